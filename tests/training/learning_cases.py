"""A small LLaMA whose FFNs have something to find: some neurons fire together, some matter more, all depend on x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ltepass

VOCAB = 61


def dense_model(*, d_ff: int = 60, layers: int = 2, seed: int = 0) -> Any:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(state)
    return model


def tokens(n: int, length: int = 21, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def transformed(target: float = 0.5, *, group_size: int = 4, **config: Any) -> Any:
    """Transformed and not calibrated."""
    settings = {"group_size": group_size, "target_sparsity": target, "grouping": "identity", **config}
    return ltepass.transform(dense_model(), config=ltepass.LTEConfig(**settings))


def calibrated(target: float = 0.5, *, group_size: int = 4, n: int = 60, **config: Any) -> Any:
    settings = {"group_size": group_size, "target_sparsity": target, **config}
    return ltepass.transform(dense_model(), config=ltepass.LTEConfig(**settings), calibration=tokens(n).split(7))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), after[name].nan_to_num()), name
