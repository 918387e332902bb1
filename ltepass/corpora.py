"""Texts for the demo and the comparisons: train and held-out slices apart, and other kinds, to measure on alone."""

from __future__ import annotations

import ast
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ltepass.errors import ConfigError


class Tokenizer(Protocol):
    """What is asked of transformers' tokenizers, and of others in their place."""

    def __call__(
        self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> Mapping[str, list[int]]: ...

    def decode(self, ids: Tensor, *, skip_special_tokens: bool = ...) -> str: ...


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


def token_blocks(tokenizer: Tokenizer, text: str, length: int, limit: int | None = None) -> Tensor:
    """[n_blocks, length] int64: the text's tokens cut into whole blocks, at most `limit`; the rest is dropped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    n_blocks = len(ids) // length
    if limit is not None:
        n_blocks = min(n_blocks, limit)
    return torch.tensor(ids[: n_blocks * length], dtype=torch.int64).view(n_blocks, length)


def corpora(folder: Path | None, train_chars: int, test_chars: int) -> dict[str, tuple[str, str]]:
    """name -> (train, test) texts of about these sizes; the test slice comes from the last tenth, never trained on.

    folder: of *.txt files; None takes what ships with Python: the language reference, docstrings and source code of the
    standard library. The training slice is eight pieces spread evenly over the first nine tenths.
    Raises FileNotFoundError where the folder has no *.txt file.
    """
    if folder is None:
        reference = python_docs(held_out=0.1)
        out = {"reference": (reference[0][:train_chars], reference[1][:test_chars])}
        return out | {name: _slices(text, train_chars, test_chars) for name, text in _standard_library().items()}
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.txt file; expected one or more texts")
    return {f.stem: _slices(f.read_text(errors="replace"), train_chars, test_chars) for f in files}


def _slices(text: str, train_chars: int, test_chars: int) -> tuple[str, str]:
    cut = int(0.9 * len(text))
    piece = min(train_chars // 8, cut // 8)
    train = "\n\n".join(text[i * (cut // 8) : i * (cut // 8) + piece] for i in range(8))
    middle = (cut + len(text)) // 2  # the first half of the tenth stays unused between training and test text
    return train, text[middle : middle + test_chars]


@cache
def _standard_library() -> dict[str, str]:
    """Docstrings and sources of the top-level modules, in the order of their names."""
    sources = [path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    docs = "\n\n".join(doc for source in sources for doc in _docstrings(source))
    return {"docstrings": docs, "source": "\n\n".join(sources)}


@cache
def other_texts() -> dict[str, str]:
    """Kinds of text that neither the demo nor the comparisons train on, from packages that every install has.

    "graph theory": what NetworkX's docstrings say, in English, without their examples of code; "C++": the headers of
    torch's c10. Documents stand in one random order, so that any beginning is like the whole, and no paragraph twice.
    Each has about 350,000 tokens of SmolLM2, the same ones for the same versions of the two. Raises ConfigError where
    one lacks its files.
    """
    modules = [path for path in _files("networkx", ".", "*.py") if "tests" not in path.parts]
    docs = [doc for path in modules for doc in _docstrings(path.read_text(errors="replace"))]
    headers = [
        path.read_text(errors="replace")
        for part in ("core", "util")
        for path in _files("torch", f"include/c10/{part}", "*.h")
    ]
    return {"graph theory": _without_code(_shuffled(docs)), "C++": _shuffled(headers)}


def _files(package: str, folder: str, pattern: str) -> list[Path]:
    spec = find_spec(package)
    found = sorted((Path(str(spec.origin)).parent / folder).rglob(pattern)) if spec else []
    if not found:
        raise ConfigError(f"the installed {package} has no {folder}/{pattern}; name other texts, or install its wheel")
    return found


def _shuffled(documents: list[str]) -> str:
    random.Random(0).shuffle(documents)
    return _unseen_paragraphs(documents, set())


def _without_code(text: str) -> str:
    """Without paragraphs that show an interpreter's session."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if ">>>" not in paragraph)


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of somebody else's source, which is text here: it is not run
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 40:
                yield doc
