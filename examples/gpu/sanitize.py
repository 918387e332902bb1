"""Every path once on small odd shapes, against the definition on the CPU: what compute-sanitizer watches."""

from __future__ import annotations

import torch

from examples.gpu import problems
from examples.gpu.problems import Shape
from ltepass.kernels import reference
from ltepass.kernels.gpu import which_path
from ltepass.kernels.gpu.launch import routed_ffn

PATHS = ((1, 0.3), (8, 0.3), (20, 0.05), (40, 0.2), (40, 0.9))  # (tokens, share of active experts)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
        for by_neuron in (False, True):
            for tokens, active in PATHS:
                shape = Shape(name="small", d_model=100, d_ff=240, group_size=12, tokens=tokens, dtype=dtype)
                here = problems.make(shape, active, "independent", "cpu", by_neuron=by_neuron).args
                args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in here)
                with which_path.assume_density(active):
                    y, expected = routed_ffn(*args).cpu().double(), reference.routed_ffn(*here).double()
                error = float((y - expected).norm() / expected.norm())
                assert error < (1e-5 if dtype == torch.float32 else 2e-2), (shape, active, error)
    print("every path right")


if __name__ == "__main__":
    main()
