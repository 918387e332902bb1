"""What the backend says, and to whom: once for each model that it cannot help; and whose settings it leaves alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import ltepass
from tests.models.zoo import Graphs, build, fresh_dynamo, generate, ids, logits, transformed


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces and our backend lowers; inductor, which would take a minute, hands the graph on."""
    fresh_dynamo(monkeypatch, inductor=False)


def words_of(calls: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        calls()
    return [str(w.message) for w in seen if "lte" in str(w.message)]


def test_gates_that_are_traced_with_gradients_are_named_once_for_each_model() -> None:
    for name in ("llama", "opt", "llama"):
        torch._dynamo.reset()  # two models of one class share graphs, and no backend is called, while both live
        model = transformed(name)
        compiled = torch.compile(model, backend="lte", dynamic=False)
        with Graphs() as graphs:
            (text,) = words_of(lambda compiled=compiled: [compiled(ids(2, n)) for n in (9, 5)])
        assert len(graphs.seen) == 2, "another length is another graph"
        assert {lowered for _, lowered in graphs.seen} == {0}
        assert "2 hard gates" in text
        assert "layers.0" in text
        assert "torch.no_grad()" in text
        assert "requires_grad_(False)" in text
        assert words_of(lambda compiled=compiled: logits(compiled)) == []


def test_nothing_is_said_where_everything_is_lowered_or_trains_softly() -> None:
    frozen = torch.compile(transformed("llama").requires_grad_(False), backend="lte")
    soft = torch.compile(transformed("opt", mode="soft"), backend="lte")
    inference = torch.compile(transformed("gpt2"), backend="lte")
    assert words_of(lambda: (frozen(ids()), soft(ids()), logits(inference))) == []


def test_a_model_without_a_gate_is_named_however_many_were_compiled_before() -> None:
    good = torch.compile(transformed("llama"), backend="lte")
    assert words_of(lambda: logits(good)) == []
    for dense in (build("llama"), transformed("llama", mode="dense"), build("opt")):
        compiled = torch.compile(dense, backend="lte")
        (text,) = words_of(lambda compiled=compiled: (logits(compiled), logits(compiled, ids(3, 4))))
        assert "no gate" in text
        assert "ltepass.transform" in text


class _Broken(nn.Module):
    """A graph break between an FFN and a part without one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ffn = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.mix(self.embed(x))
        torch._dynamo.graph_break()
        x = x + self.ffn(x)
        torch._dynamo.graph_break()
        return self.head(self.mix(x))


def test_a_part_of_a_model_that_has_no_ffn_needs_no_gate() -> None:
    model, x = _Broken().eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    compiled = torch.compile(model, backend="lte")
    with Graphs() as graphs:
        assert words_of(lambda: logits(compiled, x)) == []
    assert sorted(graphs.seen) == [(0, 0), (0, 0), (1, 1)]


def test_floats_are_constants_only_while_the_lowered_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's setting is the process's: in a call, and in the traces of others, it stays as it was."""
    from torch._dynamo import config

    traced: list[bool] = []
    ran: list[bool] = []

    def compile_fx(gm: torch.fx.GraphModule, inputs: list[Any], config_patches: dict[str, Any] | None = None) -> Any:
        traced.append(config.specialize_float)

        def run(*args: Any) -> Any:
            ran.append(config.specialize_float)
            return gm.forward(*args)

        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    logits(ltepass.lower(transformed("opt"), scope="model"))
    assert traced == [True]
    logits(torch.compile(transformed("opt"), backend=compile_fx))
    assert traced == [True, False]
    assert ran == [False, False]


def caches_of(model: hf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of the cache of every `generate` from now on."""
    made: list[str] = []
    cls = type(model)
    prepare = cls._prepare_cache_for_generation

    def recorded(self: hf.PreTrainedModel, config: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        out = prepare(self, config, inputs, *args, **kwargs)
        made.append(type(inputs.get("past_key_values")).__name__)
        return out

    monkeypatch.setattr(cls, "_prepare_cache_for_generation", recorded)
    return made


def test_scope_model_leaves_the_users_generation_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: hf.PreTrainedModel = transformed("llama", layers=1)
    draft: hf.PreTrainedModel = build("llama", layers=1)
    model.generation_config.eos_token_id = draft.generation_config.eos_token_id = None
    expected, before = generate(model, ids(1, 5), 4), model.generation_config.to_dict()
    made = caches_of(model, monkeypatch)
    ltepass.lower(model, scope="model")
    assert model.generation_config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert "cache_implementation" not in json.loads((tmp_path / "generation_config.json").read_text())
    ways: list[tuple[dict[str, Any], str]] = [
        ({}, "StaticCache"),
        ({"num_beams": 2}, "StaticCache"),
        ({"cache_implementation": "dynamic"}, "DynamicCache"),
        ({"past_key_values": hf.DynamicCache(config=model.config)}, "DynamicCache"),
        ({"use_cache": False}, "NoneType"),
        ({"prompt_lookup_num_tokens": 2}, "DynamicCache"),
        ({"assistant_model": draft}, "DynamicCache"),
    ]
    for how, cache in ways:
        made.clear()
        tokens = generate(model, ids(1, 5), 4, **how)
        assert cache in made, how
        assert how == {"num_beams": 2} or torch.equal(tokens, expected), how
    ltepass.unlower(model)
    made.clear()
    assert torch.equal(generate(model, ids(1, 5), 4), expected)
    assert made == ["DynamicCache"]
    assert "_prepare_cache_for_generation" not in model.__dict__
