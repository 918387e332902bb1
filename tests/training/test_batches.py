"""What may be passed as a batch: whatever tokenizers, collators and data loaders give. The rest is refused by name."""

from __future__ import annotations

import gc
from collections import UserDict
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BatchEncoding, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.calibration.ridge import RidgeSums
from ltepass.calibration.sensitivity import loss_sensitivity
from ltepass.config import ROUTERS
from ltepass.errors import CalibrationError, LoweredError
from ltepass.measure.sparsity import measure_union, sparsity_curve, sparsity_of_tail
from ltepass.routed.batches import inputs_of
from ltepass.routed.routed import routers_of
from ltepass.routed.samples import Reservoir, Tally
from ltepass.training.stages import held_out_perplexity, settle
from tests.training.padded import sequences, started, transformed


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


TEXTS = ["a b c d e f g h", "q w e r t y", "z x c v b n m a s d f", "p o i u"]


def tables(batches: Any) -> Tensor:
    model = transformed("llama", budget="model")
    ltepass.calibrate(model, batches)
    return torch.stack([router.quantiles for router in routers_of(model)])


def test_every_form_of_the_same_batch_calibrates_alike() -> None:
    tokens = tokenizer()
    encoded = tokens(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert isinstance(encoded, BatchEncoding)
    collate = DataCollatorForLanguageModeling(tokens, mlm=False)
    rows = [tokens(text, return_token_type_ids=False) for text in TEXTS]
    expected = tables([dict(encoded)])
    forms: tuple[Iterable[Any], ...] = (
        [encoded],
        [UserDict(encoded)],
        [{**encoded, "labels": encoded["input_ids"]}],
        DataLoader(cast(Dataset[Any], rows), batch_size=4, collate_fn=collate),
    )
    for batches in forms:
        assert torch.equal(tables(batches), expected)
    ids = torch.stack(sequences([8] * 6))
    expected = tables([{"input_ids": ids}])
    for batches in ([ids], [[ids]], DataLoader(TensorDataset(ids), batch_size=6)):
        assert torch.equal(tables(batches), expected)


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ("some text", "the text 'some text'"),
        (["some text"], "a list of 1 (the text 'some text' first)"),
        ([3, 5, 8], "a list of 3 (a int first)"),
        (np.zeros((2, 3), dtype=np.int64), "a ndarray"),
        ({"input_ids": [[3, 5], [8]]}, "'input_ids' of a batch is a list of 2 (a list of 2 (a int first) first)"),
        ({"input_ids": np.zeros((2, 3), dtype=np.int64)}, "'input_ids' of a batch is a ndarray"),
        ({"text": ["some text"]}, "'text' of a batch is a list of 1 (the text 'some text' first)"),
        ((torch.zeros(1, 3), torch.zeros(1, 3)), "a tuple of 2 (a Tensor first)"),  # ids and what?
        (object(), "a object"),
    ],
)
def test_anything_else_is_refused_by_what_it_is(batch: Any, seen: str) -> None:
    model = transformed("llama")
    with pytest.raises(CalibrationError) as raised:
        ltepass.calibrate(model, [batch])
    assert seen in str(raised.value)
    assert "return_tensors='pt'" in str(raised.value)
    with pytest.raises(CalibrationError):
        loss_sensitivity(model, [batch])


