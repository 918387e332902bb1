"""Whatever the lengths, the side and the batches: padding changes no statistic of the tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ltepass
from ltepass.calibration.energy import down_energy, fit_energies
from ltepass.measure.sparsity import measure_union
from ltepass.routed.routed import router_of
from ltepass.sparsity.thresholds import update_table
from tests.training.padded import FAMILIES, padded, same, sequences, started, whole
from tests.typed import routed

models = cache(started)


def tables(model: Any, batches: Any) -> dict[str, Tensor]:
    update_table(routed(model), batches)
    return {site.name: router_of(model, site).quantiles.clone() for site in model._lte.sites}


@pytest.mark.timeout(1800)  # of ten times as many examples on a busy machine
@given(
    family=st.sampled_from(FAMILIES),
    lengths=st.lists(st.integers(2, 12), min_size=2, max_size=6),
    left=st.booleans(),
    extra=st.integers(0, 20),
    size=st.integers(1, 6),
)
def test_statistics_are_those_of_the_tokens(family: str, lengths: list[int], left: bool, extra: int, size: int) -> None:
    model, rows = models(family), sequences(lengths)
    batches = [padded(family, rows[i : i + size], left=left, extra=extra) for i in range(0, len(rows), size)]
    alone = [whole(family, row) for row in rows]
    weights = {site.name: down_energy(model, site) for site in model._lte.sites}
    padded_fit, fit = (fit_energies(routed(model), b, weights, "dense") for b in (batches, alone))
    weights_of, alone_weights = ({name: f.weight for name, f in fits.items()} for fits in (padded_fit, fit))
    same(weights_of, alone_weights, 5e-3)
    for name in fit:
        # Their inputs are kept in bf16. One that lies between two such numbers becomes either of them, and weights of
        # 20 make up to 0.6 of that in the logits of its token: so not the greatest difference is judged.
        assert (padded_fit[name].logits - fit[name].logits).abs().mean() < 5e-2
    same(tables(model, batches), tables(model, alone), 1e-3)
    same(ltepass.measure_sparsity(model, batches), ltepass.measure_sparsity(model, alone), 1e-3)
    same(measure_union(model, batches), measure_union(model, alone), 1e-3)
