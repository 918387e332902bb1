"""`ltepass.lower(model, linears=...)`, in 8 and 4 bits: masks are the definition's, and unlower gives back what was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltepass
from ltepass.config import RouterKind
from ltepass.errors import ConfigError, LoweredError, LoweringError, NoFFNFoundError
from ltepass.kernels import linear_reference
from ltepass.kernels.routed_codes_reference import CodedLinear, scores
from ltepass.kernels.routed_schema import RoutedOp
from ltepass.kernels.weight_formats import Format, SparseFormat, quantise_int4, quantise_int8
from ltepass.measure import token_bytes
from ltepass.passes.lower import lower_linear_modules, lowered_forward
from ltepass.passes.lower.lower_linear_modules import lowered_linears
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.routed import routers_of
from ltepass.routed.torchao_weights import int8_parts
from tests.kernels.coded_cases import same_decision
from tests.models.zoo import VOCAB, build, gpt2, ids, llama, logits, mlp, transformed
from tests.stand_in_torchao import put_in_place

FORMS = ("llama", "phi3", "gpt2", "gpt_neox", "opt")


BLOCKS: dict[str, Any] = {
    "gpt2": {"n_embd": 96, "n_inner": 128},
    "opt": {"hidden_size": 96, "ffn_dim": 128, "word_embed_proj_dim": 96},
}
WIDE: Any = {"hidden_size": 96, "intermediate_size": 128}


def sparse(name: str, router: RouterKind = "linear", format: str = "int8") -> Any:
    """Calibrated, half of the neurons active; in whole blocks where the format has them."""
    model = transformed(name, router=router, **(BLOCKS.get(name, WIDE) if format == "int4" else {}))
    ltepass.calibrate(model, [torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))])
    ltepass.set_sparsity(model, 0.5)
    return model


@contextmanager
def as_defined(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[RoutedOp, tuple[Any, ...]]]]:
    """Lowered FFNs and linears compute what they mean, in plain PyTorch; what the FFNs' ops got."""
    got = []

    def ffn(op: RoutedOp, args: tuple[Any, ...]) -> Tensor:
        got.append((op, args))
        c = op.checked(args)
        return op.masked_ffn(c, op.mask(c))

    with monkeypatch.context() as patch:
        patch.setattr(lowered_forward, "call_in_codes", ffn)
        patch.setattr(lower_linear_modules, "linear_int8", linear_reference.linear_int8)
        patch.setattr(lower_linear_modules, "linear_int4", linear_reference.linear_int4)
        yield got


