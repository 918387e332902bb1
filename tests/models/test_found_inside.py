"""Verbs find the transformed model inside what wraps it; several inside one are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import TrainingArguments

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.errors import AmbiguousModelError, NotTransformedError, ShardedError
from ltepass.measure.sparsity import measure_union
from ltepass.routed.routed import routers_of, state_of
from ltepass.training.stages import begin_stage, settle
from tests.models.zoo import build, ids, layers, logits, transformed


class Parent(nn.Module):
    """Of somebody's own, around a decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"decoder": decoder})


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def peft(model: nn.Module) -> PeftModel:
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
        adapted: PeftModel = wrapped
        assert ltepass.report(adapted.merge_and_unload()).sites == ltepass.report(model).sites


def in_one(model: nn.Module, **how: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **how)


def cut(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


SHARDED: dict[str, Any] = {
    "FSDP1": lambda m: in_one(m, use_orig_params=True),
    "FSDP1, flat": in_one,
    "FSDP1, layers": lambda m: in_one(m, auto_wrap_policy=ModuleWrapPolicy({type(m.model.layers[0])})),
    "fully_shard": cut,
}
WHOLE: dict[str, Any] = {
    "calibrate": lambda m: ltepass.calibrate(m, [ids(3)]),
    "warm_start": lambda m: warm_start(m, ids(3)),
    "lower": ltepass.lower,
    "remove": ltepass.remove,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_does_what_needs_no_whole_weights_and_refuses_the_rest(name: str) -> None:
    model, batches = transformed("llama"), [ids(3), ids(2)]
    ltepass.calibrate(model, batches)
    ltepass.set_mode(model, "hard")
    shares = ltepass.measure_sparsity(model, batches)
    with one_process():
        wrapped = SHARDED[name](model)
        expected = logits(wrapped)
        assert ltepass.measure_sparsity(wrapped, batches) == shares
        for what, verb in WHOLE.items():
            with pytest.raises(ShardedError, match=f"{what} expects whole"):
                verb(wrapped)
        with pytest.raises(ShardedError, match=r"LTETrainer, unless .*DistributedConfig.* expects whole"):
            ltepass.LTETrainer(wrapped, TrainingArguments(use_cpu=True, report_to=[]))
        assert torch.equal(logits(wrapped), expected)
        ltepass.set_sparsity(wrapped, 0.3)
        ltepass.set_hidden_sparsity(wrapped, 0.2, batches)
        settle(wrapped, batches, 0.4)
        assert set(ltepass.report(wrapped).modes.values()) == {"hard"}
        if "FSDP1" in name and name != "FSDP1":
            with pytest.raises(ShardedError, match="stage"):
                begin_stage(wrapped, "soft")
        else:
            begin_stage(wrapped, "soft")
            wrapped.train()(ids())[0].float().square().mean().backward()
            assert all(router.weight.grad is not None for router in routers_of(wrapped))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", SHARDED)
def test_a_dense_model_that_is_sharded_already_is_refused_and_runs_on(name: str, tmp_path: Path) -> None:
    with one_process():
        wrapped = SHARDED[name](build("llama"))
        expected = logits(wrapped)
        with pytest.raises(ShardedError, match="transform expects whole"):
            ltepass.transform(wrapped, config=ltepass.LTEConfig(group_size=4))
        with pytest.raises(ShardedError, match="load expects whole"):
            ltepass.load(wrapped, tmp_path)
        assert torch.equal(logits(wrapped), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_lowered_model_that_is_wrapped_by_fsdp_stays_lowered(tmp_path: Path) -> None:
    model = ltepass.lower(transformed("llama"))
    expected = logits(model)
    with one_process():
        wrapped = in_one(model)
        for verb in (ltepass.unlower, lambda m: ltepass.save(m, tmp_path)):
            with pytest.raises(ShardedError, match="whole"):
                verb(wrapped)
        assert torch.allclose(logits(wrapped), expected, atol=1e-5)


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
