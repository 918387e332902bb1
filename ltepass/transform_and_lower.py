"""What a user calls to change a model: transform, lower, unlower, prune, remove. Checks come before any change."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import nn

from ltepass import transformers_hook
from ltepass.config import LTEConfig, Scope, check_sparsity
from ltepass.errors import AlreadyTransformedError, ConfigError, LoweredError
from ltepass.passes import TRANSFORM
from ltepass.passes.graph.pipeline import TransformJob, run_passes
from ltepass.passes.insert.remove_routers import remove_routers
from ltepass.routed.batches import Batch
from ltepass.routed.offloaded import require_weights
from ltepass.routed.routed import Routed, require_whole, root_of, routers_of, state_of, unwrapped
from ltepass.routed.undo import all_or_nothing, verb
from ltepass.routed.which_sites import Match, Selection, Which

if TYPE_CHECKING:
    from ltepass.kernels.weight_formats import Format

Model = TypeVar("Model", bound=nn.Module)
Pruning = Literal["inactive", "magnitude", "first_order"]


def transform(
    model: nn.Module,
    example_inputs: object = None,
    config: LTEConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    only: Which | None = None,
    skip: Which | None = None,
    per_site: Mapping[str, Mapping[str, int | str]] | None = None,
    match: Match = "ffn",
) -> nn.Module:
    """Find the FFNs of `model`, group their neurons and insert routers, in place. Paper sections 4.1 and 4.2.

    Arguments:
        model: an nn.Module (a Hugging Face model makes its own example inputs) or a torch.fx.GraphModule. What PEFT,
            DistributedDataParallel or torch.compile wrapped is transformed inside its wrapper.
        example_inputs: tuple, dict or tensor that `model(...)` accepts; traced under fake tensors, never run.
        config: settings of the whole model; None takes `LTEConfig()`.
        calibration: batches (dicts of model inputs, or token id tensors) for data-driven grouping, the router start and
            the sparsity table; the same as calling `ltepass.calibrate(model, calibration)` afterwards.
        only, skip: which FFNs are gated: a site's name or a pattern ("model.layers.*.mlp"; `*` stands for dots too),
            several, or a function of the FFNSite; what is left out stays dense, and the report says so.
        per_site: settings of some sites, by name or pattern: {"model.layers.0.mlp": {"group_size": 16}}.
        match: "ffn", or "mlp": also two linears around an activation whose output is not as wide as their input, as
            projectors, heads and decoders of other networks are (not with inactive="low_bit").
    Returns: the model, in dense mode.
    Raises: AlreadyTransformedError, LoweredError, CaptureError, NoFFNFoundError, GroupSizeError, MetaWeightsError,
        CalibrationError, ShardedError, ConfigError (a pattern that names no site, all left out, a setting that is none
        of a site's); the model is then as it was, as it is after Ctrl-C.
    Example:
        >>> model = ltepass.transform(dense, config=ltepass.LTEConfig(group_size=12), skip="*.0.mlp")
        >>> [site.name for site in ltepass.report(model).sites]
        ['model.layers.1.mlp']
    """
    root, selection = unwrapped(model), Selection(only=only, skip=skip, per_site=per_site, match=match)

    def work() -> nn.Module:
        _transform(root, example_inputs, config or LTEConfig(), calibration, selection)
        return model

    return all_or_nothing(root, work)


def _transform(
    model: nn.Module,
    example_inputs: object,
    config: LTEConfig,
    calibration: Iterable[Batch] | None,
    selection: Selection,
) -> None:
    require_whole(model, "transform")
    if state_of(model) is not None or any(routers_of(model)):
        raise AlreadyTransformedError(
            f"{type(model).__name__} has routers already; expected a dense model; call ltepass.remove(model) first"
        )
    from ltepass.passes.lower.lower_model import is_lowered  # not above: `import ltepass` stays light

    if is_lowered(model):
        raise LoweredError(
            "the model's linears are lowered; transform expects it as it was; call ltepass.unlower(model) first"
        )
    if selection.match == "mlp" and config.inactive == "low_bit":
        raise ConfigError(
            'match is "mlp" and inactive "low_bit"; expected inactive="zero" there: tiers of bits are as wide where '
            "they end as where they begin; leave one of the two out"
        )
    if calibration is not None:
        require_weights(model, "calibration")
    has = calibration is not None
    run_passes(TRANSFORM, TransformJob(model, config, example_inputs, has_calibration=has, selection=selection))
    transformers_hook.attach(model)
    if calibration is not None:
        from ltepass.calibration.calibrate_model import calibrate

        calibrate(model, calibration)


@verb
def remove(model: nn.Module, undo_grouping: bool = False) -> nn.Module:
    """Take routers and gates out again: classes, forwards and hooks as before transform.

    Arguments:
        model: a transformed model.
        undo_grouping: also put every neuron back where it was; weights are then bitwise the original's.
    Returns: the model.
    Raises: NotTransformedError, LoweredError, ShardedError, ConfigError (undo_grouping of weights in int8). Warns of a
        model of transformers whose FFNs `prune` made narrower than its config says: dense, it saves as what nothing
        loads.
    Example:
        >>> ltepass.remove(model, undo_grouping=True) is model
        True
    """
    routed = Routed.trained(model, "remove")
    require_whole(model, "remove")
    if undo_grouping:
        routed.require_floats("remove(undo_grouping=True)")
    if routed.state.narrowed and hasattr(model, "save_pretrained"):
        widths = ", ".join(map(str, sorted({site.d_ff for site in routed.sites})))
        warnings.warn(
            f"pruned FFNs of {widths} neurons are no width that {type(model.config).__name__} says of all: dense, the "
            "model runs, and from_pretrained will not load what it saves; save it with its routers, or prune with "
            "equal_widths=True",
            stacklevel=5,
        )
    remove_routers(routed, undo_grouping=undo_grouping)
    transformers_hook.detach(model)
    return model


def prune(
    model: Model,
    batches: Iterable[Batch] = (),
    *,
    method: Pruning = "inactive",
    sparsity: float | None = None,
    equal_widths: bool = False,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    permanent: bool = False,
) -> Model:
    """Take out for good what a token never uses: experts of a transformed model, or single weights of any.

    "inactive" makes FFNs smaller: experts that no token of the batches uses go, with their rows of every linear and of
    the router. Routers stay for the others, so that hard mode computes what it did on those batches; `remove` then
    gives a dense model, in which all that is left is always active. Parameters are new: make optimizers afterwards.

    Arguments:
        model: transformed and not lowered, in any mode; for masks any model that is not lowered.
        batches: of "inactive": mappings of model inputs, or token id tensors, as many as show what is used; a table of
            sparsities is made anew of them. Of "first_order": mappings with labels.
        method: "inactive"; or masks of single weights through torch.nn.utils.prune, which leave every shape: those of
            the smallest "magnitude", or to "first_order", by weight times gradient of the loss.
        sparsity: of "inactive": share of each FFN's experts to take out, those used least, used or not; None: those
            never used. Of masks: share of all chosen weights, together with those that are masked already.
            `CubicSchedule` says it step by step.
        equal_widths: of "inactive": all FFNs become as wide as the one that needs most, and the model's config says so:
            then from_pretrained loads it anywhere, dense once `remove` was called. Without it each has its own width;
            saved with its routers such a model loads where ltepass is installed.
        only, skip: of masks: which linears, by name or pattern ("model.layers.*.mlp.*"; `*` stands for dots too), or
            several; None: all, but one whose weight is a table of tokens as well.
        permanent: of masks: zeros in plain weights; else masks stay on in training, until torch.nn.utils.prune.remove.
    Returns: the model.
    Raises: ConfigError, CalibrationError (no batches, no labels, a site that no token reaches), PruningError (adapters,
        masks or quantised weights in an FFN; a forward that fixes its sizes), NotTransformedError, LoweredError,
        MetaWeightsError, ShardedError. Warns where every expert is used.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> smaller = ltepass.prune(model, batches, sparsity=0.4, equal_widths=True)
        >>> [site.d_ff for site in ltepass.report(smaller).sites], smaller.config.intermediate_size
        ([36, 36], 36)
        >>> sparse = ltepass.prune(dense, method="magnitude", sparsity=0.5, skip="lm_head", permanent=True)
        >>> float((sparse.model.layers[0].mlp.up_proj.weight == 0).float().mean()) > 0.4
        True
    """
    if method not in ("inactive", "magnitude", "first_order"):
        raise ConfigError(f"method is {method!r}; expected inactive, magnitude or first_order; pass one of these")
    of_masks = {"only": only is not None, "skip": skip is not None, "permanent": permanent}
    refused = of_masks if method == "inactive" else {"equal_widths": equal_widths, "no sparsity": sparsity is None}
    if any(refused.values()):
        raise ConfigError(
            f"method {method!r} got {', '.join(name for name, given in refused.items() if given)}; masks expect a "
            "sparsity, and may have only, skip and permanent; equal_widths belongs to 'inactive'; give what belongs"
        )
    share = None if sparsity is None else check_sparsity(sparsity, "sparsity")
    root = root_of(model, "prune") if method == "inactive" else unwrapped(model)

    def work() -> Model:
        if share is None or method == "inactive":
            from ltepass.pruning.structured import remove_experts

            remove_experts(root, list(batches), sparsity=share, equal_widths=equal_widths)
        else:
            from ltepass.pruning.unstructured import mask_weights  # needs the kernels, to tell what is lowered

            first_order = method == "first_order"
            mask_weights(
                root, list(batches), first_order=first_order, sparsity=share, only=only, skip=skip, permanent=permanent
            )
        return model

    return all_or_nothing(root, work)


def lower(model: Model, scope: Scope = "ffn", *, ffn: bool = True, linears: Format | None = None) -> Model:
    """Make every FFN that can be lowered call the sparse op, and every other linear one that reads at memory's speed.

    On a CPU. The linears are attention projections, the head and FFNs that stay dense: fp32, bf16 and fp16, and the
    weights of torchao's `Int8WeightOnlyConfig` and of `IntxWeightOnlyConfig` with int4 in groups of 32, whose inputs
    are then quantised too, to int8 in blocks of 32, as llama.cpp does.

    Arguments:
        model: a transformed model in hard mode; with ffn=False any model.
        scope: "ffn" (nothing is compiled) or "model" (torch.compile with the backend "lte").
        ffn: False lowers linears alone, so that a dense model is as fast as it can be.
        linears: None takes weights as they are, in floats or in codes (`ltepass.quantize`); "int8", "int4" or
            "int4_minimum" quantises every linear, and the first two gated FFNs with their routers, of which a token
            reads the active share of a byte or half a byte a weight; "gguf" takes the codes that weights of a GGUF file
            had in it, as `export` does. Scope "ffn" alone. Codes are held beside the weights, which `unlower` goes back
            to; a table of tokens stays as it is.
    Returns: the model. What cannot be lowered stays as it is, exact, and stands in `ltepass.report(model).notes`.
    Raises: NotTransformedError, LoweredError (lowered already), LoweringError (a router is not in hard mode, or no site
        can be lowered), ShardedError, ConfigError.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> expected = model(ids).logits
        >>> torch.allclose(ltepass.lower(model)(ids).logits, expected, atol=1e-4)
        True
    """
    from ltepass.passes.lower.lower_model import lower_model  # which needs the kernels: transform does not

    return lower_model(model, scope, ffn=ffn, linears=linears)  # at once: nothing undoes what fails after it


def unlower(model: Model) -> Model:
    """Undo `lower`: forwards and weight layout as before.

    Arguments:
        model: a transformed model, or a dense one; there is nothing to do for one that is not lowered.
    Returns: the model.
    Raises: NotTransformedError, ShardedError.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> ltepass.report(ltepass.unlower(ltepass.lower(model))).lowered is None
        True
    """
    from ltepass.passes.lower.lower_model import unlower_model

    return unlower_model(model)


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    length: int | None = None,
    linears: Format | None = None,
    cache_dtype: torch.dtype | None = None,
    shortlist: int | None = None,
) -> Path:
    """Write a folder that decodes by itself on CPUs like this one, without Python: compiled graphs, weights, kernels.

    A decode step and a prefill of one sequence over a static cache, compiled by AOTInductor with our ops in them.
    `examples/exported` has the loops, in Python and in C++; `ltepass.exporting.run_exported` has one of ours.

    Arguments:
        model: a language model of transformers on the CPU, transformed (in hard mode) or dense, not lowered. Its
            attention goes through transformers' AttentionInterface, causal, with a sliding window or none.
        folder: where to write; made where it is not there. `ltepass export` puts the tokenizer beside.
        length: tokens that the cache holds; None takes the model's own limit, 2048 at most.
        linears: None leaves them in the model's dtype; "int8" (a scale an output), "int4" or "int4_minimum" (blocks of
            32, as GGUF's Q4_0 and Q4_1) quantises every linear; inputs become int8 too. Gated FFNs go to int8 and to
            int4 as well, with routers in int8, and stay in floats otherwise. "gguf": weights that were Q4_0 or Q4_1 in
            a file keep its codes, others become int8. What ltepass.quantize changed keeps its codes.
        cache_dtype: of keys and values; None takes the model's. torch.bfloat16 halves what a long context reads.
        shortlist: rows of an int8 head that a token reads in 8 bits, the largest logits by a scan of all rows in 4
            bits, which the others are of: half of the head's bytes. None reads all rows in 8.
    Returns: the folder.
    Raises: ExportError (what cannot be traced or compiled, and why), NotTransformedError, LoweredError (call unlower
        first), LoweringError (a router is not in hard mode), ShardedError, ConfigError. The model is never changed.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> sorted(file.name for file in ltepass.export(model, folder, length=32, linears="int8").iterdir())
        ['decode.pt2', 'decoder.json', 'kernels.so', 'ops.so', 'prefill.pt2', 'weights.pt']
    """
    from ltepass.exporting.export_model import export_model

    return export_model(
        model, Path(folder), length=length, linears=linears, cache_dtype=cache_dtype, shortlist=shortlist
    )
