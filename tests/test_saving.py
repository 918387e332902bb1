"""A plain module has a save and a load: the same files, the same checks, and a refused call changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import symbolic_trace

import ltepass
from ltepass.errors import AlreadyTransformedError, CheckpointError, MetaWeightsError, NotTransformedError
from ltepass.routed.routed import routers_of, state_of
from ltepass.saving import plain_modules
from tests.typed import lte_state
from tests.watching import watch

X = torch.linspace(-2.0, 2.0, 2 * 5 * 8).reshape(2, 5, 8)


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Inline(nn.Module):
    """Its FFN's lines stand among others, behind an option."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(8, 20), nn.Linear(20, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        return self.norm(x + scale * self.fc2(torch.relu(self.fc1(x))))


class Blocks(nn.Module):
    """An aligned FFN, an inline one, two that share their weights, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = FFN(), Inline(), FFN(), FFN()
        for name in ("up", "gate", "down"):
            getattr(self.fourth, name).weight = getattr(self.third, name).weight
            getattr(self.fourth, name).bias = getattr(self.third, name).bias
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.second(x + self.first(x)) + self.shift
        x = x + self.third(x)
        return x + self.fourth(x)


def trained(**settings: Any) -> Blocks:
    torch.manual_seed(1)
    model = Blocks().eval()
    model.shift.fill_(0.25)
    config = ltepass.LTEConfig(group_size=5, grouping="random", **settings)
    ltepass.transform(model, (X,), config=config)
    for i, router in enumerate(routers_of(model)):
        router.threshold.fill_(0.05 * i)
    ltepass.set_mode(model, "hard")
    return model


def fresh() -> Blocks:
    torch.manual_seed(2)
    return Blocks().eval()


def surface(model: nn.Module) -> list[Any]:
    tensors = {name: (id(t), t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return [[(n, type(m), set(vars(m)), len(m._forward_pre_hooks)) for n, m in model.named_modules()], tensors]


def same(one: list[Any], other: list[Any]) -> bool:
    tensors, others = one[1], other[1]
    return one[0] == other[0] and all(
        tensors[k][:2] == others[k][:2] and torch.equal(tensors[k][2], others[k][2]) for k in {*tensors, *others}
    )


@pytest.mark.parametrize("settings", [{}, {"router_bias": False, "hidden_sparsity": 0.2, "input_sparsity": 0.1}])
def test_a_module_comes_back_as_it_was_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**settings)
    with torch.no_grad():
        want = model(X)
        ltepass.save(model, tmp_path / "new/folder")
        again = ltepass.load(fresh(), tmp_path / "new/folder")
        assert torch.equal(again(X), want)
        assert again.get_parameter("third.up.weight") is again.get_parameter("fourth.up.weight")
        assert state_of(again) == state_of(model)
        assert sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == ["lte.json", "model.safetensors"]
        ltepass.set_mode(again, "dense")
        assert not torch.equal(again(X), want)
        ltepass.set_mode(again, "hard")
        torch.testing.assert_close(ltepass.lower(again)(X), want)
        ltepass.save(again, tmp_path / "lowered")  # the same files: layout is no part of them
        assert torch.equal(ltepass.load(fresh(), tmp_path / "lowered")(X), want)
        ltepass.unlower(again)
        ltepass.remove(again, undo_grouping=True)
        ltepass.remove(model, undo_grouping=True)
        assert torch.equal(again(X), model(X))


def test_a_graph_module_comes_back_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    ffn = FFN().eval()
    model = ltepass.transform(symbolic_trace(ffn), (X,), config=ltepass.LTEConfig(group_size=5))
    ltepass.set_mode(model, "hard")
    assert [s.kind for s in lte_state(model).sites] == ["graph"]
    ltepass.save(model, tmp_path)
    again = ltepass.load(symbolic_trace(FFN().eval()), tmp_path)
    assert torch.equal(again(X), model(X))
    entry = json.loads((tmp_path / "lte.json").read_text())
    for nodes in (["x", "x", "down"], ["x", "down", "silu"], ["no", "mul", "down"], ["x", 'mul") or ("', "down"]):
        entry["sites"][0]["nodes"] = nodes
        (tmp_path / "lte.json").write_text(json.dumps(entry))
        with pytest.raises(CheckpointError):
            ltepass.load(symbolic_trace(FFN().eval()), tmp_path)


def test_routers_stay_in_fp32_and_weights_take_the_modules_dtype(tmp_path: Path) -> None:
    ltepass.save(trained(), tmp_path)
    model = ltepass.load(fresh().to(torch.bfloat16), tmp_path)
    assert {p.dtype for n, p in model.named_parameters() if "router" not in n} == {torch.bfloat16}
    assert {router.weight.dtype for router in routers_of(model)} == {torch.float32}


def other_file(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def other_entry(folder: Path, change: Any) -> None:
    entry = json.loads((folder / "lte.json").read_text())
    change(entry)
    (folder / "lte.json").write_text(json.dumps(entry))


BROKEN: dict[str, Any] = {
    "cannot be read as JSON": lambda f: (f / "lte.json").unlink(),
    "cannot be read as JSON.": lambda f: (f / "lte.json").write_text("[" * 100_000),
    "lte.json cannot": lambda f: (f / "lte.json").write_bytes(b"\xff\xfe"),
    "cannot be read as safetensors": lambda f: (f / "model.safetensors").write_bytes(b"no"),
    "is missing": lambda f: other_file(f, lambda t: t.pop("shift")),
    "which the model has not": lambda f: other_file(f, lambda t: t.update(more=torch.zeros(3))),
    r"F32 \[9\]": lambda f: other_file(f, lambda t: t.update(shift=torch.zeros(9))),
    "I64": lambda f: other_file(f, lambda t: t.update({"second.norm.weight": torch.zeros(8, dtype=torch.int64)})),
    "permutation of site first": lambda f: other_file(f, lambda t: t["first.router.permutation"].fill_(0)),
    "lack 4 of them": lambda f: other_file(f, lambda t: [t.pop(n) for n in list(t) if "router" in n]),
    "lack 1 of them": lambda f: other_file(f, lambda t: [t.pop(n) for n in list(t) if "third.router" in n]),
    "kind is 'hooks'": lambda f: other_entry(f, lambda e: e["sites"][0].update(kind="hooks")),
    "does not compute gelu": lambda f: other_entry(f, lambda e: e["sites"][0].update(activation="gelu")),
    "lack 1 of them .first: first.down": lambda f: other_entry(f, lambda e: e["sites"][0].update(router="first.down")),
    "does not lie below": lambda f: other_entry(f, lambda e: e["sites"][0].update(down="third.down")),
    "version 5": lambda f: other_entry(f, lambda e: e.update(version=5)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_folder_is_refused_and_the_module_is_as_before(message: str, tmp_path: Path) -> None:
    ltepass.save(trained(), tmp_path)
    BROKEN[message](tmp_path)
    model = fresh()
    before = surface(model)
    with watch() as done, pytest.raises(CheckpointError, match=message):
        ltepass.load(model, tmp_path)
    assert same(surface(model), before)
    assert not done


def test_an_interrupted_load_leaves_the_module_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ltepass.save(trained(), tmp_path)
    model = fresh()
    before = surface(model)
    take = plain_modules._fill

    def interrupted(model: nn.Module, tensors: dict[str, Any]) -> None:
        class Last:
            def to(self, *_: Any) -> None:
                raise KeyboardInterrupt

        torn: dict[str, Any] = {**tensors, "fourth.down.weight": Last(), "third.down.weight": Last()}
        take(model, torn)

    monkeypatch.setattr(plain_modules, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ltepass.load(model, tmp_path)
    assert same(surface(model), before)


def test_an_interrupted_save_leaves_the_folder_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ltepass.save(trained(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = trained(tau=0.3)
    monkeypatch.setattr(json, "dumps", lambda *_, indent=None, **__: _stop() if indent else "null")
    monkeypatch.setattr(plain_modules, "read_state", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        ltepass.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _stop() -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_saved_or_loaded_into_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotTransformedError, match="transform"):
        ltepass.save(fresh(), tmp_path / "no")
    with pytest.raises(NotTransformedError, match="only part was transformed"):
        ltepass.save(nn.ModuleDict({"part": trained()}), tmp_path / "no")
    model = trained()
    ltepass.save(model, tmp_path / "yes")
    with pytest.raises(AlreadyTransformedError):
        ltepass.load(model, tmp_path / "yes")
    with torch.device("meta"):
        empty = Blocks()
    with pytest.raises(MetaWeightsError):
        ltepass.load(empty, tmp_path / "yes")
    ltepass.save(torch.compile(model), tmp_path / "wrapped")  # type: ignore[arg-type]
    assert torch.equal(ltepass.load(fresh(), tmp_path / "wrapped")(X), model(X))
    model.first.up = nn.Sequential(model.first.up)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"first.up.weight has another name"):
        ltepass.save(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
def test_an_activation_between_the_lines_of_an_inline_ffn_is_seen(activation: str, tmp_path: Path) -> None:
    """Inline's is a function in its forward, which no module holds."""
    ltepass.save(trained(), tmp_path)
    other_entry(tmp_path, lambda e: next(s for s in e["sites"] if s["kind"] == "inline").update(activation=activation))
    with pytest.raises(CheckpointError, match=f"does not compute {activation}"):
        ltepass.load(fresh(), tmp_path)
