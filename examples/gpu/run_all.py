"""Everything that needs a GPU, by one command and in under 9 minutes:

    python examples/gpu/run_all.py --out DIR        # on a machine with a CUDA GPU; with --only, a half at a time
    python examples/gpu/run_all.py --dry-run        # here: tiny sizes, interpreted kernels, every row "not measured"

Builds the C++ op, runs the whole test suite and the GPU tests, compute-sanitizer on a small case, tunes, measures, and
writes DIR/speed.csv, speed.png, tuning_table.csv, log.txt and stages.txt (all that the stages printed). To keep a run,
copy its tables over kernels/gpu/tuning_table.csv and examples/gpu/speed.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as `python -m` has it, where the file itself is started

from examples.gpu import results  # noqa: E402 -- after the path

SECONDS = 525  # for all stages
# The test suite in parts that run side by side; together they are every folder and file of tests/.
SUITE = (
    ("tests/kernels", "tests/gpu", "tests/measure"),
    ("tests/models",),
    ("tests/passes", "tests/properties", "tests/exporting"),
    ("tests/training", "tests/vllm"),
    tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))),
)


GPU_TESTS = ("tests/gpu", "tests/models/test_bf16.py")


@dataclass
class Run:
    """The stages of one run: where they write, when they must end, what they left."""

    out: Path
    dry: bool
    printed: Path  # a folder for what each stage prints
    end: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    failed: list[str] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
        env["HF_HUB_OFFLINE"] = "1"
        if self.dry:
            env.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        return {**env, **more}

    def start(self, name: str, command: list[str], **more: str) -> subprocess.Popen[str]:
        self.say(f"== {name}: {' '.join(command)}")
        with (self.printed / f"{name}.txt").open("w") as file:
            return subprocess.Popen(
                command,
                text=True,
                start_new_session=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment(**more),
            )

    def finish(self, name: str, stage: subprocess.Popen[str], limit: float) -> None:
        """Waits for at most `limit` seconds, shows the last lines; a failure is noted and stops nothing else."""
        try:
            code = stage.wait(max(1.0, min(limit, self.end - time.monotonic())))
        except subprocess.TimeoutExpired:
            self._stop(stage)
            code = -1
        text = (self.printed / f"{name}.txt").read_text(errors="replace")
        with (self.out / "stages.txt").open("a") as file:
            file.write(f"===== {name}\n{text}\n")
        lines = text.splitlines()
        shown = lines[-4:] if code == 0 else lines[-25:]
        self.say("\n".join(f"   {line[:200]}" for line in shown))
        if code != 0:
            self.failed.append(name + (" (out of time)" if code == -1 else f" (exit {code})"))

    def _stop(self, stage: subprocess.Popen[str]) -> None:
        """Asks first, so that pytest says what failed so far; then its workers go too."""
        stage.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            stage.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()

    def stage(self, name: str, command: list[str], limit: float, **more: str) -> None:
        self.finish(name, self.start(name, command, **more), limit)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")


def python(script: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"examples.gpu.{script}", *options]


def pytest(*options: str, processes: int) -> list[str]:
    spread = ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *options]


def software() -> str:
    import torch
    import triton

    return f"torch {torch.__version__} triton {triton.__version__} python {sys.version.split()[0]}"


def check(run: Run) -> dict[str, subprocess.Popen[str]]:
    """The C++ op; then, side by side, the GPU tests and the sanitizer.

    Returns the suite, which goes on behind the rest, on the CPU at low priority: what is timed later are CUDA graphs.
    """
    run.stage("entry_points", [sys.executable, "setup.py", "-q", "egg_info"], 60)  # where torch.compile finds "lte"
    build = "from ltepass.kernels.cpu import loading as k; ok = k.load(); print('C++ op:', ok); assert ok"
    run.stage("build", [sys.executable, "-c", build], 100)
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    suite = {}
    for number, part in enumerate(SUITE, 1):
        command = ["nice", *pytest("-m", "not gpu and not slow", *part, processes=2)]
        suite[f"suite_{number}"] = run.start(f"suite_{number}", command, **no_gpu)
    stages = {"gpu_tests": run.start("gpu_tests", pytest("-m", "gpu", *GPU_TESTS, processes=8))}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(tool).exists():
        for name in ("memcheck", "racecheck"):
            how = ["--tool", name, "--report-api-errors", "no", "--error-exitcode", "1"]
            command = [tool, *how, *python("sanitize")]
            stages[name] = run.start(name, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        run.failed.append("compute-sanitizer (not installed)")
    end = time.monotonic() + 220
    for name, stage in stages.items():
        run.finish(name, stage, end - time.monotonic())
    return suite


def measure(run: Run) -> None:
    """Tuning first; the benchmarks then read the table it wrote."""
    table = run.out / "tuning_table.csv"
    run.stage("tune", python("tune", "--out", str(table), "--seconds", "70"), 100)
    tuned = {"LTEPASS_TUNING_TABLE": str(table)} if table.exists() else {}
    about = ("--software", software())
    run.stage("bench_token", python("bench_token", "--out", str(run.out / "token.csv"), *about), 200, **tuned)
    run.stage("bench_ffn", python("bench_ffn", "--out", str(run.out / "ffn.csv"), *about), SECONDS, **tuned)


def report(run: Run) -> None:
    """One CSV, one plot and the printed table, of whatever was measured."""
    parts = [path for path in (run.out / "ffn.csv", run.out / "token.csv") if path.exists()]
    rows = results.merged(row for path in parts for row in results.read(path))
    results.write(run.out / "speed.csv", rows)
    for path in parts:
        path.unlink()
    run.say(results.table(rows))
    run.say(f"\nfailed stages: {', '.join(run.failed) or 'none'}")
    results.plot(run.out / "speed.png", rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for what is written")
    parser.add_argument("--dry-run", action="store_true", help="run every script on the CPU, at tiny sizes")
    parser.add_argument("--only", choices=("check", "measure"), help="one half of the run")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as printed:
        run = Run(options.out.resolve(), options.dry_run, Path(printed))
        everything(run, options.only)
    return bool(run.failed)


def everything(run: Run, only: str | None) -> None:
    """All stages, or one half of them."""
    for name in ("log.txt", "stages.txt"):
        (run.out / name).write_text("")
    run.say(software())
    suite = {}
    if run.dry:
        run.stage("sanitize", python("sanitize"), 120)
    elif only != "measure":
        suite = check(run)
    if only != "check":
        measure(run)
    for name, part in suite.items():
        run.finish(name, part, SECONDS)
    report(run)


if __name__ == "__main__":
    sys.exit(main())
