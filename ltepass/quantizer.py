"""Saving and loading through transformers' quantizer interface, under the name "lte".

`save_pretrained` writes safetensors (dense names kept, routers beside them) and puts the sites into config.json as
`quantization_config`; `from_pretrained` rebuilds the routers from that list before the weights load, with no capture.
Without `import ltepass` transformers warns and loads the dense model: names and neuron order make that right as well.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ltepass.config import LTEConfig
from ltepass.errors import CheckpointError, LTEError
from ltepass.router import Router
from ltepass.sites import FFNSite, LTEState, Refusal, state_of

METHOD = "lte"
VERSION = 1  # of what to_dict writes


class LTEQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """What config.json says of a transformed model. A live view of the model's `LTEState`, so it never goes stale."""

    def __init__(self, state: LTEState) -> None:
        self.quant_method = METHOD
        self.state = state

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *_: Any, **__: Any) -> LTEQuantizationConfig:
        """Raises CheckpointError where the entry was not written by this format."""
        return cls(_read_state(config_dict))

    def to_dict(self) -> dict[str, Any]:
        state = self.state
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "config": dict(state.config),
            "grouping": state.grouping,
            "sites": [site.to_dict() for site in state.sites],
            "refusals": [dataclasses.asdict(refusal) for refusal in state.refusals],
        }

    def get(self, key: str, default: Any = None) -> Any:
        """transformers reads a config given as an object like the dict it is in config.json."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def _read_state(entry: dict[str, Any]) -> LTEState:
    if entry.get("version") != VERSION:
        raise CheckpointError(
            f"config.json says quant_method 'lte' with version {entry.get('version')!r}; this ltepass reads version "
            f"{VERSION}; load it with the ltepass that wrote it, or delete quantization_config to load it dense"
        )
    try:
        return LTEState(
            config=LTEConfig(**entry["config"]).to_dict(),
            sites=[FFNSite.from_dict(site) for site in entry["sites"]],
            refusals=[Refusal(**refusal) for refusal in entry.get("refusals", ())],
            grouping=entry["grouping"],
        )
    except (KeyError, TypeError, AttributeError, LTEError) as error:
        raise CheckpointError(
            f"quantization_config in config.json is not what ltepass writes ({type(error).__name__}: {error}); "
            "expected the keys config, grouping and sites; save the model again with save_pretrained"
        ) from error


class LTEQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Rebuilds the routers on the meta device before the weights load, and sets hard mode after."""

    quantization_config: LTEQuantizationConfig
    lower_scope: ClassVar[Literal["ffn", "model"] | None] = None  # set by a server, which loads models out of our sight

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "an LTE config was passed for a checkpoint that holds no routers; expected a directory written by a "
                "transformed model; load it without quantization_config and call ltepass.transform"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from ltepass.passes.insert_routers import insert_routers

        state = self.quantization_config.state
        _check_files(state.sites, checkpoint_files or [])
        state.sites = _fit_prefix(model, state.sites)
        _check_sites(model, state.sites)
        insert_routers(model, state.sites, LTEConfig(**state.config), device="meta")
        model._lte = state

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, Router):
                module.mode = "hard"
        # The weights are plain: with these flags transformers would refuse .half() and .float().
        model.is_quantized = False
        del model.quantization_method
        if self.lower_scope is not None:
            import ltepass

            ltepass.lower(model, scope=self.lower_scope)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        import ltepass

        return ltepass.remove(model)

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


def attach(model: Any) -> None:
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


def _own_config(model: Any) -> None:
    """A config object may have built several models: only this one is to say that it has routers."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


def detach(model: Any) -> None:
    """The model saves as a dense model again. Nothing happens where `attach` was not called."""
    if isinstance(getattr(model, "hf_quantizer", None), LTEQuantizer):
        del model.hf_quantizer
        model.is_quantized = False
        if isinstance(getattr(model.config, "quantization_config", None), LTEQuantizationConfig):
            del model.config.quantization_config


def _fit_prefix(model: nn.Module, sites: list[FFNSite]) -> list[FFNSite]:
    """Paths as this class has them: `AutoModel` drops the head, and with it the prefix that the causal LM puts before.

    The list comes back as it was where no prefix fits; `_check_sites` then says what is missing.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = {name for name, _ in model.named_modules()}
    renames: tuple[Callable[[str], str], ...] = (
        str,
        lambda path: path.removeprefix(prefix),
        lambda path: prefix + path,
    )
    for rename in renames:
        if all(rename(site.down) in names for site in sites):
            return [_renamed(site, rename) for site in sites]
    return sites


def _renamed(site: FFNSite, rename: Callable[[str], str]) -> FFNSite:
    return dataclasses.replace(
        site,
        name=rename(site.name),
        owner=rename(site.owner),
        router=rename(site.router),
        up=rename(site.up),
        gate=None if site.gate is None else rename(site.gate),
        down=rename(site.down),
        neurons=tuple(dataclasses.replace(rows, param=rename(rows.param)) for rows in site.neurons),
    )


def _check_sites(model: nn.Module, sites: list[FFNSite]) -> None:
    """Every parameter that a site names is there and large enough; else the list belongs to another model."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for site in sites:
        for rows in site.neurons:
            last = rows.start + (site.d_ff - 1) * rows.step
            shape = shapes.get(rows.param)
            if shape is None or rows.dim >= len(shape) or shape[rows.dim] <= last:
                raise CheckpointError(
                    f"site {site.name} in config.json expects {site.d_ff} neurons in {rows.param}; this "
                    f"{type(model).__name__} has {'no such parameter' if shape is None else f'shape {tuple(shape)}'}; "
                    "config.json and the model's settings do not belong together: save the model again"
                )


def _check_files(sites: list[FFNSite], files: list[str]) -> None:
    """Routers are in the files: without them transformers would only warn and start them at random."""
    names: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; ltepass reads and writes only those; save it again")
        try:
            with safe_open(file, "pt") as tensors:
                names.update(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors ({error}); copy or save it again") from error
    # transformers may write other prefixes than the model has, so count what only a router has before complaining.
    missing = [site.router for site in sites if f"{site.router}.quantiles" not in names]
    if files and missing and sum(name.endswith(".quantiles") for name in names) < len(sites):
        raise CheckpointError(
            f"config.json lists {len(sites)} routers, and the weight files lack {len(missing)} of them (first: "
            f"{missing[0]}); expected a directory written by save_pretrained of a transformed model; save it again"
        )


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(LTEQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(LTEQuantizationConfig)
