"""LTEConfig(router="proxy"): one model in eager, lowered, compiled and saved; what is calibrated, trained, refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ltepass
from ltepass.errors import CheckpointError, ConfigError, LoweringError, MetaWeightsError, ShardedError
from ltepass.kernels import proxy_reference
from ltepass.measure.token_bytes import router_share, weights_read
from ltepass.passes.group.permutations import permute_routed
from ltepass.routed.proxy import CONSTANTS, ProxyRouter
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from tests.models import zoo
from tests.models.zoo import Graphs

NAMES = ("llama", "opt", "phi3", "gpt2", "own")  # gated, inline with biases, fused, conv1d, no Hugging Face model


def proxied(name: str = "llama", **settings: Any) -> nn.Module:
    model = zoo.build(name)
    config = ltepass.LTEConfig(router="proxy", **settings)
    return ltepass.transform(model, None if name in zoo.HF else zoo.ids(), config, calibration=[zoo.ids(4, 16)])


def routers(model: nn.Module) -> list[ProxyRouter]:
    found = Routed.of(model, "the test").routers
    assert all(isinstance(router, ProxyRouter) for router in found)
    return found  # type: ignore[return-value]


def masks(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []

    def see(router: Router, _: object, logits: Tensor) -> None:
        seen.append(logits > router.threshold)

    handles = [router.register_forward_hook(see) for router in routers(model)]
    zoo.logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_lowered_is_hard_eager(name: str) -> None:
    model = proxied(name)
    dense = zoo.logits(model)
    assert torch.equal(dense, zoo.logits(zoo.build(name)))
    ltepass.set_mode(model, "hard")
    hard = zoo.logits(model)
    assert not torch.equal(hard, dense)
    ltepass.lower(model)
    assert ltepass.report(model).notes == []
    for x in (None, zoo.ids(1, 1)):
        torch.testing.assert_close(
            zoo.logits(model, x), zoo.logits(ltepass.unlower(copy.deepcopy(model)), x), rtol=1e-4, atol=1e-6
        )
    ltepass.unlower(model)
    assert torch.equal(zoo.logits(model), hard)
    ltepass.remove(model, undo_grouping=True)
    assert torch.equal(zoo.logits(model), dense)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_backend_lowers_it(name: str) -> None:
    model = proxied(name)
    ltepass.set_mode(model, "hard")
    hard = zoo.logits(model)
    with Graphs() as graphs:
        torch.testing.assert_close(zoo.logits(torch.compile(model, backend="lte")), hard, rtol=1e-4, atol=1e-6)
    assert [sum(counts) for counts in zip(*graphs.seen, strict=True)] == [2, 2]


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("settings", [{}, {"proxy_scales": "rows"}, {"group_size": 4}, {"budget": "model"}])
def test_saved_and_loaded_is_the_same_model(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model: Any = proxied(name, **settings)
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(zoo.logits(again), expected)
    for ours, theirs in zip(routers(again), routers(model), strict=True):
        for name_ in (*CONSTANTS, "weight", "bias", "threshold", "quantiles"):
            a, b = getattr(ours, name_), getattr(theirs, name_)
            assert a is b is None or torch.equal(a, b), name_
    assert ltepass.report(again).config["router"] == "proxy"
    assert (routers(again)[0].multipliers is None) == (settings.get("proxy_scales") == "rows")
    assert (routers(again)[0].biases is not None) == (name == "opt")
    ltepass.lower(again)
    torch.testing.assert_close(zoo.logits(again), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        ("codes", lambda t: t[..., :8].clone(), "U8"),
        ("codes", lambda t: t.to(torch.int8), "I8"),
        ("scales", lambda t: t.double(), "F64"),
        ("sizes", lambda t: None, "missing"),
        ("weight", lambda t: t[:, None].clone(), "F32"),
        ("multipliers", lambda t: torch.full_like(t, 255), "multiplier"),
    ],
)
def test_a_changed_tensor_is_refused(tensor: str, change: Any, says: str, tmp_path: Path) -> None:
    model: Any = proxied()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.router.{tensor}"
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_single_neurons_unless_asked_otherwise() -> None:
    assert {site.group_size for site in ltepass.report(proxied()).sites} == {1}
    assert {site.group_size for site in ltepass.report(proxied(group_size=5)).sites} == {5}
    model = zoo.build("llama")
    config = ltepass.LTEConfig(router="proxy")
    ltepass.transform(model, config=config, per_site={"*.0.mlp": {"group_size": 4}})
    assert [site.group_size for site in ltepass.report(model).sites] == [4, 1]
    assert {site.group_size for site in ltepass.report(zoo.transformed("llama")).sites} == {4}  # linear ones as before


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_scores_are_what_experts_add(name: str, group_size: int) -> None:
    """Against the exact hidden units: the experts that are chosen are nearly those that an oracle chooses."""
    model = proxied(name, group_size=group_size, grouping="identity")
    routed = Routed.of(model, "the test")
    for site, router in routed:
        x = torch.randn(200, site.d_model, generator=torch.Generator().manual_seed(0))
        up, gate = (None if r is None else r.of(model, site.d_ff) for r in (site.up_rows, site.gate_rows))
        assert up is not None
        h = nn.functional.relu(x @ up.T + site.up_bias.of(model, site.d_ff)) if site.up_bias else None
        h = nn.functional.silu(x @ gate.T) * (x @ up.T) if gate is not None else h
        assert h is not None
        sizes = (h.abs() * site.down_rows.of(model, site.d_ff).norm(dim=1)).unflatten(-1, (-1, group_size)).norm(dim=-1)
        scores = router.logits(x)
        with torch.no_grad():
            same = torch.corrcoef(torch.stack([scores.flatten(), sizes.flatten()]))[0, 1]
        assert same > 0.98


@pytest.mark.parametrize("settings", [{}, {"budget": "model"}, {"tau": 0.3}, {"group_size": 4}])
def test_calibration_meets_the_target_with_logits_that_a_sigmoid_can_use(settings: dict[str, Any]) -> None:
    model = proxied(target_sparsity=0.6, **settings)
    batches = [zoo.ids(4, 16)]
    shares = ltepass.measure_sparsity(model, batches)
    mean = sum(shares.values()) / len(shares)
    assert abs(mean - 0.6) < 0.05
    assert all(share > 0.3 for share in shares.values())
    for router in routers(model):
        tau = torch.tensor(settings.get("tau", 0.5))
        torch.testing.assert_close(router.threshold, torch.logit(tau))
        quartiles = router.quantiles[75] - router.quantiles[25]
        assert 1.0 < quartiles < 8.0
    ltepass.set_sparsity(model, 0.9)
    shares = ltepass.measure_sparsity(model, batches)
    assert abs(sum(shares.values()) / len(shares) - 0.9) < 0.04
    ltepass.calibrate(model, batches, inputs="hard")
    shares = ltepass.measure_sparsity(model, batches)
    assert abs(sum(shares.values()) / len(shares) - 0.6) < 0.05


def test_a_relu_that_is_mostly_zero_can_be_calibrated() -> None:
    model = zoo.build("opt")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("fc1.bias"):
                p.fill_(-0.05)
    config = ltepass.LTEConfig(router="proxy", target_sparsity=0.9)
    ltepass.transform(model, config=config, calibration=[zoo.ids(4, 16)])
    assert all(router.sizes.isfinite().all() and router.sizes.max() > 0 for router in routers(model))
    shares = ltepass.measure_sparsity(model, [zoo.ids(4, 16)])
    assert all(share >= 0.85 for share in shares.values())


def test_both_stages_learn() -> None:
    """Soft: the loss falls, the scale and the bias of each site move, and codes do not. Hard: routers stand still."""
    model: Any = proxied(target_sparsity=0.7)
    ids = zoo.ids(8, 16)
    before = copy.deepcopy({name: p for router in routers(model) for name, p in router.state_dict().items()})
    ltepass.begin_stage(model, "soft")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses, sparsities = [], []
    for _ in range(12):
        optimizer.zero_grad()
        task = model(input_ids=ids, labels=ids).loss
        auxiliary = ltepass.take_auxiliary(model, ltepass.label_mask(ids))
        loss = task + (2.0 * auxiliary.efficiency + 1e-4 * auxiliary.separability) / auxiliary.tokens
        loss.backward()
        assert all(
            grad is not None and grad.abs().max() > 0 for r in routers(model) for grad in (r.weight.grad, r.bias.grad)
        )
        optimizer.step()
        losses.append(float(loss.detach()))
        sparsities.append(float(auxiliary.sparsity / auxiliary.tokens))
    assert losses[-1] < losses[0] - 0.1
    assert sparsities[-1] > sparsities[0]
    after = {name: p for router in routers(model) for name, p in router.state_dict().items()}
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {"weight", "bias"}
    shares = ltepass.settle(model, [{"input_ids": ids}], 0.7)
    assert all(abs(share - 0.7) < 0.05 for share in shares.values())
    codes = routers(model)[0].codes.clone()
    assert not torch.equal(codes, before["codes"])  # of the weights as they are now
    ltepass.begin_stage(model, "hard")
    assert not any(p.requires_grad for router in routers(model) for p in router.parameters())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    hard = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        hard.append(float(loss.detach()))
    assert hard[-1] < hard[0] - 0.1


def test_the_trainer_runs_both_stages(tmp_path: Path) -> None:
    model = proxied(target_sparsity=0.7)
    rows = [{"input_ids": row, "labels": row} for row in zoo.ids(8, 16)]
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-3, logging_steps=1
    )
    lte = ltepass.LTESettings(soft_steps=4, hard_steps=4)
    trainer = ltepass.LTETrainer(model, arguments, train_dataset=rows, eval_dataset=rows, lte=lte)
    trainer.fit()
    shares = ltepass.measure_sparsity(model, [zoo.ids(8, 16)])
    assert all(abs(share - 0.7) < 0.1 for share in shares.values())


def test_straight_through_and_through_op() -> None:
    ids = zoo.ids(4, 16)
    model: Any = proxied()
    ltepass.begin_stage(model, "hard", straight_through=True)
    model(input_ids=ids, labels=ids).loss.backward()
    learned = [p.grad for router in routers(model) for p in router.parameters()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in learned)
    plain, through = proxied(), proxied()
    ltepass.begin_stage(plain, "hard")
    ltepass.begin_stage(through, "hard")
    ltepass.lower(through)
    grads = []
    for one in (plain, through):
        one(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in one.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 4])
def test_codes_follow_a_new_order_of_the_neurons(group_size: int) -> None:
    model = proxied("opt", group_size=group_size, grouping="identity")
    ltepass.set_mode(model, "hard")
    routed = Routed.of(model, "the test")
    before, expected = masks(model), zoo.logits(model)
    experts = torch.randperm(60 // group_size, generator=torch.Generator().manual_seed(0))
    order = (experts[:, None] * group_size + torch.arange(group_size)).flatten()
    for site, router in routed:
        permute_routed(routed, site, order)
        with torch.no_grad():
            router.weight.copy_(router.weight[experts])
    for old, new in zip(before, masks(model), strict=True):
        assert torch.equal(old[..., experts], new)
    torch.testing.assert_close(zoo.logits(model), expected, rtol=1e-4, atol=1e-6)


def test_cuts_and_budget_work_beside_it() -> None:
    model = proxied(hidden_sparsity=0.2, input_sparsity=0.2)
    ltepass.set_mode(model, "hard")
    hard = zoo.logits(model)
    assert all(router.cut > 0 and router.input_cut > 0 for router in routers(model))  # type: ignore[operator]
    torch.testing.assert_close(zoo.logits(ltepass.lower(model)), hard, rtol=1e-4, atol=1e-6)


def test_bytes_count_the_codes() -> None:
    model: Any = proxied()
    ltepass.set_mode(model, "hard")
    sites = ltepass.report(model).sites
    router = routers(model)[0]
    own = sum(t.nbytes for t in router.operands() if t is not None)
    assert own >= 2 * 60 * 24 / 2
    assert router_share(model, sites) == pytest.approx(own / (3 * 60 * 24 * 4))
    linear: Any = zoo.transformed("llama")
    read = [weights_read(m, active=0.5) for m in (model, linear)]
    theirs = sum(p.nbytes for r in Routed.of(linear, "the test").routers for p in r.parameters())
    assert read[0] - read[1] == pytest.approx(2 * own - theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = proxied()
    ltepass.set_mode(model, "hard")
    model.to(dtype)
    assert all(r.scales.dtype == torch.float32 and r.codes.dtype == torch.uint8 for r in routers(model))
    hard = zoo.logits(model)
    assert hard.isfinite().all()
    torch.testing.assert_close(zoo.logits(ltepass.lower(model)).float(), hard.float(), rtol=0.05, atol=0.02)


def test_a_call_that_fails_leaves_codes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = proxied()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr("ltepass.calibration.initialise.place_cuts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ltepass.calibrate(model, [zoo.ids(4, 32)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_a_proxy_cannot_be_is_refused() -> None:
    for settings, says in (
        ({"router": "both"}, "linear, proxy"),
        ({"proxy_scales": "tiles"}, "blocks, rows"),
        ({"router": "proxy", "router_bias": False}, "never negative"),
    ):
        with pytest.raises(ConfigError, match=says):
            ltepass.LTEConfig(**settings)
    with torch.device("meta"):
        meta = zoo.llama()
    with pytest.raises(MetaWeightsError, match="proxy"):
        ltepass.transform(meta, config=ltepass.LTEConfig(router="proxy"))
    assert not any(isinstance(m, Router) for m in meta.modules())


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 60), nn.Linear(60, 24)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


def test_an_activation_that_no_proxy_computes() -> None:
    model = Tanh().eval()
    config = ltepass.LTEConfig(router="proxy")
    with pytest.raises(ConfigError, match='router="linear", or skip='):
        ltepass.transform(model, torch.randn(2, 24), config)
    assert not any(isinstance(m, Router) for m in model.modules())


def test_where_an_adapter_holds_the_weights_codes_stay() -> None:
    peft = pytest.importorskip("peft")
    model: Any = proxied()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj", "gate_proj"]))
    codes = [router.codes.clone() for router in routers(model)]
    ltepass.settle(adapted, [zoo.ids(4, 16)], 0.6)
    assert all(torch.equal(a, router.codes) for a, router in zip(codes, routers(model), strict=True))
    with pytest.raises(ShardedError, match="before wrapping"):
        ltepass.calibrate(adapted, [zoo.ids(4, 16)])


def test_a_soft_gate_is_not_lowered() -> None:
    model = proxied()
    ltepass.set_mode(model, "soft")
    with pytest.raises(LoweringError):
        ltepass.lower(model)
    assert not torch.equal(zoo.logits(model), zoo.logits(zoo.build("llama")))


def test_old_settings_say_nothing_of_it() -> None:
    assert (ltepass.LTEConfig().router, ltepass.LTEConfig().proxy_scales) == ("linear", "blocks")
    assert proxy_reference.blocks_of(24) == 1
