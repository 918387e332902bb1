"""Building on first use: two processes at once, no compiler, a broken one, a read-only cache, another ISA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltepass.kernels.cpu import build, loading
from tests.child import environment, quick_compiler

x86 = pytest.mark.skipif(build.isa() not in build.X86_LEVELS, reason="x86-64 only")
RUN = """
import warnings, torch
from tests.kernels.routed_cases import Recipe, make
import ltepass.kernels.routed_ffn
from ltepass.kernels import reference
from ltepass.kernels.cpu import loading
from ltepass.kernels.cpu.which_path import which_path
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for T in (1, 9):
        args = make(Recipe(T=T))
        y = torch.ops.ltepass.routed_ffn(*args)
        torch.testing.assert_close(y, reference.routed_ffn(*args), rtol=1e-4, atol=1e-5)
print("loaded", loading._loaded)
for w in seen:
    if "ltepass" in str(w.message): print("warning", w.message)
print(which_path(1, 64, 64, 8, torch.float32))
"""


def start(cache: Path, **env: str) -> subprocess.Popen[str]:
    full = environment(**{"LTEPASS_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **env})
    return subprocess.Popen(
        [sys.executable, "-c", RUN], env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@x86
def test_two_processes_build_once(tmp_path: Path) -> None:
    """The compiler is a script that counts its calls. The object is the baseline one, which any x86-64 runs."""
    log, cache = tmp_path / "calls", tmp_path / "cache"
    counting = quick_compiler(tmp_path, log)
    runs = [start(cache, CXX=counting, LTEPASS_ISA="x86-64") for _ in range(2)]
    for run in runs:
        assert "loaded True" in finish(run)
    assert log.read_text().count("call") == 1
    assert [p.name for p in cache.glob("*.so")] == [build.object_name("x86-64")]
    assert not [p for p in cache.iterdir() if p.is_dir()]  # no temporary folder is left
    assert "loaded True" in finish(start(cache, CXX="/does/not/exist", LTEPASS_ISA="x86-64"))  # from the cache


def test_without_a_compiler_results_are_exact_and_one_warning_says_what_to_install(tmp_path: Path) -> None:
    out = finish(start(tmp_path, CXX="/does/not/exist"))
    assert "loaded False" in out
    assert out.count("warning") == 1
    assert "install g++" in out
    assert "PyTorch" in out.splitlines()[-1]


def test_a_failing_compiler_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    out = finish(start(tmp_path / "cache", CXX=str(broken)))
    assert "loaded False" in out
    assert "out of ideas" in out


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = finish(start(tmp_path / "file"))
    assert "loaded False" in out
    assert "LTEPASS_CACHE_DIR" in out


@x86
@pytest.mark.slow
def test_the_avx2_object_works(tmp_path: Path) -> None:
    assert "loaded True" in finish(start(tmp_path, LTEPASS_ISA="x86-64-v3"))


@pytest.mark.skipif(build.isa() != "cooperlake", reason="needs a CPU that multiplies bf16, and its object")
def test_multiplying_bf16_and_widening_it_agree(tmp_path: Path) -> None:
    """What differs is the rounding of the hidden units, so not every output is the same."""
    code = (
        "import sys, torch\n"
        "from tests.kernels.routed_cases import Recipe, make\nimport ltepass.kernels.routed_ffn\n"
        "args = make(Recipe(T=32, d_model=512, group_size=33, dtype=torch.bfloat16, layout='neuron_rows'))\n"
        "torch.save(torch.ops.ltepass.routed_ffn(*args), sys.argv[1])"
    )
    y = []
    for level in ("cooperlake", "x86-64-v4"):
        env = environment(LTEPASS_ISA=level)
        subprocess.run([sys.executable, "-c", code, str(tmp_path / level)], env=env, check=True, timeout=240)
        y.append(torch.load(tmp_path / level).float())
    assert not torch.equal(*y)
    assert (y[0] - y[1]).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * y[1].abs().max()


def test_name_follows_source_isa_and_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = build.object_name("x86-64")
    assert first != build.object_name("x86-64-v3")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert build.object_name("x86-64") != first
    monkeypatch.undo()
    for name in (*build.SOURCES, *build.HEADERS):
        (tmp_path / name).write_bytes((build.HERE / name).read_bytes())
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.object_name("x86-64") == first
    for name in (*build.SOURCES, *build.HEADERS):
        before = build.object_name("x86-64")
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n// changed\n")
        assert build.object_name("x86-64") != before, name


def test_an_object_from_the_wheel_is_taken_while_it_fits_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (*build.SOURCES, *build.HEADERS):
        (tmp_path / name).write_bytes((build.HERE / name).read_bytes())
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setenv("LTEPASS_CACHE_DIR", str(tmp_path / "cache"))
    prebuilt = tmp_path / "prebuilt" / build.prebuilt_name(build.isa())
    prebuilt.parent.mkdir()
    prebuilt.touch()
    assert loading._prebuilt() == prebuilt
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert loading._prebuilt() == prebuilt  # the stable ABI serves every torch
    assert not loading._load_prebuilt()  # it cannot be loaded (it is empty), so one is built
    (tmp_path / build.SOURCES[0]).write_text("// changed\n")
    assert loading._prebuilt() is None
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert not loading._load_built()


def test_headers_are_all_listed() -> None:
    """A header that is not in the hash would leave stale objects behind."""
    folder = Path(build.__file__).parent
    assert {p.name for p in folder.glob("*.h")} == set(build.HEADERS)
