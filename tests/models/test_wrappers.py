"""What other libraries do to a transformed model: adapters, offload, replicas. Right, or an error with a way out."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import ltepass
from ltepass.errors import DisplacedHookError, LoweredError, LoweringError, NoFFNFoundError
from ltepass.routed.routed import routers_of
from ltepass.routed.router import Router
from tests.models.zoo import build, ids, layers, logits, transformed
from tests.typed import grad

LINEARS = {"llama": ["gate_proj", "up_proj", "down_proj"], "opt": ["fc1", "fc2"]}


def lora(model: nn.Module, name: str) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=LINEARS[name], modules_to_save=["router"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", LINEARS)
def test_lora_after_transform_equals_its_merged_model(name: str) -> None:
    base = logits(transformed(name))
    model = lora(transformed(name), name)
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(logits(merged), adapted, atol=1e-5)
    # the oracle: the merged weights in a model transformed afresh, with the same routers
    fresh = transformed(name)
    fresh.load_state_dict({k: merged.state_dict()[k] for k in fresh.state_dict()})
    assert torch.allclose(logits(fresh), adapted, atol=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_the_saved_copy_of_a_router_is_the_one_that_decides_and_learns(name: str) -> None:
    model = lora(transformed(name, mode="soft"), name)
    model.train()
    model(ids())[0].float().square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if "router" in n and p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("name", LINEARS)
def test_lora_before_transform_is_refused_with_the_reason(name: str) -> None:
    model = get_peft_model(build(name), LoraConfig(r=3, target_modules=LINEARS[name]))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NoFFNFoundError, match="different inputs"):
        ltepass.transform(model)
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", LINEARS)
def test_lowering_leaves_adapted_linears_masked_dense_and_says_so(name: str) -> None:
    model = transformed(name)
    adapted = lora(model, name)
    expected = logits(adapted)
    with pytest.raises(LoweringError, match="peft"):
        ltepass.lower(model)
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize("name", LINEARS)
def test_wrapping_a_lowered_model_raises_and_names_unlower(name: str) -> None:
    model = ltepass.lower(transformed(name))
    adapted = lora(model, name)
    with pytest.raises((LoweredError, DisplacedHookError), match="lower"):
        logits(adapted)


@pytest.mark.parametrize("name", LINEARS)
def test_cpu_offload_is_right_and_not_lowered(name: str) -> None:
    model = transformed(name)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    with pytest.raises(LoweringError, match="offload"):
        ltepass.lower(model)


def test_a_bypassed_gate_raises_instead_of_being_dense() -> None:
    model = transformed("opt")
    down = layers(model)[0].get_submodule("fc2")
    assert isinstance(down, nn.Linear)
    vars(down)["forward"] = lambda h: nn.functional.linear(h, down.weight, down.bias)
    logits(model)  # hooks still run around a replaced forward

    class Quiet(nn.Linear):
        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(h, self.weight, self.bias)

    down.__class__ = Quiet
    with pytest.raises(DisplacedHookError, match="gate was not applied"):
        logits(model)


def test_a_replica_uses_its_own_router() -> None:
    """What DataParallel does: modules copied shallowly, parameters replaced, hooks shared."""
    model = transformed("opt")
    expected = logits(model)
    replica = copy.copy(layers(model)[0])
    replica._modules = {k: copy.copy(m) for k, m in replica._modules.items()}
    router = replica.get_submodule("router")
    assert isinstance(router, Router)
    router._buffers = {k: b if b is None else b.clone() for k, b in router._buffers.items()}
    router.threshold.fill_(torch.inf)
    x = torch.randn(1, 5, 24)
    ours = replica(x, attention_mask=None)[0]
    original = layers(model)[0](x, attention_mask=None)[0]
    assert not torch.equal(ours, original)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", LINEARS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model: PreTrainedModel = transformed(name, mode="soft").train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        torch.manual_seed(5)
        model(ids())[0].float().square().mean().backward()
        grads.append([grad(r.weight).clone() for r in routers_of(model)])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
