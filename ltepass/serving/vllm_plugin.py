"""vLLM loads a folder of a routed model: what its entry point `vllm.general_plugins` calls in each of its processes.

The folder's entry in config.json has the method "lte"; vLLM then runs `vllm_model.RoutedForCausalLM` in the place of
its own class. Needs vLLM, which alone imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm import ModelRegistry
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ltepass.routed.json_entry import Json
from ltepass.routed.sites import LTEState
from ltepass.saving.state_json import METHOD, read_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

ARCHITECTURE = "LTERoutedForCausalLM"
MODEL = "ltepass.serving.vllm_model:RoutedForCausalLM"


def register() -> None:
    """Tells vLLM of our method and our class; again in the same process, it changes nothing."""
    register_quantization_config(METHOD)(LTEInVLLM)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)


class LTEInVLLM(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed here
    """The entry of a folder of ours. vLLM calls it a quantisation; every weight is plain."""

    def __init__(self, state: LTEState) -> None:
        super().__init__()
        self.state = state

    @classmethod
    def from_config(cls, config: dict[str, Json]) -> LTEInVLLM:
        """Raises CheckpointError where the entry was not written by this format."""
        return cls(read_state(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Before vLLM makes the model: its class is ours from here on."""
        if hf_config is not None:
            hf_config.architectures = [ARCHITECTURE]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
