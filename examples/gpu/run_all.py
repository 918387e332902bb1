"""Everything that needs a GPU, by one command and in under 9 minutes:

    python examples/gpu/run_all.py --out DIR        # on a machine with a CUDA GPU
    python examples/gpu/run_all.py --dry-run        # here: tiny sizes, interpreted kernels, every row "not measured"

Builds the C++ op, runs the whole test suite and the GPU tests, compute-sanitizer on a small case, tunes, measures, and
writes DIR/speed.csv, speed.png, tuning_table.csv and log.txt. To keep a run, copy its tables over
kernels/tuning_table.csv and examples/gpu/speed.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import results

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SECONDS = 525  # for all stages


@dataclass
class Run:
    """The stages of one run: where they write, when they must end, what they left."""

    out: Path
    dry: bool
    end: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    failed: list[str] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            env.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        return {**env, **more}

    def start(self, name: str, command: list[str], **more: str) -> subprocess.Popen[str]:
        self.say(f"== {name}: {' '.join(command)}")
        with (self.out / f"{name}.txt").open("w") as file:
            how = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": self.environment(**more)}
            return subprocess.Popen(command, text=True, start_new_session=True, **how)  # type: ignore[call-overload]

    def finish(self, name: str, stage: subprocess.Popen[str], limit: float) -> None:
        """Waits for at most `limit` seconds, shows the last lines; a failure is noted and stops nothing else."""
        try:
            code = stage.wait(max(1.0, min(limit, self.end - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(stage.pid, signal.SIGKILL)  # its workers too
            stage.wait()
            code = -1
        lines = (self.out / f"{name}.txt").read_text(errors="replace").splitlines()
        shown = lines[-4:] if code == 0 else lines[-25:]
        self.say("\n".join(f"   {line[:200]}" for line in shown))
        if code != 0:
            self.failed.append(name + (" (out of time)" if code == -1 else f" (exit {code})"))

    def stage(self, name: str, command: list[str], limit: float, **more: str) -> None:
        self.finish(name, self.start(name, command, **more), limit)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")


def python(script: str, *options: str) -> list[str]:
    return [sys.executable, str(HERE / script), *options]


def pytest(*options: str, processes: int) -> list[str]:
    spread = ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *options]


def software() -> str:
    import torch
    import triton

    return f"torch {torch.__version__} triton {triton.__version__} python {sys.version.split()[0]}"


def check(run: Run) -> None:
    """The C++ op, then at the same time: the suite on the CPU, the GPU tests, the sanitizer. Nothing is timed yet."""
    build = "from ltepass.kernels import routed_ffn_cpu as k; ok = k.load(); print('C++ op:', ok); assert ok"
    run.stage("build", [sys.executable, "-c", build], 60)
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    suite = run.start("suite", pytest("-m", "not gpu and not slow", processes=7), **no_gpu)
    gpu = run.start("gpu_tests", pytest("-m", "gpu", "tests", processes=4))
    watched = {}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(tool).exists():
        for name in ("memcheck", "racecheck"):
            command = [tool, "--tool", name, "--error-exitcode", "1", *python("sanitize.py")]
            watched[name] = run.start(name, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        run.failed.append("compute-sanitizer (not installed)")
    run.finish("gpu_tests", gpu, 150)
    for name, stage in watched.items():
        run.finish(name, stage, 60)
    run.finish("suite", suite, 60)  # what is not done by now would disturb the timings


def measure(run: Run) -> list[results.Row]:
    """Tuning first; the benchmarks then read the table it wrote."""
    table, ffn, token = run.out / "tuning_table.csv", run.out / "ffn.csv", run.out / "token.csv"
    run.stage("tune", python("tune.py", "--out", str(table), "--seconds", "80"), 110)
    tuned = {"LTEPASS_TUNING_TABLE": str(table)} if table.exists() else {}
    about = ("--software", software())
    run.stage("bench_token", python("bench_token.py", "--out", str(token), *about), 150, **tuned)
    run.stage("bench_ffn", python("bench_ffn.py", "--out", str(ffn), *about), SECONDS, **tuned)
    return results.merged(row for path in (ffn, token) if path.exists() for row in results.read(path))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for what is written")
    parser.add_argument("--dry-run", action="store_true", help="run every script on the CPU, at tiny sizes")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out.resolve(), options.dry_run)
    (run.out / "log.txt").write_text("")
    run.say(software())
    if run.dry:
        run.stage("sanitize", python("sanitize.py"), 120)
    else:
        check(run)
    rows = measure(run)
    results.write(run.out / "speed.csv", rows)
    results.plot(run.out / "speed.png", rows)
    for name in ("ffn.csv", "token.csv"):
        (run.out / name).unlink(missing_ok=True)  # their rows stand in speed.csv
    run.say(results.table(rows))
    run.say(f"\nfailed stages: {', '.join(run.failed) or 'none'}")
    return bool(run.failed)


if __name__ == "__main__":
    sys.exit(main())
