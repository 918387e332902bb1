"""Every way to install the package imports all of it, and importing it stays light."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from ltepass.kernels.cpu import build as kernel
from tests.child import quick_compiler

ROOT = Path(__file__).resolve().parent.parent
SITE = sysconfig.get_paths()["purelib"]
HEAVY = ("transformers", "triton", "matplotlib", "networkx", "peft", "typer", "torch._dynamo", "torch._inductor")
BUILDS = ("wheel", pytest.param("wheel from sdist", marks=pytest.mark.slow), "editable")
TREE = ("ltepass", "ltepass_autoload.py", "kernels", "passes", "pyproject.toml", "setup.py", "README.md", "LICENSE")

NEED_VLLM = {"ltepass.serving.vllm_model", "ltepass.serving.vllm_plugin"}  # which alone imports them

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs in a source tree only")


def run(code: str, *, cwd: Path, flags: tuple[str, ...] = (), **more: str) -> str:
    """Runs code in a new interpreter, away from the repository root, and returns what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path, prebuild: str = "", **more: str) -> Path:
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    return out / run(code, cwd=source, flags=(), LTEPASS_PREBUILD=prebuild, **more).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, links kept, so that nothing is built into the checkout."""
    copy = tmp_path_factory.mktemp("source")
    junk = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    for name in TREE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, symlinks=True, ignore=junk)
        else:
            shutil.copy(path, copy / name)
    return copy


@pytest.mark.parametrize("kind", BUILDS)
def test_every_kind_of_install_imports_every_package(kind: str, source: Path, tmp_path: Path) -> None:
    if kind == "wheel from sdist":
        sdist = build("sdist", source, tmp_path)
        shutil.unpack_archive(sdist, tmp_path)
        source = tmp_path / sdist.name.removesuffix(".tar.gz")
    wheel = build("editable" if kind == "editable" else "wheel", source, tmp_path)
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, timeout=240)
    # -S leaves this environment's own ltepass out; its other packages come in by path, its .pth files do not.
    modules = sorted({*modules_of_the_tree(source)} - NEED_VLLM)
    code = (
        f"import site, sys; site.addsitedir({str(target)!r}); sys.path.append({SITE!r})\n"
        f"import importlib\nfor name in {modules!r}: print(importlib.import_module(name).__file__)"
    )
    home = source if kind == "editable" else target
    for file in run(code, cwd=tmp_path, flags=("-S",)).splitlines():
        if file != "None":  # ltepass.kernels has no __init__.py on purpose
            assert Path(file).is_relative_to(home), file
    if kind != "editable":
        assert file_names(target / "ltepass/kernels", "*.cpp") == file_names(source / "kernels", "*.cpp")
        assert (target / "ltepass/py.typed").exists()


@pytest.mark.slow
@pytest.mark.skipif(kernel.compiler() is None, reason="needs a C++ compiler")
def test_a_wheel_built_beside_torch_brings_the_kernel_along(source: Path, tmp_path: Path) -> None:
    """It runs where there is no compiler and nothing in the cache."""
    wheel = build("wheel", source, tmp_path, prebuild=kernel.isa(), CXX=quick_compiler(tmp_path))
    assert not wheel.stem.endswith("any")
    target = tmp_path / "target"
    shutil.unpack_archive(wheel, target, "zip")
    code = (
        f"import site, sys; site.addsitedir({str(target)!r}); sys.path.append({SITE!r})\n"
        "from ltepass.kernels.cpu import loading; import ltepass.kernels.routed_ffn\n"
        "print(loading.load(), loading._prebuilt() is not None, loading.__file__)"
    )
    out = run(code, cwd=tmp_path, flags=("-S",), CXX="/does/not/exist", LTEPASS_CACHE_DIR=str(tmp_path / "cache"))
    assert out.split()[:2] == ["True", "True"]
    assert Path(out.split()[2]).is_relative_to(target)


@pytest.mark.skipif(kernel.compiler() is None, reason="needs a C++ compiler")
def test_the_wheel_holds_nothing_of_the_workshop_and_all_that_runs(source: Path, tmp_path: Path) -> None:
    """From it the C++ compiles, and the tuning table is found."""
    target = tmp_path / "target"
    shutil.unpack_archive(build("wheel", source, tmp_path), target, "zip")
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"ltepass", "ltepass_autoload.py"}
    names = file_names(target, "*")
    for word in ("examples", "tests", "zoo", "census", "aot", "coverage", "op_cases", "speed_page", "demo_table"):
        assert not [name for name in names if word in name], word
    code = (
        f"import site, sys; site.addsitedir({str(target)!r}); sys.path.append({SITE!r})\n"
        "from ltepass.kernels.cpu import loading; from ltepass.kernels.gpu import tuning\n"
        "print(loading._prebuilt() is None and loading.load(), tuning.TABLE.exists(), loading.__file__)"
    )
    env = {"LTEPASS_CACHE_DIR": str(tmp_path / "cache"), "CXX": quick_compiler(tmp_path)}
    out = run(code, cwd=tmp_path, flags=("-S",), **env)
    assert out.split()[:2] == ["True", "True"]
    assert Path(out.split()[2]).is_relative_to(target)


def test_a_wheel_built_without_a_compiler_is_one_for_any_platform(source: Path, tmp_path: Path) -> None:
    wheel = build("wheel", source, tmp_path, prebuild=kernel.isa(), CXX="/does/not/exist")
    assert wheel.stem.endswith("any")
    shutil.unpack_archive(wheel, tmp_path / "target", "zip")
    assert not file_names(tmp_path / "target", "*.so")


def file_names(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


def modules_of_the_tree(root: Path = ROOT) -> list[str]:
    """Dotted names of all our modules; the two links lead to the two top-level folders."""
    names = []
    for folder, dotted in (("ltepass", "ltepass"), ("kernels", "ltepass.kernels"), ("passes", "ltepass.passes")):
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            if parts[0] not in ("kernels", "passes"):
                names.append(".".join((dotted, *parts)).removesuffix(".__init__"))
    return names


def test_the_explicit_package_list_is_the_tree() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = modules_of_the_tree()
    with_modules = {name.rpartition(".")[0] for name in names if not is_package(name)}
    assert set(setup["packages"]) == with_modules | {name for name in names if is_package(name)}


def is_package(name: str) -> bool:
    relative = Path(*name.split("."))
    return (ROOT / "ltepass" / relative.relative_to("ltepass") / "__init__.py").exists()


def test_the_links_are_links_and_kernels_is_no_top_level_package() -> None:
    for name in ("kernels", "passes"):
        assert (ROOT / "ltepass" / name).is_symlink(), "committed as a link"
        assert os.readlink(ROOT / "ltepass" / name) == f"../{name}"
    # transformers would import it as Hugging Face's `kernels` package when the repository root is on sys.path.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_relative_imports_in_the_linked_folders() -> None:
    """They would load one file twice, as `kernels.x` and as `ltepass.kernels.x`."""
    for folder in ("kernels", "passes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}:{node.lineno}"


def test_importing_ltepass_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, ltepass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "import torch; print(torch.cuda.is_initialized())"
    )
    assert run(code, cwd=tmp_path).splitlines() == ["[]", "False"]


def test_the_citation_and_the_workflow_are_of_this_version_and_its_ci() -> None:
    import ltepass

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ltepass.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["run"]["steps"]
    assert {"run": "bash .ci/run"} in steps


PUBLIC = [
    "ContrastiveSettings",
    "CubicSchedule",
    "FFNSite",
    "LTEConfig",
    "LTESettings",
    "LTETrainer",
    "LTETrainerMixin",
    "Refusal",
    "Report",
    "SparsityController",
    "__version__",
    "begin_stage",
    "calibrate",
    "contrastive_loss",
    "draft",
    "export",
    "exported_loop",
    "label_mask",
    "load",
    "lower",
    "measure_sparsity",
    "measure_union",
    "perplexity",
    "prune",
    "quantize",
    "remove",
    "report",
    "save",
    "set_hidden_sparsity",
    "set_input_sparsity",
    "set_mode",
    "set_sparsity",
    "settle",
    "take_auxiliary",
    "transform",
    "unlower",
    "warm_start",
]


def test_public_names_are_frozen() -> None:
    import ltepass

    assert sorted(ltepass.__all__) == PUBLIC
    assert all(hasattr(ltepass, name) for name in PUBLIC)


def test_what_an_extra_installs_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, lines in extras.items():
        file = ROOT / ("constraints-vllm.txt" if name == "vllm" else "constraints.txt")
        pinned = set(re.findall(r"^([\w.-]+)==", file.read_text(), re.MULTILINE))
        assert {re.match(r"[\w-]+", line)[0] for line in lines} <= pinned, name  # type: ignore[index]


def test_vllm_is_pointed_at_a_function_of_ours() -> None:
    """`make vllm` calls it; here vLLM is not installed."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, name = points["lte"].split(":")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    assert module in NEED_VLLM
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_floor_is_what_pyproject_names_at_its_lowest() -> None:
    """torch aside: its floor runs where a GPU is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    floors = dict(pin for line in named for pin in re.findall(r"^(\w+)>=([\d.]+)", line))
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    (oldest,) = re.findall(r"^FLOORS := (\S+)", makefile, re.MULTILINE)
    pins |= {"transformers": oldest, "peft": re.findall(rf"^floor-{oldest}: PEFT := (\S+)", makefile, re.MULTILINE)[0]}
    for name in floors.keys() - {"torch", "setuptools"}:
        assert f"{pins[name]}.".startswith(f"{floors[name]}."), name
