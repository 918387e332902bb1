"""Saving and loading through transformers' quantizer interface, under the name "lte".

`save_pretrained` writes safetensors (dense names kept, routers beside them) and puts the sites into config.json as
`quantization_config`; `from_pretrained` rebuilds the routers from that list before the weights load, with no capture.
Where ltepass is not installed transformers warns and loads the dense model: names and neuron order make that right too.
A model whose weights torchao holds is saved as torchao's, with our entry inside that of method "torchao": there too,
transformers loads the dense model where ltepass is not installed, and asks for torchao where that is missing.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ltepass.config import LTEConfig
from ltepass.errors import CheckpointError
from ltepass.routed.json_entry import Json
from ltepass.routed.narrowing import narrow_to
from ltepass.routed.routed import Routed, refuse_tensor_parallel, set_state, state_of
from ltepass.routed.sites import FFNSite, LTEState
from ltepass.routed.torchao_weights import config_of, is_quantised, torchao, weights_of
from ltepass.saving.forward_checks import as_gated_now, check_forwards, try_gates
from ltepass.saving.model_card import write_cards
from ltepass.saving.renaming import as_loaded, fit_prefix
from ltepass.saving.site_checks import check_sites
from ltepass.saving.state_json import METHOD, read_state, write_state
from ltepass.saving.tensor_checks import (
    Header,
    check_present,
    check_routers,
    check_shapes,
    check_values,
    check_weights,
    has_routers,
    read_header,
    shapes_of,
)
from ltepass.saving.torchao_files import check_codes, check_linears, conversions, flat, is_ours, require_torchao, whole
from ltepass.transform_and_lower import remove

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LTEQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """What config.json says of a transformed model. A live view of the model's `LTEState`, so it never goes stale."""

    def __init__(self, state: LTEState) -> None:
        self.quant_method = METHOD  # by which transformers finds our quantizer, whatever the file says
        self.state = state

    @classmethod
    def from_dict(cls, config_dict: dict[str, Json], *_: object, **__: object) -> LTEQuantizationConfig:
        """Raises CheckpointError where the entry was not written by this format."""
        if METHOD not in config_dict:
            return cls(read_state(config_dict))
        require_torchao()
        state = read_state(config_dict[METHOD])
        state.weights = "int8"
        return cls(state)

    def to_dict(self) -> dict[str, Json]:
        entry = write_state(self.state)
        return entry if self.state.weights is None else {**torchao_entry(self.state.weights), METHOD: entry}

    def get(self, key: str, default: Json = None) -> Json:
        """transformers reads a config given as an object like the dict it is in config.json."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Iterator[tuple[str, Json]]:
        yield from self.to_dict().items()


class LTEQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Rebuilds the routers on the meta device before the weights load, and sets hard mode after."""

    quantization_config: LTEQuantizationConfig

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "an LTE config was passed for a checkpoint that holds no routers; expected a directory written by a "
                "transformed model; load it without quantization_config and call ltepass.transform"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        from ltepass.passes.insert.insert_routers import insert_routers

        planned = getattr(model.config, "distributed_config", None)  # the model is split after this, and then loaded
        refuse_tensor_parallel(model, "a routed model", getattr(planned, "tp_size", None))
        state = self.quantization_config.state
        header, packed = whole(read_header(checkpoint_files)) if checkpoint_files else (None, ())
        state.weights = "int8" if packed else None  # or int4: their values say so
        if header is None or has_routers(state.sites, header):
            state.narrowed = narrow_to(model, fit_prefix(model, state.sites))
        sites = checked_sites(model, state, header, packed)
        self._built = shapes_of(model)
        if not sites:
            warnings.warn(
                "config.json lists routers, and no weight file holds one: the model was saved again without ltepass; "
                "loaded dense; delete quantization_config from config.json to say so",
                stacklevel=2,
            )
            return
        insert_routers(model, sites, LTEConfig(**state.config), device="meta")
        state.sites = sites
        set_state(model, state)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        # The weights are plain: with these flags transformers would refuse .half() and .float().
        model.is_quantized = False
        del model.quantization_method
        check_shapes(model, self._built)
        check_codes(model)
        used = getattr(model, "_weight_conversions", None)  # none where another way loaded the weights
        if used is not None:
            model._weight_conversions = [conversion for conversion in used if not is_ours(conversion)]  # for a save
        state = state_of(model)
        if state is None:
            detach(model)
            return model
        state.weights = weights_of(model)
        set_hard(model)
        _watch_parents(model)
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How transformers reads what is no tensor under its own name."""
        return [] if self.quantization_config.state.weights is None else conversions()

    def get_new_dtype(self, converter: object, param: object, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales are not rounded to the model's dtype."""
        return None if is_ours(converter) else super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes in the place of the state dict. The entry of the config is written after it."""
        self.quantization_config.state.weights = weights_of(model)
        return flat(model.state_dict()) if is_quantised(model) else (None, {})

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        return remove(model)

    def remove_quantization_config(self, model: nn.Module) -> None:
        detach(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def checked_sites(
    model: PreTrainedModel, state: LTEState, header: Header | None, packed: Sequence[str] = ()
) -> list[FFNSite]:
    """The state's sites as this model has them, compared with it and with the files; none where those hold no router.

    header: of all weight files, int8 weights in it as `whole` says; None where the weights come from elsewhere. packed:
    names of those weights. Raises CheckpointError; changes nothing.
    """
    sites = fit_prefix(model, state.sites)
    if header is None:
        check_sites(model, sites)
    elif not has_routers(state.sites, header):
        return []
    else:
        named, converted = as_loaded(model, sites, header)
        check_routers(sites, state.config, named)
        check_sites(model, sites)
        check_weights(model, named)
        check_linears(model, as_loaded(model, sites, {name: header[name] for name in packed})[0])
        if not converted:
            check_present(model, sites, named)
    sites = as_gated_now(model, sites)
    check_forwards(model, sites)
    return sites


def set_hard(model: nn.Module) -> None:
    """After the weights are loaded: what routers hold is checked, and they decide. Raises CheckpointError."""
    routed = Routed.of(model, "from_pretrained")
    for site, router in routed:
        check_values(site, dict(router.named_buffers()))
        router.mode = "hard"
        router.note_density()
    routed.state.untried = try_gates(model, routed.sites)


def attach(model: PreTrainedModel) -> None:
    """From now on `model.save_pretrained` writes the sites. The model must be transformed."""
    state = state_of(model)
    assert state is not None
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not isinstance(other, LTEQuantizer):
        warnings.warn(
            f"the model is quantised with {other.quantization_config.quant_method}: config.json can hold one method, "
            "so save_pretrained will keep that one and the routers will not load again; keep the state_dict instead",
            stacklevel=3,
        )
        return
    config = LTEQuantizationConfig(state)
    _own_config(model)
    model.config.quantization_config = config
    model.hf_quantizer = LTEQuantizer(config, pre_quantized=True)
    _watch_parents(model)


def _watch_parents(model: nn.Module) -> None:
    if _warn_of_parent not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(_warn_of_parent)


def _warn_of_parent(model: PreTrainedModel, prefix: str, keep_vars: bool) -> None:
    """Where a Hugging Face model holds the transformed one, its config says nothing of the routers."""
    from transformers import PreTrainedModel

    frame = sys._getframe(1)
    while prefix and frame is not None and frame.f_code is nn.Module.state_dict.__code__:
        parent = frame.f_locals["self"]
        if parent is not model and isinstance(parent, PreTrainedModel) and state_of(parent) is None:
            warnings.warn(
                f"{prefix.removesuffix('.')} of this {type(parent).__name__} was transformed alone: the weights hold "
                "its routers, and the whole model's config.json does not list them, so from_pretrained will load it "
                "dense; transform the whole model instead, or save the part",
                stacklevel=2,
            )
            return
        frame = frame.f_back  # type: ignore[assignment]


def _own_config(model: PreTrainedModel) -> None:
    """A config object may have built several models: only this one is to say that it has routers."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


