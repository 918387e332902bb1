"""What a user calls to hold a model's weights in fewer bits: torchao holds them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ltepass import transformers_hook
from ltepass.calibration.int4_codes import int4_codes_by_input, quantise_to_int4
from ltepass.config import LTEConfig
from ltepass.errors import ConfigError, LoweredError, MetaWeightsError
from ltepass.kernels.weight_formats import BLOCK, kept_codes, unpack_int4
from ltepass.passes.lower.lower_model import is_lowered
from ltepass.passes.lower.why_not_linear import is_conv1d, is_product
from ltepass.routed.batches import Batch
from ltepass.routed.coded_ffn import why_not_in_codes
from ltepass.routed.modes import set_mode
from ltepass.routed.routed import Routed, is_transformed, require_whole, unwrapped
from ltepass.routed.sites import is_ordinary
from ltepass.routed.torchao_weights import config_of, int4_weight, is_quantised, torchao
from ltepass.routed.undo import all_or_nothing
from ltepass.transform_and_lower import transform

METHOD = "lte"  # of transformers' quantiser that is ours
log = logging.getLogger("ltepass")
Model = TypeVar("Model", bound=nn.Module)
Weights = Literal["int8", "int4"]  # of linears, which torchao holds


def quantize(
    model: Model, weights: Weights | Literal["tiers"] = "int8", calibration: Iterable[Batch] | None = None
) -> Model:
    """Hold the weights of linears as codes, in place: a quarter or an eighth of fp32's bytes for a token to read.

    torchao holds them (`pip install 'ltepass[quantize]'`), and rounds them: int8 with a scale an output, int4 in blocks
    of 32 inputs with the scale that loses least (HQQ), and a head in int8 there. On SmolLM2-135M int8 costs x1.007 of
    the perplexity and int4 about x2; with text, int4 is by GPTQ (arXiv 2210.17323) and costs about x1.1: what rounding
    loses, later inputs make up for. Weights that were Q4_0 in a GGUF file keep its codes. Eager is the definition then;
    `lower` and `export` read the same codes, and make inputs int8 too. `save_pretrained` and `ltepass.save` write the
    codes, a byte each, and a folder loads as it was saved, bit for bit.

    Arguments:
        model: a transformed model or a dense one, not lowered, without adapters. Routers stay in floats, as do weights
            that several modules share (a head that is tied to the embedding), embeddings, transformers' Conv1D, and
            FFNs whose planes hold them already (inactive="low_bit"); in int4, linears whose d_in is no multiple of 32,
            and gated FFNs of such sizes.
        weights: "int8", "int4" or "tiers". Where routers gate an FFN, down's blocks in int4 are 32 outputs of a neuron,
            which the sparse op reads for active ones alone. "tiers", of a dense model: each FFN weight in two planes of
            4 bits, of which a token reads the second one for a tenth of the neurons only (`LTEConfig(router="proxy",
            inactive="low_bit")`; `set_sparsity` changes the share), and every other linear in int8; the model is then
            transformed, in hard mode, and keeps its FFNs in floats beside the planes, in a saved folder too.
        calibration: batches of token ids, or mappings of inputs; some 8,000 tokens of text. Of int4: what GPTQ sees; of
            tiers, which need it: what GPTQ and the thresholds see.
    Returns: the model. Quantised weights no longer learn; routers do.
    Raises: ConfigError (torchao is missing, an adapter or another quantiser holds a weight, a mask or another
        parametrisation computes one, no linear is left to be quantised, routers that tiers would replace, tiers without
        text), CalibrationError (a batch that is no model input, or values that
        are not finite), LoweredError, MetaWeightsError, ShardedError, of tiers also what `transform` raises; the model
        is then as it was.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> ltepass.quantize(model, "int8").save_pretrained(folder)
    """
    root = unwrapped(model)

    def work() -> Model:
        batches = None if calibration is None else list(calibration)
        if weights == "tiers":
            _make_tiers(root, batches)
            _quantize(root, "int8", None)
        else:
            _quantize(root, weights, batches)
        return model

    return all_or_nothing(root, work)


def _make_tiers(model: nn.Module, batches: list[Batch] | None) -> None:
    """A dense model's FFNs in planes, in hard mode."""
    if not batches:
        raise ConfigError(
            "calibration is empty or None; tiers need text, which says what rounding loses and which neurons matter; "
            "pass batches of token ids"
        )
    if is_transformed(model):
        raise ConfigError(
            'the model has routers; expected a dense one, whose FFNs become tiers; quantise this one to "int8", or '
            "call ltepass.remove first"
        )
    _require_plain(model)
    torchao("quantization")  # before minutes of calibration
    example = None if hasattr(model, "main_input_name") else batches[0]  # transformers' makes its own
    config = LTEConfig(router="proxy", inactive="low_bit", target_sparsity=0.9)
    transform(model, example, config, calibration=batches)
    set_mode(model, "hard")


