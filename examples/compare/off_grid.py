"""The same network with weights that lie on no grid: outputs are equal up to the rounding of fp32.

SmolLM2's weights come from a Q4_1 file, so rounding to Q4_1 costs them nothing, and bits say more about the file than
about a method. Three changes that leave the function alone take them off it, all made in fp64:

    folded    y = W (g * rms(x))          ->  y = (W diag(g)) rms(x), g = 1: gains of norms go into what reads them
    rescaled  h_j = act(g_j) * u_j        ->  up's row j times s_j, down's column j by s_j, s_j log-normal
    rotated   every write to the residual stream W -> Q^T W, every read W -> W Q: rms(x Q) = rms(x) Q where gains are 1

An embedding that is the head too becomes two matrices: they are changed by different things.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SPREAD = 0.3  # standard deviation of log s


@torch.no_grad()
def off_grid(model: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """A copy, for Llama's modules without biases."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size, generator=generator).double())[
        0
    ]
    embedding, head = model.model.embed_tokens, model.lm_head
    head.weight = nn.Parameter(embedding.weight.clone() if model.config.tie_word_embeddings else head.weight)
    model.config.tie_word_embeddings = False
    _set(embedding, embedding.weight.double() @ q)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        _read(layer.input_layernorm, readers, q)
        _read(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), q)
        scale = torch.randn(mlp.up_proj.out_features, generator=generator).double().mul(SPREAD).exp()
        _set(mlp.up_proj, mlp.up_proj.weight.double() * scale[:, None])
        _set(mlp.down_proj, q.T @ (mlp.down_proj.weight.double() / scale))
        _set(attention.o_proj, q.T @ attention.o_proj.weight.double())
    _read(model.model.norm, (head,), q)
    return model


def _read(norm: nn.Module, linears: tuple[nn.Linear, ...], q: Tensor) -> None:
    """Linears that read the residual stream through a norm take its gain, and read it rotated."""
    gain = norm.weight
    assert isinstance(gain, Tensor)
    for linear in linears:
        assert linear.bias is None, "a bias would stay, and is none of Llama's"
        _set(linear, (linear.weight.double() * gain.double()) @ q)
    gain.fill_(1.0)


def _set(module: nn.Linear | nn.Embedding, weight: Tensor) -> None:
    module.weight.copy_(weight)
