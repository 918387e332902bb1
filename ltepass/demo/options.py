"""What the demo is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from ltepass.config import ROUTERS, RouterKind, check_sparsity
from ltepass.errors import ConfigError


class Options(TypedDict):
    """`DemoOptions` as JSON."""

    model: str
    target_sparsity: float
    steps: int | None
    router: str
    seed: int
    device: str


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `ltepass demo` may be asked. steps: optimizer steps of each training; None takes the default."""

    model: Literal["smollm2", "tiny"] = "smollm2"
    target_sparsity: float = 0.5
    steps: int | None = None
    router: RouterKind = "proxy"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity, "--target-sparsity")
        if self.model not in MODELS:
            raise ConfigError(f"--model is {self.model!r}; expected one of {', '.join(MODELS)}")
        if self.router not in ROUTERS:
            raise ConfigError(f"--router is {self.router!r}; expected one of {', '.join(ROUTERS)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}; expected at least 1")


MODELS = ("smollm2", "tiny")


def command_line(options: Options) -> str:
    """The command line that repeats this run."""
    words = ["ltepass demo"]
    if options["model"] != "smollm2":
        words.append(f"--model {options['model']}")
    if options["steps"] is not None:
        words.append(f"--steps {options['steps']}")
    if options.get("router", "linear") == "linear":  # older results have no such key
        words.append("--router linear")
    return " ".join([*words, f"--target-sparsity {options['target_sparsity']} --seed {options['seed']}"])