def _quantize(model: nn.Module, weights: Weights, batches: list[Batch] | None) -> None:
    if weights not in get_args(Weights):
        raise ConfigError(f"weights is {weights!r}; expected one of {', '.join((*get_args(Weights), 'tiers'))}")
    if batches is not None and weights != "int4":
        raise ConfigError('calibration is given, and int8 needs none; expected weights "int4" or "tiers" with it')
    require_whole(model, "quantize")
    routed = Routed.of(model, "quantize") if is_transformed(model) else None
    if is_lowered(model) or (routed is not None and routed.state.lowered):
        raise LoweredError("the model is lowered; quantize expects it as it was; call ltepass.unlower(model) first")
    _require_plain(model)
    chosen, left = _linears(model, weights)
    by_neuron = _whole_ffns(model, chosen, left) if weights == "int4" and routed is not None else set[str]()
    if not chosen:
        reasons = "; ".join(f"{n} left: {reason}" for reason, n in left.items()) or "it has no linear"
        raise ConfigError(f"no linear of {type(model).__name__} can be quantised to {weights}: {reasons}")
    torchao("quantization")  # before any text is read
    head = _head(model) if weights == "int4" else None
    _round(model, [module for module in chosen.values() if module is head], "int8")
    others = {path: module for path, module in chosen.items() if module is not head}
    if weights == "int4":
        others = {path: module for path, module in others.items() if path in by_neuron or not _keep(module)}
    if batches is None or not others:
        _round(model, [module for path, module in others.items() if path not in by_neuron], weights)
        for path in by_neuron:
            _put(chosen[path], *int4_codes_by_input(chosen[path].weight.detach(), None))
    else:
        quantise_to_int4(model, list(others.items()), batches, _put, by_neuron)
    for module in chosen.values():
        module.__dict__.pop("extra_repr", None)  # torchao's, which a model that is loaded has not
    if routed is not None:
        routed.state.weights = weights
    else:
        transformers_hook.attach_quantised(model)
    log.info("quantize: %d linears in %s%s", len(chosen), weights, "".join(f"; {n} {why}" for why, n in left.items()))


def _head(model: nn.Module) -> nn.Module | None:
    """A language model's, which is held in 8 bits, as llama.cpp holds it beside 4."""
    found: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return found


def _round(model: nn.Module, linears: Iterable[nn.Linear], weights: Weights) -> None:
    held = {id(module) for module in linears}
    if held:
        torchao("quantization").quantize_(model, config_of(weights), lambda module, _: id(module) in held)


def _keep(linear: nn.Linear) -> bool:
    """Whether it came from blocks of Q4_0, as a GGUF file's: then it has the codes that it had."""
    parts = kept_codes(linear.weight.detach())
    if parts is None or parts[0] is None or parts[1] is None or parts[2] is not None:
        return False
    _put(linear, unpack_int4(parts[0]).to(torch.int8) - 8, parts[1])
    return True


def _put(linear: nn.Linear, codes: Tensor, scale: Tensor) -> None:
    linear.weight = int4_weight(codes, scale, linear.weight.dtype)


