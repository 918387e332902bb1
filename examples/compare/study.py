"""One harness for every comparison: models, texts, budgets, training, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

import ltepass
from examples.compare import models
from examples.compare.rule_hooks import Ruled
from ltepass.calibration.warm_start import warm_start
from ltepass.config import Budget as BudgetName
from ltepass.config import RouterKind
from ltepass.measure.quality import perplexity
from ltepass.measure.text_blocks import corpora, token_blocks
from ltepass.measure.token_bytes import router_share
from ltepass.routed.routed import Routed
from ltepass.routed.sites import router_of
from ltepass.sparsity.thresholds import move_biases, set_sparsity, update_table
from ltepass.training.settings import LTESettings
from ltepass.training.trainer import LTETrainerMixin

HELD_OUT = 12  # blocks
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets: steps x batch x length training tokens, and of each text `test` blocks to measure on."""

    model: str
    steps: int
    batch: int
    length: int
    learning_rate: float
    test: int
    test_length: int
    calibration: int  # training blocks that routers and the warm start are fitted on, before training
    group_size: int
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length


@dataclass(frozen=True)
class Data:
    """train: [steps * batch, length] blocks of all texts in a seed's order, none of them twice; held_out: some more, to
    settle thresholds on, that nothing trains on; test by text."""

    train: Tensor
    held_out: Tensor
    test: dict[str, Tensor]
    tokenizer: Any


