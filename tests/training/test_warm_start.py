"""The layer-wise warm start: closer to the dense model, sparsity on target, nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.errors import CalibrationError, LoweredError, NotTransformedError
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import routers_of
from tests.training.learning_cases import assert_same, calibrated, tokens, transformed, weights
from tests.typed import routed


def distance(model: Any, dense: torch.Tensor, x: torch.Tensor) -> float:
    """KL of the hard model's predictions from the dense ones, nats a token."""
    with torch.no_grad(), mode_of(routed(model), "hard"):
        log_q = model(x).logits.log_softmax(-1)
    log_p = dense.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("router_bias", [True, False])
def test_the_hard_model_comes_closer_to_the_dense_one_on_new_text(target: float, router_bias: bool) -> None:
    model, x = calibrated(target, router_bias=router_bias), tokens(20, seed=9)
    with torch.no_grad():
        dense = model(x).logits
    before = distance(model, dense, x)
    warm_start(model, tokens(80))
    assert distance(model, dense, x) < 0.95 * before  # random weights: few hidden units tell of others


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_thresholds_meet_the_target_on_inputs_that_are_sparse_themselves(target: float) -> None:
    model, x = calibrated(target), tokens(80)
    warm_start(model, x)
    for share in ltepass.measure_sparsity(model, [x]).values():
        assert share == pytest.approx(target, abs=0.01)
    assert all(float(r.threshold) == 0.0 for r in routers_of(model))  # the paper's: the bias moved


def test_only_down_projections_and_thresholds_change() -> None:
    model = calibrated()
    before, mode = weights(model), next(routers_of(model)).mode
    rng = torch.random.get_rng_state()
    warm_start(model, tokens(20))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert all(name.endswith(("down_proj.weight", "router.bias", "router.quantiles")) for name in changed), changed
    assert len(changed) == 6
    assert next(routers_of(model)).mode == mode
    assert not model.training
    assert not any(m._forward_hooks for m in model.modules() if not m._forward_pre_hooks)
    assert torch.equal(rng, torch.random.get_rng_state())


def test_the_refit_is_the_penalised_least_squares_solution() -> None:
    """The first site, by fp64 normal equations with the penalty written out."""
    model, x = calibrated(), tokens(40)
    site = model._lte.sites[0]
    down = model.get_submodule(site.down)
    old = down.weight.detach().double().T.clone()
    h = hidden_units(model, down, x, "dense")
    warm_start(model, x, penalty=0.2)
    g = hidden_units(model, down, x, "hard")
    gram = g.T @ g
    penalty = 0.2 * gram.diagonal() + 1e-3 * gram.diagonal().mean() + 1e-12
    change = torch.linalg.solve(gram + penalty.diag(), g.T @ ((h - g) @ old))
    torch.testing.assert_close(down.weight.detach().double(), (old + change).T, rtol=1e-3, atol=1e-4)


def hidden_units(model: Any, down: torch.nn.Module, x: torch.Tensor, mode: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2).double()))
    with torch.no_grad(), mode_of(routed(model), mode):
        model(x)
    hook.remove()
    return seen.pop()


def test_errors_and_progress_are_reported_site_by_site() -> None:
    model, seen = calibrated(), []
    errors = warm_start(model, tokens(20), on_site=lambda number, error: seen.append((number, error)))
    assert list(errors) == [s.name for s in model._lte.sites]
    assert seen == list(enumerate(errors.values(), 1))
    assert all(0.0 < e < 1.0 for e in errors.values())


def test_refusals_leave_the_model_as_it_was() -> None:
    model = transformed()
    before = weights(model)
    with pytest.raises(CalibrationError, match=r"ltepass\.calibrate"):
        warm_start(model, tokens(4))
    assert_same(before, weights(model))
    with pytest.raises(NotTransformedError):
        warm_start(torch.nn.Linear(2, 2), tokens(4))
    ready = calibrated()
    ltepass.set_mode(ready, "hard")
    ltepass.lower(ready, scope="ffn")
    with pytest.raises(LoweredError, match="unlower"):
        warm_start(ready, tokens(4))
