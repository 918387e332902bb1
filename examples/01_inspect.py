"""What would be found in a model, and what is refused, without reading a weight: a LLaMA on the meta device."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ltepass


def main() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=8, vocab_size=1000))
    ltepass.transform(model, config=ltepass.LTEConfig(grouping="identity"))
    report = ltepass.report(model)
    print(report)
    assert len(report.sites) == 8


if __name__ == "__main__":
    main()
