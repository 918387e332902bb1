"""`ltepass.quantize`: torchao's codes in the place of weights; what it cannot do is refused, and changes nothing."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal

import ltepass
from ltepass.errors import ConfigError, LoweredError, MetaWeightsError
from ltepass.routed.routed import routers_of
from ltepass.routed.torchao_weights import holds_int8, int8_parts, is_quantised
from ltepass.training.stages import begin_stage
from tests.models.zoo import VOCAB, build, gpt2, ids, llama, logits, made_once, mlp, transformed
from tests.stand_in_torchao import put_in_place

BATCHES = [torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


@made_once
def sparse() -> Any:
    """Calibrated, half of the neurons active."""
    model = transformed("llama")
    ltepass.calibrate(model, BATCHES)
    ltepass.set_sparsity(model, 0.5)
    return model


def test_every_linear_is_int8_and_hard_eager_computes_what_the_codes_mean() -> None:
    model, meant = sparse(), sparse()
    expected = logits(model)
    assert ltepass.quantize(model) is model
    names = [name for name, weight in model.named_parameters() if holds_int8(weight)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert names == [f"{name}.weight" for name in linears]
    assert len(names) == 15
    for name in names:
        codes, scale = int8_parts(model.get_parameter(name))
        meant.get_parameter(name).data.copy_(codes * scale[:, None])
    torch.testing.assert_close(logits(model), logits(meant), rtol=1e-5, atol=1e-5)
    assert 0 < (logits(model) - expected).norm() < 0.02 * expected.norm()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))


def test_lowered_reads_these_very_codes_without_being_asked() -> None:
    model = ltepass.quantize(sparse())
    expected = logits(model)
    ltepass.lower(model)
    assert not any("masked-dense" in note for note in ltepass.report(model).notes)
    for layer, router in enumerate(routers_of(model)):
        assert router.coded is not None
        codes, _ = int8_parts(mlp(model, layer).get_parameter("up_proj.weight"))
        assert router.coded.up[0].data_ptr() == codes.data_ptr(), "not copied"
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(logits(ltepass.unlower(model)), expected)


def test_the_report_counts_a_byte_a_weight() -> None:
    model = sparse()
    before, r = ltepass.report(model).bits, next(routers_of(model))
    after = ltepass.report(ltepass.quantize(model)).bits
    assert before is not None
    assert after is not None
    (site, _), active = ltepass.report(model).sites, r.density or 0.0
    weights = 3 * site.d_ff * site.d_model
    router = sum(t.nbytes for t in r.operands() if t is not None)
    own = weights + 4 * 2 * site.d_ff  # up and gate have a scale a neuron
    assert after.held == pytest.approx(8 * (own + 4 * site.d_model + router) / weights)
    assert after.read == pytest.approx(8 * (active * own + 4 * site.d_model + router) / weights)
    assert after.read < 0.45 * before.read


def test_routers_learn_above_frozen_codes() -> None:
    model = ltepass.quantize(sparse())
    begin_stage(model, "soft")
    model(BATCHES[0], labels=BATCHES[0]).loss.backward()
    assert all(p.grad is not None for router in routers_of(model) for p in router.parameters())
    assert not any(p.requires_grad for p in model.parameters() if holds_int8(p))


def test_a_tied_head_stays_in_floats_and_so_do_embeddings() -> None:
    model: Any = ltepass.quantize(transformed("llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not holds_int8(model.lm_head.weight)
    assert is_quantised(model)


def test_a_model_of_planes_keeps_its_ffns() -> None:
    model = build("llama")
    ltepass.transform(model, config=ltepass.LTEConfig(router="proxy", inactive="low_bit", group_size=1))
    ltepass.quantize(model)
    held = {name for name, weight in model.named_parameters() if holds_int8(weight)}
    assert held
    assert not any(".mlp." in name for name in held)


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))


def changed(change: Callable[[nn.Module], object]) -> Callable[[], Any]:
    """Makes a model one of whose linears was changed so."""

    def make() -> Any:
        model = llama()
        change(mlp(model, 1).get_submodule("up_proj"))
        return model

    return make


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            changed(lambda linear: prune.random_unstructured(linear, "weight", 0.5)),
            ConfigError,
            r"layers.1.mlp.up_proj.weight is masked .*prune.remove\(linear",
        ),
        (changed(orthogonal), ConfigError, r"layers.1.mlp.up_proj.weight is parametrised.*remove_parametrizations"),
        (
            changed(nn.utils.spectral_norm),
            ConfigError,
            r"layers.1.mlp.up_proj.weight is computed of weight_orig; .*remove_spectral_norm",
        ),
        (gpt2, ConfigError, r"8 left: stored \[d_in, d_out\] \(Conv1D\).*; 1 left: share their weight"),
        (adapted, ConfigError, "q_proj carries an adapter .* merge it first"),
        (lambda: ltepass.quantize(sparse()), ConfigError, "does it once"),
        (lambda: ltepass.lower(sparse()), LoweredError, "call ltepass.unlower"),
        (lambda: llama().to("meta"), MetaWeightsError, "on the meta device"),
    ],
)
def test_what_cannot_be_quantised_is_refused_and_stays(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    model = make()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=words):
        ltepass.quantize(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_other_weights_and_a_missing_torchao_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse()
    expected = logits(model)
    with pytest.raises(ConfigError, match="weights is 'int3'; expected one of int8"):
        ltepass.quantize(model, "int3")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"pip install 'ltepass\[quantize\]'"):
        ltepass.quantize(model)
    assert torch.equal(logits(model), expected)
    assert not is_quantised(model)


def test_a_call_that_is_interrupted_leaves_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = sparse(), []
    expected = logits(model)
    library = sys.modules["torchao.quantization"]
    quantise: Any = library.quantize_

    def half_way(model: nn.Module, config: object, filter_fn: Callable[[nn.Module, str], bool]) -> None:
        quantise(model, config, lambda m, path: filter_fn(m, path) and "layers.0" in path)
        done.append(is_quantised(model))
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "quantize_", half_way)
    with pytest.raises(KeyboardInterrupt):
        ltepass.quantize(model)
    assert done == [True]
    assert not is_quantised(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: ltepass.calibrate(model, BATCHES),
        lambda model: ltepass.warm_start(model, ids()),
        lambda model: ltepass.remove(model, undo_grouping=True),
        lambda model: begin_stage(model, "soft", trainable="lora"),
    ],
)
def test_what_would_change_codes_is_refused(call: Callable[[Any], object]) -> None:
    model = ltepass.quantize(sparse())
    expected = logits(model)
    with pytest.raises(ConfigError, match=r"_proj\.weight is in torchao's codes, .* call it before ltepass.quantize"):
        call(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_half_way_changes_nothing(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse()
    before, expected = dict(model.named_parameters()), logits(model)
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    torchao = sys.modules["torchao.quantization"]
    rounds = torchao.quantize_

    def three_and_no_more(model: nn.Module, config: Any, filter_fn: Callable[[nn.Module, str], bool]) -> None:
        chosen = [path for path, module in model.named_modules() if filter_fn(module, path)][:3]
        rounds(model, config, lambda _, path: path in chosen)
        assert any(holds_int8(weight) for weight in model.parameters())
        raise error

    monkeypatch.setattr(torchao, "quantize_", three_and_no_more)
    with pytest.raises(error):
        ltepass.quantize(model)
    assert not any(holds_int8(weight) for weight in model.parameters())
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert torch.equal(logits(model), expected)
    monkeypatch.setattr(torchao, "quantize_", rounds)
    assert any(holds_int8(weight) for weight in ltepass.quantize(model).parameters())
