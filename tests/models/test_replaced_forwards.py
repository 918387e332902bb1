"""The forward that really runs is the one that is gated: whoever replaced it, before transform or after, and how."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import ltepass
from ltepass.errors import DisplacedHookError
from ltepass.routed.routed import routers_of
from tests.models.zoo import CountOp, build, ids, layers, logits, mlp, transformed
from tests.typed import lte_state

CONFIG = ltepass.LTEConfig(group_size=5, grouping="random")
AS_IS = ltepass.LTEConfig(group_size=5, grouping="identity")


def fused(self: LlamaMLP, x: Tensor) -> Any:
    """As Liger and TEAL write an FFN: the same function, another code."""
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As a profiler does: what it replaces is called."""
    return lambda *args, **kwargs: forward(*args, **kwargs)


def by_setattr(module: nn.Module, forward: Any) -> None:
    module.forward = MethodType(forward, module)


def by_dict(module: nn.Module, forward: Any) -> None:
    module.__dict__["forward"] = MethodType(forward, module)


def by_class(module: nn.Module, forward: Any) -> None:
    module.__class__ = type("Fused", (type(module),), {"forward": forward})


def routed(model: nn.Module, config: ltepass.LTEConfig = CONFIG) -> nn.Module:
    ltepass.transform(model.eval(), config=config)
    ltepass.set_mode(model, "hard")
    return model


@pytest.mark.parametrize("replace", [by_setattr, by_dict, by_class])
def test_a_forward_that_was_replaced_before_transform_is_gated_and_lowered(replace: Callable[..., Any]) -> None:
    expected = logits(routed(build("llama")))
    model = build("llama")
    for layer in layers(model):
        replace(layer.mlp, fused)
    routed(model)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    for router in routers_of(copied):
        router.threshold.fill_(torch.inf)
    assert not torch.allclose(logits(copied), expected, atol=1e-3)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    ltepass.lower(model)
    with CountOp() as count:
        assert torch.allclose(logits(model), expected, atol=1e-5)
    assert count.calls == 2
    ltepass.remove(ltepass.unlower(model), undo_grouping=True)
    assert torch.equal(logits(model), logits(build("llama")))
    assert ("forward" in layers(model)[0].mlp.__dict__) == (replace is not by_class)


def layer_forward(self: LlamaDecoderLayer, hidden_states: Tensor, **kwargs: Any) -> Any:
    """A decoder layer whose FFN is spelled out: its mlp is never called."""
    residual, x = hidden_states, self.input_layernorm(hidden_states)
    x = residual + self.self_attn(hidden_states=x, **kwargs)[0]
    return x + fused(self.mlp, self.post_attention_layernorm(x))


@pytest.mark.parametrize("replace", [by_setattr, by_dict])
def test_a_layer_that_was_replaced_before_transform_owns_its_ffn(replace: Callable[..., Any]) -> None:
    expected = logits(routed(build("llama")))
    model = build("llama")
    for layer in layers(model):
        replace(layer, layer_forward)
    routed(model)
    assert {s.owner for s in lte_state(model).sites} == {"model.layers.0", "model.layers.1"}
    assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("replace", [by_setattr, by_dict, by_class])
@pytest.mark.parametrize("what", ["mlp", "layer"])
def test_a_forward_without_the_gate_that_is_put_there_later_raises(
    what: str, replace: Callable[..., Any], lowered: bool
) -> None:
    model = routed(build("llama"))
    expected = logits(model)
    if lowered:
        ltepass.lower(model)
    layer = layers(model)[1]
    module, forward = (mlp(model, 1), fused) if what == "mlp" else (layer, layer_forward)
    replace(module, forward)
    with pytest.raises(DisplacedHookError, match=r"ltepass\.remove"):
        logits(model)
    if what == "mlp" and replace is by_class and not lowered:
        with pytest.raises(DisplacedHookError):
            ltepass.lower(model)
    if replace is not by_class:
        del module.forward
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("replace", [by_setattr, by_dict])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_owner_that_is_called_alone_sees_that_its_forward_was_replaced(
    name: str, replace: Callable[..., Any], lowered: bool
) -> None:
    model = transformed(name)
    if lowered:
        ltepass.lower(model)
    owner, x = model.get_submodule(lte_state(model).sites[0].owner), torch.randn(2, 5, 24)
    mask = {} if name == "llama" else {"attention_mask": None}
    expected = owner(x, **mask)[0]
    replace(owner, lambda self, x, **mask: x)
    for _ in range(2):
        with pytest.raises(DisplacedHookError, match=r"ltepass\.remove"):
            owner(x, **mask)
    del owner.__dict__["forward"]
    assert torch.equal(owner(x, **mask)[0], expected)
    forward = owner.forward
    replace(owner, lambda self, *args, **kwargs: forward(*args, **kwargs))
    if not lowered:
        assert torch.equal(owner(x, **mask)[0], expected)