def test_one_batch_in_place_of_several_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the text 'input_ids'"):
        ltepass.calibrate(transformed("llama"), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_images_and_flags_are_passed_on_as_they_are() -> None:
    named = {"pixel_values": [torch.zeros(3, 4, 4)], "sizes": [(4, 4)], "use_cache": False, "past": None}
    args, kwargs = inputs_of(torch.nn.Linear(1, 1), {**named, "labels": torch.zeros(1)})
    assert args == ()
    assert kwargs == named


EMPTY = torch.zeros(0, 8, dtype=torch.long)


@pytest.mark.parametrize("empty", [EMPTY, {"input_ids": EMPTY}, [EMPTY], torch.zeros(2, 0, dtype=torch.long)])
@pytest.mark.parametrize("budget", ["layer", "model"])
def test_empty_batches_change_nothing(empty: Any, budget: Any) -> None:
    ids = torch.stack(sequences([8] * 6))
    states = []
    for batches in ([empty, ids, empty], [ids]):
        model = transformed("llama", budget=budget, grouping="auto")
        ltepass.calibrate(model, batches, inputs="hard")
        ltepass.set_hidden_sparsity(model, 0.2, batches)
        states.append({k: v for k, v in model.state_dict().items() if "router" in k})
    for name, value in states[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, states[1][name]), name


def test_batches_of_padding_alone_change_nothing_either() -> None:
    ids = torch.stack(sequences([8] * 6))
    nothing = {"input_ids": ids[:2], "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    assert torch.equal(tables([nothing, ids]), tables([ids]))


def test_nothing_but_empty_batches_is_refused() -> None:
    model = started("llama")
    nothing = {"input_ids": EMPTY}
    for call in (
        lambda: ltepass.calibrate(model, [nothing]),
        lambda: ltepass.measure_sparsity(model, [nothing]),
        lambda: measure_union(model, [nothing]),
        lambda: loss_sensitivity(model, [nothing]),
        lambda: settle(model, [nothing], 0.5),
        lambda: warm_start(model, EMPTY),
        lambda: ltepass.set_input_sparsity(model, 0.5, [nothing]),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CalibrationError, match=r"no token|no batch"):
            call()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("budget", ["layer", "model"])
def test_a_token_that_overflows_is_refused_by_its_site_and_nothing_changes(budget: Any, router: Any) -> None:
    """One infinite value would make routers, tables or weights NaN, and NaN opens no gate: the FFN would be silent."""
    model, ids = started("llama", budget=budget, router=router), torch.stack(sequences([8] * 6)).clamp_max(59)
    bad = ids.clone()
    bad[2, 3] = 60
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = torch.inf
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call in (
        lambda: ltepass.calibrate(model, [ids, bad], grouping="coactivation"),
        lambda: ltepass.calibrate(model, [ids, bad], grouping="identity", inputs="hard"),
        lambda: loss_sensitivity(model, [bad]),
        lambda: settle(model, [ids, bad], 0.5),
        lambda: warm_start(model, bad),
        lambda: ltepass.set_input_sparsity(model, 0.5, [bad]),
    ):
        with pytest.raises(CalibrationError, match="saw values that are not finite"):
            call()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    ltepass.calibrate(model, [ids])


def test_a_warm_start_of_something_else_is_refused_by_what_it_is() -> None:
    with pytest.raises(CalibrationError, match="a batch is the text 'some text'"):
        warm_start(started("llama"), "some text")  # type: ignore[arg-type]


def test_held_out_perplexity_reads_any_mapping() -> None:
    model, ids = started("llama"), torch.stack(sequences([8] * 2))
    batch = {"input_ids": ids, "labels": ids}
    assert held_out_perplexity(model, [batch]) == held_out_perplexity(model, [UserDict(batch)])


def test_a_ridge_sum_begins_with_the_first_rows_that_there_are() -> None:
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    plain, uneven = RidgeSums(), RidgeSums()
    plain.add(x, y)
    for part in (slice(0, 0), slice(0, 20), slice(20, 20)):
        uneven.add(x[part], y[part])
    for a, b in zip(plain.solve(), uneven.solve(), strict=True):
        assert torch.equal(a, b)


def test_a_sample_is_uniform_over_all_batches_and_does_not_depend_on_them() -> None:
    rows = torch.arange(3000)[:, None]
    samples = []
    for size in (3000, 700, 7):
        sample = Reservoir(500)
        for part in rows.split(size):
            sample.add(part)
        samples.append(sample.rows())
    assert all(torch.equal(sample, samples[0]) for sample in samples)
    assert len(samples[0].unique()) == 500
    assert abs(float(samples[0].double().mean()) - 1500) < 4 * 866 / 500**0.5
    small = Reservoir(500)
    small.add(rows[:30])
    assert torch.equal(small.rows(), rows[:30])


def test_measuring_keeps_counts_and_no_logits() -> None:
    """Not one tensor of logits is alive when the next batch is asked for."""
    model, alive = started("llama"), []
    n_experts = next(routers_of(model)).n_experts

    def batches() -> Any:
        for _ in range(4):
            gc.collect()
            tensors = [o for o in gc.get_objects() if type(o) is Tensor]
            alive.append(sum(t.numel() == 48 * 32 * n_experts for t in tensors))
            yield torch.randint(0, 61, (48, 32))

    for measure in (ltepass.measure_sparsity, measure_union):
        measure(model, batches())
    assert max(alive) == 0


def test_no_pass_keeps_keys_and_values() -> None:
    """Nobody reads them; of a 7B model they are half a gigabyte for 1,024 tokens."""
    ids, kept = torch.zeros(2, 9, dtype=torch.long), list[object]()
    model = transformed("llama")
    model.register_forward_hook(lambda module, args, out: kept.append(out.past_key_values))
    ltepass.calibrate(model, [ids])
    warm_start(model, ids)
    assert kept
    assert not any(kept)
    assert model(ids).past_key_values is not None


def test_counts_are_exact_beyond_what_floats_count() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add(torch.ones(2**24, dtype=torch.bool))
    tally.add(torch.tensor([True, False]))
    assert int(tally.true) == tally.count - 1 == 3 * 2**24 + 1


def test_a_lowered_model_is_refused_with_one_message() -> None:
    model, ids = started("llama"), torch.zeros(1, 9, dtype=torch.long)
    ltepass.set_mode(model, "hard")
    ltepass.lower(model)
    for name, call in {
        "measure_sparsity": lambda: ltepass.measure_sparsity(model, [ids]),
        "measure_union": lambda: measure_union(model, [ids]),
        "sparsity_of_tail": lambda: sparsity_of_tail(model, ids[0], 2),
        "settle": lambda: ltepass.settle(model, [ids], 0.5),
        "loss_sensitivity": lambda: loss_sensitivity(model, [ids]),
        "sparsity_curve": lambda: next(sparsity_curve(model, ids, [0.5])),
        "calibrate": lambda: ltepass.calibrate(model, [ids]),
        "set_mode": lambda: ltepass.set_mode(model, "soft"),
        "set_hidden_sparsity": lambda: ltepass.set_hidden_sparsity(model, 0.5, [ids]),
        "set_input_sparsity": lambda: ltepass.set_input_sparsity(model, 0.5, [ids]),
        "warm_start": lambda: warm_start(model, ids),
        "remove": lambda: ltepass.remove(model),
        "lower": lambda: ltepass.lower(model),
    }.items():
        expected = f"the model is lowered (scope 'ffn'), which is hard mode; {name} expects it as trained; call "
        with pytest.raises(LoweredError) as raised:
            call()
        assert str(raised.value) == expected + "ltepass.unlower(model)"
