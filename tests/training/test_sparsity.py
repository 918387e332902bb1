"""Modes, the sparsity knob and its table, calibration: what they change, what they leave alone, what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import BioGptConfig, BioGptForSequenceClassification
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

import ltepass
from ltepass.calibration import initialise
from ltepass.calibration.energy import fit_energies
from ltepass.config import ROUTERS, RouterKind
from ltepass.errors import CalibrationError, ConfigError, LoweredError, NotTransformedError
from ltepass.passes.group import group_neurons
from ltepass.routed.batches import every, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.samples import SomeRows, record_logits
from ltepass.sparsity.thresholds import update_table
from ltepass.training.stages import settle
from tests.models.zoo import llama, made_once
from tests.training.learning_cases import dense_model, router_inputs, tokens
from tests.typed import lte_state, routed


def ids(seed: int, batch: int = 16, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@made_once
def model(calibrated: bool = True, **config: Any) -> Any:
    torch.manual_seed(0)
    m = llama(intermediate_size=64).eval()
    settings = ltepass.LTEConfig(**{"group_size": 8, **config})
    return ltepass.transform(m, config=settings, calibration=[ids(1), ids(2)] if calibrated else None)


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.9])
def test_calibration_starts_routers_near_the_target(target: float) -> None:
    m = model(target_sparsity=target)
    assert abs(mean(ltepass.measure_sparsity(m, [ids(3)])) - target) < 0.06
    assert all(bool(r.quantiles.isfinite().all()) for r in routers_of(m))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_a_start_from_hard_inputs_meets_the_target_at_every_site(target: float, bias: bool) -> None:
    """Eight layers deep, where a start from dense inputs is off by 0.016 to 0.021 (with biases)."""
    m = dense_model(layers=8)
    with torch.no_grad():
        for layer in m.model.layers:
            layer.mlp.down_proj.weight.mul_(3.0)
    batches = tokens(60).split(4)
    m = ltepass.transform(m, config=ltepass.LTEConfig(group_size=4, target_sparsity=target, router_bias=bias))
    ltepass.calibrate(m, batches, inputs="hard")
    shares = ltepass.measure_sparsity(m, batches).values()
    assert max(abs(share - target) for share in shares) < 0.01
    if bias:
        assert all(float(r.threshold) == 0.0 for r in routers_of(m))  # logit(tau): the bias carries the target


@pytest.mark.parametrize("budget", ["layer", "model"])
def test_every_expert_is_active_at_a_target_of_nothing(budget: Any) -> None:
    """No score is further off the threshold than it must be: with one budget each, every site's least alike."""
    m = model(calibrated=False, target_sparsity=0.0, budget=budget)
    with torch.no_grad():
        m.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    ltepass.calibrate(m, [ids(1)], inputs="hard")
    assert mean(ltepass.measure_sparsity(m, [ids(1)])) == 0.0
    least = [float(r.quantiles[0]) for r in routers_of(m)]
    assert min(least) == pytest.approx(2.0)
    assert (max(least) == pytest.approx(2.0)) == (budget == "layer")


def test_a_table_is_taken_from_random_rows_and_kept_where_there_are_none() -> None:
    positions = torch.arange(64).repeat(8)[:, None]
    drawn = SomeRows(64)
    first, second = drawn(positions), drawn(positions)
    assert len(first) == len(second) == 64
    assert min(len(first.unique()), len(second.unique())) > 24  # a stride of 8 sees 8 positions
    assert not torch.equal(first, second)
    assert torch.equal(SomeRows(64)(positions), first)
    assert torch.equal(SomeRows(None)(positions), positions)
    m = model()
    before = [r.quantiles.clone() for r in routers_of(m)]
    update_table(routed(m), [])
    assert all(torch.equal(r.quantiles, b) for r, b in zip(routers_of(m), before, strict=True))


