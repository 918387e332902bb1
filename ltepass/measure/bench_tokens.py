"""The time of one token of several sides that take turns, and the least that reading its bytes would take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from torch import Tensor

from ltepass.errors import ConfigError
from ltepass.measure.processes import Seat, Worker, workers
from ltepass.measure.records import Environment, TokenRecord
from ltepass.measure.sides.llama_cpp_side import LlamaCpp
from ltepass.measure.sides.side import Facts, Side
from ltepass.measure.timing import Timing
from ltepass.progress import steps

PROMPT_TOKENS = 64
PREFILL_TOKENS = 512  # at most
COLD = 2  # times of a call that do not count: the prompt's, and the first after it
PASSES = 5  # of reading the weights, in a round
MEGA = 1e6


@dataclass(frozen=True, kw_only=True)
class Text:
    """ids: [T] int64, whose first prompt_tokens are the prompt of `tokens` timed ones; blocks: for the perplexity.

    Raises ConfigError where too few tokens are left to time.
    """

    ids: Tensor
    tokens: int
    blocks: Tensor
    prompt_tokens: int = PROMPT_TOKENS

    def __post_init__(self) -> None:
        if len(self.timed) < COLD + 6:
            raise ConfigError(
                f"{len(self.ids)} tokens were given, of which {len(self.timed)} are to be timed; expected at least "
                f"{self.prompt_tokens + COLD + 6} and {COLD + 6}; pass a longer text, or more --tokens"
            )

    @property
    def prompt(self) -> Tensor:
        return self.ids[: self.prompt_tokens]

    @property
    def timed(self) -> Tensor:
        return self.ids[self.prompt_tokens : self.prompt_tokens + self.tokens]

    @property
    def prefill(self) -> Tensor:
        return self.ids[:PREFILL_TOKENS]

    @property
    def length(self) -> int:
        """Tokens that a call sees at most."""
        return max(self.prompt_tokens + self.tokens, len(self.prefill) + 1, self.blocks.shape[1])


def bench_tokens(
    sides: Sequence[Side], text: Text, *, model: str, threads: Sequence[int], rounds: int
) -> Iterator[list[TokenRecord]]:
    """For each number of threads, as soon as it is measured, a record a side; a side of ours must be among them: its
    weights give the bandwidth.

    A round is one call of each side, in an order that rotates, and one reading of the weights; the first round is not
    counted. model: what the rows call it.
    """
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    for n in threads:
        yield _on(n, sides, text, model=model, rounds=rounds, run=run)


def _on(threads: int, sides: Sequence[Side], text: Text, *, model: str, rounds: int, run: str) -> list[TokenRecord]:
    with workers(sides, threads=threads, length=text.length) as opened:
        ours, passes = _whose_weights(opened), list[float]()
        token = _turns(opened, text.prompt, text.timed, rounds, lambda: passes.extend(_read_speeds(ours)))
        load = [worker.ask(Seat.load_seconds) for worker in opened]
        memory = [worker.ask(Seat.memory) for worker in opened]
        prefill = _turns(opened, text.prefill, text.prefill[:1], rounds, warm=True)
        here = Environment.here(run, bandwidth=statistics.median(passes), flops=ours.ask(Seat.gemm_rate))
        ids = text.ids[: text.prompt_tokens + text.tokens]
        facts = [
            worker.ask(partial(Seat.facts, ids=ids, prompt_tokens=text.prompt_tokens, blocks=text.blocks))
            for worker in steps("perplexity of sides" if len(text.blocks) else "bytes of sides", opened)
        ]
    here = replace(here, threads=threads)
    return [
        replace(_record(here, model, side.name, facts[i], token[i], prefill[i], memory[i], text), load_s=load[i])
        for i, side in enumerate(sides)
    ]


def _record(
    here: Environment,
    model: str,
    side: str,
    facts: Facts,
    token: list[list[float]],
    prefill: list[list[float]],
    memory: tuple[int, int],
    text: Text,
) -> TokenRecord:
    """token, prefill: seconds, a list a call."""
    timing = Timing.of([seconds for call in token for seconds in call[COLD:]])
    positions = text.prompt_tokens + (COLD + len(text.timed) - 1) / 2  # that the timed token in the middle sees
    weights, cache, ms = facts.weight_bytes / MEGA, positions * facts.position_bytes / MEGA, 1e3 * timing.median
    ideal = (weights + cache) / here.bandwidth_gbs  # MB over GB/s are ms
    written = (text.prompt_tokens + len(text.timed)) * facts.position_bytes
    return TokenRecord(
        **vars(here),
        model=model,
        side=side,
        how=facts.how,
        format=facts.format,
        head=facts.head,
        sparsity=facts.sparsity,
        active=facts.active,
        router=facts.router,
        router_share=facts.router_share,
        group_size=facts.group_size,
        tokens=timing.repeats,
        ms=ms,
        p20_ms=1e3 * timing.p20,
        p80_ms=1e3 * timing.p80,
        p99_ms=1e3 * timing.p99,
        prefill_tokens=len(text.prefill),
        prefill_ms=1e3 * statistics.median(call[0] for call in prefill),
        perplexity=facts.perplexity,
        weight_mb=weights,
        kv_mb=cache,
        resident_mb=memory[0] / MEGA,
        peak_mb=memory[1] / MEGA,
        gbs=(weights + cache) / ms,
        byte_ideal_ms=ideal,
        share_of_byte_ideal=ideal / ms,
        prompt_tokens=text.prompt_tokens,
        memory_over_weights=(memory[1] - written) / facts.held_bytes,
    )


def _whose_weights(opened: Sequence[Worker]) -> Worker:
    """The first lowered side, or the first of ours."""
    ours = [worker for worker in opened if not isinstance(worker.side, LlamaCpp)]
    assert ours, "no side of ours"
    return next((worker for worker in ours if worker.side.name == "ltepass"), ours[0])


def _turns(
    opened: Sequence[Worker],
    prompt: Tensor,
    tokens: Tensor,
    rounds: int,
    after: Callable[[], object] = tuple,
    *,
    warm: bool = False,
) -> list[list[list[float]]]:
    """The seconds of each counted call of each side. after: what ends a counted round. warm: another call goes before
    each of them, for sides that are more than memory together: their weights were read from the disk again.
    """
    calls: list[list[list[float]]] = [[] for _ in opened]
    n = len(opened)
    for turn in steps(f"turns of {n} sides, {len(tokens)} tokens each", range(n * (1 + rounds))):
        counted, i = turn >= n, (turn // n + turn) % n
        for _ in range(2 if warm and counted else 1):
            times = opened[i].ask(partial(Seat.times, prompt=prompt, tokens=tokens))
        if counted:
            calls[i].append(times)
        if counted and turn % n == n - 1:
            after()
    return calls


def _read_speeds(worker: Worker) -> list[float]:
    """Bytes/s of reading the weights alone, a few times."""
    passes = [worker.ask(Seat.read_pass) for _ in range(PASSES)]
    return [size / seconds for size, seconds in passes]