def _require_plain(model: nn.Module) -> None:
    """Raises ConfigError where somebody else stands in a linear's place, MetaWeightsError where there is no weight."""
    other = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if is_quantised(model):
        raise ConfigError(
            "torchao holds weights of the model as codes already; quantize expects plain weights, and does it once; "
            "load the model in floats"
        )
    if other is not None and other.quant_method != METHOD:
        raise ConfigError(
            f"the model was loaded by the quantiser {other.quant_method}; quantize expects plain weights; load it "
            "without quantization_config"
        )
    for path, module in model.named_modules():
        if "base_layer" in module._modules or "modules_to_save" in module._modules:
            raise ConfigError(
                f"{path} carries an adapter ({type(module).__name__}), which would no longer merge into codes; "
                "merge it first (merge_and_unload()), or quantise the model before adding it"
            )
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
            raise ConfigError(f"{path}.weight is {_computed(module)}; quantize expects plain weights")
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                raise MetaWeightsError(f"{path}.{name} is on the meta device; quantize expects real weights")
            if weight is not None and not is_ordinary(weight):
                raise ConfigError(
                    f"{path}.{name} is a {type(weight).__module__}.{type(weight).__name__}; quantize expects plain "
                    "weights, and does it once; load a model in floats"
                )


def _computed(linear: nn.Linear) -> str:
    """What a linear has in the place of a parameter, and how it becomes one again."""
    if "weight_mask" in linear._buffers:
        return "masked by torch.nn.utils.prune; fold the mask into it first (prune.remove(linear, 'weight'))"
    if is_parametrized(linear, "weight"):
        return "parametrised; fold that into it first (torch.nn.utils.parametrize.remove_parametrizations)"
    of = ", ".join(name for name, held in linear._parameters.items() if held is not None and name != "bias")
    return f"computed of {of or 'no parameter'}; make it a parameter first (remove_spectral_norm and the like)"


def _linears(model: nn.Module, weights: Weights) -> tuple[dict[str, nn.Linear], Counter[str]]:
    """The linears to quantise by their paths, and how many others are left for which reason."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    planes = _held_by_planes(model)
    chosen, left = dict[str, nn.Linear](), Counter[str]()
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(weight, Tensor) or not (is_product(module) or isinstance(module, nn.Linear)):
            continue
        reason = _why_not(module, weight, shared=uses[id(weight)] > 1, planes=path in planes)
        if reason is None and weights == "int4" and weight.shape[1] % BLOCK:
            reason = f"have a d_in that is no multiple of {BLOCK}"
        if reason is None:
            assert isinstance(module, nn.Linear)
            chosen[path] = module
        else:
            left[reason] += 1
    return chosen, left


def _whole_ffns(model: nn.Module, chosen: dict[str, nn.Linear], left: Counter[str]) -> set[str]:
    """Paths of the downs of gated FFNs, whose columns the sparse op gathers; an FFN of which it cannot read all is left
    in floats.
    """
    routed, prefix = _held_routed(model)
    by_neuron = set[str]()
    for site in [] if routed.tiered else routed.sites:
        paths = {prefix + path for path in (site.up, site.gate, site.down) if path is not None}
        reason = why_not_in_codes(site, "int4")
        if reason is None and paths <= chosen.keys():
            by_neuron.add(prefix + site.down)
            continue
        for path in paths & chosen.keys():
            del chosen[path]
            left[reason or "stand in an FFN with one that is left"] += 1
    return by_neuron


def _held_routed(model: nn.Module) -> tuple[Routed, str]:
    """A model's sites, and what stands before their paths."""
    routed = Routed.of(model, "quantize")
    return routed, next(f"{name}." if name else "" for name, module in model.named_modules() if module is routed.model)


def _why_not(module: nn.Module, weight: Tensor, *, shared: bool, planes: bool) -> str | None:
    """Why a linear stays in floats, or None."""
    if is_conv1d(module):
        return "stored [d_in, d_out] (Conv1D), which torchao does not read"
    if not is_product(module):
        return f"of a class of its own ({type(module).__name__})"
    if shared:
        return "share their weight with another module"
    if planes:
        return "held by planes already"
    return None if weight.is_floating_point() else f"hold {weight.dtype}"


def _held_by_planes(model: nn.Module) -> set[str]:
    """Paths of linears whose FFN is computed from its router's planes."""
    if not is_transformed(model):
        return set()
    routed, prefix = _held_routed(model)
    linears = {path for site in routed.sites for path in (site.up, site.gate, site.down) if path is not None}
    return {prefix + path for path in linears} if routed.tiered else set()
