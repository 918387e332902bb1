"""What a token reads is counted by hand on tiny models; the pass over the weights reads each of their bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ltepass
from ltepass.kernels.cpu import build, loading
from ltepass.kernels.read_pass import read_pass
from ltepass.measure import token_bytes
from ltepass.passes.lower.lower_linear_modules import lower_linear_modules, unlower_linear_modules
from tests.measure.tiny import made
from tests.models.test_lower_linears import int4, int8
from tests.models.zoo import made_once

FFN = 3 * 64 * 96 * 4  # bytes of one


@made_once
def routed(**more: Any) -> Any:
    model = made("llama")
    ids = [torch.randint(0, 61, (2, 16))]
    ltepass.transform(model, config=ltepass.LTEConfig(**{"group_size": 8, **more}), calibration=ids)
    ltepass.set_mode(model, "hard")
    return model


@pytest.mark.parametrize("name", ["llama", "llama, tied, wide heads"])
def test_a_dense_token_reads_every_weight_but_an_embedding_that_is_no_head(name: str) -> None:
    model = made(name)
    every = sum(p.nbytes for p in model.parameters())
    assert token_bytes.weights_read(model) == every - (0 if "tied" in name else 60 * 64 * 4)
    assert sum(t.nbytes for t in token_bytes.buffers(model)) == every - (0 if "tied" in name else 61 * 64 * 4)


def test_a_sparse_token_reads_its_active_neurons_and_the_routers() -> None:
    model = routed()
    routers = 2 * (96 // 8) * 65 * 4
    assert routers == sum(p.nbytes for r in model.model.layers for p in r.mlp.router.parameters())
    dense = token_bytes.weights_read(made("llama"))
    assert token_bytes.weights_read(model, 1.0) == dense + routers
    assert token_bytes.weights_read(model, 0.25) == pytest.approx(dense + routers - 0.75 * 2 * FFN)
    ltepass.lower(model)
    assert token_bytes.weights_read(model, 0.25) == pytest.approx(dense + routers - 0.75 * 2 * FFN)
    assert token_bytes.router_share(model, ltepass.report(model).sites) == pytest.approx(routers / (2 * FFN))


def test_quantised_weights_count_as_their_ops_read_them() -> None:
    model = made("llama")
    linear = model.model.layers[0].mlp.up_proj
    dense, size = token_bytes.weights_read(model), linear.weight.nbytes
    for make, bits in ((int8, 8 + 32 / 64), (int4, 4 + 16 / 32)):
        linear._parameters["weight"] = make(96, 64)
        lower_linear_modules(model, ())
        assert token_bytes.weights_read(model) == dense - size + 96 * 64 * bits / 8
        unlower_linear_modules(model)


def test_cuts_leave_parts_of_active_neurons_unread() -> None:
    plain = token_bytes.weights_read(routed(), 0.5)
    cut = token_bytes.weights_read(routed(hidden_sparsity=0.5, input_sparsity=0.25), 0.5)
    assert plain - cut == pytest.approx(2 * FFN * 0.5 * (0.5 / 3 + 0.25 * 2 / 3))


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_tiers_are_read_as_far_as_neurons_ask_for(least: float) -> None:
    settings: dict[str, Any] = {"router": "proxy", "inactive": "low_bit", "target_sparsity": 0.75}
    model = routed(group_size=1, low_bit_sparsity=least, **settings)
    plane = 96 * (64 / 2 + 2 + 4)  # of one matrix: codes, multipliers, scales
    proxy = 2 * plane + 96 * 4 + 96 * 4 + 4  # with sizes, weights and a bias
    read = 2 * (proxy + (1 - least) * plane + 0.25 * 3 * plane)
    others = token_bytes.weights_read(made("llama")) - 2 * FFN
    assert token_bytes.weights_read(model, 0.25) == pytest.approx(others + read)
    assert token_bytes.held(model) == token_bytes.held(made("llama")) + 2 * (proxy + 4 * plane)
    bits = ltepass.report(model).bits
    assert bits is not None
    assert bits.read == pytest.approx(8 * read / (2 * FFN / 4), rel=0.01)
    assert bits.held == pytest.approx(8 * 2 * (proxy + 4 * plane) / (2 * FFN / 4))
    assert f"a token reads {bits.read:.2f} of {bits.held:.2f}" in str(ltepass.report(model))
    ltepass.set_sparsity(model, 0.2)
    more = ltepass.report(model).bits
    assert more is not None
    assert more.read == pytest.approx(
        8 * 2 * (proxy + 0.8 * plane * 4 + (0.2 - least) * plane * (not least)) / (2 * FFN / 4), rel=0.02
    )


def test_bits_of_plain_sparsity_count_active_weights_and_the_router() -> None:
    model = routed()
    bits = ltepass.report(model).bits
    assert bits is not None
    routers = 2 * (96 // 8) * 65 * 4
    assert bits.held == pytest.approx(32 * (1 + routers / (2 * FFN)))
    assert bits.read == pytest.approx(32 * (0.5 + routers / (2 * FFN)), rel=0.02)
    uncalibrated = ltepass.transform(made("llama"), config=ltepass.LTEConfig(group_size=8))
    assert ltepass.report(uncalibrated).bits is None


def test_a_position_adds_its_keys_and_values() -> None:
    model = made("llama").to(torch.bfloat16)
    assert token_bytes.position_bytes(model, torch.arange(9)) == 2 * 2 * 2 * 2 * 16  # layers, k and v, heads, bytes


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_pass_reads_every_byte_of_every_buffer(threads: int) -> None:
    """It returns the XOR of all 64-bit words, which a changed byte changes, wherever it lies."""
    assert loading.load()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (0, 1, 63, 64, 255, 256, 4096, 10_007):
            flat = torch.zeros(n, dtype=torch.uint8)
            assert torch.ops.ltepass._read_pass([flat, flat.new_zeros(5)]) == 0
            for i in {0, n // 3, n // 2, n - 1} if n else ():
                flat[i] = 1
                assert torch.ops.ltepass._read_pass([flat]) != 0, (n, i)
                flat[i] = 0
        turned = torch.zeros(33, 40).T
        turned[3, 32] = 1.0
        assert torch.ops.ltepass._read_pass([turned]) != 0
    finally:
        torch.set_num_threads(before)


def test_without_the_kernel_a_sum_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda: False)
    seen: list[int] = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda tensor: seen.append(tensor.numel()))
    read_pass([torch.ones(3), torch.ones(2, 4).to(torch.bfloat16)])
    assert seen == [3, 8]
