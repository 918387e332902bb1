"""`torch.set_default_dtype` and `set_default_device` are the user's: no number of ours depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.measure.sparsity import measure_union
from ltepass.passes.group.balanced_kmeans import WHOLE_GRAM, balanced_kmeans
from ltepass.routed.routed import router_of, routers_of
from ltepass.training.auxiliary_loss import take_auxiliary
from ltepass.training.stages import begin_stage, settle

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@contextmanager
def default(what: torch.dtype | torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(what if isinstance(what, torch.dtype) else before)
    try:
        with what if isinstance(what, torch.device) else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@cache
def results(
    dtype: torch.dtype, by_default: torch.dtype | torch.device, settings: tuple[tuple[str, Any], ...]
) -> dict[str, Tensor]:
    """All that calibrating, settling, cutting and measuring give."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()
    batches = [torch.randint(0, 61, (4, 32)) for _ in range(3)]
    found: dict[str, Tensor] = {}
    with default(by_default):
        config = ltepass.LTEConfig(group_size=4, **dict(settings))
        ltepass.transform(model, config=config)
        found |= {f"start {i}": router.weight.detach().clone() for i, router in enumerate(routers_of(model))}
        ltepass.calibrate(model, batches, inputs="hard")
        ltepass.set_hidden_sparsity(model, 0.3, batches)
        found |= {f"settled {k}": number(v) for k, v in settle(model, batches, 0.4).items()}
        ltepass.set_sparsity(model, 0.6)
        shares = ltepass.measure_sparsity(model, batches) | measure_union(model, batches)
        found |= {f"share {k}": number(v) for k, v in shares.items()}
        if dtype is torch.float32:
            errors = warm_start(model, batches[0])
            found |= {f"error {k}": number(v) for k, v in errors.items()}
        begin_stage(model, "soft")
        model(batches[0])
        aux = take_auxiliary(model, None)
        found |= {name: getattr(aux, name).detach() for name in aux.__dataclass_fields__}
    return found | {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("settings", [(("budget", "model"),), (("grouping", "kmeans"), ("router_bias", False))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_default", [d for d in DTYPES if d is not torch.float32])
def test_routers_and_measures_are_those_of_the_fp32_default(
    by_default: torch.dtype, dtype: torch.dtype, settings: tuple[tuple[str, Any], ...]
) -> None:
    expected, found = results(dtype, torch.float32, settings), results(dtype, by_default, settings)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize("settings", [(("budget", "model"),), (("grouping", "kmeans"),), (("router", "proxy"),)])
def test_no_tensor_of_ours_goes_where_the_default_device_is(settings: tuple[tuple[str, Any], ...]) -> None:
    """Scripts set "cuda" for the process. Here "meta" stands for it, where nothing can be read."""
    expected = results(torch.float32, torch.float32, settings)
    found = results(torch.float32, torch.device("meta"), settings)
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize("by_default", [torch.bfloat16, torch.float64])
def test_groups_of_many_neurons_do_not_depend_on_it(by_default: torch.dtype) -> None:
    """More than have all their products kept: their projection is random."""
    points = torch.randn(WHOLE_GRAM + 64, 300)
    expected = balanced_kmeans(points, 520, seed=0, lloyd=1, rounds=1)
    with default(by_default):
        assert torch.equal(balanced_kmeans(points, 520, seed=0, lloyd=1, rounds=1), expected)


def test_a_checkpoint_written_under_one_default_computes_the_same_under_another(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = torch.randint(0, 61, (4, 32))
    with default(torch.float64):
        ltepass.transform(model, config=ltepass.LTEConfig(group_size=4), calibration=[ids])
        ltepass.set_mode(model, "hard")
        model.save_pretrained(tmp_path)
    expected = model(ids).logits
    with default(torch.bfloat16):
        again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        ltepass.set_mode(again, "hard")
        torch.testing.assert_close(again(ids).logits, expected)
        for site in again._lte.sites:
            assert router_of(again, site).threshold.dtype == torch.float32
