"""`ltepass demo`: a real model is trained, lowered, timed, saved and loaded, and one table says what came out."""

from __future__ import annotations

from ltepass.demo.folder import DemoOptions, Folder
from ltepass.demo.run import run_demo

__all__ = ["DemoOptions", "Folder", "run_demo"]
