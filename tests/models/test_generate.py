"""transformers' ways to generate, from a lowered model: the tokens of hard eager, and few graphs where it is compiled.

Here Dynamo traces and our backend lowers, but inductor, which takes a minute, does not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import ltepass
from ltepass.kernels.routed_ffn import routed_ffn
from ltepass.passes.lower import lowered_forward
from tests.models.zoo import VOCAB, Graphs, build, fresh_dynamo, generate, transformed

NEW = 8
MOST_GRAPHS = 4  # prompts and steps, of one token to keep and of several

Way = Callable[[Any], dict[str, Any]]


def prompt(length: int) -> Tensor:
    """Without token 0, which pads: `generate` would mask it."""
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


def endless(model: nn.Module) -> Any:
    generation: Any = model.generation_config
    generation.eos_token_id = None
    return model


def draft_of(model: Any) -> Any:
    """Its weights, moved a little: some of what it says is taken."""
    draft = endless(transformed("llama", layers=1))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.full_like(parameter, 0.02))
    return ltepass.lower(draft, scope=model._lte.lowered or "ffn")


WAYS: dict[str, Way] = {
    "default": lambda model: {},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "static": lambda model: {"cache_implementation": "static"},
    "no cache": lambda model: {"use_cache": False},
    "chunked prefill": lambda model: {"prefill_chunk_size": 4},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "dense assistant": lambda model: {"assistant_model": endless(build("llama", layers=1))},
    "lowered assistant": lambda model: {"assistant_model": draft_of(model)},
    "early exit": lambda model: {"assistant_early_exit": 1},
}


def batched(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """By continuous batching."""
    generation = hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    asked = [x[0].tolist() for x in prompts]
    blocks = hf.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)  # prompts come in several pieces
    found = model.generate_batch(asked, generation_config=generation, continuous_batching_config=blocks)
    outs = sorted(found.values(), key=lambda out: int(out.request_id.split("_")[-1]))
    return [torch.tensor([out.prompt_ids + out.generated_tokens]) for out in outs]


def test_a_lowered_model_gives_the_tokens_of_hard_eager_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of continuous batching, whose thread no profiler sees, the calls of the op are counted too."""
    model, prompts, called = endless(transformed("llama")), [prompt(length) for length in (3, 24)], Counter[str]()
    expected = [generate(model, x, NEW) for x in prompts]

    def counted(*args: Any) -> Tensor:
        called["op"] += 1
        return routed_ffn(*args)

    monkeypatch.setattr(lowered_forward, "routed_ffn", counted)
    ltepass.lower(model)
    ways = {name: lambda x, way=way: generate(model, x, NEW, **way(model)) for name, way in WAYS.items()}
    for name, by in ways.items():
        called.clear()
        assert all(map(torch.equal, map(by, prompts), expected)), name
        assert called, name
    called.clear()
    assert all(map(torch.equal, batched(model, prompts), expected))
    assert called


def test_continuous_batching_of_a_compiled_model_is_exact_and_says_that_it_is_not_compiled() -> None:
    model, prompts = endless(transformed("llama", layers=1)), [prompt(length) for length in (3, 11, 24)]
    expected = [generate(model, x, NEW) for x in prompts]
    ltepass.lower(model, scope="model")
    with pytest.warns(UserWarning, match='paged cache.*scope "ffn" is sparse'), Graphs() as graphs:
        assert all(map(torch.equal, batched(model, prompts), expected))
    assert graphs.seen == []


def test_assisted_generation_of_a_compiled_model_has_a_cache_that_rolls_back_and_stays_packed() -> None:
    """Graphs are made for strides: a view of a cache would be one more."""
    model, prompts, packed = endless(transformed("llama", layers=1)), [prompt(length) for length in (3, 11)], []
    expected = [generate(model, x, NEW) for x in prompts]

    def look(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        keys = kwargs["past_key_values"].layers[0].keys
        packed.append(keys is None or keys.is_contiguous())

    model.register_forward_pre_hook(look, with_kwargs=True)
    ltepass.lower(model, scope="model")
    with torch.compiler.set_stance("force_eager"):  # only caches are looked at
        for way in ("prompt lookup", "lowered assistant", "early exit"):
            how = WAYS[way](model)
            assert all(torch.equal(generate(model, x, NEW, **how), y) for x, y in zip(prompts, expected, strict=True))
    assert len(packed) > 20
    assert all(packed)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["default", "prompt lookup", "dense assistant", "lowered assistant"])
def test_twenty_prompts_recompile_three_times_at_most(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_dynamo(monkeypatch, inductor=False)
    model, prompts = endless(transformed("llama", layers=1)), [prompt(length) for length in range(4, 24)]
    expected = [generate(model, x, NEW) for x in prompts]
    how = WAYS[way](ltepass.lower(model, scope="model"))
    with Graphs() as graphs:
        assert all(torch.equal(generate(model, x, NEW, **how), y) for x, y in zip(prompts, expected, strict=True))
    models = 2 if way == "lowered assistant" else 1
    assert models < len(graphs.seen) <= MOST_GRAPHS * models
