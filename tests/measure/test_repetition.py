"""How much continuations repeat themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ltepass
from ltepass.measure.quality import repeated_share, repetition
from tests.models.zoo import llama


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=1, max_size=4))
def test_the_share_is_that_of_a_plain_count(rows: list[list[int]]) -> None:
    again = 0
    for row in rows:
        grams = [tuple(row[i : i + 4]) for i in range(9)]
        again += sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated_share(torch.tensor(rows)) == pytest.approx(again / (9 * len(rows)))


def test_a_loop_repeats_all_but_its_first_round_and_rows_do_not_share() -> None:
    loop = torch.arange(5).repeat(8)[None]  # 37 4-grams, five of them distinct
    assert repeated_share(loop) == pytest.approx(32 / 37)
    assert repeated_share(torch.arange(40)[None].repeat(3, 1)) == 0.0


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_continuations_are_greedy_equally_long_and_those_of_the_present_mode(batch: int) -> None:
    """An end of text, which this model likes best everywhere, is not let through."""
    model = llama(eos_token_id=7)
    model.get_output_embeddings().weight.data[7] *= 50
    prompts = torch.randint(0, 61, (5, 6), generator=torch.Generator().manual_seed(0))
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=12), calibration=[prompts])
    for mode in ("dense", "hard"):
        ltepass.set_mode(model, mode)
        ids = prompts
        for _ in range(20):
            logits = model(input_ids=ids).logits[:, -1]
            logits[:, 7] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert repetition(model, prompts, 20, batch) == pytest.approx(repeated_share(ids[:, 6:]))
