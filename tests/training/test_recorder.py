"""What routers leave for the losses: whoever calls them, and whatever becomes of the call."""

from __future__ import annotations

import copy

import pytest
import torch

import ltepass
from ltepass.errors import TrainingError
from ltepass.routed.routed import routers_of
from ltepass.routed.router import Router
from ltepass.routed.undo import all_or_nothing
from ltepass.training.auxiliary_loss import take_auxiliary
from tests.training.padded import started

IDS = torch.zeros(1, 4, dtype=torch.long)


def test_a_mode_that_is_set_by_hand_leaves_the_last_calls_losses() -> None:
    model = started("llama")
    for router in routers_of(model):
        router.mode = "soft"
    for _ in range(2):
        model(input_ids=IDS)
    assert int(take_auxiliary(model, None).tokens) == 4


def test_a_call_that_fails_takes_back_what_it_asked_of_recorders() -> None:
    model = started("llama")
    ltepass.set_mode(model, "soft")
    model(input_ids=IDS)

    def work() -> None:
        for router in routers_of(model):
            router.recorder.count_inactive = router.recorder.share_neighbours = True
            router.recorder.calls.clear()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_or_nothing(model, work)
    assert not any(r.recorder.count_inactive or r.recorder.share_neighbours for r in routers_of(model))
    assert int(take_auxiliary(model, None).tokens) == 4


def test_a_refused_mask_leaves_the_losses_to_the_right_one() -> None:
    model = started("llama")
    ltepass.set_mode(model, "soft")
    model(input_ids=IDS)
    with pytest.raises(TrainingError, match="labels have 3"):
        take_auxiliary(model, torch.ones(1, 3, dtype=torch.bool))
    assert int(take_auxiliary(model, torch.ones(1, 4, dtype=torch.bool)).tokens) == 4
    with pytest.raises(TrainingError, match="left no auxiliary loss"):
        take_auxiliary(model, None)  # taken


def test_what_a_replica_of_data_parallel_records_is_lost_with_it() -> None:
    router = Router(4, 8, 2)
    router.mode = "soft"
    router(torch.ones(3, 4))
    calls = list(router.recorder.calls)
    replica = router._replicate_for_data_parallel()
    replica.weight, replica.bias = router.weight, router.bias
    replica(torch.ones(5, 4))
    assert router.recorder.calls == calls


def test_a_router_that_an_earlier_version_pickled_keeps_what_was_asked_of_it() -> None:
    state = Router(4, 8, 2).__getstate__()
    del state["recorder"]
    old = Router.__new__(Router)
    old.__setstate__({**state, "kept": [], "rows": None, "count_inactive": True, "share_neighbours": True})
    old(torch.ones(3, 4))
    assert old.recorder.count_inactive
    assert old.recorder.share_neighbours
    assert "kept" not in old.__dict__


def test_a_copy_keeps_what_was_asked_of_it_and_no_call() -> None:
    router = Router(4, 8, 2)
    router.mode, router.recorder.count_inactive = "soft", True
    router(torch.ones(3, 4))
    for twin in (copy.copy(router), copy.deepcopy(router)):
        assert twin.recorder.count_inactive
        assert not twin.recorder.calls
    assert len(router.recorder.calls) == 1
