"""Sides take turns in processes of their own; a row's figures are those of its side, worked by hand."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ltepass
from examples.bench import token_table
from ltepass.commands.bench_tables import token_plot, token_tables
from ltepass.commands.load import load
from ltepass.errors import ConfigError
from ltepass.measure.bench_tokens import Text, bench_tokens
from ltepass.measure.processes import Seat, Worker
from ltepass.measure.quality import perplexity
from ltepass.measure.records import TokenRecord, append, read
from ltepass.measure.sides.side import Facts
from ltepass.measure.sides.transformers_side import Transformers
from ltepass.measure.sparsity import sparsity_of_tail
from ltepass.measure.token_bytes import weights_read
from ltepass.passes.lower.lower_linear_modules import lowered_linears
from ltepass.transform_and_lower import remove
from tests.measure.test_token_bytes import FFN, routed
from tests.measure.tiny import made

TEXT = Text(ids=torch.arange(96) % 61, tokens=20, blocks=torch.arange(60).view(2, 30))
FACTS = Facts(
    how="eager", format="F32", head="F32", weight_bytes=8e6, held_bytes=1e7, position_bytes=1e4, perplexity=3.0
)


@dataclass(frozen=True)
class Stub:
    """A side that answers what a test gives it."""

    name: str


class Stand:
    """In place of its process."""

    def __init__(self, side: Stub, calls: list[str]) -> None:
        self.side, self.calls, self.round, self.prefills = side, calls, 0, 0

    def ask(self, call: Any) -> Any:
        what = getattr(call, "func", call).__name__
        self.calls.append(f"{self.side.name} {what}")
        if what != "times":
            return {
                "memory": (20e6, 30e6),
                "load_seconds": 0.5,
                "read_pass": (10**9, 0.1),
                "gemm_rate": 1e12,
                "facts": FACTS,
            }[what]
        if len(call.keywords["tokens"]) == 1:
            self.prefills += 1  # one of the first round, then two a turn, the first of which reads from a disk
            return [0.5 if self.prefills % 2 else 9.0]
        self.round += 1
        step = 1e-3 if self.side.name == "ltepass" else 4e-3
        return [0.5, 0.25, *([9.0] * 18 if self.round == 1 else [step] * 18)][: len(call.keywords["tokens"])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what the sides were asked, in order; no process starts."""
    asked: list[str] = []

    @contextmanager
    def seats(sides: Sequence[Any], *, threads: int, length: int) -> Iterator[list[Stand]]:
        assert length == 97  # the whole prefill and a token more
        asked.append(f"threads {threads}")
        yield [Stand(side, asked) for side in sides]

    monkeypatch.setattr("ltepass.measure.bench_tokens.workers", seats)
    return asked


def rows() -> list[TokenRecord]:
    sides: list[Any] = [Stub("transformers"), Stub("ltepass")]
    return list(chain.from_iterable(bench_tokens(sides, TEXT, model="m", threads=(1, 2), rounds=3)))


def test_a_row_has_the_median_of_its_turns_and_the_ideal_of_its_bytes(calls: list[str]) -> None:
    dense, ours, *_ = rows()
    assert [ours.ms, ours.p99_ms, ours.tokens] == pytest.approx([1.0, 1.0, 3 * 18])  # no first round
    assert dense.ms == pytest.approx(4.0)
    assert [ours.prefill_tokens, ours.prefill_ms] == pytest.approx([96, 500])
    assert ours.bandwidth_gbs == pytest.approx(10)
    # timed are tokens 2 to 19 after 64: the one in the middle sees 64 + 10.5 positions of 10 kB
    assert [ours.weight_mb, ours.kv_mb] == pytest.approx([8, 0.745])
    assert ours.byte_ideal_ms == pytest.approx(0.8745)
    assert [ours.share_of_byte_ideal, dense.share_of_byte_ideal] == pytest.approx([0.8745, 0.8745 / 4])
    assert ours.gbs == pytest.approx(8.745)
    assert (ours.resident_mb, ours.peak_mb, ours.load_s) == (20, 30, 0.5)
    assert ours.memory_over_weights == pytest.approx((30 - 0.84) / 10), "84 positions are written"


def test_turns_rotate_and_the_weights_that_are_read_are_ours(calls: list[str]) -> None:
    records = rows()
    assert [(r.threads, r.side) for r in records] == [(n, s) for n in (1, 2) for s in ("transformers", "ltepass")]
    assert len({r.run for r in records}) == 1
    turns = [call.split()[0] for call in calls if call.endswith("times")]
    assert turns[:4] == ["transformers", "ltepass", "ltepass", "transformers"]
    assert "transformers read_pass" not in calls
    first = calls[: calls.index("threads 2")]
    assert first.index("ltepass memory") < first.index("ltepass facts")  # what facts takes is no memory of a token
    assert [call.split()[1] for call in first[-2:]] == ["facts", "facts"]


