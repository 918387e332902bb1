"""Knowledge graphs: entities from semantic evidence, as SE-GNN has them, with transformer layers, dense and routed.

python -m examples.gallery.05_knowledge_graph          about three minutes of one core a seed

What is said of an entity is gathered by torch_geometric's aggregations at three levels, as in SE-GNN (Li et al., AAAI
2022): relations that lead to it, entities at their other ends, and both together. A transformer layer makes the entity
of these and of its own vector; another makes a query of an entity and a relation, which is compared with all entities.
Set, filters and ranks are pykeen's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from examples.gallery.dense_and_routed import Options, Task, compare
from examples.gallery.rows import here, keep

OPTIONS = Options(dense=500, soft=80, hard=80, batch=256, rate=3e-3)
WIDTH, SHARE = 64, 0.25  # of vectors; of triples that are gathered from in a step of training


@dataclass(frozen=True)
class Triples:
    """Head, relation and tail, [n, 3] each; relations from `relations` on are inverse ones, in training alone."""

    training: Tensor
    validation: Tensor
    testing: Tensor
    entities: int
    relations: int


def load() -> Triples:
    """104 members of a people of central Australia, and 25 terms of kinship between them."""
    from pykeen.datasets import Kinships

    found = Kinships()
    training, validation, testing = (part.mapped_triples for part in (found.training, found.validation, found.testing))
    both = torch.cat([training, inverse(training, found.num_relations)])
    return Triples(both, validation, testing, found.num_entities, found.num_relations)


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

        known = self.triples.training[: len(self.triples.training) // 2]
        every = torch.cat([known, self.triples.validation, self.triples.testing])
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
    tails = torch.zeros(len(pairs), triples.entities).index_put((which, triples.training[:, 2]), torch.tensor(1.0))
    tails = tails / tails.sum(1, keepdim=True)

    def loss(model: nn.Module, step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pairs), (options.batch,), generator=g)
        scores = model(pairs[rows, 0], pairs[rows, 1])[0]
        return nn.functional.cross_entropy(scores, tails[rows])

    def queries(some: Tensor) -> dict[str, Tensor]:
        return {"heads": some[:, 0], "relations": some[:, 1]}

    g = torch.Generator().manual_seed(seed)
    some = pairs[torch.randperm(len(pairs), generator=g)[: 8 * options.batch]]
    held = torch.cat([triples.validation, inverse(triples.validation, triples.relations)])
    facts = {"example": "05_knowledge_graph", "data": "pykeen: Kinships", "model": "evidence graph, transformer layers"}
    return Task(
        model=model,
        loss=loss,
        score=ranks,
        batches=[queries(part) for part in some.split(options.batch)],
        held_out=[queries(held)],
        facts={**facts, "metric": "filtered MRR", "seed": seed, **here("torch_geometric", "pykeen")},
    )


def main(options: Options = OPTIONS) -> None:
    triples, rows = load(), []
    for seed in options.seeds:
        torch.manual_seed(seed)
        ranks = Ranks(triples)
        for found in compare(task(triples, evidence_graph(triples), seed, options, ranks), options):
            rows += [found, replace(found, metric="filtered Hits@10", value=ranks.hits, seconds=0.0)]
            print(f"seed {seed} {found.side} {found.target:.0%} {found.stage}: {found.value:.4f} {ranks.hits:.4f}")
        keep(rows)


if __name__ == "__main__":
    main()
