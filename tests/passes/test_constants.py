"""What a forward reads when it runs is read after transform too: by regenerated code, or by its own behind hooks."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ltepass
from ltepass.passes.capture.trace_owner import trace_owner
from tests.typed import lte_state

FLAGS = SimpleNamespace(factor=2.0)


class Owner(nn.Module):
    """A plain FFN with attributes that its subclasses' forwards read."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act, self.drop = nn.Linear(8, 24), nn.Linear(24, 8), nn.ReLU(), nn.Dropout(0.5)
        self.p, self.scale, self.on, self.function = 0.5, 1.0, True, torch.relu
        self.config = SimpleNamespace(scale=1.0)
        self.shift = nn.Parameter(torch.rand(8))
        self.gain: Tensor
        self.register_buffer("gain", torch.tensor(1.5))


class DropoutP(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(functional.dropout(torch.relu(self.up(x)), self.p, self.training))


class Scale(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x))) * self.scale


class OfTheClass(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x))) * self.factor


class Config(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x))) * self.config.scale


class Flag(Owner):
    def forward(self, x: Tensor) -> Any:
        y = self.down(torch.relu(self.up(x)))
        if self.on:
            y = y * 2
        return y


class Function(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.function(self.up(x)))


class OfAChild(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(functional.dropout(torch.relu(self.up(x)), self.drop.p, self.training))


class ChildInALocal(Owner):
    def forward(self, x: Tensor) -> Any:
        drop = self.drop
        return self.down(functional.dropout(torch.relu(self.up(x)), drop.p, self.training))


class Global(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x))) * FLAGS.factor


class Method(Owner):
    def middle(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) * self.scale

    def forward(self, x: Tensor) -> Any:
        return self.down(self.middle(x))


class IsTensor(Owner):
    def forward(self, x: Tensor) -> Any:
        y = self.down(torch.relu(self.up(x)))
        return y if isinstance(x, Tensor) else y * 100


class TypeOf(Owner):
    def forward(self, x: Tensor) -> Any:
        h = self.up(x)
        return self.down(torch.relu(h)) * float(type(h) is Tensor or type(h) is nn.Parameter)


class WeightDtype(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x)).to(self.down.weight.dtype))


class GradMode(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x))) * (2.0 if torch.is_grad_enabled() else 1.0)


class Writes(Owner):
    def forward(self, x: Tensor) -> Any:
        self.last = x
        return self.down(torch.relu(self.up(x)))


class Getattr(Owner):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x))) * getattr(self, "scale")  # noqa: B009  # the subject of the test


class Straight(Owner):
    def forward(self, x: Tensor) -> Any:
        h = functional.dropout(self.drop(self.act(self.up(x))), 0.5, self.training)
        first, second = h.chunk(2, dim=-1)
        h = torch.cat((first, second), -1) if False is None else h  # never: but a branch
        return self.down(h) + self.shift * self.gain


class Plain(Owner):
    def forward(self, x: Tensor) -> Tensor:
        """Children, parameters, buffers, functions of torch and methods of tensors."""
        h = functional.dropout(self.drop(self.act(self.up(x))), 0.5, self.training).contiguous()
        y = self.down(h)
        y += self.shift * self.gain
        return torch.add(y, y.view(x.shape) * 0.5).to(x.dtype)


class Block(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), owner

    def forward(self, x: Tensor) -> Any:
        return x + self.mlp(self.norm(x))


def change(owner: Any) -> None:
    """Everything that these forwards may read gets another value."""
    owner.p, owner.scale, owner.on, owner.function = 0.9, 3.0, False, torch.sigmoid
    owner.config.scale, owner.drop.p, FLAGS.factor, Owner.factor = 3.0, 0.9, 3.0, 3.0


READS = [DropoutP, Scale, Config, Function]  # of its own attributes: they stay reads
CROOKED = [
    *(OfTheClass, Flag, OfAChild, ChildInALocal, Global, Method),
    *(IsTensor, TypeOf, WeightDtype, GradMode, Writes, Getattr),
]


