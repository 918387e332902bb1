"""The demo's stages in order. Each returns what results.json keeps of it; what is large lies beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import ltepass
from ltepass.demo import reload, training_loop
from ltepass.demo.options import DemoOptions
from ltepass.demo.plain_formats import plain_formats
from ltepass.demo.results import (
    Calibrated,
    Dense,
    Folder,
    Generated,
    Losses,
    OnText,
    Prepared,
    Quality,
    Reloaded,
    Speed,
    Trained,
    TunedDense,
)
from ltepass.demo.task import Task, load_dense, load_task
from ltepass.measure.quality import logits_on_cpu, perplexity, ratio_of_perplexities, token_losses
from ltepass.measure.sparsity import counting_inactive, sparsity_of_tail
from ltepass.measure.timing import summary, time_decoding, without_ffns
from ltepass.measure.token_bytes import router_share
from ltepass.routed.routed import Routed, routers_of
from ltepass.training.stages import settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PROMPT_TOKENS = 64  # of held-out text in the KV cache before the first timed token
TIMED_TOKENS = 160
DOMAIN = "Python reference"  # what is trained on
COMPILE_MODE = "eager on both sides (no torch.compile)"


@dataclass
class Demo:
    """One run: what was asked, where it keeps its results, and the task, loaded when a stage first needs it."""

    options: DemoOptions
    folder: Folder
    console: Console = field(default_factory=Console)

    @cached_property
    def task(self) -> Task:
        return load_task(self.options.model)

    @property
    def steps(self) -> int:
        return self.options.steps or self.task.steps

    def base_model(self) -> PreTrainedModel:
        """The dense model as it came."""
        return load_dense(self.options.model, self.folder.path, self.options.seed).to(self.options.device)

    def saved_model(self, name: str) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder.path / name).to(self.options.device).eval()

    def tune(self, model: PreTrainedModel, what: str, state_file: str) -> Losses:
        steps = self.batches()
        with training_loop.progress_bar(self.console, what, len(steps)) as on_step, self.ctrl_c() as asked:
            return training_loop.tune(model, steps, self.folder.path / state_file, on_step, asked)

    def ctrl_c(self) -> AbstractContextManager[Callable[[], bool]]:
        return training_loop.ctrl_c_between_steps(lambda text: self.console.print(text, markup=False))

    def batches(self) -> list[Tensor]:
        """The training batches, the same for the dense and the LTE model."""
        task = self.task
        return list(training_loop.batches(task.train, task.batch, self.steps, self.options.seed))


def prepare(demo: Demo) -> Prepared:
    model = demo.base_model()
    task = demo.task
    return {
        "name": task.name,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "train_blocks": len(task.train),
        "test": task.test_text,
        "steps": demo.steps,
    }


def dense(demo: Demo) -> Dense:
    return {"perplexity": perplexity(demo.base_model(), demo.task.test)}


def tune_dense(demo: Demo) -> TunedDense:
    """The baseline that LTE is compared with: it sees the same tokens, so that new text is not counted as a gain."""
    model = demo.base_model()
    losses = demo.tune(model, "dense fine-tuning", "dense-training.pt")
    model.save_pretrained(demo.folder.path / "dense")
    return {
        "perplexity": perplexity(model, demo.task.test),
        "tokens": sum(batch.numel() for batch in demo.batches()),
        "losses": losses,
    }


def calibrate(demo: Demo) -> Calibrated:
    """Passes of transform, then grouping, router start and sparsity table from training text.

    Linear routers are fitted to the model as it came, and trained; a proxy needs no training, and takes the tuned one.
    """
    options, task = demo.options, demo.task
    linear = options.router == "linear"
    model = demo.base_model() if linear else demo.saved_model("dense")
    config = ltepass.LTEConfig(
        router=options.router,
        group_size=task.group_size if linear else "auto",
        target_sparsity=options.target_sparsity,
        seed=options.seed,
    )
    blocks = task.train[: task.calibration_blocks].to(model.device)
    ltepass.transform(model, config=config, calibration=torch.split(blocks, task.batch))
    ltepass.set_mode(model, "hard")
    model.save_pretrained(demo.folder.path / "calibrated")
    report = ltepass.report(model)
    demo.console.print(
        f"    {len(report.sites)} FFN sites, {len(report.refusals)} other linears refused; "
        f"`ltepass report {demo.folder.path}/calibrated` says why",
        markup=False,
        highlight=False,
    )
    return {
        "sites": len(report.sites),
        "group_size": report.sites[0].group_size,
        "grouping": report.grouping,
        "tokens": blocks.numel(),
        "perplexity": perplexity(model, task.test),
    }


def train(demo: Demo) -> Trained:
    """Hard stage (paper section 4.3): routers frozen, everything else trained on the task loss; then thresholds settle.

    Under a proxy nothing is left to train: its model has seen the same tokens before.
    """
    model = demo.saved_model("calibrated")
    losses: dict[str, Losses] = {}
    if demo.options.router == "linear":
        for router in routers_of(model):
            router.requires_grad_(False)
        losses["LTE, hard stage"] = demo.tune(model, "LTE training", "lte-training.pt")
    blocks = demo.task.train[: demo.task.calibration_blocks // 2].to(model.device)
    settle(model, torch.split(blocks, demo.task.batch), demo.options.target_sparsity)
    ids = demo.task.test[:1, :128]
    reference = {"ids": ids, "logits": logits_on_cpu(model, ids)}
    save_file(reference, demo.folder.path / "reference.safetensors")
    model.save_pretrained(demo.folder.path / "lte")
    demo.task.tokenizer.save_pretrained(demo.folder.path / "lte")
    return {"losses": losses}


def quality(demo: Demo) -> Quality:
    """From the saved checkpoint, in hard mode, as the definition has it (eager, masked dense)."""
    dense, model = demo.saved_model("dense"), demo.saved_model("lte")
    rivals = (dense, demo.base_model())
    kinds = {DOMAIN: demo.task.test, **demo.task.others}
    seen = {kind: on_text(model, rivals, blocks) for kind, blocks in kinds.items()}
    return {
        "perplexity": seen[DOMAIN][0]["perplexity"],
        "sparsity": seen[DOMAIN][1],
        "texts": {kind: found for kind, (found, _) in seen.items()},
        "plain": plain_formats(dense, demo.task.test),
    }


def measure_speed(demo: Demo) -> Speed:
    """Time per token of the same checkpoints as in `quality`; p is measured on the very tokens that are timed."""
    plain, routed = demo.saved_model("dense"), demo.saved_model("lte")
    sites = ltepass.report(routed).sites
    text = demo.task.test.flatten()[: PROMPT_TOKENS + TIMED_TOKENS].to(demo.options.device)
    active = 1 - sparsity_of_tail(routed, text, PROMPT_TOKENS)
    ltepass.lower(routed, scope="ffn")
    sides = {"dense": plain, "lowered": routed, "bare": without_ffns(plain, sites)}
    times = time_decoding(sides, text[:PROMPT_TOKENS], text[PROMPT_TOKENS:])
    return {
        **summary(times, active, router_share(routed, sites)),
        "compile_mode": COMPILE_MODE,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "notes": ltepass.report(routed).notes,
        "ms": {name: [round(1000 * value, 3) for value in values] for name, values in times.items()},
    }


def generate(demo: Demo) -> Generated:
    """Greedy continuations of one prompt."""
    task = demo.task
    ids = torch.tensor(task.tokenizer(task.prompt)["input_ids"])[None].to(demo.options.device)
    dense, routed = demo.saved_model("dense"), demo.saved_model("lte")
    ltepass.lower(routed, scope="ffn")

    def continued(model: PreTrainedModel) -> str:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.new_tokens, do_sample=False)
        return task.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return {"prompt": task.prompt, "dense": continued(dense), "lowered": continued(routed)}


def reload_elsewhere(demo: Demo) -> Reloaded:
    """A new process loads the saved model; its logits must be those of the model that was trained here, bit by bit."""
    path = demo.folder.path
    return reload.compare(
        path / "lte", path / "reference.safetensors", path / "reloaded.safetensors", demo.options.device
    )


def on_text(
    model: PreTrainedModel, rivals: Sequence[PreTrainedModel], blocks: Tensor
) -> tuple[OnText, dict[str, float]]:
    """(figures, sparsity by site name) of a transformed model in hard mode, over the dense model that is best on blocks
    [n, T] int64: tuned on another kind of text, it may be worse than as it came."""
    with counting_inactive(Routed.trained(model, "on_text")) as shares:
        losses = token_losses(model, blocks)
    dense = min((token_losses(rival, blocks) for rival in rivals), key=lambda found: float(found.mean()))
    ratio, sparsity = ratio_of_perplexities(losses, dense), shares()
    found: OnText = {
        "tokens": blocks.numel(),
        "perplexity": math.exp(float(losses.mean())),
        "dense": math.exp(float(dense.mean())),
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "sparsity": sum(sparsity.values()) / len(sparsity),
    }
    return found, sparsity