def torchao_entry(weights: str) -> dict[str, Json]:
    """What config.json holds of a dense model in "int8" or "int4": transformers' own entry of it."""
    config = torchao("core.config").config_to_dict(config_of(weights))
    return {"quant_method": "torchao", "quant_type": {"default": config}}


def attach_quantised(model: PreTrainedModel) -> None:
    """From now on a dense model in codes saves as transformers saves torchao's, and loads without ltepass."""
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    weights = weights_of(model)
    assert weights is not None, "it was quantised"
    config = TorchAoConfig(config_of(weights))
    _own_config(model)
    model.config.quantization_config = config
    model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)


def detach(model: PreTrainedModel) -> None:
    """The model saves as a dense model again. Nothing happens where `attach` was not called."""
    if isinstance(getattr(model, "hf_quantizer", None), LTEQuantizer):
        del model.hf_quantizer
        model.is_quantized = False
        for key in [key for key, hook in model._state_dict_pre_hooks.items() if hook is _warn_of_parent]:
            del model._state_dict_pre_hooks[key]
        if isinstance(getattr(model.config, "quantization_config", None), LTEQuantizationConfig):
            del model.config.quantization_config
        if is_quantised(model):
            attach_quantised(model)


AUTO_QUANTIZER_MAPPING[METHOD] = LTEQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LTEQuantizationConfig
write_cards()
