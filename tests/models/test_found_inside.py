"""Verbs find the transformed model inside what wraps it; several inside one are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import build, ids, transformed

import ltepass
from ltepass.errors import AmbiguousModelError, NotTransformedError
from ltepass.sites import routers_of, state_of
from ltepass.sparsity import measure_union
from ltepass.training.stages import begin_stage, settle
from ltepass.training.warm_start import warm_start


class Parent(nn.Module):
    """Of somebody's own, around a decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"decoder": decoder})


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def peft(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


WRAPPERS: dict[str, Any] = {
    "peft": peft,
    "peft, routers saved": lambda m: get_peft_model(
        m, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"])
    ),
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "an own parent": Parent,
    "torch.compile of peft": lambda m: torch.compile(peft(m)),
}


@pytest.mark.filterwarnings("ignore:hidden_sparsity was 0 when PEFT copied")
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_verb_finds_the_model_inside(name: str) -> None:
    model = transformed("llama")
    with one_process():
        wrapped = WRAPPERS[name](model)
        batches = [ids(3), ids(2)]
        ltepass.calibrate(wrapped, batches)
        ltepass.set_sparsity(wrapped, 0.3)
        ltepass.set_hidden_sparsity(wrapped, 0.2, batches)
        ltepass.set_input_sparsity(wrapped, 0.0, batches)
        ltepass.set_mode(wrapped, "hard")
        assert ltepass.measure_sparsity(wrapped, batches) == ltepass.measure_sparsity(model, batches)
        assert measure_union(wrapped, batches).keys() == ltepass.report(wrapped).modes.keys()
        settle(wrapped, batches, 0.4)
        warm_start(wrapped, ids(3))
        begin_stage(wrapped, "soft")
        assert set(ltepass.report(wrapped).modes.values()) == {"soft"}
        ltepass.set_mode(wrapped, "hard")
        assert ltepass.lower(wrapped) is wrapped
        assert ltepass.report(model).lowered == "ffn"
        assert ltepass.unlower(wrapped) is wrapped
        assert ltepass.remove(wrapped) is wrapped
        assert not any(routers_of(wrapped))
        with pytest.raises(NotTransformedError, match="transform"):
            ltepass.set_mode(wrapped, "hard")


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "own" not in name and "saved" not in name])
def test_transform_reaches_through_wrappers_so_that_the_model_outlives_them(name: str) -> None:
    model = build("llama")
    with one_process():
        wrapped = WRAPPERS[name](model)
        assert ltepass.transform(wrapped, config=ltepass.LTEConfig(group_size=4)) is wrapped
    assert state_of(model) is not None
    if name == "peft":
        assert ltepass.report(wrapped.merge_and_unload()).sites == ltepass.report(model).sites


def test_several_transformed_models_inside_one_are_named() -> None:
    both = nn.ModuleDict({"draft": transformed("llama"), "target": transformed("llama")})
    with pytest.raises(AmbiguousModelError, match=r"draft, target.*set_mode"):
        ltepass.set_mode(both, "hard")


def test_the_router_that_decides_is_the_active_adapters() -> None:
    """With adapters disabled it is the model's own."""
    model = transformed("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"])
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("second", config)
    batches = [ids(3)]
    ltepass.calibrate(wrapped, batches)
    ltepass.set_sparsity(wrapped, 0.7)
    first = ltepass.measure_sparsity(wrapped, batches)
    wrapped.set_adapter("second")
    ltepass.calibrate(wrapped, batches)
    ltepass.set_sparsity(wrapped, 0.2)
    assert max(ltepass.measure_sparsity(wrapped, batches).values()) < min(first.values())
    wrapped.set_adapter("default")
    assert ltepass.measure_sparsity(wrapped, batches) == first
    with wrapped.disable_adapter():
        assert ltepass.measure_sparsity(wrapped, batches) != first
