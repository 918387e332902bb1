"""Whole models on a GPU: transformed, lowered and compiled, token for token what hard mode says in eager."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn

import ltepass
from tests.models.zoo import generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NEW_TOKENS = 24


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(LlamaConfig(intermediate_size=600, num_key_value_heads=3, **_sizes()))
    return model


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model: nn.Module = Qwen2ForCausalLM(Qwen2Config(intermediate_size=600, num_key_value_heads=3, **_sizes()))
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=301, n_embd=192, n_layer=3, n_head=3, n_inner=600))
    return model


def _sizes() -> dict[str, Any]:
    return {"vocab_size": 301, "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}


@pytest.fixture(params=[llama, qwen2, gpt2], ids=lambda build: build.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Hard mode, fp32, experts of 8, about half of them active."""
    build: Callable[[], nn.Module] = request.param
    torch.manual_seed(0)
    made = build().eval()
    ltepass.transform(made, config=ltepass.LTEConfig(group_size=8, grouping="identity"))
    made.cuda()
    ltepass.set_mode(made, "hard")
    torch._dynamo.reset()
    return made


def tokens_of(model: nn.Module, **how: Any) -> Tensor:
    return generate(model, torch.arange(1, 8, device="cuda")[None], NEW_TOKENS, **how)


@pytest.mark.parametrize("scope", ["ffn", "model"])
def test_lowered_generates_what_hard_eager_does(
    model: nn.Module, scope: Literal["ffn", "model"], caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens_of(model)
    caplog.set_level(logging.INFO, "ltepass")
    ltepass.lower(model, scope=scope)
    assert torch.equal(tokens_of(model), expected)
    graphs = {cast(tuple[int, int, str], r.args)[:2] for r in caplog.records if str(r.msg).startswith("lte backend")}
    assert graphs == ({(3, 3)} if scope == "model" else set())
    ltepass.unlower(model)
    assert torch.equal(tokens_of(model), expected)


def test_the_backend_with_cuda_graphs(model: nn.Module) -> None:
    prompt = torch.arange(1, 8, device="cuda")[None]
    with torch.no_grad():
        expected = model(prompt).logits
        compiled = torch.compile(model, backend="lte", fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            found = compiled(prompt, use_cache=False).logits.clone()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
