"""A draft of the model's own weights proposes what the model says, and costs no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import CalibrationError, ConfigError
from ltepass.routed.routed import routers_of
from tests.models.zoo import transformed
from tests.training.learning_cases import copied_text, trained

NEW = 16
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "linear routers": ({}, 0.8),
    "low bits": ({"router": "proxy", "group_size": 1, "inactive": "low_bit"}, 0.99),
}


def held(model: nn.Module) -> dict[int, int]:
    """Bytes by the address of each storage."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("name", MODELS)
def test_a_draft_shares_its_weights_and_changes_no_token(name: str) -> None:
    settings, sparsity = MODELS[name]
    model = trained(**settings)
    ltepass.set_mode(model, "hard")
    thresholds = [float(router.threshold) for router in routers_of(model)]
    prompts = [row[None] for row in copied_text(2, 9, length=20)]
    greedy = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    asked = [{"inputs": x, "attention_mask": torch.ones_like(x), **greedy} for x in prompts]
    expected = [model.generate(**one) for one in asked]
    draft = ltepass.draft(ltepass.lower(model), sparsity)
    assert sum(size for at, size in held(draft).items() if at not in held(model)) <= 0.01 * sum(held(model).values())
    assert all(float(a.threshold) > b for a, b in zip(routers_of(draft), thresholds, strict=True))
    assert [float(router.threshold) for router in routers_of(model)] == thresholds

    forwards = 0

    def count(*args: object) -> None:
        nonlocal forwards
        forwards += 1

    model.register_forward_pre_hook(count)
    assert all(
        torch.equal(model.generate(**one, assistant_model=draft), y) for one, y in zip(asked, expected, strict=True)
    )
    print(f"{name}: {len(asked) * NEW} tokens by {forwards} forwards of the model")
    assert forwards < len(asked) * NEW / 3


def test_a_draft_wants_a_table_and_a_share() -> None:
    with pytest.raises(CalibrationError, match="no calibrated sparsity table"):
        ltepass.draft(transformed("llama"), 0.8)
    with pytest.raises(ConfigError, match="sparsity"):
        ltepass.draft(transformed("llama"), 1.0)
