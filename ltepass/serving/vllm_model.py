"""A routed model in vLLM: transformers' model under vLLM's attention, each FFN one sparse op.

    transformers' model -> checked sites -> routers -> vLLM's layers around the FFNs -> weights -> lowered FFNs

vLLM's backend for transformers builds the model and puts its own layers in; the linears of our FFNs stay as they are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.model_executor.models.transformers import TransformersForCausalLM, vllm_attention_forward

from ltepass.config import LTEConfig
from ltepass.errors import CheckpointError, ConfigError
from ltepass.passes.insert.insert_routers import insert_routers
from ltepass.routed.routed import set_state
from ltepass.saving.quantizer import checked_sites, set_hard
from ltepass.saving.renaming import as_loaded
from ltepass.saving.tensor_checks import Header, check_routers, noted
from ltepass.serving.vllm_plugin import LTEInVLLM
from ltepass.transform_and_lower import lower

if TYPE_CHECKING:
    from vllm.config import VllmConfig


ATTENTION = "ltepass_vllm"  # by which transformers' models call it
FORMATS = ("auto", "hf", "safetensors")
TRIED = ("llama", "qwen2", "qwen3", "gpt2")  # tests/vllm compares their tokens


def attention_in_heads(module: nn.Module, query: Tensor, *args: Tensor, **kwargs: object) -> tuple[Tensor, None]:
    """vLLM's attention in the shape that transformers' has, [1, T, heads, size]: GPT-2 joins the last two axes.

    query: [1, heads, T, size].
    """
    out, _ = vllm_attention_forward(module, query, *args, **kwargs)
    return out.unflatten(-1, (query.shape[1], -1))[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_in_heads)


class RoutedForCausalLM(TransformersForCausalLM):  # type: ignore[misc]  # vLLM is not typed here
    """What vLLM runs for a folder that a routed model was saved to. Raises CheckpointError, ConfigError."""

    quant_config: LTEInVLLM

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _refuse_what_cannot_be_gated(vllm_config)
        vllm_config.load_config.load_format = "safetensors"  # nor does it look for another form
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.text_config._attn_implementation = ATTENTION

    def _create_hf_to_vllm_mapper(self) -> None:
        """vLLM drops what a pattern of transformers' finds in a name: GPT-2's `attn.bias` is in `attn.c_attn.bias`."""
        self.model._keys_to_ignore_on_load_unexpected = [
            pattern
            for pattern in self.model._keys_to_ignore_on_load_unexpected or ()
            if not any(re.search(pattern, name) for name, _ in self.model.named_parameters())
        ]
        super()._create_hf_to_vllm_mapper()

    def recursive_replace(self) -> None:
        """vLLM puts its layers in, while the linears of our FFNs are out of its sight."""
        self.state = copy.deepcopy(self.quant_config.state)  # of this model; vLLM may make another
        self.state.sites = checked_sites(self.model, self.state, None)
        insert_routers(self.model, self.state.sites, LTEConfig(**self.state.config), self.device_config.device)
        set_state(self.model, self.state)
        paths = {path for site in self.state.sites for path in (site.up, site.gate, site.down) if path is not None}
        linears = {path: self.model.get_submodule(path) for path in paths}
        for path in linears:
            self.model.set_submodule(path, nn.Identity())
        super().recursive_replace()
        for path, linear in linears.items():
            self.model.set_submodule(path, linear)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        header: Header = {}
        loaded: set[str] = super().load_weights(noted(weights, header))
        named, _ = as_loaded(self.model, self.state.sites, header)
        check_routers(self.state.sites, self.state.config, named)
        # vLLM asks for every weight of a dense model alone, and leaves what no file has as the memory was.
        if missing := sorted({name for name, _ in self.named_parameters()} - loaded):
            raise CheckpointError(f"{missing[0]} is missing from the weight files; save the model again")
        return loaded

    def process_weights_after_loading(self) -> None:
        set_hard(self.model)
        lower(self.model)


def _refuse_what_cannot_be_gated(vllm_config: VllmConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    refused = {
        f"a model of type {model.hf_config.model_type}": model.hf_config.model_type not in TRIED,
        f"tensor_parallel_size {parallel.tensor_parallel_size}": parallel.tensor_parallel_size > 1,
        f"pipeline_parallel_size {parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
        "LoRA": vllm_config.lora_config is not None,
        f"load_format {vllm_config.load_config.load_format}": vllm_config.load_config.load_format not in FORMATS,
        "quantised weights": vllm_config.quant_config.online_quantization_config is not None,
    }
    for what, seen in refused.items():
        if seen:
            raise ConfigError(
                f"vLLM was asked for {what}, and the model has routers; expected {', '.join(TRIED)}, whose tokens "
                "were compared, on one device, with plain weights in safetensors; leave that out, or save what "
                "ltepass.remove makes of the model"
            )
