"""Graph, shapes, padding, dtype and what is done to the model, all drawn at once: hard mode is the masked FFN by hand,
sparsity is that of the tokens, and lowering computes the same or refuses by name.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import ltepass
from ltepass.errors import LTEError
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.routed.routed import routers_of
from tests.properties.test_equivalence import Block, Form, forms
from tests.properties.trees import examples

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Decoder(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.block, self.form = Block(form), form

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.block(x)


def pickled(model: Decoder) -> nn.Module:
    if model.block.ffn.act.__name__ == "<lambda>":  # which pickle cannot name
        return copy.deepcopy(model)
    again: nn.Module = pickle.loads(pickle.dumps(model))
    return again


def reloaded(model: Decoder) -> nn.Module:
    """The state in a model that was transformed afresh."""
    form, dtype = model.form, model.block.ffn.down.weight.dtype
    fresh = Decoder(form).to(dtype).eval()
    config = ltepass.LTEConfig(group_size=form.group, grouping="identity")
    ltepass.transform(fresh, torch.randn(1, 2, form.d_model, dtype=dtype), config, match=form.match)
    fresh.load_state_dict(model.state_dict())
    ltepass.set_mode(fresh, "hard")
    return fresh


def adapted(model: Decoder) -> PeftModel:
    """LoRA whose updates are zero."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down"])).eval()


def compiled(model: Decoder) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", dynamic=False)  # type: ignore[return-value]  # it is a module


def patched(model: Decoder) -> nn.Module:
    """The owner's forward behind another one on the instance, as kernel libraries put theirs."""
    forward = model.block.ffn.forward
    model.block.ffn.forward = functools.wraps(forward)(lambda *args: forward(*args))
    return model


def replica(model: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them: parameters are plain tensors."""
    made: nn.Module = model._replicate_for_data_parallel()
    for name, parameter in model._parameters.items():
        setattr(made, name, None if parameter is None else parameter.detach())
    made._buffers = dict(model._buffers)
    for name, child in model._modules.items():
        made._modules[name] = None if child is None else replica(child)
        if child is not None:
            setattr(made, name, made._modules[name])
    return made


def hooked(model: Decoder) -> nn.Module:
    """A steering vector behind the down projection."""
    model.block.ffn.down.register_forward_hook(lambda module, args, y: y + 1)
    return model


def recast(model: Decoder) -> nn.Module:
    """There and back."""
    dtype = model.block.ffn.down.weight.dtype
    return model if dtype == torch.float16 else model.to(torch.float64).to(dtype)


WRAPPERS: dict[str, Callable[[Decoder], nn.Module]] = {
    "none": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "state dict": reloaded,
    "LoRA": adapted,
    "compile": compiled,
    "patched": patched,
    "replica": replica,
    "hook": hooked,
    "recast": recast,
}


@dataclass(frozen=True)
class Case:
    form: Form
    dtype: torch.dtype
    padding: str  # "none", "left", "right"
    wrapper: str
    seed: int

    def mask(self, x: Tensor) -> Tensor | None:
        """[batch, length], 1 for tokens; every row keeps one."""
        if self.padding == "none":
            return None
        batch, length = x.shape[:2]
        keep = torch.randint(1, length + 1, (batch, 1), generator=torch.Generator().manual_seed(self.seed))
        mask = (torch.arange(length) < keep).long()
        return mask.flip(-1) if self.padding == "left" else mask


cases = st.builds(
    Case,
    form=forms,
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    padding=st.sampled_from(["none", "left", "right"]),
    wrapper=st.sampled_from(sorted(WRAPPERS)),
    seed=st.integers(0, 99),
)


def by_hand(model: Decoder, x: Tensor, extra: float) -> tuple[Tensor, Tensor]:
    """(output, who is active [..., n_experts]) of hard mode; extra: what a hook adds behind down."""
    ffn, form = model.block.ffn, model.form
    (router,) = routers_of(model)
    z = model.block.norm(x)
    active = nn.functional.linear(z.float(), router.weight, router.bias) > router.threshold
    up = nn.functional.linear(z, ffn.up.weight, ffn.up.bias)
    act = ACTIVATIONS[form.activation]
    if not form.gated:
        h = act(up)
    elif form.fused:
        g, u = up.chunk(2, dim=-1)
        h = act(g) * u
    else:
        h = up * act(nn.functional.linear(z, ffn.gate.weight, ffn.gate.bias))
    h = h * active.repeat_interleave(form.group, -1).to(h)
    y = nn.functional.linear(h, ffn.down.weight, ffn.down.bias) + extra
    return x + y if form.out_width is None else y, active


def started(case: Case) -> tuple[Decoder, Tensor]:
    torch.manual_seed(case.seed)
    form = case.form
    model = Decoder(form).to(case.dtype).eval()
    x = torch.randn(*form.tokens, form.d_model).to(case.dtype)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=form.group, grouping="identity"), match=form.match)
    ltepass.set_mode(model, "hard")
    (router,) = routers_of(model)
    logits = nn.functional.linear(model.block.norm(x).float(), router.weight, router.bias).flatten().sort().values
    gaps = logits.diff()  # in the widest one: no rounding flips a decision
    middle = logits[gaps.argmax()] + gaps.max() / 2 if len(gaps) else logits[0] - 1
    router.threshold.fill_({"none": torch.inf, "some": float(middle), "all": -torch.inf}[form.active])
    return model, x


@examples(100)
@given(cases)
@torch.no_grad()
def test_whatever_is_drawn(case: Case) -> None:
    model, x = started(case)
    mask = case.mask(x)
    expected, active = by_hand(model, x, 1.0 if case.wrapper == "hook" else 0.0)
    batch = {"x": x} if mask is None else {"x": x, "attention_mask": mask}
    (sparsity,) = ltepass.measure_sparsity(model, [batch]).values()
    real = active if mask is None else active[mask.bool()]
    assert abs(sparsity - (1 - real.float().mean().item())) < 1e-6

    wrapped = WRAPPERS[case.wrapper](model)
    close = functools.partial(torch.testing.assert_close, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])
    close(wrapped(**batch), expected)
    try:
        ltepass.lower(wrapped if hasattr(wrapped, "_lte") else model)
    except LTEError:
        assert case.wrapper in ("LoRA", "patched", "hook", "replica")
    close(wrapped(**batch), expected)
