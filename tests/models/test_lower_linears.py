"""Lowering makes plain linears call our op: exact, undone, and never in the way of what a user does next."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltepass
from ltepass.errors import LoweredError
from ltepass.kernels.weight_formats import dequantise_int4, dequantise_int8, pack_int4
from ltepass.passes.lower.lower_linear_modules import lower_linear_modules, lowered_linears, unlower_linear_modules
from tests.models.zoo import gpt2, ids, llama, logits, opt, transformed


class Counted:
    """How often our ops are called in a block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ltepass.passes.lower.lower_linear_modules as module

        self.calls: list[str] = []
        for name in ("linear", "linear_int8", "linear_int4"):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, op: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return op(*args)

        return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


@pytest.mark.parametrize("make", [llama, opt, gpt2])
def test_every_linear_of_a_dense_model_calls_the_op_and_unlower_gives_back_what_was(
    make: Any, counted: Counted
) -> None:
    model, x = make().eval(), ids(2, 5)
    expected, strides = logits(model, x), [p.stride() for p in model.parameters()]
    assert ltepass.lower(model, ffn=False) is model
    assert lowered_linears(model) == len(linears(model))
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-5, atol=1e-5)
    assert counted.calls == ["linear"] * len(linears(model))
    ltepass.unlower(model)
    assert [p.stride() for p in model.parameters()] == strides
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_of_a_transformed_model_those_beside_its_ffns(name: str, counted: Counted) -> None:
    model, x = transformed(name), ids(2, 5)
    expected = logits(model, x)
    ltepass.lower(model)
    report = ltepass.report(model)
    beside = len(linears(model)) - sum(2 + (s.gate not in (None, s.up)) for s in report.sites)
    assert (report.linears, report.notes) == (beside, [])
    assert f"lowered: ffn, {beside} linears beside" in str(report)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)
    assert counted.calls == ["linear"] * beside
    assert ltepass.report(ltepass.unlower(model)).linears == 0
    assert torch.equal(logits(model, x), expected)


def test_without_ffns_every_linear_is_lowered_and_the_sites_say_why(counted: Counted) -> None:
    model, x = transformed("llama"), ids(2, 5)
    expected = logits(model, x)
    report = ltepass.report(ltepass.lower(model, ffn=False))
    assert report.linears == len(linears(model))
    assert report.notes == [f"{site.name}: kept masked-dense: ffn is False" for site in report.sites]
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)


def test_lowered_twice_or_transformed_meanwhile_is_refused() -> None:
    model = llama()
    ltepass.lower(model, ffn=False)
    for call in (lambda: ltepass.lower(model, ffn=False), lambda: ltepass.transform(model)):
        with pytest.raises(LoweredError, match=r"ltepass\.unlower\(model\)"):
            call()
    ltepass.transform(ltepass.unlower(model))


def test_a_linear_that_something_else_runs_stays_and_is_told() -> None:
    model = transformed("llama")
    path = "model.layers.0.self_attn.q_proj"
    linear: Any = model.get_submodule(path)
    linear.forward = lambda x: torch.zeros(*x.shape[:-1], linear.out_features)
    expected = logits(model, ids(1, 4))
    ltepass.lower(model)
    reason = "it runs a forward that was put on the instance"
    assert ltepass.report(model).notes == [f"{path}: calls torch's linear: {reason}"]
    torch.testing.assert_close(logits(model, ids(1, 4)), expected, rtol=1e-4, atol=1e-5)


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 7, bias=False)).eval()


def test_hooks_run_and_gradients_flow(counted: Counted) -> None:
    model, x = block(), torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    ltepass.lower(model, ffn=False)
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    model(x).sum().backward()
    assert counted.calls == ["linear", "linear"]
    assert len(seen) == 1
    for got, wanted in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float64),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(48, 64))),
        lambda model: model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()}),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=["fp64", "replaced", "loaded", "bf16"],
)
def test_weights_that_change_afterwards_are_what_a_call_reads(change: Any) -> None:
    model, plain = block(), block()
    ltepass.lower(model, ffn=False)
    for each in (model, plain):
        change(each)
    x = torch.randn(3, 64, dtype=next(model.parameters()).dtype)
    torch.testing.assert_close(model(x), plain(x))


