"""Texts for the demo and the comparisons: the language reference inside CPython, train and held-out slices apart."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor


def python_docs(held_out: float = 0.12, seed: int = 0) -> tuple[str, str]:
    """(train, held_out): whole topics of `pydoc_data.topics`; no paragraph stands on both sides.

    The reference repeats itself (one topic contains others whole), so a split by topic would test on trained text.
    """
    from pydoc_data.topics import topics

    return split_topics(topics, held_out, seed)


def split_topics(topics: dict[str, str], held_out: float, seed: int) -> tuple[str, str]:
    """Hold out whole topics until they make up `held_out` of the text; drop their paragraphs from the training side."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    wanted = held_out * sum(len(topics[name]) for name in names)
    test: list[str] = []
    # A topic above half the wanted size would decide the slice alone.
    for name in names:
        if sum(len(topics[n]) for n in test) < wanted and len(topics[name]) < wanted / 2:
            test.append(name)
    seen: set[str] = set()
    kept_test = _unseen_paragraphs([topics[name] for name in test], seen)
    kept_train = _unseen_paragraphs([topics[name] for name in names if name not in test], seen)
    return kept_train, kept_test


def _unseen_paragraphs(texts: list[str], seen: set[str]) -> str:
    """The texts joined, without paragraphs met before (short ones, such as headings, may repeat)."""
    kept = []
    for text in texts:
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) > 40:
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def token_blocks(tokenizer: Any, text: str, length: int, limit: int | None = None) -> Tensor:
    """[n_blocks, length] int64: the text's tokens cut into whole blocks, at most `limit`; the rest is dropped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    n_blocks = len(ids) // length
    if limit is not None:
        n_blocks = min(n_blocks, limit)
    return torch.tensor(ids[: n_blocks * length], dtype=torch.int64).view(n_blocks, length)
