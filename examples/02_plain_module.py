"""A decoder block that no library knows: FFNs are found in the traced graph, not by class or by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ltepass


class Block(nn.Module):
    """Pre-norm attention, then an FFN written inline between other lines."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.narrow(torch.relu(self.wide(self.norm2(x))))
        return out


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(1, 7, 48)
    before = model(x)
    ltepass.transform(model, example_inputs=(x,), config=ltepass.LTEConfig(grouping="identity"))
    assert torch.equal(model(x), before), "dense mode is the original, bit by bit"
    ltepass.set_mode(model, "hard")
    print(ltepass.report(model))
    print(f"largest change by the untrained routers: {(model(x) - before).abs().max():.3f}")


if __name__ == "__main__":
    main()
