"""The op as PyTorch sees it: registration, fakes, gradients by name, compile, export, AOTInductor, torch.func."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ltepass.kernels.routed_ffn
from ltepass.errors import LTEError
from ltepass.kernels import reference
from ltepass.kernels.cpu.which_path import which_path
from tests.kernels.routed_cases import ARGUMENTS, Recipe, doubled, make, with_grad

op = torch.ops.ltepass.routed_ffn


@pytest.mark.parametrize("name", ["routed_ffn", "routed_ffn_with_mask"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [Recipe(T=1), Recipe(T=63), Recipe(T=0), Recipe(gated=False, bias=False, dtype=torch.bfloat16), Recipe(d_out=7)],
)
def test_opcheck(name: str, grad: bool, recipe: Recipe) -> None:
    args = make(recipe)
    torch.library.opcheck(getattr(torch.ops.ltepass, name).default, with_grad(args) if grad else args)


def test_opcheck_of_the_op_without_an_autograd_rule() -> None:
    torch.library.opcheck(torch.ops.ltepass._routed_ffn_no_grad.default, make(Recipe(T=2)))


def test_which_op_a_lowered_module_calls() -> None:
    """The one without an autograd rule where nothing can ask for a gradient or looks on; the bits are the same."""
    args = make(Recipe(T=2))

    def called() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(ltepass.kernels.routed_ffn.routed_ffn(*args), y)
        return {event.key for event in profile.key_averages() if event.key.startswith("ltepass::")}

    with torch.no_grad():
        y = torch.ops.ltepass.routed_ffn(*args)
        assert called() == {"ltepass::_routed_ffn_no_grad"}
        with FlopCounterMode(display=False):
            assert called() == {"ltepass::routed_ffn"}
        with forward_ad.dual_level():
            assert called() == {"ltepass::routed_ffn"}
    assert called() == {"ltepass::routed_ffn"}


@pytest.mark.parametrize("trace", [make_fx, torch.fx.symbolic_trace, None])
def test_graphs_hold_the_public_op(trace: Any) -> None:
    args = make(Recipe(T=2))
    targets: list[Any] = []

    def ours(gm: torch.fx.GraphModule, _: Any = None) -> torch.fx.GraphModule:
        targets.extend(n.target for n in gm.graph.nodes if n.op == "call_function" and "ltepass" in str(n.target))
        return gm

    def of_x(x: Tensor) -> Tensor:
        return ltepass.kernels.routed_ffn.routed_ffn(x, *args[1:])

    with torch.no_grad():
        if trace is None:
            torch.compile(of_x, backend=ours, fullgraph=True)(args[0])
        else:
            traced = trace(of_x)
            ours(traced(args[0]) if trace is make_fx else traced)
    assert targets == [torch.ops.ltepass.routed_ffn.default]


def test_forward_mode_raises() -> None:
    args = make(Recipe())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        op(forward_ad.make_dual(args[0], args[0]), *args[1:])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda w: op(*args[:4], w, *args[5:]), (args[4],), (args[4],))
    with pytest.raises((NotImplementedError, RuntimeError)), forward_ad.dual_level():
        op(forward_ad.make_dual(args[0].clone().requires_grad_(), args[0]), *args[1:])


def test_torch_func_grad_and_vmap() -> None:
    args = make(Recipe(T=6))
    ours = torch.func.grad(lambda x: op(x, *args[1:]).square().sum())(args[0])
    theirs = torch.func.grad(lambda x: reference.routed_ffn(x, *args[1:]).square().sum())(args[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    batched = torch.vmap(lambda x: op(x, *args[1:]))(args[0].view(2, 3, -1))
    assert torch.equal(batched, op(*args).view(2, 3, -1))
    per_sample = torch.vmap(lambda x: op(x, *args[1:]), in_dims=1, out_dims=1)(args[0].view(2, 3, -1))
    torch.testing.assert_close(per_sample, batched, rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="weights"):
        torch.vmap(lambda w: op(*args[:4], w, *args[5:]))(torch.stack([args[4]] * 2))
    with pytest.raises(NotImplementedError, match="only x"):
        torch.vmap(lambda cut: op(*args, cut))(torch.zeros(2))


class Layer(torch.nn.Module):
    """The op beside ordinary ones, so that a compiler has something to fuse around it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.rest = make(recipe)[1:]
        for name, a in zip(ARGUMENTS[1:], self.rest, strict=False):
            if a is not None:
                self.register_buffer(name, a)

    def forward(self, x: Tensor) -> Tensor:
        named = [getattr(self, name, None) for name in ARGUMENTS[1:]]
        return torch.relu(op(torch.sin(x), *named, self.rest[-1])) + 1


