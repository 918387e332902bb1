"""`set_hidden_sparsity` and `set_input_sparsity`: cuts where they are asked for; lowered, saved, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import ltepass
from ltepass.errors import CalibrationError, ConfigError, LoweredError, NotTransformedError
from ltepass.routed.routed import router_of
from ltepass.routed.router import Router
from ltepass.sparsity.cuts import BUFFERS, Setting
from tests.models.zoo import ALL, CountOp, build, ids, logits, transformed
from tests.typed import lte_state, present

SETTERS = {"hidden_sparsity": ltepass.set_hidden_sparsity, "input_sparsity": ltepass.set_input_sparsity}
both = pytest.mark.parametrize("setting", SETTERS)


def cuts(model: nn.Module, setting: Setting) -> list[torch.Tensor]:
    return [getattr(router_of(model, s), BUFFERS[setting]) for s in lte_state(model).sites]


def shares_left_out(model: nn.Module, setting: Setting) -> list[float]:
    """By site: of active experts' hidden units those that down does not see, of x what up and gate do not see (nothing
    is 0 by itself: the activation is smooth)."""
    last: dict[nn.Module, torch.Tensor] = {}  # logits of each router
    shares, handles = [], []
    for site in lte_state(model).sites:
        router = router_of(model, site)
        linears = [site.down] if setting == "hidden_sparsity" else [site.up, present(site.gate)]

        def look(module: nn.Module, args: tuple[torch.Tensor, ...], router: Router = router) -> None:
            there = (last[router] > router.threshold).float().mean() if setting == "hidden_sparsity" else 1.0
            shares.append(1 - float((args[0] != 0).float().mean() / there))

        handles.append(router.register_forward_hook(lambda m, a, out: last.__setitem__(m, out)))
        handles += [model.get_submodule(path).register_forward_pre_hook(look) for path in linears]
    logits(model)
    for handle in handles:
        handle.remove()
    return shares


@both
@pytest.mark.parametrize("name", ALL)
def test_lowered_equals_hard_eager(name: str, setting: Setting) -> None:
    model = transformed(name, grouping="random")
    whole = logits(model)
    SETTERS[setting](model, 0.5, [ids()])
    expected = logits(model)
    assert (expected - whole).abs().max() > 1e-4 * whole.abs().max(), "the cuts must leave something out"
    ltepass.lower(model)
    with CountOp() as count:
        lowered = logits(model)
    assert count.calls == len(lte_state(model).sites)
    assert (lowered - expected).abs().max() <= 1e-5 * expected.abs().max()
    token = ids() if name == "export" else ids(1, 1)  # what it was exported with
    one = logits(model, token)
    ltepass.unlower(model)
    assert torch.equal(logits(model), expected)
    alone = logits(model, token)
    assert (one - alone).abs().max() <= 1e-5 * alone.abs().max()
    SETTERS[setting](model, 0.0, [])
    assert torch.equal(logits(model), whole)
    assert not any(key.endswith(BUFFERS[setting]) for key in model.state_dict())


@both
def test_the_share_asked_for_is_left_out(setting: Setting) -> None:
    model = transformed("llama", grouping="random")
    for share in (0.3, 0.6):
        SETTERS[setting](model, share, [ids()])
        left_out = shares_left_out(model, setting)
        assert left_out == pytest.approx([share] * len(left_out), abs=0.06)


def test_one_cut_leaves_the_other_where_it_is() -> None:
    model = transformed("llama", grouping="random")
    ltepass.set_input_sparsity(model, 0.5, [ids()])
    ltepass.set_hidden_sparsity(model, 0.5, [ids()])
    assert shares_left_out(model, "input_sparsity") == pytest.approx([0.5] * 4, abs=0.06)
    assert shares_left_out(model, "hidden_sparsity") == pytest.approx([0.5] * 2, abs=0.06)
    expected = logits(model)
    ltepass.lower(model)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ltepass.unlower(model)
    before = cuts(model, "input_sparsity")
    ltepass.set_hidden_sparsity(model, 0.0, [])
    assert cuts(model, "input_sparsity") == before


def test_routers_see_all_of_x() -> None:
    model = transformed("llama", grouping="random", layers=1)
    router, seen = router_of(model, lte_state(model).sites[0]), []
    router.register_forward_hook(lambda m, args, out: seen.append(out))
    logits(model)
    ltepass.set_input_sparsity(model, 0.9, [ids()])
    logits(model)
    assert torch.equal(seen[0], seen[-1])


@both
def test_compiled_equals_hard_eager(setting: Setting) -> None:
    model = transformed("llama", grouping="random")
    SETTERS[setting](model, 0.5, [ids()])
    expected = logits(model)
    torch._dynamo.reset()  # what other tests compiled of the same class may serve this model too
    ltepass.lower(model, scope="model")
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not lte_state(model).notes
    with CountOp() as count:
        logits(model)
    assert count.calls == len(lte_state(model).sites)
    for cut in cuts(model, setting):  # a moved cut is seen without a new compilation
        cut.fill_(1e9)
    assert (logits(model) - expected).abs().max() > 1e-4 * expected.abs().max()


@both
def test_saved_and_loaded(tmp_path: Path, setting: Setting) -> None:
    model: PreTrainedModel = transformed("llama", grouping="random")
    SETTERS[setting](model, 0.5, [ids()])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ltepass.set_mode(loaded, "hard")
    assert torch.equal(logits(loaded.eval()), expected)
    assert cuts(loaded, setting) == cuts(model, setting)


@both
def test_training_places_the_cuts_again(tmp_path: Path, setting: Setting) -> None:
    model = transformed("llama", grouping="random")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 61, (32, 16))]
    ltepass.calibrate(model, [torch.stack([d["input_ids"] for d in data[:8]])])
    SETTERS[setting](model, 0.4, [data[0]["input_ids"][None]])
    before = [float(cut) for cut in cuts(model, setting)]
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", learning_rate=1e-2, use_cpu=True)
    ltepass.LTETrainer(model=model, args=args, train_dataset=data).fit()
    after = [float(cut) for cut in cuts(model, setting)]
    assert all(b != a and a > 0 for b, a in zip(before, after, strict=True))


@both
def test_calibration_places_the_cuts_of_the_config(setting: Setting) -> None:
    model = build("llama")
    shares: dict[str, Any] = {setting: 0.4}
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=4, **shares))
    assert all(cut < 0 for cut in cuts(model, setting))  # none before
    ltepass.calibrate(model, [ids()])
    ltepass.set_mode(model, "hard")
    left_out = shares_left_out(model, setting)
    assert left_out == pytest.approx([0.4] * len(left_out), abs=0.06)


@both
def test_soft_mode_has_no_cut(setting: Setting) -> None:
    model = transformed("llama", grouping="random")
    ltepass.set_mode(model, "soft")
    soft = logits(model)
    SETTERS[setting](model, 0.5, [ids()])
    assert torch.equal(logits(model), soft)


@both
def test_refusals(setting: Setting) -> None:
    model, set_share = transformed("llama", grouping="random"), SETTERS[setting]
    with pytest.raises(ConfigError, match=rf"{setting} is 1\.5"):
        set_share(model, 1.5, [ids()])
    with pytest.raises(CalibrationError, match="no token reached"):
        set_share(model, 0.5, [])
    with pytest.raises(NotTransformedError):
        set_share(nn.Linear(2, 2), 0.5, [])
    ltepass.lower(model)
    with pytest.raises(LoweredError):
        set_share(model, 0.5, [ids()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_keeps_it_masked_dense_and_says_so() -> None:
    model = transformed("llama", grouping="random").cuda()
    ltepass.set_input_sparsity(model, 0.5, [ids().cuda()])
    with pytest.raises(ltepass.errors.LoweringError, match="which no GPU kernel does"):
        ltepass.lower(model)
