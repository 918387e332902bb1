"""A gated model that is exported in int8 decodes what the same graph says in plain PyTorch, and so does the example."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ltepass
from ltepass.exporting.export_model import passes
from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.measure.sides.exported_side import Exported
from ltepass.measure.sides.transformers_side import Transformers
from ltepass.passes.capture.decoder_step import capture_step
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from tests.child import environment
from tests.models.zoo import VOCAB, transformed
from tests.passes.test_export_passes import Plain

PROMPT, NEW = [5, 17, 9, 33, 21], 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model at 50 % sparsity, and its folder in int8. Compiled once."""
    model: Any = transformed("llama", num_key_value_heads=1)
    batch = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    ltepass.calibrate(model, [batch])
    ltepass.set_sparsity(model, 0.5)
    folder = tmp_path_factory.mktemp("exported") / "out"
    ltepass.export(model, folder, length=32, linears="int8")
    return model, folder


def in_plain_pytorch(model: Any) -> list[int]:
    step = capture_step(model, length=32)
    run_passes(passes("int8"), GraphJob(step.graph))
    cache, ids, position, out = torch.zeros_like(step.cache), PROMPT, 0, list[int]()
    with torch.no_grad():
        while len(out) < NEW:
            logits = Plain(step.graph).run(torch.tensor([ids]), torch.tensor(position), cache)
            position, ids = position + len(ids), [int(logits[0, -1].argmax())]
            out += ids
    return out


def test_tokens_are_those_of_the_graph_in_plain_pytorch(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    decoder, wanted = ExportedDecoder(folder), in_plain_pytorch(model)
    assert len({*wanted}) > 2, "no constant answer"
    ids, got = PROMPT, list[int]()
    while len(got) < NEW:
        ids = [int(decoder(ids).argmax())]
        got += ids
    assert got == wanted
    assert decoder.about.gated_bytes == 2 * (3 * 60 * 24 + 2 * 60 * 4), "a byte a weight"
    assert {t.dtype for name, t in decoder._weights.items() if name.endswith("neuron_codes")} == {torch.int8}


@pytest.mark.slow
def test_a_program_without_ltepass_runs_it(exported: tuple[Any, Path]) -> None:
    """Through ops.so and kernels.so, as examples/exported do."""
    model, folder = exported
    code = (
        "import sys, json, torch; sys.modules['ltepass'] = None; from torch._inductor import aoti_load_package; "
        f"folder = {str(folder)!r}; torch.ops.load_library(folder + '/ops.so'); "
        "graph = aoti_load_package(folder + '/decode.pt2'); weights = torch.load(folder + '/weights.pt'); "
        "graph.load_constants({n: weights[n] for n in graph.get_constant_fqns()}, check_full_update=True); "
        "about = json.load(open(folder + '/decoder.json')); cache = torch.empty(about['cache']); "
        f"out = [graph(torch.tensor([[t]]), torch.tensor(i), cache)[0, -1] for i, t in enumerate({PROMPT!r})]; "
        "print(int(out[-1].argmax()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == in_plain_pytorch(model)[0]


def test_bench_names_a_folder_by_the_format_of_its_ffns(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    source = Transformers(load=lambda: copy.deepcopy(model), routed=True)
    engine: Any = Exported(folder=folder, source=source).open(32)
    ids, about = torch.tensor(PROMPT), engine._decoder.about
    for linears, name in {"int8": "int8", "int4": "int4", "int4_minimum": "F32, linears int4_minimum"}.items():
        engine._decoder.about = replace(about, linears=linears)
        assert engine.facts(ids, 2, ids[None][:0]).format == name