def load_data(budget: Budget, folder: Path | None, tokenizer: Any, seed: int) -> Data:
    """Test blocks are the same for every seed."""
    wanted = budget.steps * budget.batch
    chars = 8 if budget.model == "smollm2" else 1  # a token has about 4 characters; code fewer
    each = -(-wanted // 3) + 8
    texts = corpora(folder, chars * each * budget.length, chars * budget.test * budget.test_length)
    train = torch.cat([token_blocks(tokenizer, a, budget.length) for a, _ in texts.values()])
    test = {n: token_blocks(tokenizer, b, budget.test_length, limit=budget.test) for n, (_, b) in texts.items()}
    if len(train) < wanted + HELD_OUT or any(len(blocks) < budget.test for blocks in test.values()):
        raise ValueError(
            f"the texts give {len(train)} training blocks and {min(map(len, test.values()))} test blocks; expected "
            f"{wanted + HELD_OUT} and {budget.test}; use longer texts or a smaller preset"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Data(train[order[:wanted]], train[order[wanted : wanted + HELD_OUT]], test, tokenizer)


class InOrder:
    """A Trainer that takes the blocks as they come: every method sees the same tokens in the same order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class DenseTrainer(InOrder, Trainer):  # type: ignore[misc]
    ruled: Ruled | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        out = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        extra = self.ruled.extra_loss() if self.ruled is not None and model.training else None
        if extra is None:
            return out
        return (out[0] + extra, out[1]) if return_outputs else out + extra


class RoutedTrainer(InOrder, LTETrainerMixin, Trainer):  # type: ignore[misc]
    """LTE on the same loop."""


def arguments(budget: Budget, folder: Path, seed: int, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=budget.batch,
        learning_rate=budget.learning_rate,
        adam_beta2=0.95,
        weight_decay=0.0,
        warmup_steps=max(1, round(0.06 * steps)),
        lr_scheduler_type="linear",
        bf16=budget.dtype == "bfloat16",
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, steps // 8),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def examples(blocks: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": block, "labels": block} for block in blocks]


def freeze_embeddings(model: Any) -> None:
    """A tenth of a step's time, and rare tokens learn nothing from so little text. For every method alike."""
    model.get_input_embeddings().weight.requires_grad_(False)


def tune_dense(
    model: Any, data: Data, budget: Budget, folder: Path, seed: int, ruled: Ruled | None = None
) -> list[Any]:
    """Plain fine-tuning, under rules where there are any; returns the log. Raises ValueError where gradients overflow:
    clipping would turn them into zeros, and the row would show a model that never learned."""
    freeze_embeddings(model)
    args = arguments(budget, folder, seed, budget.steps)
    trainer = DenseTrainer(model=model, args=args, train_dataset=examples(data.train))
    trainer.ruled = ruled
    trainer.train()
    model.eval()
    log = list(trainer.state.log_history)
    norms = [row["grad_norm"] for row in log if "grad_norm" in row]
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"gradient norms were {norms}; expected finite ones; look at the rule's scale of scores")
    return log


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How LTE uses the budget: soft_share of the steps in the soft stage; warm: the layer-wise warm start; rate: its
    learning rate over the budget's; start: share of the calibration blocks that it starts from; oracle: no routers, but
    the experts that turn out to have most energy, what better routers could reach at best."""

    name: str = "lte"
    soft_share: float = 0.0
    warm: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    grouping: str = "output_aware"
    budget: BudgetName = "layer"
    group_size: int | None = None
    router: RouterKind = "linear"
    random_routers: bool = False
    rate: float = 1.0
    start: float = 1.0
    oracle: bool = False


def calibration_blocks(data: Data, budget: Budget, share: float = 1.0) -> Tensor:
    """The first training blocks: nothing is seen that the others do not see."""
    return data.train[: round(share * budget.calibration)]


def group_size(budget: Budget, recipe: Recipe) -> int:
    """Neurons an expert: the budget's for linear routers, single ones for proxies, unless the recipe says."""
    return recipe.group_size or (budget.group_size if recipe.router == "linear" else 1)


def transform(model: Any, data: Data, budget: Budget, sparsity: float, recipe: Recipe, seed: int) -> Any:
    config = ltepass.LTEConfig(
        group_size=group_size(budget, recipe),
        router=recipe.router,
        target_sparsity=sparsity,
        grouping=recipe.grouping,
        budget=recipe.budget,
        seed=seed,
    )
    batches = torch.split(calibration_blocks(data, budget, recipe.start).to(model.device), budget.batch)
    return ltepass.transform(model, config=config, calibration=batches)


def retarget(model: Any, sparsity: float) -> Any:
    """A model calibrated on dense inputs, as if for another sparsity: only thresholds depend on it."""
    routed = Routed.trained(model, "retarget")
    routed.config["target_sparsity"] = sparsity
    move_biases(routed, sparsity)
    return model


def tune_lte(
    model: Any, data: Data, budget: Budget, folder: Path, seed: int, *, recipe: Recipe, cuts: Any = None
) -> tuple[Any, list[Any]]:
    """Train a calibrated model with this recipe to its target; returns (model in hard mode, log).

    cuts: `cuts.Cuts`, what active experts leave out from the first step on.
    """
    blocks = calibration_blocks(data, budget, recipe.start).to(model.device)
    if recipe.random_routers:
        forget_routers(model, blocks, seed)
    if recipe.warm:
        warm_start(model, blocks)
    freeze_embeddings(model)
    held_out = data.held_out.to(model.device)
    if cuts is not None:
        cuts.apply(model, torch.split(held_out, budget.batch))
    log = run_stages(model, examples(data.train), examples(held_out), budget, folder, seed, recipe)
    return model, log


def run_stages(
    model: Any, rows: list[Any], held_out: list[Any], budget: Budget, folder: Path, seed: int, recipe: Recipe
) -> list[Any]:
    """Both stages, each on its own share of the rows, so that none is seen twice; thresholds settle on `held_out`;
    returns the log."""
    budget = replace(budget, learning_rate=recipe.rate * budget.learning_rate)
    soft = round(recipe.soft_share * budget.steps)
    cut = soft * budget.batch
    log: list[Any] = []
    for stage, steps, part in (("soft", soft, rows[:cut]), ("hard", budget.steps - soft, rows[cut:])):
        if steps:
            soft_steps, hard_steps = (steps, 0) if stage == "soft" else (0, steps)
            lte = replace(LTESettings(**recipe.settings), soft_steps=soft_steps, hard_steps=hard_steps)
            args = arguments(budget, folder, seed, steps)
            trainer = RoutedTrainer(model=model, args=args, train_dataset=part, eval_dataset=held_out, lte=lte)
            trainer.fit()
            log += trainer.state.log_history
    ltepass.set_mode(model, "hard")
    model.eval()
    return log


def forget_routers(model: nn.Module, blocks: Tensor, seed: int) -> None:
    """Random routers with thresholds at the target: what the calibrated start is compared with."""
    generator = torch.Generator().manual_seed(seed)
    routed = Routed.trained(model, "forget_routers")
    for router in routed.all_routers():
        permutation = router.permutation.clone()
        router.reset(generator)
        router.permutation.copy_(permutation)
    ltepass.set_mode(model, "hard")
    update_table(routed, [blocks])
    set_sparsity(model, routed.config["target_sparsity"])


class Workshop:
    """Where a command keeps its models, and what it has loaded.

    name: of the preset, in the folders' names. texts: folder of *.txt files, None for text that ships with Python.
    """

    def __init__(self, name: str, budget: Budget, texts: Path | None, work: Path) -> None:
        self.name, self.budget, self.texts, self.work = name, budget, texts, work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = models.tokenizer(budget.model)
        self._data: dict[int, Data] = {}

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            self._data[seed] = load_data(self.budget, self.texts, self.tokenizer, seed)
        return self._data[seed]

    def base(self) -> Any:
        """The model as it came."""
        return models.load(self.budget.model, self.work, self.data(0).train).to(DEVICE)

    def tuned(self, seed: int) -> Any:
        """The dense model fine-tuned on the same tokens; trained once for each seed."""
        folder = self.work / f"dense-{self.name}-{seed}"
        if not (folder / "config.json").exists():
            model = self.base()
            tune_dense(model, self.data(seed), self.budget, folder / "log", seed)
            model.save_pretrained(folder)
        return models.load(str(folder), self.work).to(DEVICE)


def perplexities(model: Any, test: dict[str, Tensor]) -> dict[str, float]:
    return {name: perplexity(model, blocks) for name, blocks in test.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


Measured = tuple[dict[str, float], dict[str, float], dict[str, float]]  # perplexity, FFN sparsity, bytes share by text


def measure_rule(ruled: Ruled, test: dict[str, Tensor]) -> Measured:
    ppl, sparsity, read = {}, {}, {}
    ruled.model.eval()
    with ruled:
        for name, blocks in test.items():
            ruled.reset()
            ppl[name] = perplexity(ruled.model, blocks)
            sparsity[name], read[name] = ruled.measured()
    return ppl, sparsity, read


@torch.no_grad()
def measure_lte(model: Any, test: dict[str, Tensor]) -> Measured:
    own = router_share(model, model._lte.sites)
    routers = [router_of(model, site) for site in model._lte.sites]
    ppl, sparsity = {}, {}
    for name, blocks in test.items():
        shares: list[Tensor] = []
        handles = [r.register_forward_hook(_keep_share(shares)) for r in routers]
        ppl[name] = perplexity(model, blocks)
        for handle in handles:
            handle.remove()
        sparsity[name] = float(torch.stack(shares).mean())
    return ppl, sparsity, {n: 1.0 - s + own for n, s in sparsity.items()}


def _keep_share(shares: list[Tensor]) -> Any:
    return lambda router, args, logits: shares.append((logits <= router.threshold).float().mean())