def test_a_start_from_hard_inputs_places_thresholds_before_and_after_its_second_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand: where the last table was taken, the routers leave the target share out."""
    steps: list[Any] = []
    table, fit = update_table, fit_energies

    def keep_table(m: Any, batches: Any) -> None:
        steps.append((copy.deepcopy(m), batches))
        table(m, batches)

    def keep_fit(m: Any, batches: Any, weights: Any, mode: Any) -> Any:
        steps.append((mode, len(batches)))
        return fit(m, batches, weights, mode)

    monkeypatch.setattr(initialise, "update_table", keep_table)
    monkeypatch.setattr(initialise, "fit_energies", keep_fit)
    m = model(calibrated=False, target_sparsity=0.9)
    ltepass.calibrate(m, [ids(seed) for seed in range(17)], inputs="hard")
    (first, (_, settling), second, _, (before, batches)) = steps
    assert (first, len(settling), second, len(batches)) == (("dense", 5), 3, ("hard", 17), 3)
    seen = router_inputs(before.model, batches, "hard")
    for site in m._lte.sites:
        router = router_of(m, site)
        logits = torch.nn.functional.linear(seen[site.name], router.weight, router.bias)
        assert float((logits <= router.threshold).float().mean()) == pytest.approx(0.9, abs=1e-3)


def test_what_needs_few_tokens_gets_some_from_everywhere() -> None:
    few = [ids(seed, batch=4) for seed in range(16)]  # 128 tokens each
    many = [{"input_ids": ids(seed)} for seed in range(16)]
    embedded = [{"inputs_embeds": torch.zeros(16, 32, 24)} for _ in range(16)]
    named = [{"notes": ids(seed)} for seed in range(16)]
    for nth, batches, expected in (
        (8, few, [0, 5, 10, 15]),
        (4, few, [0, 4, 8, 12]),
        (8, many, [0, 8]),
        (8, embedded, [0, 8]),
        (8, named, [*range(16)]),
        (8, few[:2], [0, 1]),
        (8, [few[0][:1], *many[:1]], [0, 1]),  # the first alone holds too few
        (2, [few[0][:1], *many[:1], *few[1:4], *many[1:2]], [0, 1, 2, 3, 4, 5]),
        (2, [many[0], *many[:3]], [0, 2]),
        (4, [torch.zeros(4, 32, 24)] * 4 + few[:0], [0, 0, 0, 0]),  # 128 tokens each, of 24 numbers
        (8, [], []),
    ):
        assert [next(i for i, b in enumerate(batches) if b is one) for one in every(nth, batches)] == expected


def test_a_start_with_groups_in_place_takes_no_pass_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    before = [r.permutation.clone() for r in routers_of(m)]
    monkeypatch.setattr(group_neurons, "collect", lambda *_: pytest.fail("sampled for groups that stay"))
    ltepass.calibrate(m, [ids(1), ids(2)])
    assert all(torch.equal(r.permutation, b) for r, b in zip(routers_of(m), before, strict=True))
    for budget in ("layer", "model"):
        m._lte.config["budget"] = budget
        with pytest.raises(CalibrationError, match=r"no token reached|no batch"):
            ltepass.calibrate(m, [])


def test_passes_for_hooks_make_no_more_logits_than_they_must() -> None:
    m, shapes = model(), []
    m.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    for batch in (ids(1), {"input_ids": ids(1)}, {"input_ids": ids(1), "logits_to_keep": 3}):
        run_batches(m, [batch])
    assert shapes == [(16, 1, 61), (16, 1, 61), (16, 3, 61)]
    plain = torch.nn.Linear(3, 2)  # knows no such thing
    run_batches(plain, [torch.zeros(1, 3), {"input": torch.zeros(1, 3)}])


def test_passes_for_hooks_show_every_token_to_every_ffn() -> None:
    """Gemma 4 drops tokens before its last FFNs, BioGPT's classifier before it pools, if told to keep one logit."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 64, "num_attention_heads": 2}
    one_token = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "num_key_value_heads": 1}
    gemma = Gemma4TextConfig(
        **sizes, **one_token, num_hidden_layers=4, head_dim=12, global_head_dim=12, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    biogpt = BioGptConfig(**sizes, num_hidden_layers=2, pad_token_id=0)
    for dense in (Gemma4ForCausalLM(gemma), BioGptForSequenceClassification(biogpt)):
        m = ltepass.transform(dense.eval(), config=ltepass.LTEConfig(group_size=8, grouping="random"))
        with mode_of(routed(m), "hard"), record_logits(routed(m)) as seen:
            run_batches(m, [ids(1)])
        assert [sum(map(len, rows)) for rows in seen.values()] == [16 * 32] * len(lte_state(m).sites)


def test_a_calibrated_start_beats_a_random_one() -> None:
    """The hard output stays nearer to the dense one than with routers that know nothing."""
    distances = []
    for calibrated in (True, False):
        m = model(calibrated)
        x = ids(4)
        with torch.no_grad():
            dense = m(x).logits
            ltepass.set_mode(m, "hard")
            if not calibrated:
                settle(m, [ids(1)], 0.5)
            distances.append(float((m(x).logits - dense).square().mean()))
    assert distances[0] < 0.6 * distances[1]


@pytest.mark.parametrize("inputs", ["dense", "hard"])
def test_calibration_leaves_mode_flags_rng_and_hooks(inputs: Any) -> None:
    m = model(calibrated=False)
    ltepass.set_mode(m, "hard")
    m.train()
    state = torch.get_rng_state()
    ltepass.calibrate(m, [ids(1), {"input_ids": ids(2)}], inputs=inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(x.training for x in m.modules())
    assert {r.mode for r in routers_of(m)} == {"hard"}
    assert all(r.observer is None and not r._forward_pre_hooks and not r._forward_hooks for r in routers_of(m))


def test_the_knob_is_monotonic_and_hits_what_the_table_says() -> None:
    m = model()
    reached = []
    for s in (0.0, 0.2, 0.5, 0.8, 0.99):
        ltepass.set_sparsity(m, s)
        reached.append(mean(ltepass.measure_sparsity(m, [ids(5)])))
        assert abs(reached[-1] - s) < 0.06
    assert reached == sorted(reached)


def test_settling_meets_the_target_within_a_point() -> None:
    m = model()
    for target in (0.25, 0.6, 0.95):
        settle(m, [ids(6), ids(7)], target)
        assert abs(mean(ltepass.measure_sparsity(m, [ids(8), ids(9)])) - target) <= 0.01


def test_refusals_change_nothing() -> None:
    m = model(calibrated=False)
    thresholds = [r.threshold.clone() for r in routers_of(m)]
    with pytest.raises(CalibrationError, match=r"ltepass\.calibrate"):
        ltepass.set_sparsity(m, 0.5)
    with pytest.raises(ConfigError, match="expected"):
        ltepass.set_sparsity(m, 1.0)
    with pytest.raises(ConfigError, match="soft, hard, dense"):
        ltepass.set_mode(m, "sparse")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no token"):
        ltepass.calibrate(m, [])
    with pytest.raises(ConfigError, match="expected one of dense, hard"):
        ltepass.calibrate(m, [ids(1)], inputs="soft")  # type: ignore[arg-type]
    assert all(torch.equal(r.threshold, t) for r, t in zip(routers_of(m), thresholds, strict=True))
    assert {r.mode for r in routers_of(m)} == {"dense"}
    ltepass.set_mode(m, "hard")
    ltepass.lower(m)
    for call in (lambda: ltepass.calibrate(m, [ids(1)]), lambda: ltepass.measure_sparsity(m, [ids(1)])):
        with pytest.raises(LoweredError, match="unlower"):
            call()


def test_a_failed_calibration_inside_transform_leaves_the_dense_model() -> None:
    torch.manual_seed(0)
    m = llama(1, intermediate_size=64).eval()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(CalibrationError):
        ltepass.transform(m, config=ltepass.LTEConfig(group_size=8, grouping="random"), calibration=[])
    assert before.keys() == m.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    with pytest.raises(NotTransformedError):
        ltepass.set_mode(m, "hard")


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "output_aware", "random"])
def test_calibrated_groupings_are_permutations_that_keep_the_function(method: str) -> None:
    plain = ltepass.remove(model(calibrated=False))
    m = model(grouping=method)
    for site in m._lte.sites:
        permutation = router_of(m, site).permutation
        assert torch.equal(permutation.sort().values, torch.arange(site.d_ff))
        assert not torch.equal(permutation, torch.arange(site.d_ff))
    ltepass.set_mode(m, "dense")
    with torch.no_grad():
        assert torch.allclose(m(ids(3)).logits, plain(ids(3)).logits, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("measure", [ltepass.measure_sparsity, ltepass.measure_union])
def test_a_score_of_nan_is_an_error_and_no_inactive_expert(measure: Any, router: RouterKind) -> None:
    m = model(router=router, group_size="auto")
    measure(m, [ids(1)])
    with torch.no_grad():
        m.get_input_embeddings().weight[int(ids(1)[0, 3])] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp saw values that are not finite"):
        measure(m, [ids(1)])
