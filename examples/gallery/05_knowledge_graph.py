"""Knowledge graphs: entities from semantic evidence, as SE-GNN has them, with transformer layers, dense and routed.

python -m examples.gallery.05_knowledge_graph          about a quarter of an hour of one core a seed

What is said of an entity is gathered by torch_geometric's aggregations at three levels, as in SE-GNN (Li et al., AAAI
2022): relations that lead to it, entities at their other ends, and both together. A transformer layer makes the entity
of these and of its own vector; another makes a query of an entity and a relation, which is compared with all entities.
Filters and ranks are pykeen's, and so are the smaller sets, of kinship, medicine and countries, and the model that
rows are set beside, ComplEx. The larger set is what WordNet says of places (Debian's package wordnet-base).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.gallery.dense_and_routed import Options, Task, compare, row
from examples.gallery.rows import Row, here, keep

OPTIONS = Options(dense=500, soft=80, hard=80, batch=256, rate=3e-3)
WIDTH, SHARE = 64, 0.25  # of vectors; of triples that are gathered from in a step of training
HITS = "filtered Hits@10"
EPOCHS = 200  # of ComplEx
NOUNS = Path("/usr/share/wordnet/data.noun")
PLACES = "15"  # WordNet's number of nouns for them
# What a synset is a kind, an instance, a member, a part or a substance of. The inverse pointers, which the same file
# holds, would give the answers away.
POINTERS = ("@", "@i", "#m", "#p", "#s")


@dataclass(frozen=True)
class Triples:
    """Head, relation and tail, [n, 3] each; relations from `relations` on are inverse ones, in the second half of
    training alone.
    """

    name: str
    training: Tensor
    validation: Tensor
    testing: Tensor
    entities: int
    relations: int

    @staticmethod
    def of(name: str, parts: Iterable[Tensor], entities: int, relations: int) -> Triples:
        """parts: to train on, to validate and to test, none of them with an inverse."""
        training, validation, testing = parts
        both = torch.cat([training, inverse(training, relations)])
        return Triples(name, both, validation, testing, entities, relations)

    @property
    def known(self) -> Tensor:
        """What is trained on, without the inverse ones."""
        return self.training[: len(self.training) // 2]


def of_pykeen(name: str) -> Triples:
    """Of the sets that pykeen carries. Kinships: 104 members of a people of central Australia, and 25 terms of kinship
    between them; UMLS: 135 kinds of things in medicine; Nations: 14 countries.
    """
    from pykeen.datasets import get_dataset

    found = get_dataset(dataset=name)
    parts = (part.mapped_triples for part in (found.training, found.validation, found.testing))
    return Triples.of(f"pykeen: {name}", parts, found.num_entities, found.num_relations)


def wordnet() -> Triples:
    """3,200 places and kinds of places, with what each is an instance, a kind or a part of."""
    if not NOUNS.exists():
        raise FileNotFoundError(f"{NOUNS} is not there; expected WordNet's nouns; apt-get install wordnet-base")
    names, triples = pointers(NOUNS.read_text().splitlines(), PLACES)
    mixed = triples[torch.randperm(len(triples), generator=torch.Generator().manual_seed(0))]
    tenth = len(mixed) // 10
    parts = (mixed[2 * tenth :], mixed[:tenth], mixed[tenth : 2 * tenth])
    return Triples.of("wordnet-base: places", parts, len(names), len(POINTERS))


def pointers(lines: Iterable[str], kind: str) -> tuple[list[str], Tensor]:
    """Of a WordNet data file: synsets of one kind, and the pointers [n, 3] between them (man 5 wndb)."""
    seen: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        fields = line.partition(" | ")[0].split()
        if line.startswith(" ") or fields[1] != kind:
            continue
        words = 4 + 2 * int(fields[3], 16)  # each with a number behind it
        symbols, offsets = fields[words + 1 :: 4], fields[words + 2 :: 4]
        seen[fields[0]] = list(zip(symbols, offsets, strict=False))  # no frames stand behind a noun's
    number = {offset: i for i, offset in enumerate(seen)}
    triples = [
        (number[head], POINTERS.index(symbol), number[tail])
        for head, said in seen.items()
        for symbol, tail in said
        if symbol in POINTERS and tail in number
    ]
    return list(number), torch.tensor(triples)


def inverse(triples: Tensor, relations: int) -> Tensor:
    """From tail to head, by the inverse relation."""
    return torch.stack([triples[:, 2], (triples[:, 1] + relations) % (2 * relations), triples[:, 0]], 1)


class EvidenceGraph(nn.Module):
    """Scores [B, entities] of heads [B] and relations [B]. gather: three aggregations, as torch_geometric has them."""

    def __init__(self, triples: Triples, gather: list[nn.Module]) -> None:
        super().__init__()
        self.entity = nn.Embedding(triples.entities, WIDTH)
        self.relation = nn.Embedding(2 * triples.relations, WIDTH)
        self.gather = nn.ModuleList(gather)
        self.evidence, self.query = (
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.bias = nn.Parameter(torch.zeros(triples.entities))
        self.triples: Tensor
        self.register_buffer("triples", triples.training, persistent=False)

    def forward(self, heads: Tensor, relations: Tensor) -> tuple[Tensor]:
        entities = self.entities(self.known(heads, relations))
        tokens = torch.stack([entities[heads], self.relation(relations)], 1)
        return (self.query(tokens)[:, 0] @ entities.T / WIDTH**0.5 + self.bias,)

    def known(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Triples to gather from: in training a share, without those that are asked for in either direction."""
        if not self.training:
            return self.triples
        n = self.relation.num_embeddings
        asked = heads * n + relations
        turned = inverse(self.triples, n // 2)
        found = [torch.isin(some[:, 0] * n + some[:, 1], asked) for some in (self.triples, turned)]
        return self.triples[~(found[0] | found[1]) & (torch.rand(len(turned)) < SHARE)]

    def entities(self, triples: Tensor) -> Tensor:
        own = self.entity.weight
        head, relation = own[triples[:, 0]], self.relation(triples[:, 1])
        levels = (relation, head, head * relation)
        seen = [of(said, triples[:, 2], dim_size=len(own)) for of, said in zip(self.gather, levels, strict=True)]
        made: Tensor = self.evidence(torch.stack([own, *seen], 1))[:, 0]
        return made


def evidence_graph(triples: Triples) -> EvidenceGraph:
    from torch_geometric.nn.aggr import SoftmaxAggregation

    return EvidenceGraph(triples, [SoftmaxAggregation(learn=True) for _ in range(3)])


@dataclass
class Ranks:
    """Of what is asked for among all entities but other right ones, on both sides of each triple."""

    triples: Triples
    hits: float = 0.0  # of what was scored last

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """The mean reciprocal rank."""
        from pykeen.evaluation import RankBasedEvaluator
        from pykeen.evaluation.evaluator import create_sparse_positive_filter_, filter_scores_

        every = torch.cat([self.triples.known, self.triples.validation, self.triples.testing])
        asked, evaluator = self.triples.testing, RankBasedEvaluator()
        turned = inverse(asked, self.triples.relations)
        for target, column, queries in (("tail", 2, asked), ("head", 0, turned)):
            scores = model(queries[:, 0], queries[:, 1])[0]
            right = scores.gather(1, asked[:, column, None])
            others, _ = create_sparse_positive_filter_(asked, every, filter_col=column)
            scores = filter_scores_(scores.clone(), others).scatter_(1, asked[:, column, None], right)
            evaluator.process_scores_(asked, target, scores, right)
        found = evaluator.finalize()
        self.hits = float(found.get_metric("both.realistic.hits_at_10"))
        return float(found.get_metric("both.realistic.inverse_harmonic_mean_rank"))


def task(triples: Triples, model: EvidenceGraph, seed: int, options: Options, ranks: Ranks) -> Task:
    pairs, which = triples.training[:, :2].unique(dim=0, return_inverse=True)
    at = torch.stack([which, triples.training[:, 2]])
    size = (len(pairs), triples.entities)
    tails = torch.sparse_coo_tensor(at, torch.ones(at.shape[1]), size, check_invariants=True).coalesce()

    def loss(model: nn.Module, step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pairs), (options.batch,), generator=g)
        scores = model(pairs[rows, 0], pairs[rows, 1])[0]
        right = tails.index_select(0, rows).to_dense().clamp(max=1)
        return nn.functional.cross_entropy(scores, right / right.sum(1, keepdim=True))

    def queries(some: Tensor) -> dict[str, Tensor]:
        return {"heads": some[:, 0], "relations": some[:, 1]}

    g = torch.Generator().manual_seed(seed)
    some = pairs[torch.randperm(len(pairs), generator=g)[: 8 * options.batch]]
    held = torch.cat([triples.validation, inverse(triples.validation, triples.relations)])
    facts = {"example": "05_knowledge_graph", "data": triples.name, "model": "evidence graph, transformer layers"}
    return Task(
        model=model,
        loss=loss,
        score=ranks,
        batches=[queries(part) for part in some.split(options.batch)],
        held_out=[queries(held)],
        facts={**facts, "metric": "filtered MRR", "seed": seed, **here("torch_geometric", "pykeen")},
    )


