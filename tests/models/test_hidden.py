"""`set_hidden_sparsity`: cuts where they were asked for, the same lowered, compiled, saved and trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments
from zoo import ALL, CountOp, build, ids, logits, transformed

import ltepass
from ltepass.errors import CalibrationError, ConfigError, LoweredError, NotTransformedError
from ltepass.sites import router_of


def shares_left_out(model: nn.Module) -> list[float]:
    """By site: of active experts' hidden units, those that down does not see (a smooth activation gives no zeros)."""
    shares, handles = [], []
    for site in model._lte.sites:
        router = router_of(model, site)

        def look(module: nn.Module, args: tuple[torch.Tensor, ...], router: nn.Module = router) -> None:
            active = (router.last > router.threshold).float().mean()
            shares.append(1 - float((args[0] != 0).float().mean() / active))

        handles.append(router.register_forward_hook(lambda m, a, out: setattr(m, "last", out)))
        handles.append(model.get_submodule(site.down).register_forward_pre_hook(look))
    logits(model)
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize("name", ALL)
def test_lowered_equals_hard_eager(name: str) -> None:
    model = transformed(name, grouping="random")
    whole = logits(model)
    ltepass.set_hidden_sparsity(model, 0.5, [ids()])
    expected = logits(model)
    assert (expected - whole).abs().max() > 1e-4 * whole.abs().max(), "the cuts must leave something out"
    ltepass.lower(model)
    with CountOp() as count:
        lowered = logits(model)
    assert count.calls == len(model._lte.sites)
    assert (lowered - expected).abs().max() <= 1e-5 * expected.abs().max()
    ltepass.unlower(model)
    assert torch.equal(logits(model), expected)
    ltepass.set_hidden_sparsity(model, 0.0, [])
    assert torch.equal(logits(model), whole)
    assert not any(key.endswith(".cut") for key in model.state_dict())


def test_the_share_asked_for_is_left_out() -> None:
    model = transformed("llama", grouping="random")
    for share in (0.3, 0.6):
        ltepass.set_hidden_sparsity(model, share, [ids()])
        assert shares_left_out(model) == pytest.approx([share] * 2, abs=0.06)


def test_compiled_equals_hard_eager() -> None:
    model = transformed("llama", grouping="random")
    ltepass.set_hidden_sparsity(model, 0.5, [ids()])
    expected = logits(model)
    ltepass.lower(model, scope="model")
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not model._lte.notes
    for site in model._lte.sites:  # a moved cut is seen without a new compilation
        router_of(model, site).cut.fill_(1e9)
    assert (logits(model) - expected).abs().max() > 1e-4 * expected.abs().max()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = transformed("llama", grouping="random")
    ltepass.set_hidden_sparsity(model, 0.5, [ids()])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ltepass.set_mode(loaded, "hard")
    assert torch.equal(logits(loaded.eval()), expected)
    assert [router_of(loaded, s).cut for s in loaded._lte.sites] == [router_of(model, s).cut for s in model._lte.sites]


def test_training_places_the_cuts_again(tmp_path: Path) -> None:
    model = transformed("llama", grouping="random")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 61, (32, 16))]
    ltepass.calibrate(model, [torch.stack([d["input_ids"] for d in data[:8]])])
    ltepass.set_hidden_sparsity(model, 0.4, [data[0]["input_ids"][None]])
    before = [float(router_of(model, s).cut) for s in model._lte.sites]
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", learning_rate=1e-2, use_cpu=True)
    ltepass.LTETrainer(model=model, args=args, train_dataset=data).fit()
    after = [float(router_of(model, s).cut) for s in model._lte.sites]
    assert all(b != a and a > 0 for b, a in zip(before, after, strict=True))


def test_calibration_places_the_cuts_of_the_config() -> None:
    model = build("llama")
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=4, hidden_sparsity=0.4))
    assert all(float(router_of(model, s).cut) < 0 for s in model._lte.sites)  # none before
    ltepass.calibrate(model, [ids()])
    ltepass.set_mode(model, "hard")
    assert shares_left_out(model) == pytest.approx([0.4] * 2, abs=0.06)


def test_soft_mode_has_no_cut() -> None:
    model = transformed("llama", grouping="random")
    ltepass.set_mode(model, "soft")
    soft = logits(model)
    ltepass.set_hidden_sparsity(model, 0.5, [ids()])
    assert torch.equal(logits(model), soft)


def test_refusals() -> None:
    model = transformed("llama", grouping="random")
    with pytest.raises(ConfigError, match=r"hidden_sparsity is 1\.5"):
        ltepass.set_hidden_sparsity(model, 1.5, [ids()])
    with pytest.raises(CalibrationError, match="no token reached"):
        ltepass.set_hidden_sparsity(model, 0.5, [])
    with pytest.raises(NotTransformedError):
        ltepass.set_hidden_sparsity(nn.Linear(2, 2), 0.5, [])
    ltepass.lower(model)
    with pytest.raises(LoweredError):
        ltepass.set_hidden_sparsity(model, 0.5, [ids()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_keeps_it_masked_dense_and_says_so() -> None:
    model = transformed("llama", grouping="random").cuda()
    ltepass.set_hidden_sparsity(model, 0.5, [ids().cuda()])
    with pytest.raises(ltepass.errors.LoweringError, match="only the CPU's kernels"):
        ltepass.lower(model)
