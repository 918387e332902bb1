"""Commands whose code stays out of the package: they run programs of a checkout's examples, as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ltepass
from ltepass.errors import ConfigError


def run_example(command: str, module: str, arguments: Sequence[str]) -> int:
    """Exit status of `python -m module`, which prints as it goes. Raises ConfigError where there is no checkout.

    command: what the user typed, for messages; module: below `examples`.
    """
    root = Path(ltepass.__file__).resolve().parent.parent
    if not (root / "examples" / Path(*module.split("."))).with_suffix(".py").exists():
        raise ConfigError(
            f"{command} is no part of an installed ltepass; expected a checkout of its repository; run it there, where "
            f"its code is examples/{module.replace('.', '/')}.py"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", f"examples.{module}", *arguments]
    return subprocess.run(line, env=os.environ | {"PYTHONPATH": path}).returncode
