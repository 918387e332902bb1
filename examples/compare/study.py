"""One harness for every comparison: models, texts, budgets, training, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ltepass
from ltepass.config import Budget as BudgetName
from ltepass.config import RouterKind
from ltepass.corpora import corpora, token_blocks
from ltepass.routed.routed import Routed
from ltepass.sparsity.thresholds import move_biases

HELD_OUT = 12  # blocks
MOST_CHARACTERS = 12  # of a token, on average
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
    settle thresholds on, that nothing trains on; test by text; measured: more blocks of the same texts and
    of others, outside the training domain, for intervals."""

    train: Tensor
    held_out: Tensor
    test: dict[str, Tensor]
    tokenizer: Any
    measured: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outside(self) -> set[str]:
        return {*self.measured} - {*self.test}


def load_data(budget: Budget, folder: Path | None, tokenizer: Any, seed: int, blocks: int = 0) -> Data:
    """Test blocks are the same for every seed; `measured` begins with them and has up to `blocks`, if there is text."""
    wanted = budget.steps * budget.batch
    chars = 8 if budget.model == "smollm2" else 1  # a token has about 4 characters; code fewer
    each = -(-wanted // 3) + 8
    most = max(budget.test, blocks)
    texts = corpora(folder, chars * each * budget.length, chars * most * budget.test_length)
    train = torch.cat([token_blocks(tokenizer, a, budget.length) for a, _ in texts.values()])
    measured = {n: token_blocks(tokenizer, b, budget.test_length, limit=most) for n, (_, b) in texts.items()}
    test = {name: found[: budget.test] for name, found in measured.items()}
    if len(train) < wanted + HELD_OUT or any(len(blocks) < budget.test for blocks in test.values()):
        raise ValueError(
            f"the texts give {len(train)} training blocks and {min(map(len, test.values()))} test blocks; expected "
            f"{wanted + HELD_OUT} and {budget.test}; use longer texts or a smaller preset"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Data(train[order[:wanted]], train[order[wanted : wanted + HELD_OUT]], test, tokenizer, measured)


def load_others(budget: Budget, texts: Mapping[str, str], tokenizer: Any, blocks: int) -> dict[str, Tensor]:
    """Test blocks of texts outside the training domain. Raises ValueError where one has none."""
    room = MOST_CHARACTERS * blocks * budget.test_length
    found = {n: token_blocks(tokenizer, text[:room], budget.test_length, blocks) for n, text in texts.items()}
    short = [name for name, rows in found.items() if not len(rows)]
    if short:
        raise ValueError(f"{', '.join(short)}: shorter than a block of {budget.test_length} tokens; use longer texts")
    return found


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How LTE uses the budget: soft_share of the steps in the soft stage; warm: the layer-wise warm start; rate: its
    learning rate over the budget's; start: share of the calibration blocks that it starts from; oracle: no routers, but
    the experts that turn out to have most energy, what better routers could reach at best; tuned_teacher: `distill`
    learns from the dense model tuned on the same tokens, and not from the model as it came."""

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
    tuned_teacher: bool = False


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