def test_rows_of_few_threads_are_there_before_those_of_more(calls: list[str]) -> None:
    sides: list[Any] = [Stub("ltepass")]
    first = next(bench_tokens(sides, TEXT, model="m", threads=(1, 2), rounds=1))
    assert [r.threads for r in first] == [1]
    assert "threads 2" not in calls


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="70 tokens were given, of which 6 are to be timed; expected at least 72"):
        Text(ids=torch.arange(70), tokens=20, blocks=torch.arange(60).view(2, 30))


def test_rows_survive_the_file(calls: list[str], tmp_path: Path) -> None:
    append(tmp_path / "rows.csv", rows())
    again = read(tmp_path / "rows.csv", TokenRecord)
    assert [(r.side, r.threads, r.ms) for r in again] == [(r.side, r.threads, r.ms) for r in rows()]


def wide_rows() -> list[TokenRecord]:
    """As on a model of 1B, where every figure is long."""
    sides: list[Any] = [Stub("transformers"), Stub("ltepass")]
    (records,) = bench_tokens(sides, TEXT, model="m", threads=(1,), rounds=1)
    base = records[1]
    big: dict[str, Any] = {
        "ms": 312.34,
        "p99_ms": 1234.56,
        "perplexity": 1234.56,
        "weight_mb": 4943.2,
        "prefill_ms": 12345.6,
    }
    big |= {"resident_mb": 5210.4, "gbs": 34.56, "router": "linear", "group_size": 16, "sparsity": 0.5}
    file: dict[str, Any] = {"side": "llama.cpp file", "format": "Q4_1", "head": "Q8_0", "router": "", "sparsity": 0.0}
    unread = {"perplexity": math.nan}
    return [replace(base, **big | unread, side="transformers"), replace(base, **big), replace(base, **big | file)]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_terminal_with_every_figure_whole(calls: list[str], width: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(token_tables(wide_rows()))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    for figure in ("transformers", "312.3", "1235", "4944", "34.6", "12346", "5210", "50%", "Q4_1", "Q8_0"):
        assert any(figure in line.split() for line in lines), (figure, lines)
    assert "linear router, experts of 16" in " ".join(out.getvalue().split())


def test_the_page_sets_our_rows_beside_llama_cpps_in_the_same_format(calls: list[str]) -> None:
    """And beside the targets, which are of ours alone; the newest run counts."""
    dense, ours, *_ = rows()
    ours = replace(ours, sparsity=0.5, router="linear", group_size=8)
    theirs = replace(dense, side="llama.cpp", ms=3.0)
    old = replace(ours, run="2020", ms=99.0)
    lowered = replace(dense, side="ltepass, dense")
    bytes_ours = replace(dense, side="ltepass, exported", format="int8", ms=2.0)
    bytes_theirs = replace(theirs, format="Q8_0", ms=2.5)
    shown = token_table.markdown([old, dense, lowered, ours, bytes_ours, theirs, bytes_theirs]).splitlines()
    ours_row, theirs_row = (
        next(line for line in shown if line.startswith(f"| {s} |")) for s in ("ltepass", "llama.cpp")
    )
    assert "| 50% (linear, experts of 8) |" in ours_row
    assert "| 0.87 (0.7) | 3.00x of 3.43x (1.4) |" in ours_row
    assert "| 0.22 | - |" in theirs_row
    assert "99.00" not in "".join(shown)
    assert "0.75x of 3.43x (1.15)" in next(line for line in shown if line.startswith("| ltepass, dense |"))
    assert "1.25x of 2.86x (1.15)" in next(line for line in shown if line.startswith("| ltepass, exported |"))
    assert "(1.15)" not in next(line for line in shown if line.startswith("| transformers |")), "it is not ours"


def test_the_plot_has_a_bar_a_row(calls: list[str]) -> None:
    pytest.importorskip("matplotlib")
    drawn = token_plot(wide_rows())
    assert "ltepass F32 50% sparse, 1 thread" in drawn
    assert "llama.cpp file Q4_1, 1 thread" in drawn


def tiny_routed() -> Any:
    """Loaded in another process as well: a function of this module."""
    torch.manual_seed(0)
    return routed()


@pytest.mark.parametrize("sparsity", [None, 0.75])
def test_a_side_of_ours_is_the_lowered_model(sparsity: float | None) -> None:
    engine: Any = Transformers(load=tiny_routed, routed=True, sparsity=sparsity).open(64)
    assert ltepass.report(engine._model).lowered == "ffn"
    times = engine.times(TEXT.prompt, TEXT.timed)
    assert len(times) == 20
    assert min(times) > 0
    size, seconds = engine.read_pass()
    assert size == sum(p.nbytes for p in engine._model.parameters()) - 61 * 64 * 4
    assert seconds > 0
    facts, expected = engine.facts(TEXT.ids, 64, TEXT.blocks), tiny_routed()
    if sparsity is not None:
        ltepass.set_sparsity(expected, sparsity)
    assert facts.perplexity == pytest.approx(perplexity(expected, TEXT.blocks), rel=1e-6)
    assert facts.active == pytest.approx(1 - sparsity_of_tail(expected, TEXT.ids, 64))
    assert (facts.router, facts.group_size, facts.sparsity) == ("linear", 8, 0.5 if sparsity is None else sparsity)
    assert facts.weight_bytes == pytest.approx(weights_read(expected, facts.active))


def test_a_side_in_bf16_keeps_its_routers_in_fp32(tmp_path: Path) -> None:
    tiny_routed().save_pretrained(tmp_path)
    load_bf16 = partial(load, str(tmp_path), "cpu", torch.bfloat16)
    engine: Any = Transformers(load=load_bf16, routed=True).open(64)
    assert len(engine.times(TEXT.prompt, TEXT.timed)) == 20
    facts = engine.facts(TEXT.ids, 64, TEXT.blocks)
    assert (facts.format, facts.head) == ("BF16", "BF16")
    dense, routers = weights_read(made("llama")), 2 * 12 * 65 * 4
    assert facts.weight_bytes == pytest.approx(dense / 2 + routers - (1 - facts.active) * FFN)


def test_a_dense_side_has_no_routers() -> None:
    engine: Any = Transformers(load=tiny_routed, routed=False).open(64)
    facts = engine.facts(TEXT.ids, 64, TEXT.blocks)
    assert (facts.router, facts.active, facts.format) == ("", 1.0, "F32")
    assert facts.weight_bytes == weights_read(made("llama"))
    assert math.isnan(engine.facts(TEXT.ids, 64, TEXT.blocks[:0]).perplexity)


def test_a_dense_side_of_ours_is_lowered_without_its_routers() -> None:
    side = Transformers(load=tiny_routed, routed=False, lowered=True)
    engine: Any = side.open(64)
    assert side.name == "ltepass, dense"
    assert lowered_linears(engine._model) == 2 * 7 + 1  # of two layers, and the head
    facts = engine.facts(TEXT.ids, 64, TEXT.blocks)
    assert facts.weight_bytes == weights_read(made("llama"))
    assert facts.perplexity == pytest.approx(perplexity(remove(tiny_routed()), TEXT.blocks), rel=1e-5)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_a_quantised_side_counts_what_its_ops_read(weights: Any, bits: int) -> None:
    pytest.importorskip("torchao")
    engine: Any = Transformers(load=tiny_routed, routed=False, lowered=True, quantised=weights).open(64)
    facts = engine.facts(TEXT.ids, 64, TEXT.blocks)
    assert facts.format == weights
    assert facts.weight_bytes < weights_read(made("llama")) * (bits + 1) / 32 + 8000, "norms, scales, a row"


@dataclass(frozen=True)
class Empty:
    """A side that holds nothing."""

    name: str = "empty"

    def imports(self) -> None:
        pass

    def open(self, length: int) -> Any:
        return None


def threads(seat: Seat) -> int:
    return torch.get_num_threads()


def double(seat: Seat, x: Tensor) -> Tensor:
    return 2 * x


def refuse(seat: Seat) -> None:
    raise ConfigError("not so")


def fail(seat: Seat) -> None:
    raise KeyError("a bug")


def die(seat: Seat) -> None:
    os._exit(7)


def test_a_process_answers_refuses_fails_and_dies() -> None:
    worker = Worker(Empty(), threads=2, length=8)
    try:
        assert worker.ask(threads) == 2
        assert torch.equal(worker.ask(partial(double, x=torch.arange(3))), torch.tensor([0, 2, 4]))
        now, peak = worker.ask(Seat.memory)
        assert now <= peak
        with pytest.raises(ConfigError, match="not so"):
            worker.ask(refuse)
        with pytest.raises(RuntimeError, match=r"in the process of empty:[\s\S]*KeyError: 'a bug'"):
            worker.ask(fail)
        with pytest.raises(RuntimeError, match="the process of empty ended with status 7"):
            worker.ask(die)
    finally:
        worker.close()
    assert worker._process.exitcode == 7


def test_a_longer_prompt_stands_before_the_timed_tokens() -> None:
    text = Text(ids=torch.arange(100), tokens=20, blocks=torch.arange(60).view(2, 30), prompt_tokens=70)
    assert (len(text.prompt), text.timed.tolist(), text.length) == (70, list(range(70, 90)), 101)
    with pytest.raises(ConfigError, match="expected at least 88 and 8"):
        Text(ids=torch.arange(85), tokens=20, blocks=torch.arange(60).view(2, 30), prompt_tokens=80)