def test_fullgraph_compile_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    layer = Layer(Recipe())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (1, 5, 63):
        x = make(Recipe(T=T))[0]
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_fullgraph_compile_of_a_backward() -> None:
    torch._dynamo.reset()
    layer = Layer(Recipe())
    grads = []
    for fn in (layer, torch.compile(layer, fullgraph=True)):
        x = make(Recipe())[0].requires_grad_()
        fn(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_export_keeps_one_op() -> None:
    layer, x = Layer(Recipe()), make(Recipe())[0]
    tokens = torch.export.Dim("tokens", min=1, max=512)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: tokens}}).run_decompositions()
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(op.default) == 1
    more = make(Recipe(T=9))[0]
    torch.testing.assert_close(program.module()(more), layer(more), rtol=1e-5, atol=1e-6)


def test_aot_inductor(tmp_path: Path) -> None:
    layer, x = Layer(Recipe()), make(Recipe())[0]
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(layer, (x,)), package_path=str(tmp_path / "layer.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(x), layer(x), rtol=1e-5, atol=1e-6)


def test_fake_and_meta_have_the_real_shapes() -> None:
    args = make(Recipe(d_out=7, dtype=torch.float16))
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    y, mask, count = torch.ops.ltepass.routed_ffn_with_mask(*meta)
    real = torch.ops.ltepass.routed_ffn_with_mask(*args)
    for m, r in zip((y, mask, count), real, strict=True):
        assert (m.shape, m.dtype, m.device.type) == (r.shape, r.dtype, "meta")
    with pytest.raises(LTEError, match="expected"):
        op(meta[0][:, :3], *meta[1:])


def test_float64_takes_the_plain_path() -> None:
    args = doubled(make(Recipe()))
    assert torch.equal(op(*args), reference.routed_ffn(*args))


def test_import_is_light() -> None:
    code = (
        "import sys, ltepass.kernels.routed_ffn, ltepass.kernels.reference; "
        "assert 'triton' not in sys.modules and 'transformers' not in sys.modules; "
        "from ltepass.kernels.cpu import loading; assert loading._loaded is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def gemms(args: tuple[Any, ...]) -> int:
    """How many of PyTorch's own linears one call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        op(*args)
    names = ("aten::linear", "mkldnn::_linear_pointwise")
    return sum(event.name in names for event in seen.events())


def test_the_path_that_is_told_is_the_path_that_runs() -> None:
    """The dense one is PyTorch's GEMMs; it is taken from shapes and counts alone."""
    assert "dense and mask above" in which_path(64, 64, 64, 8, torch.float32)
    assert "dense" not in which_path(1, 64, 64, 8, torch.float32)
    assert "float64" in which_path(1, 64, 64, 8, torch.float64)
    assert gemms(make(Recipe(T=64, mask="all"))) == 3
    assert gemms(make(Recipe(T=64, mask="all", gated=False))) == 2
    assert gemms(make(Recipe(T=64, mask="one"))) == 0
    assert gemms(make(Recipe(T=1, mask="all"))) == 0


def test_the_report_of_a_lowered_model_shows_the_paths() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import ltepass

    sizes = dict(hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    model = ltepass.transform(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), config=ltepass.LTEConfig(group_size=8))
    ltepass.set_mode(model, "hard")
    assert ltepass.report(model).paths == []
    shown = str(ltepass.report(ltepass.lower(model)))
    assert "1 token: C++" in shown
    assert "dense and mask above" in shown
