"""What was pickled or exported when modules had other names still loads, and computes what it did."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ltepass
from ltepass.old_names import HELD, MOVED
from ltepass.passes.lower import lower_linear_modules, lowered_forward
from ltepass.routed import gate

PICKLES = Path(__file__).parent / "checkpoints" / "pickles"


@pytest.mark.parametrize("name", ["aligned", "inline", "aligned_lowered", "inline_lowered", "graph", "graph_lowered"])
def test_an_old_pickle_loads_and_computes_the_same(name: str) -> None:
    held = torch.load(PICKLES / f"{name}.pt", weights_only=False)
    model = held["model"]
    torch.testing.assert_close(model(**held["inputs"]), held["expected"])
    if name.endswith("lowered"):
        ltepass.unlower(model)
    gated = model(**held["inputs"])
    assert not torch.allclose(ltepass.remove(model)(**held["inputs"]), gated), "it was sparse"


def test_an_old_program_loads_after_the_import_alone() -> None:
    code = (
        "import torch, ltepass, sys\n"
        "p = torch.export.load(sys.argv[1]); held = torch.load(sys.argv[2], weights_only=False)\n"
        "torch.testing.assert_close(p.module()(held['inputs']['input']), held['expected'])"
    )
    files = [str(PICKLES / "program.pt2"), str(PICKLES / "aligned.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *files], check=True, timeout=120)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_name_is_the_new_module(old: str) -> None:
    try:
        new = importlib.import_module(MOVED[old])
    except ImportError as missing:
        pytest.skip(f"{MOVED[old]}: {missing}")
    assert importlib.import_module(old) is new
    assert new.__spec__ is not None
    assert new.__spec__.name == MOVED[old], "the alias leaves the module as it was"


@pytest.mark.parametrize("package", sorted(HELD))
def test_a_folder_with_a_modules_old_name_still_holds_its_names(package: str) -> None:
    """`from ltepass.sparsity import measure_union` is in users' code."""
    names = {"calibration": "calibrate", "saving": "load", "serving": "checked_server", "sparsity": "measure_union"}
    names |= {"sites": "router_of", "quality": "sparsity_of_tail"}
    folder = importlib.import_module(package)
    assert callable(getattr(folder, names[package.rpartition(".")[2]]))
    with pytest.raises(AttributeError, match="nothing"):
        _ = folder.nothing


def test_the_old_backend_module_is_a_forward() -> None:
    today = importlib.import_module("ltepass.passes.lower.compile_backend")
    assert importlib.import_module("ltepass.backend").lte is today.lte


def test_what_generated_forwards_called_is_found_by_its_old_name() -> None:
    """A forward that calls an attribute of its owner (`self.act(...)`) was pickled with this function in it."""
    assert pickle.loads(b"cltepass.regenerate\ncall\n.") is importlib.import_module(MOVED["ltepass.regenerate"]).call


@pytest.mark.parametrize("name", ["lowered_ffn", "lowered_in_graph", "lowered_call", "Plan"])
@pytest.mark.parametrize("old", ["ltepass.lowering", "ltepass.passes.lower.lower_modules"])
def test_what_a_lowered_model_calls_is_found_by_its_old_names(old: str, name: str) -> None:
    assert pickle.loads(f"c{old}\n{name}\n.".encode()) is getattr(lowered_forward, name)


@pytest.mark.parametrize("old", ["ltepass.router", "ltepass.routed.router"])
def test_what_a_gated_model_calls_is_found_by_its_old_names(old: str) -> None:
    for name in ("gate", "seen_inputs"):
        assert pickle.loads(f"c{old}\n{name}\n.".encode()) is getattr(gate, name)


def test_a_lowered_linear_is_found_in_the_file_that_held_it() -> None:
    assert pickle.loads(b"cltepass.passes.lower.lower_linears\nFloatCall\n.") is lower_linear_modules.FloatCall


def test_an_unknown_old_name_stays_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(b"cltepass.nothing\nX\n.")


@pytest.mark.parametrize(
    "old",
    [
        "passes.lower.linears.FloatCall",
        "passes.insert.regenerated_forwards._rebuild",
        "passes.graph.linears.Flow",
        "passes.capture.owner_forward.call",
        "routed.token_rows.TokenRows",
        "routed.padding.TokenHooks",
        "exporting.package.About",
        "passes.capture.capture_module.export_module",
        "passes.insert.selfcheck.check_gated",
        "routed.proxy.ProxyRouter",
        "sparsity.modes.set_mode",
        "demo.folder.Folder",
        "passes.insert.guard_forwards.guarded",
        "passes.insert.watch_forwards.Watch",
        "passes.capture.partial_capture.Parts",
        "passes.lower.compiled.compile_model",
    ],
)
def test_what_stood_in_a_merged_or_renamed_file_is_found_by_its_old_name(old: str) -> None:
    module, _, name = f"ltepass.{old}".rpartition(".")
    assert pickle.loads(f"c{module}\n{name}\n.".encode()) is getattr(importlib.import_module(MOVED[module]), name)