def test_a_forward_that_calls_what_it_replaced_runs_as_it_says() -> None:
    for name in ("llama", "opt"):
        model = transformed(name)
        expected = logits(model)
        blocks = layers(model)
        owner = mlp(model, 0) if name == "llama" else blocks[0]
        for module in (owner, blocks[1]) if name == "llama" else (owner,):
            module.forward = wrapped(module.forward)
        assert torch.equal(logits(model), expected)
        ltepass.lower(model)
        assert any("forward that was put on the instance" in note for note in lte_state(model).notes)
        with CountOp() as count:
            assert torch.allclose(logits(model), expected, atol=1e-5)
        assert count.calls == 1
        ltepass.unlower(model)
        assert torch.equal(logits(model), expected)


def test_a_class_that_is_patched_after_transform_raises_or_is_gated() -> None:
    model = routed(build("llama"))
    expected = logits(model)
    before = LlamaMLP.forward
    try:
        LlamaMLP.forward = fused
        with pytest.raises(DisplacedHookError):
            logits(model)
    finally:
        LlamaMLP.forward = before
    assert torch.equal(logits(model), expected)
    before = LlamaDecoderLayer.forward
    try:
        LlamaDecoderLayer.forward = layer_forward
        with pytest.raises(DisplacedHookError):
            logits(model)
    finally:
        LlamaDecoderLayer.forward = before
    assert torch.equal(logits(model), expected)
    opt = transformed("opt")
    kind, expected = vars(type(layers(opt)[0]))["_lte_original"], logits(opt)
    before = kind.forward
    try:
        kind.forward = lambda self, *args, **kwargs: before(self, *args, **kwargs)
        assert torch.equal(logits(opt), expected)
        kind.forward = lambda self, hidden_states, **kwargs: hidden_states
        with pytest.raises(DisplacedHookError):
            logits(opt)
    finally:
        kind.forward = before


def test_a_module_that_is_replaced_after_transform_raises() -> None:
    model = routed(build("llama"))
    layers(model)[1].mlp = mlp(build("llama"), 1)
    with pytest.raises(DisplacedHookError, match=r"layers\.1\.mlp|layers.1.mlp"):
        logits(model)


def disk_map(model: nn.Module) -> dict[str, str]:
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    return {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}


def dispatched(model: nn.Module, folder: Any) -> nn.Module:
    made: nn.Module = dispatch_model(
        model, disk_map(model), main_device="cpu", offload_dir=str(folder), force_hooks=True
    )
    return made


def test_a_dispatched_model_is_found_gated_and_kept_masked_dense(tmp_path: Any) -> None:
    expected = logits(routed(build("llama"), AS_IS))
    model = routed(dispatched(build("llama"), tmp_path), AS_IS)
    assert len(lte_state(model).sites) == 2
    assert torch.equal(logits(model), expected)
    assert any("offloaded" in line for line in ltepass.report(model).untried)
    with pytest.raises(ltepass.errors.LoweringError, match="offload"):
        ltepass.lower(model)
    assert torch.equal(logits(model), expected)


def test_a_model_that_is_dispatched_and_taken_back_stays_gated(tmp_path: Any) -> None:
    for first in ("transform", "dispatch"):
        model = build("llama")
        if first == "transform":
            routed(model)
            expected = logits(model)
        cpu_offload(model, execution_device=torch.device("cpu"))
        if first == "dispatch":
            expected = logits(routed(model, AS_IS))
        assert torch.equal(logits(model), expected)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), expected)
        assert not torch.allclose(expected, logits(build("llama")), atol=1e-3)


class Own(nn.Module):
    """The root itself owns its FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.relu(self.up(self.norm(x))))


@pytest.mark.parametrize("replace", [by_setattr, by_dict])
def test_a_root_that_owns_its_ffn(replace: Callable[..., Any]) -> None:
    model, x = Own().eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    for forward in (Own.forward, lambda self, x: Own.forward(self, x)):
        replace(model, forward)
        if forward is Own.forward:
            model(x)  # its class's own forward, bound: nothing is replaced
        else:
            with pytest.raises(DisplacedHookError):
                model(x)


def test_what_torch_compile_wrapped_is_gated() -> None:
    torch._dynamo.reset()
    expected = logits(routed(build("llama")))
    for compiled in ("owner", "layer", "root"):
        model: Any = build("llama")
        for layer in layers(model):
            (layer.get_submodule("mlp") if compiled == "owner" else layer).compile(backend="eager")
        if compiled == "root":
            model = torch.compile(model, backend="eager")
        logits(model)  # compiled before it was gated
        routed(model)
        assert torch.allclose(logits(model), expected, atol=1e-5)
        copied = copy.deepcopy(ltepass.routed.routed.unwrapped(model))
        for p in copied.parameters():
            p.data.zero_()
        assert not logits(copied).any()
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_bypass_is_seen_from_a_wrapper_that_calls_forward() -> None:
    """As PEFT does: the root's hooks do not run."""
    model = routed(build("llama"))
    by_dict(mlp(model, 0), fused)
    with torch.no_grad(), pytest.raises(DisplacedHookError):
        functools.partial(model.forward)(ids())
