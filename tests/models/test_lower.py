"""Lowered equals hard eager: masks first, then values, then token for token; and every FFN really calls the op."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import ConfigError, LoweredError, LoweringError
from ltepass.kernels import reference
from ltepass.passes import BACKEND
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from ltepass.routed.routed import router_of, routers_of
from tests.models import zoo
from tests.models.zoo import ALL, HF, CountOp, Graphs, generate, ids, logits, transformed
from tests.typed import grad, lte_state, present


def router_inputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each router reads in one forward."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        router_of(model, s).register_forward_pre_hook(lambda m, a, name=s.name: seen.__setitem__(name, a[0]))
        for s in lte_state(model).sites
    ]
    logits(model, x)
    for h in handles:
        h.remove()
    return seen


@pytest.mark.parametrize("name", ALL)
def test_lowered_equals_hard_eager_masks_first(name: str) -> None:
    model = transformed(name, grouping="random")
    expected, x_of = logits(model), router_inputs(model, ids())
    masks = {}
    for site in lte_state(model).sites:
        r = router_of(model, site)
        masks[site.name] = reference.mask(x_of[site.name], r.weight, r.bias, r.threshold)
        share = masks[site.name].float().mean()
        assert 0.2 < share < 0.8, "the routers must decide something for this test to mean anything"
    ltepass.lower(model)
    for site in lte_state(model).sites:  # the op's own decision, from its sibling that returns the mask
        r, x = router_of(model, site), x_of[site.name]
        zeros = x.new_zeros(site.d_ff, site.d_model)
        args = (x, r.weight, r.bias, r.threshold, zeros, None, None, None, zeros.t(), None, "relu")
        _, mask, count = torch.ops.ltepass.routed_ffn_with_mask(*args)
        assert torch.equal(mask, masks[site.name])
        assert int(count) == int(mask.sum())
    with CountOp() as count_op:
        lowered = logits(model)
    assert count_op.calls == len(lte_state(model).sites) == 2
    assert (lowered - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_unlower_is_bitwise_what_was(name: str) -> None:
    model = transformed(name)
    expected, state = logits(model), {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    ltepass.unlower(ltepass.lower(model))
    assert torch.equal(logits(model), expected)
    for k, v in model.state_dict().items():
        assert v.stride() == state[k][1]
        assert torch.allclose(v, state[k][0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_generate_calls_the_op_once_a_layer_and_step_and_gives_the_same_tokens(name: str) -> None:
    layers, new = 12, 7
    model = transformed(name, layers=layers)
    expected = generate(model, ids(1, 5), new)
    ltepass.lower(model)
    with CountOp() as count:
        tokens = generate(model, ids(1, 5), new)
    assert torch.equal(tokens, expected)
    assert count.calls == layers * new  # the prefill gives the first token, each further step one more
    for batch, length in ((2, 3), (4, 17)):
        x = ids(batch, length)
        assert torch.equal(generate(model, x, 4), generate(ltepass.unlower(model), x, 4))
        ltepass.lower(model)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "opt"])
def test_scope_model_compiles_with_the_backend_and_gives_the_same_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.fresh_dynamo(monkeypatch, inductor=name == "llama")
    layers, new = 3, 6
    model = transformed(name, layers=layers)
    expected = generate(model, ids(1, 5), new)
    ltepass.lower(model, scope="model")
    with Graphs() as graphs:  # compiles, which runs the op on fake tensors too
        assert torch.equal(generate(model, ids(1, 5), new), expected)
    with CountOp() as count:
        tokens = generate(model, ids(1, 5), new)
    assert torch.equal(tokens, expected)
    assert count.calls == layers * new
    assert set(graphs.seen) == {(layers, layers)}
    ltepass.unlower(model)
    with CountOp() as count:
        assert torch.equal(generate(model, ids(1, 5), new), expected)
    assert count.calls == 0


@pytest.mark.parametrize("name", ["llama", "opt", "own"])
def test_torch_compile_with_the_backend_lowers_every_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.fresh_dynamo(monkeypatch, inductor=name == "llama")
    model = transformed(name)
    expected = logits(model)
    compiled = torch.compile(model, backend="lte", fullgraph=True)
    with Graphs() as graphs:
        assert (logits(compiled) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert graphs.seen == [(2, 2)]


@pytest.mark.parametrize("name", ALL)
def test_the_pass_alone_lowers_every_gate_of_dynamos_graph(name: str) -> None:
    """As above without inductor, which is quick enough for every style of model."""
    torch._dynamo.reset()
    model, results = transformed(name), []

    def lower_only(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        job = run_passes(BACKEND, GraphJob(gm))
        results.append((job.lowered, job.notes))
        return gm.forward

    expected = logits(model)
    compiled = torch.compile(model, backend=lower_only, fullgraph=True)
    assert (logits(compiled) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert results == [(2, {})]


def test_the_backend_is_found_without_importing_ltepass() -> None:
    code = "import torch, sys; print('lte' in torch.compiler.list_backends(), 'ltepass' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False"]


def test_set_sparsity_moves_a_tensor_and_compiles_nothing_again() -> None:
    torch._dynamo.reset()
    model = transformed("llama")
    for router in routers_of(model):
        router.quantiles.copy_(torch.linspace(-2, 2, len(router.quantiles)))
    compiled = torch.compile(model, backend="lte")
    outputs = []
    with Graphs() as graphs:
        for s in (0.2, 0.5, 0.8):
            ltepass.set_sparsity(model, s)
            outputs.append(logits(compiled))
            assert torch.allclose(outputs[-1], logits(model), atol=1e-5)
    assert len(graphs.seen) == 1
    assert not torch.equal(outputs[0], outputs[2])


def test_set_sparsity_acts_on_a_lowered_model() -> None:
    model = transformed("opt")
    for router in routers_of(model):
        router.quantiles.copy_(torch.linspace(-2, 2, len(router.quantiles)))
    expected = []
    for s in (0.3, 0.9):
        ltepass.set_sparsity(model, s)
        expected.append(logits(model))
    ltepass.lower(model)
    for s, e in zip((0.3, 0.9), expected, strict=True):
        ltepass.set_sparsity(model, s)
        assert torch.allclose(logits(model), e, atol=1e-5)


@pytest.mark.parametrize("name", HF)
def test_bf16_is_as_near_to_fp64_as_eager_is(name: str) -> None:
    """Routers decide far from the threshold here, so that rounding flips no mask."""
    model = transformed(name)
    for router in routers_of(model):
        router.weight.data.zero_()
        present(router.bias).data.copy_(torch.tensor([1.0, -1.0] * 40)[: router.n_experts])
    exact = logits(model.double())
    model.to(torch.bfloat16)
    eager = (logits(model).double() - exact).abs().max()
    ltepass.lower(model)
    lowered = (logits(model).double() - exact).abs().max()
    assert lowered <= 1.5 * eager


def test_weights_load_into_a_lowered_model() -> None:
    model, other = transformed("gpt2"), transformed("gpt2")
    for p in other.parameters():
        p.data.mul_(1.01)
    ltepass.lower(model)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(logits(model), logits(other), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_hard_stage_gradients_on_a_lowered_model_are_those_of_eager(name: str) -> None:
    grads = []
    for lowered in (False, True):
        model = transformed(name)
        if lowered:
            ltepass.lower(model)
        model(ids())[0].float().square().mean().backward()
        grads.append({n: grad(p) for n, p in model.named_parameters() if "router" not in n})
    for n, g in grads[0].items():
        assert torch.allclose(g, grads[1][n], atol=1e-6), n


def test_a_custom_activation_stays_masked_dense_and_is_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
            self.up2, self.down2 = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> Any:
            x = x + self.down(torch.sin(self.up(x)))
            return x + self.down2(torch.relu(self.up2(x)))

    model, x = Odd().eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    for router in routers_of(model):
        router.mode = "hard"
    expected = logits(model, x)
    ltepass.lower(model)
    with CountOp() as count:
        assert torch.allclose(logits(model, x), expected, atol=1e-6)
    assert count.calls == 1
    (note,) = ltepass.report(model).notes
    assert "no kernel knows its activation custom(sin" in note


def test_refused_lowering_leaves_the_model_as_it_was() -> None:
    model = transformed("llama", mode="soft")
    expected = logits(model)
    with pytest.raises(LoweringError, match="hard"):
        ltepass.lower(model)
    assert torch.equal(logits(model), expected)
    model = transformed("llama")
    with pytest.raises(ConfigError, match="scope"):
        ltepass.lower(model, scope="all")  # type: ignore[arg-type]
    ltepass.lower(model)
    for call in (ltepass.lower, ltepass.remove, lambda m: ltepass.set_mode(m, "soft")):
        with pytest.raises(LoweredError, match="unlower"):
            call(model)
