"""Decoders and encoders of plain torch, as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- its usual name

D, FF, VOCAB = 32, 48, 61


class TorchDecoder(nn.Module):
    """A language model of `torch.nn.TransformerDecoderLayer`s."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        layer = nn.TransformerDecoderLayer(D, 4, FF, batch_first=True, norm_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y: Tensor = self.head(self.decoder(x, x, tgt_mask=mask, memory_mask=mask, tgt_is_causal=True))
        return y


class TorchEncoder(nn.Module):
    """An encoder of `torch.nn.TransformerEncoderLayer`s."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        layer = nn.TransformerEncoderLayer(D, 4, FF, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.embed(input_ids))
        return y


class _Attention(nn.Module):
    """Causal attention with one fused projection, under the names of its style."""

    def __init__(self, qkv: str, out: str, bias: bool) -> None:
        super().__init__()
        self.names = qkv, out
        self.add_module(qkv, nn.Linear(D, 3 * D, bias=bias))
        self.add_module(out, nn.Linear(D, D, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        qkv, out = (self.get_submodule(n) for n in self.names)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in qkv(x).split(D, dim=-1))
        y: Tensor = out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return y


class _NanoMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.gelu = nn.Linear(D, 4 * D), nn.GELU()
        self.c_proj, self.dropout = nn.Linear(4 * D, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return y


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(*s, bias=False) for s in ((D, FF), (D, FF), (FF, D)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class _Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = norm(D), attention, norm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class _Decoder(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], positions: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, D), nn.Embedding(64, D) if positions else None
        self.h = nn.ModuleList(block() for _ in range(2))
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        y: Tensor = self.lm_head(x)
        return y


def nano_gpt() -> nn.Module:
    """Written as nanoGPT writes it: tied head, learned positions, GELU."""
    return _Decoder(lambda: _Block(nn.LayerNorm, _Attention("c_attn", "c_proj", True), _NanoMLP()), positions=True)


def gpt_fast() -> nn.Module:
    """Written as gpt-fast writes it: RMS norms, w1, w3 and w2 without biases."""
    return _Decoder(lambda: _Block(nn.RMSNorm, _Attention("wqkv", "wo", False), _FeedForward()), positions=False)