def complex_of(triples: Triples, seed: int, epochs: int = EPOCHS) -> tuple[float, float]:
    """MRR and Hits@10 of pykeen's ComplEx, trained by pykeen to tell a query's tails from all other entities."""
    from pykeen.pipeline import pipeline
    from pykeen.triples import CoreTriplesFactory

    def factory(some: Tensor, inverse: bool = False) -> CoreTriplesFactory:
        return CoreTriplesFactory(some, triples.entities, triples.relations, create_inverse_triples=inverse)

    found = pipeline(
        training=factory(triples.known, inverse=True),
        validation=factory(triples.validation),
        testing=factory(triples.testing),
        model="ComplEx",
        model_kwargs={"embedding_dim": WIDTH},
        loss="CrossEntropyLoss",
        training_loop="LCWA",
        training_kwargs={"num_epochs": epochs, "batch_size": 256, "use_tqdm": False},
        optimizer_kwargs={"lr": 1e-2},
        evaluation_kwargs={"use_tqdm": False},
        random_seed=seed,
        device="cpu",
    )
    value = found.metric_results.get_metric
    return float(value("both.realistic.inverse_harmonic_mean_rank")), float(value("both.realistic.hits_at_10"))


def rows_of(triples: Triples, seed: int, options: Options) -> Iterator[Row]:
    torch.manual_seed(seed)
    ranks = Ranks(triples)
    work = task(triples, evidence_graph(triples), seed, options, ranks)
    start = time.perf_counter()
    mrr, hits = complex_of(triples, seed)
    beside = row(work, side="ComplEx", value=mrr, seconds=time.perf_counter() - start)
    yield from (beside, replace(beside, metric=HITS, value=hits, seconds=0.0))
    for found in compare(work, options):
        yield from (found, replace(found, metric=HITS, value=ranks.hits, seconds=0.0))


SETS: tuple[Callable[[], Triples], ...] = (
    *(partial(of_pykeen, name) for name in ("Kinships", "UMLS", "Nations")),
    wordnet,
)


def main(options: Options = OPTIONS, sets: Sequence[Callable[[], Triples]] = SETS) -> None:
    graphs, rows = [load() for load in sets], []
    for seed in options.seeds:
        for triples in graphs:
            for found in rows_of(triples, seed, options):
                rows.append(found)
                told = f"{triples.name}, seed {seed}, {found.side} {found.target:.0%} {found.stage}"
                print(f"{told}: {found.metric} {found.value:.4f}", flush=True)
        keep(rows)


if __name__ == "__main__":
    main()
