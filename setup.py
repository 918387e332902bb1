"""What pyproject.toml cannot say: a wheel that is built beside torch and a C++ compiler carries the CPU kernel.

    pip wheel --no-build-isolation --no-deps .          objects for every ISA level of this architecture
    LTEPASS_PREBUILD=x86-64-v3 pip wheel ...            for this one; empty: none, a wheel for any platform

Without torch (pip's own isolated build) or a compiler it carries none, and the kernel is built on its first call.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BUILDER = Path(__file__).resolve().parent / "kernels" / "cpu" / "build.py"


@cache
def prebuilds() -> bool:
    if os.environ.get("LTEPASS_PREBUILD") == "" or importlib.util.find_spec("torch") is None:
        return False
    spec = importlib.util.spec_from_file_location("builder", BUILDER)
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    return builder.compiler() is not None


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode and prebuilds():
            levels = os.environ.get("LTEPASS_PREBUILD", "").split()
            only = ["--isa", *levels] if levels else []
            target = Path(self.build_lib) / "ltepass" / "kernels" / "cpu" / "prebuilt"
            subprocess.run([sys.executable, str(BUILDER), str(target), *only], check=True)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The objects use torch's stable ABI and no Python: one wheel for every Python version."""
        tag: tuple[str, str, str] = super().get_tag()
        return ("py3", "none", tag[2]) if prebuilds() else tag


class WithObjects(Distribution):
    def has_ext_modules(self) -> bool:
        return prebuilds()


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel}, distclass=WithObjects)
