"""ltepass.prune: what never fires goes, and hard mode computes what it did; masks of weights; saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.config import RouterKind
from ltepass.errors import CalibrationError, ConfigError, LoweredError, NotTransformedError, PruningError
from ltepass.pruning import width_in_config
from ltepass.routed.routed import Routed
from ltepass.routed.samples import record_logits
from tests.models import zoo
from tests.models.zoo import HF, ids, logits, made_once, t5, transformed
from tests.training.learning_cases import weights
from tests.typed import lte_state


def build(name: str, **more: Any) -> Any:
    return zoo.build(name, **more)


FEW = ids()  # so few tokens that some experts are never used at 90 %


@made_once
def sparse(name: str, router: RouterKind = "linear", sparsity: float = 0.9) -> Any:
    model = transformed(name, router=router)
    ltepass.calibrate(model, [FEW])
    ltepass.set_sparsity(model, sparsity)
    ltepass.set_mode(model, "hard")
    return model


def widths(model: nn.Module) -> list[int]:
    return [site.d_ff for site in ltepass.report(model).sites]


def used(model: nn.Module) -> list[int]:
    """By site: neurons of experts that some token of the few uses."""
    routed = Routed.of(model, "test")
    with record_logits(routed) as seen:
        logits(model, FEW)
    return [
        int((seen[site.name][0] > router.threshold).any(0).sum()) * site.group_size for site, router in routed
    ]  # fmt: skip


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the order in which fp32 is summed


CASES: list[tuple[str, RouterKind]] = [(name, "linear") for name in ("llama", "gpt2", "own", "symbolic_trace")]


@pytest.mark.parametrize(("name", "router"), [*CASES, ("phi3", "proxy")])
def test_what_no_token_uses_goes_and_hard_mode_stays(name: str, router: RouterKind, tmp_path: Path) -> None:
    model = sparse(name, router)
    expected, left, before = logits(model, FEW), used(model), widths(model)
    assert ltepass.prune(model, [FEW]) is model
    assert widths(model) == left
    assert sum(left) < sum(before)
    close(logits(model, FEW), expected)
    close(logits(ltepass.lower(model), FEW), expected)
    ltepass.unlower(model)
    if name in HF:
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        ltepass.save(model, tmp_path)
        again = ltepass.load(build(name), tmp_path)
    assert widths(again) == left
    assert torch.equal(logits(again, FEW), logits(model, FEW))


def always_on(model: nn.Module) -> Tensor:
    ltepass.set_mode(model, "dense")
    return logits(model, FEW)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_widths_load_without_us_once_routers_are_removed(name: str, tmp_path: Path) -> None:
    model = sparse(name)
    left = used(model)
    ltepass.prune(model, [FEW], equal_widths=True)
    assert widths(model) == [max(left)] * 2
    assert not lte_state(model).narrowed
    expected = always_on(model)
    with warnings.catch_warnings(action="error"):
        ltepass.remove(model)
        model.save_pretrained(tmp_path)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(dense, "_lte")
    assert dense.num_parameters() < build(name).num_parameters()
    close(logits(dense, FEW), expected)


def test_widths_that_no_config_says_are_warned_of_when_routers_go() -> None:
    model = ltepass.prune(sparse("llama"), [FEW])
    expected, left = always_on(model), widths(model)
    assert len(set(left)) == 2
    with pytest.warns(UserWarning, match="from_pretrained will not load what it saves"):
        ltepass.remove(model)
    close(logits(model, FEW), expected)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == left


def test_a_config_that_cannot_say_a_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width_in_config, "NAMES", ())
    model = sparse("llama")
    with pytest.raises(PruningError, match="no entry of LlamaConfig makes FFNs of"):
        ltepass.prune(model, [FEW], equal_widths=True)
    assert widths(model) == [60, 60]


def test_a_sparsity_leaves_the_experts_that_are_used_most() -> None:
    model = sparse("llama", sparsity=0.3)
    routed = Routed.of(model, "test")
    with record_logits(routed) as seen:
        logits(model, FEW)
    often = [(seen[s.name][0] > r.threshold).sum(0).sort(descending=True).values for s, r in routed]
    ltepass.prune(model, [FEW], sparsity=0.6)
    assert widths(model) == [24, 24]
    with record_logits(Routed.of(model, "test")) as seen:
        logits(model, FEW)
    first, router = next(iter(Routed.of(model, "test")))
    assert torch.equal((seen[first.name][0] > router.threshold).sum(0).sort(descending=True).values, often[0][:6])


def test_tables_orders_and_flags_are_of_what_is_left() -> None:
    original = build("llama").model.layers[0].mlp.up_proj.weight
    model: Any = transformed("llama", grouping="kmeans")
    ltepass.calibrate(model, [FEW])
    ltepass.begin_stage(model, "hard")
    ltepass.prune(model, [FEW], sparsity=0.6)
    assert [r.mode for r in Routed.of(model, "test").routers] == ["hard", "hard"]
    assert not any(r.weight.requires_grad for r in Routed.of(model, "test").routers)
    ltepass.set_sparsity(model, 0.5)
    assert all(share == pytest.approx(0.5, abs=0.03) for share in ltepass.measure_sparsity(model, [FEW]).values())
    expected = always_on(model)
    ltepass.remove(model, undo_grouping=True)
    close(logits(model, FEW), expected)
    rows = model.model.layers[0].mlp.up_proj.weight
    places = [int((original == row).all(1).nonzero()) for row in rows]
    assert places == sorted(places)


def test_an_encoder_decoder_is_pruned() -> None:
    model = t5().eval()
    given = {"input_ids": FEW, "decoder_input_ids": FEW}
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=4), calibration=[given])
    ltepass.set_sparsity(model, 0.9)
    ltepass.set_mode(model, "hard")
    with torch.no_grad():
        expected = model(**given).logits
        ltepass.prune(model, [given])
        close(model(**given).logits, expected)
    assert max(widths(model)) < 60


class Twice(nn.Module):
    """Two FFNs of the same weights: what either uses stays."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.first = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 8))
        self.second = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 8))
        for one, other in ((self.first[0], self.second[0]), (self.first[2], self.second[2])):
            other.weight, other.bias = one.weight, one.bias

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        return self.second(-self.first(x))