def test_autocast_and_other_dtypes_are_torch_s(counted: Counted) -> None:
    model, plain, x = block(), block(), torch.randn(3, 64)
    ltepass.lower(model, ffn=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    assert counted.calls == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_reads_its_own_weights(copied: Any, counted: Counted) -> None:
    model, x = block(), torch.randn(3, 64)
    ltepass.lower(model, ffn=False)
    other = copied(model)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    torch.testing.assert_close(other(x), block()(x))
    assert counted.calls == ["linear", "linear"]
    assert torch.equal(ltepass.unlower(other)(x), block()(x))


def test_adapters_added_afterwards_see_the_lowered_base(counted: Counted) -> None:
    from peft import LoraConfig, get_peft_model

    model = llama().eval()
    plain = copy.deepcopy(model)
    ltepass.lower(model, ffn=False)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    results = []
    for each in (model, plain):
        torch.manual_seed(1)
        results.append(logits(get_peft_model(each, config), ids(1, 4)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(counted.calls) == lowered_linears(model)


def test_a_failure_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import ltepass.passes.lower.lower_linear_modules as module

    model, made, make = gpt2().eval(), [], module._call

    def breaks(linear: nn.Module) -> Any:
        made.append(linear)
        if len(made) > 2:
            raise KeyboardInterrupt
        return make(linear)

    monkeypatch.setattr(module, "_call", breaks)
    expected, strides = logits(model, ids(1, 4)), [p.stride() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        ltepass.lower(model, ffn=False)
    assert lowered_linears(model) == 0
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(logits(model, ids(1, 4)), expected)


# ---- quantised weights, as torchao has them ----


def stand_in(name: str, **tensors: Tensor) -> Any:
    """A weight of a class of this name, with these fields, whose own product is of what they mean."""

    def torch_function(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return func(x, weight.dense, bias)
        return super(subclass, subclass).__torch_function__(func, types, args, kwargs or {})

    subclass: Any = type(name, (torch.Tensor,), {"__torch_function__": classmethod(torch_function)})
    weight = torch.zeros(tensors["qdata"].shape).as_subclass(subclass)
    for key, value in tensors.items():
        setattr(weight, key, value)
    return weight


def int8(d_out: int = 48, d_in: int = 70, **more: Tensor) -> Any:
    codes, scale = torch.randint(-128, 128, (d_out, d_in), dtype=torch.int8), torch.rand(d_out, 1)
    return stand_in("Int8Tensor", qdata=codes, scale=scale, dense=dequantise_int8(codes, scale[:, 0]), **more)


def int4(d_out: int = 48, d_in: int = 64, **more: Tensor) -> Any:
    codes = torch.randint(-8, 8, (d_out, d_in), dtype=torch.int8)
    scale = torch.rand(d_out, d_in // 32).half().float()
    dense = dequantise_int4(pack_int4((codes + 8).to(torch.uint8)), scale.half(), None)
    return stand_in("IntxUnpackedToInt8Tensor", qdata=codes, scale=scale, dense=dense, **more)


def holding(weight: Any) -> nn.Sequential:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear._parameters["weight"] = weight
    return nn.Sequential(linear)


@pytest.mark.parametrize(("make", "op"), [(int8, "linear_int8"), (int4, "linear_int4")])
def test_quantised_weights_run_in_their_op(make: Any, op: str, counted: Counted) -> None:
    model = holding(make(zero_point=torch.zeros(48, 1, dtype=torch.int8)))
    linear: Any = model[0]
    x = torch.randn(5, linear.in_features)
    expected = model(x)
    assert lower_linear_modules(model, ()) == {}
    error = (model(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.01, "the inputs have 8 bits"
    assert counted.calls == [op]
    unlower_linear_modules(model)
    assert torch.equal(model(x), expected)


def int8_of(*shape: int, scales: tuple[int, ...]) -> Any:
    return stand_in("Int8Tensor", qdata=torch.ones(shape, dtype=torch.int8), scale=torch.ones(scales))


def int4_of(*shape: int, scales: tuple[int, ...], code: int = 1) -> Any:
    codes = torch.full(shape, code, dtype=torch.int8)
    return stand_in("IntxUnpackedToInt8Tensor", qdata=codes, scale=torch.ones(scales))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (int8(zero_point=torch.ones(48, 1)), "its codes have a zero point"),
        (int8_of(4, 8, scales=(4, 2)), "expected one an output"),
        (int8(act_pre_scale=torch.ones(70)), "its inputs are scaled first"),
        (int4_of(4, 64, scales=(4, 1)), "for each 32"),
        (int4_of(4, 32, scales=(4, 1), code=9), "more than 4 bits"),
        (int4_of(4, 32, scales=(4, 1), code=-9), "more than 4 bits"),
        (stand_in("Float8Tensor", qdata=torch.ones(4, 32)), "Float8Tensor"),
    ],
)
def test_what_the_ops_do_not_read_is_left_with_its_reason(weight: Any, reason: str) -> None:
    model = holding(weight)
    (left,) = lower_linear_modules(model, ()).values()
    assert reason in left
    assert lowered_linears(model) == 0


@pytest.mark.parametrize(("name", "bits"), [("Int8WeightOnlyConfig", 8), ("IntxWeightOnlyConfig", 4)])
def test_torchao_itself(name: str, bits: int, counted: Counted) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    group = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}  # type: ignore[attr-defined]
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32, bias=False)).eval()
    quantization.quantize_(model[0], getattr(quantization, name)(**({"version": 2} if bits == 8 else group)))
    x = torch.randn(3, 64)
    expected = model(x)
    ltepass.lower(model, ffn=False)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.02)
    assert counted.calls == [f"linear_int{bits}", "linear"]
