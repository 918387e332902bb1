"""Models of real size are inspected without their weights: on the meta device, in little time and memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

SHAPES = {
    "LLaMA-2-7B": (LlamaConfig(), 32),
    "Llama-3-70B": (
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        80,
    ),
}
SECONDS, GIGABYTES = 60.0, 2.0


@pytest.mark.parametrize("name", ["LLaMA-2-7B", pytest.param("Llama-3-70B", marks=pytest.mark.slow)])
def test_a_big_shape_is_inspected_in_a_minute_and_two_gigabytes(name: str, tmp_path: Path) -> None:
    config, layers = SHAPES[name]
    config.save_pretrained(tmp_path)
    command = [sys.executable, "-c", "from ltepass.cli import main; main()", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{layers} FFN sites" in done.stdout
    output = done.stderr
    last = re.search(r"found in ([\d.]+) s; peak memory of the process ([\d.]+) GB", output)
    assert last is not None, output
    print(f"{name}: {last.group()}")
    seconds, gigabytes = map(float, last.groups())
    assert seconds <= SECONDS
    assert gigabytes <= GIGABYTES