@pytest.mark.parametrize("router", ["linear", "proxy"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_lowered_model_computes_what_its_codes_mean(
    format: SparseFormat, name: str, router: RouterKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse(name, router, format)
    expected, strides = logits(model), [p.stride() for p in model.parameters()]
    ltepass.lower(model, linears=format)
    with as_defined(monkeypatch) as got:
        meant = logits(model)
    for op, args in got:
        same_decision(op, args)
        assert op.format == format
        assert 0.2 < op.mask(op.checked(args)).float().mean() < 0.8
    assert len(got) == len(ltepass.report(model).sites)
    torch.testing.assert_close(logits(model), meant, rtol=1e-4, atol=1e-4)
    assert not torch.equal(meant, expected)
    assert (meant - expected).norm() < (0.1 if format == "int8" else 0.5) * expected.norm()
    assert [p.stride() for p in model.parameters()] == strides, "the model's own weights lie as they did"
    ltepass.unlower(model)
    assert torch.equal(logits(model), expected)
    assert all(r.coded is None for r in routers_of(model))


def test_hard_mode_with_a_quantised_router_decides_as_the_lowered_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager: the same codes, scored by the definition, in the first FFN, whose input is equal in both."""
    model = sparse("llama")
    router, seen = next(routers_of(model)), list[Any]()
    hook: Any = router.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits(model)
    hook.remove()
    x = seen[0][0]
    assert isinstance(router.bias, Tensor)
    quantised = CodedLinear(*quantise_int8(router.weight.detach()), router.bias)
    eager = scores(x, quantised) > router.threshold
    rounded = (eager != (seen[0][1] > router.threshold)).float().mean()
    assert rounded < 0.02, "of decisions that rounding the router changes"
    ltepass.lower(model, linears="int8")
    with as_defined(monkeypatch) as got:
        logits(model)
    op, args = got[0]
    same_decision(op, (x, *args[1:]))
    assert torch.equal(op.mask(op.checked((x, *args[1:]))), eager)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_linears_of_a_dense_model_are_quantised(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    expected = logits(model)
    ltepass.lower(model, ffn=False, linears="int8")
    assert lowered_linears(model) > 8
    with as_defined(monkeypatch):
        meant = logits(model)
    torch.testing.assert_close(logits(model), meant, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(ltepass.unlower(model)), expected)


def test_4_bits_of_linears_are_those_of_their_format() -> None:
    fits, left = nn.Linear(64, 9), nn.Linear(9, 3)
    linear = nn.Sequential(fits, left).requires_grad_(False)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    codes, scale, minimum = quantise_int4(fits.weight, with_minimum=True)
    meant = linear_reference.linear_int4(x, codes, scale, minimum, fits.bias)
    ltepass.lower(linear, ffn=False, linears="int4_minimum")
    torch.testing.assert_close(linear(x), left(meant))


@pytest.mark.parametrize(
    ("linears", "words"),
    [
        ("int4", "blocks of 4 bits are 32 long, and d_model is 24, d_out 24"),
        ("int4_minimum", "only int8 and int4 are read by a sparse op"),
        ("gguf", "only int8 and int4 are read by a sparse op"),
    ],
)
def test_ffns_that_no_op_reads_so_stay_in_floats_and_the_report_says_why(linears: Format, words: str) -> None:
    model = sparse("llama")
    ltepass.lower(model, linears=linears)
    assert f"model.layers.0.mlp: stays in floats: {words}" in ltepass.report(model).notes
    assert all(r.coded is None for r in routers_of(model))


def test_copies_and_pickles_compute_the_same() -> None:
    model = sparse("llama")
    ltepass.lower(model, linears="int8")
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        with torch.no_grad():
            mlp(other, 1).down_proj.weight.mul_(2)  # type: ignore[union-attr, operator]
        with pytest.raises(LoweredError, match="changed after its int8 codes were made"):
            logits(other)
    assert torch.equal(logits(model), expected)


def test_a_linear_whose_weight_changed_runs_its_own_forward() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    model = nn.Sequential(linear)
    ltepass.lower(model, ffn=False, linears="int8")
    linear.weight.fill_(1.0)
    assert torch.equal(model(torch.ones(1, 8)), 8 + linear.bias[None])


@pytest.mark.parametrize("router", ["linear", "proxy"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_bytes_are_counted_from_the_tensors(format: SparseFormat, router: RouterKind) -> None:
    model = sparse("llama", router, format)
    before = ltepass.report(model).bits
    ltepass.lower(model, linears=format)
    report, (site, _) = ltepass.report(model), ltepass.report(model).sites
    assert report.bits is not None
    assert before is not None
    gathered, whole, weights = 0.0, 0.0, 3 * site.d_ff * site.d_model
    for made in routers_of(model):
        assert made.coded is not None
        density = made.density or 0.0
        parts = [t for pair in (made.coded.up, made.coded.gate, made.coded.down) if pair for t in pair]
        of_outputs = parts[-1].nbytes if format == "int8" else 0
        whole += sum(t.nbytes for t in made.operands() if t is not None) + of_outputs
        gathered += density * (sum(t.nbytes for t in parts) - of_outputs)
        if not isinstance(made, ProxyRouter):
            codes = made.operands()[0]
            assert codes is not None
            assert codes.nbytes == site.n_experts * site.d_model
    assert report.bits.read == pytest.approx(8 * (gathered + whole) / (2 * weights))
    assert report.bits.read < before.read / 2
    active = next(made.density or 0.0 for made in routers_of(model))
    all_of_it = token_bytes.weights_read(model, 1.0)
    ffns = sum(t.nbytes for r in routers_of(model) if r.coded for t in r.coded.tensors())
    ffns -= sum(t.nbytes for r in routers_of(model) if r.coded for t in r.coded.whole())
    assert token_bytes.weights_read(model, active) == pytest.approx(all_of_it - (1 - active) * ffns)


def test_gradients_are_refused_by_name() -> None:
    model = sparse("llama")
    ltepass.lower(model, linears="int8")
    out = model(ids()).logits
    with pytest.raises(NotImplementedError, match="routed_ffn_int8 has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"linears": "int2"}, "linears is 'int2'; expected None or one of int8, int4, int4_minimum, gguf"),
        ({"linears": "int8", "scope": "model"}, 'linears is \'int8\' and scope "model"; expected scope "ffn"'),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(how: dict[str, Any], words: str) -> None:
    for model in (sparse("llama"), build("llama")):
        expected = logits(model)
        with pytest.raises(ConfigError, match=words):
            ltepass.lower(model, ffn=holds_routers(model), **how)
        assert torch.equal(logits(model), expected)
        assert lowered_linears(model) == 0


def holds_routers(model: nn.Module) -> bool:
    return any(True for _ in routers_of(model))


def test_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="not all of the model is on the CPU"):
        ltepass.lower(build("llama").to("meta"), ffn=False, linears="int8")


def by_torchao(model: Any, config: str = "Int8WeightOnlyConfig") -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    how = {"version": 2} if config.startswith("Int8") else {"weight_dtype": torch.int4}  # type: ignore[attr-defined]
    quantization.quantize_(model, getattr(quantization, config)(**how))
    return model


@pytest.mark.parametrize(("router", "linears"), [("linear", "int8"), ("proxy", None)])
def test_codes_that_torchao_made_are_read_as_they_stand(
    router: RouterKind, linears: Format | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch)
    model = ltepass.quantize(sparse("llama", router))
    expected = logits(model)
    with pytest.raises(LoweringError, match=r'up_proj holds a .*Int8Tensor.*; lower\(linears="int8"\) reads it'):
        ltepass.lower(model, "model")
    ltepass.lower(model, linears=linears)
    assert "kept masked-dense" not in str(ltepass.report(model))
    with as_defined(monkeypatch) as got:
        assert (logits(model) - expected).norm() < 0.03 * expected.norm(), "inputs have 8 bits"
    op, args = got[0]
    weights = op.checked(args).weights
    (up, up_scale), (down, down_scale) = (
        int8_parts(mlp(model, 0).get_parameter(f"{name}_proj.weight")) for name in ("up", "down")
    )
    read = (weights[0], weights[6], weights[4], weights[8])
    for ours, theirs in zip(read, (up, up_scale, down, down_scale), strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
    ltepass.unlower(model)
    assert torch.equal(logits(model), expected)


def test_what_torchao_quantised_before_the_transform_is_named() -> None:
    with pytest.raises(
        NoFFNFoundError, match=r"torchao's Int8Tensor, as those of 15 linears, .* transform the model first"
    ):
        ltepass.transform(by_torchao(build("llama")))


def test_4_bits_of_torchao_stay_masked_dense_and_are_reported() -> None:
    model = sparse("llama")
    model = by_torchao(model, "IntxWeightOnlyConfig")
    with pytest.raises(LoweringError, match=r"up_proj is left in int4: its \[60, 24\] codes have \[60, 1\] scales"):
        ltepass.lower(model, linears="int8")
    assert ltepass.report(model).sites
