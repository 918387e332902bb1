"""bf16, end to end: the lowered model says what hard eager says, up to the first token that rounding can decide.

Two roundings of the same sum differ, so a router's logit next to its threshold may flip and the two best tokens may
swap. The models here are as random as they come, and only steps whose best token leads by more than GAP are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ltepass
from tests.models.zoo import VOCAB, llama, opt

GAP = 0.06  # of the spread of a step's logits; bf16 keeps 8 bits
NEW_TOKENS = 16
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
    ),
]


def steps_of(model: Any, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
    """Greedy tokens, and by how much the best one led, in standard deviations of its step's logits."""
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    out = model.generate(prompt, **limits, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(out.logits)[:, 0].float()
    best = logits.topk(2).values
    return out.sequences[0, prompt.shape[1] :].tolist(), ((best[:, 0] - best[:, 1]) / logits.std(-1)).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [llama, opt], ids=lambda build: build.__name__)
def test_same_tokens_while_one_leads_clearly(build: Any, device: str) -> None:
    torch.manual_seed(0)
    model = build().eval()
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=6, grouping="identity"))
    model.to(device, torch.bfloat16)
    ltepass.set_mode(model, "hard")
    prompts = torch.randint(1, VOCAB, (12, 1, 7), device=device)
    expected = [steps_of(model, prompt) for prompt in prompts]
    ltepass.lower(model)
    compared = 0
    for prompt, (tokens, gaps) in zip(prompts, expected, strict=True):
        clear = next((i for i, gap in enumerate(gaps) if gap < GAP), NEW_TOKENS)
        assert steps_of(model, prompt)[0][:clear] == tokens[:clear]
        compared += clear
    assert compared >= 24, f"only {compared} of {12 * NEW_TOKENS} steps could be compared"