@pytest.fixture(autouse=True)
def as_they_were() -> Any:
    yield
    FLAGS.factor, Owner.factor = 2.0, 1.0


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """In evaluation and in training, with gradients and without."""
    found = []
    for training in (False, True):
        for grad in (False, True):
            torch.manual_seed(3)
            with torch.set_grad_enabled(grad):
                found.append(model.train(training)(x).detach())
    return found


@pytest.mark.parametrize("cls", [*READS, *CROOKED])
def test_a_value_that_changes_after_transform_acts(cls: type[Owner]) -> None:
    torch.manual_seed(0)
    model, x = Block(cls()).eval(), torch.randn(2, 3, 8)
    torch.manual_seed(0)
    plain = Block(cls()).eval()
    assert (trace_owner(model.mlp) is None) == (cls in CROOKED)
    ltepass.transform(model, (x,), ltepass.LTEConfig(group_size=4, grouping="identity"))
    assert [s.kind for s in lte_state(model).sites] == ["inline" if cls in CROOKED else "aligned"]
    assert all(map(torch.equal, outputs(model, x), outputs(plain, x)))
    change(model.mlp)
    change(plain.mlp)
    assert all(map(torch.equal, outputs(model, x), outputs(plain, x)))


def test_a_straight_forward_is_regenerated_and_reads_its_tensors() -> None:
    model, x = Block(Plain()).eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, (x,), ltepass.LTEConfig(group_size=4, grouping="identity"))
    assert [s.kind for s in lte_state(model).sites] == ["aligned"]
    y = model(x)
    model.mlp.get_buffer("gain").fill_(3.0)
    assert not torch.equal(model(x), y)
    assert trace_owner(Straight()) is None


def test_a_forward_without_source_is_not_regenerated() -> None:
    scope: dict[str, Any] = {"Owner": Owner, "torch": torch}
    exec("class Typed(Owner):\n    def forward(self, x):\n        return self.down(torch.relu(self.up(x)))", scope)
    assert trace_owner(scope["Typed"]()) is None


def test_a_forward_whose_source_warns_is_regenerated_without_a_word(tmp_path: Path) -> None:
    """Python warns where it compiles a module; afterwards it is quiet, as an import from its cache is."""
    path = tmp_path / "warns.py"
    path.write_text(
        "import torch\nfrom tests.passes.test_constants import Owner\n\n\nclass Warns(Owner):\n"
        '    def forward(self, x):\n        """In \\R^n."""\n        return self.down(torch.relu(self.up(x)))\n'
    )
    spec = importlib.util.spec_from_file_location("warns", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    assert trace_owner(module.Warns()) is not None


def test_the_ffns_of_most_models_stay_regenerated() -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Config
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP

    gpt2 = GPT2Config(n_embd=8, bos_token_id=0, eos_token_id=0)
    sizes = {"hidden_size": 8, "intermediate_size": 24, "num_attention_heads": 2}
    owners = [GPT2MLP(24, gpt2), LlamaMLP(LlamaConfig(**sizes)), Phi3MLP(Phi3Config(**sizes, pad_token_id=0))]
    owners.append(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)))
    assert all(trace_owner(owner) is not None for owner in owners)


def test_an_old_checkpoint_that_regenerated_such_a_forward_is_gated_by_hooks(tmp_path: Any) -> None:
    import json

    torch.manual_seed(0)
    model, x = Block(Global()).eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, (x,), ltepass.LTEConfig(group_size=4, grouping="identity"))
    ltepass.save(model, tmp_path)
    (written,) = [p for p in tmp_path.iterdir() if p.suffix == ".json"]
    written.write_text(json.dumps(json.loads(written.read_text())).replace('"inline"', '"aligned"'))
    loaded = ltepass.load(Block(Global()).eval(), tmp_path)
    assert [s.kind for s in lte_state(loaded).sites] == ["inline"]
    ltepass.set_mode(loaded, "dense")
    assert torch.equal(loaded(x), model(x))
    FLAGS.factor = 0.0
    assert torch.equal(loaded(x), x)