def test_ffns_that_share_weights_keep_what_either_uses() -> None:
    torch.manual_seed(0)
    model: Any = ltepass.transform(Twice().eval(), FEW, ltepass.LTEConfig(group_size=4), calibration=[FEW])
    ltepass.set_sparsity(model, 0.9)
    ltepass.set_mode(model, "hard")
    expected, alone = logits(model, FEW), used(model)
    ltepass.prune(model, [FEW])
    close(logits(model, FEW), expected)
    assert model.first[0].weight is model.second[0].weight
    assert max(alone) < model.first[0].out_features == model.second[0].out_features < 96


def test_nothing_to_prune_is_said_and_changes_nothing() -> None:
    model = sparse("llama", sparsity=0.0)
    before = weights(model)
    with pytest.warns(UserWarning, match="every expert is used"):
        ltepass.prune(model, [FEW])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Fixed(nn.Module):
    """A forward that knows its width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(61, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: Tensor) -> Any:
        return self.down(torch.relu(self.up(self.embed(ids))).view(*ids.shape, 12))


def test_a_forward_that_fixes_its_width_is_refused_and_left_as_it_was() -> None:
    model = ltepass.transform(Fixed().eval(), FEW, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    expected = logits(model, FEW)
    with pytest.raises(PruningError, match="does not run with fewer neurons"):
        ltepass.prune(model, [FEW], sparsity=0.5)
    assert torch.equal(logits(model, FEW), expected)


def adapted() -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), sparse("llama"))


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = [
    (lambda: sparse("llama"), {"method": "some"}, ConfigError, "method is 'some'"),
    (lambda: sparse("llama"), {"only": "*"}, ConfigError, "'inactive' got only"),
    (lambda: sparse("llama"), {"method": "magnitude"}, ConfigError, "got no sparsity"),
    (lambda: sparse("llama"), {"method": "magnitude", "sparsity": 1.0}, ConfigError, "sparsity is 1.0"),
    (lambda: sparse("llama"), {}, CalibrationError, "no batches were given"),
    (lambda: build("llama"), {"batches": [FEW]}, NotTransformedError, "prune expects a transformed model"),
    (lambda: ltepass.lower(sparse("llama")), {"batches": [FEW]}, LoweredError, "prune expects it as trained"),
    (lambda: ltepass.lower(sparse("llama")), {"method": "magnitude", "sparsity": 0.5}, LoweredError, "as it was"),
    (adapted, {"batches": [FEW]}, PruningError, "an adapter, a mask or a quantised weight"),
    (lambda: build("llama"), {"method": "first_order", "sparsity": 0.5}, CalibrationError, "no batches were given"),
    (
        lambda: build("llama"),
        {"batches": [{"input_ids": FEW}], "method": "first_order", "sparsity": 0.5},
        CalibrationError,
        "a batch has no labels",
    ),
    (
        lambda: build("llama"),
        {"method": "magnitude", "sparsity": 0.5, "only": "*.w1"},
        ConfigError,
        r"only names '\*.w1'",
    ),
    (lambda: build("llama"), {"method": "magnitude", "sparsity": 0.5, "skip": "*"}, ConfigError, "none is left"),
]


@pytest.mark.parametrize(("make", "given", "error", "text"), REFUSED)
def test_what_is_refused_says_why(
    make: Callable[[], nn.Module], given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ltepass.prune(make(), **given)


def masked(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight_mask for name, m in model.named_modules() if hasattr(m, "weight_mask")}


def test_magnitude_masks_the_smallest_of_all_linears_and_only_grows() -> None:
    model = build("llama")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    sizes = torch.cat([m.weight.detach().abs().flatten() for m in linears.values()])
    ltepass.prune(model, method="magnitude", sparsity=0.5)
    limit = sizes.median()
    assert masked(model).keys() == linears.keys()
    for name, mask in masked(model).items():
        original = linears[name].get_parameter("weight_orig")
        assert torch.equal(mask.bool(), original.abs() > limit)
    half = {name: mask.clone() for name, mask in masked(model).items()}
    with torch.no_grad():
        for linear in linears.values():
            linear.get_parameter("weight_orig").mul_(torch.rand(linear.out_features, 1))
    ltepass.prune(model, method="magnitude", sparsity=0.8)
    gone = torch.cat([(mask == 0).flatten() for mask in masked(model).values()])
    assert int(gone.sum()) == round(0.8 * len(sizes))
    assert all((mask <= half[name]).all() for name, mask in masked(model).items())
    with pytest.raises(ConfigError, match="what is masked stays so"):
        ltepass.prune(model, method="magnitude", sparsity=0.5)
    hooks = [len(linear._forward_pre_hooks) for linear in linears.values()]
    assert set(hooks) == {1}, "one mask a linear"


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75])
def test_of_equal_weights_the_first_go_and_just_so_many(sparsity: float) -> None:
    linear: Any = nn.Linear(4, 1, bias=False)
    nn.init.ones_(linear.weight)
    ltepass.prune(linear, method="magnitude", sparsity=sparsity)
    assert linear.weight_mask.flatten().tolist() == [float(i >= 4 * sparsity) for i in range(4)]


def test_masked_weights_stay_zero_in_training_and_permanent_ones_are_plain() -> None:
    model = build("llama")
    ltepass.prune(model, method="magnitude", sparsity=0.9, only=["*.mlp.*"])
    assert set(masked(model)) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in n}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(input_ids=FEW, labels=FEW).loss.backward()
    optimizer.step()
    logits(model)  # the hook applies the mask
    up = model.model.layers[0].mlp.up_proj
    assert torch.equal(up.weight == 0, up.weight_mask == 0)
    expected = logits(model)
    ltepass.prune(model, method="magnitude", sparsity=0.9, only=["*.mlp.*"], permanent=True)
    assert not masked(model)
    assert isinstance(up.weight, nn.Parameter)
    assert float((up.weight == 0).float().mean()) > 0.8
    assert torch.equal(logits(model), expected)
    assert not torch_prune.is_pruned(model)


def test_first_order_masks_where_weight_times_gradient_is_least_and_leaves_no_trace() -> None:
    model = build("llama").train()
    model.requires_grad_(False)
    up = model.model.layers[0].mlp.up_proj
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    twin(input_ids=FEW, labels=FEW).loss.backward()
    weight = twin.model.layers[0].mlp.up_proj.weight
    least = (weight * weight.grad).abs().detach()
    ltepass.prune(
        model, [{"input_ids": FEW, "labels": FEW}], method="first_order", sparsity=0.5, only="*.0.mlp.up_proj"
    )
    assert torch.equal(up.weight_mask.bool(), least > least.median())
    assert model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_weight_that_is_a_table_of_tokens_too_is_left_alone() -> None:
    model = build("llama", tie_word_embeddings=True)
    ltepass.prune(model, method="magnitude", sparsity=0.5)
    assert "lm_head" not in masked(model)
    assert "lm_head" in masked(ltepass.prune(build("llama"), method="magnitude", sparsity=0.5))


def test_a_schedule_is_cubic_and_refuses_what_cannot_be() -> None:
    schedule = ltepass.CubicSchedule(initial=0.2, final=0.9, begin=10, end=20)
    assert [schedule(step) for step in (0, 10, 20, 99)] == pytest.approx([0.2, 0.2, 0.9, 0.9])
    assert schedule(14) == pytest.approx(0.9 - 0.7 * 0.6**3)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"final": 1.0}, "final is 1.0"), ({"initial": 0.95}, "nothing grows back"), ({"begin": 20}, "begin is 20"),
    ]  # fmt: skip
    for wrong, text in refused:
        with pytest.raises(ConfigError, match=text):
            replace(schedule, **wrong)
