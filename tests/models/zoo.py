"""Tiny random models of the styles that the tests name, and small helpers. Odd sizes on purpose."""

# No future annotations: torch.fx cannot pickle a graph whose annotations are strings.
import copy
import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, Self, TypeVar, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import ltepass
from ltepass.config import Mode, RouterKind
from ltepass.routed.routed import routers_of

VOCAB = 61
P = ParamSpec("P")
T = TypeVar("T")


def _sizes(layers: int, more: dict[str, Any], width: str = "intermediate_size") -> dict[str, Any]:
    """more: whatever of the configuration a test wants otherwise; width: the name that d_ff has there."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": 3, width: 60}
    return {**sizes, **more}


def llama(layers: int = 2, **more: Any) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(layers, more)))


def gpt2(layers: int = 2, **more: Any) -> hf.PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": layers, "n_head": 3, "n_inner": 60}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **more}))


def opt(layers: int = 2, **more: Any) -> hf.PreTrainedModel:
    sizes = _sizes(layers, {"word_embed_proj_dim": 24, "max_position_embeddings": 64, **more}, "ffn_dim")
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes))


def phi3(layers: int = 2, **more: Any) -> hf.PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**_sizes(layers, {**special, **more})))


def gpt_neox(layers: int = 2, **more: Any) -> hf.PreTrainedModel:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_sizes(layers, more)))


def t5() -> hf.PreTrainedModel:
    """An encoder-decoder, of a layer each: not among ALL, whose models take token ids alone."""
    sizes = {"vocab_size": VOCAB, "d_model": 24, "d_ff": 60, "d_kv": 6, "num_layers": 1, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


class Own(nn.Module):
    """A decoder-like module that is no Hugging Face model: one FFN in a Sequential, one in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.block = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 24))
        self.w1, self.w3, self.w2 = nn.Linear(24, 40, bias=False), nn.Linear(24, 40), nn.Linear(40, 24)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(24, VOCAB)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        x = x + self.block(x)
        return self.head(x + self.drop(self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))))


HF: dict[str, Callable[..., nn.Module]] = {"llama": llama, "gpt2": gpt2, "opt": opt, "phi3": phi3, "gpt_neox": gpt_neox}
GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "own": Own,
    "symbolic_trace": lambda: torch.fx.symbolic_trace(Own().eval()),
    "export": lambda: torch.export.export(Own().eval(), (ids(),)).module(),
}
ALL = {**HF, **GRAPHS}


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def build(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = ALL[name](**kwargs)
    return model if name == "export" else model.eval()


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """As `make`, with a copy of what it first made of these arguments: transform traces for a second, a copy takes a
    hundredth of it. It is made of seed 0, and torch's random state stays as it is.
    """
    prototype: Callable[P, T] = cache(make)  # type: ignore[assignment]  # arguments that have a hash

    @wraps(make)
    def copy_of(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return copy.deepcopy(prototype(*args, **kwargs))

    return copy_of


@made_once
def _transformed(name: str, grouping: str, router: RouterKind, **kwargs: Any) -> nn.Module:
    model = build(name, **kwargs)
    example = None if name in HF else ids()
    config = ltepass.LTEConfig(group_size=4, grouping=grouping, router=router, seed=3)
    return ltepass.transform(model, example, config)


def transformed(
    name: str, mode: Mode = "hard", grouping: str = "identity", router: RouterKind = "linear", **kwargs: Any
) -> nn.Module:
    model = _transformed(name, grouping, router, **kwargs)
    for made in routers_of(model):
        made.mode = mode
    return model


def logits(model: Callable[..., Any], x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out = model(ids() if x is None else x)
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


def fresh_dynamo(monkeypatch: pytest.MonkeyPatch, *, inductor: bool) -> None:
    """Nothing is compiled yet. Without inductor, which takes a minute, Dynamo traces, our backend lowers, and the graph
    runs as it is.
    """
    torch._dynamo.reset()
    if not inductor:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: gm.forward)


def generate(model: hf.PreTrainedModel, x: Tensor, new: int, **how: Any) -> Tensor:
    """x and `new` tokens after it, greedily."""
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    tokens: Tensor = model.generate(x, **lengths, do_sample=False, pad_token_id=0, **how)
    return tokens


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, of llama or opt."""
    (found,) = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return found


def mlp(model: nn.Module, layer: int) -> nn.Module:
    """Of llama."""
    return layers(model)[layer].get_submodule("mlp")


class Graphs(logging.Handler):
    """What the backend said of each graph that it compiled: (gates, regions lowered), and every reason it gave."""

    def __enter__(self) -> Self:
        self.clear()
        self.log, self.before = logging.getLogger("ltepass"), logging.getLogger("ltepass").level
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.log.removeHandler(self)
        self.log.setLevel(self.before)

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("lte backend"):
            gates, lowered, lines = cast(tuple[int, int, str], record.args)
            self.seen.append((gates, lowered))
            self.reasons += [lines] if lines else []

    def clear(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.reasons: list[str] = []


class CountOp:
    """Counts calls of ltepass::routed_ffn, eager or from inductor's code, as the profiler sees them.

    Eager calls that nothing can ask for a gradient of have the name of the op without an autograd rule.
    """

    NAMES = ("ltepass::routed_ffn", "ltepass::_routed_ffn_no_grad")

    def __enter__(self) -> Self:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._profile.__exit__(*exc)
        rows = self._profile.key_averages()
        self.calls = sum(r.count for r in rows if r.key in self.NAMES)
