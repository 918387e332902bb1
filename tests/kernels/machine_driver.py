"""Run by test_machines in a process of its own: each case is a machine where something is missing or wrong.

python -m tests.kernels.machine_driver FOLDER OBJECT: FOLDER/results.json holds what came of each case. OBJECT is a
kernel that loads.
A case runs in a forked child that has loaded nothing yet: it prepares the machine, calls the op, and counts warnings.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ltepass.kernels import reference, routed_ffn
from ltepass.kernels.cpu import build, loading
from tests.kernels.routed_cases import Recipe, make

STRANGER = 54321  # a user id without a name or a home
ROOT = getattr(os, "geteuid", lambda: 1)() == 0


class Machine:
    """cache: the folder that LTEPASS_CACHE_DIR names, not there yet. whole: the bytes of an object that loads."""

    def __init__(self, home: Path, source: Path) -> None:
        self.home, self.cache, self.whole = home, home / "cache", source.read_bytes()
        home.mkdir()
        (home / "unsealed").write_bytes(self.whole[: -build.DIGEST])
        os.environ["LTEPASS_CACHE_DIR"] = str(self.cache)
        self.compiler(f'cp "{home}/unsealed" "$2"')

    @property
    def target(self) -> Path:
        return self.cache / build.object_name(build.isa())

    def compiler(self, then: str, name: str = "compiler", shebang: str = "#!/bin/sh") -> Path:
        """CXX: notes that it was called, leaves OBJECT of `-o OBJECT` in $2, and does what `then` says."""
        script = self.home / name
        script.write_text(
            f'{shebang}\necho call >> "{self.home}/calls"\nwhile [ "$1" != -o ]; do shift; done\n{then}\n'
        )
        script.chmod(0o755)
        os.environ["CXX"] = str(script)
        return script

    def cached(self, content: bytes | None = None) -> None:
        self.cache.mkdir(mode=0o700)
        self.target.write_bytes(self.whole if content is None else content)
        self.target.chmod(0o755)


def cut_short(machine: Machine) -> None:
    machine.cached(machine.whole[: len(machine.whole) // 2])


def pipe(machine: Machine) -> None:
    machine.cache.mkdir()
    os.mkfifo(machine.target)


def folder(machine: Machine) -> None:
    machine.target.mkdir(parents=True)


def nowhere(machine: Machine) -> None:
    machine.cache.mkdir()
    machine.target.symlink_to("nowhere")


def writable_object(machine: Machine) -> None:
    machine.cached()
    machine.target.chmod(0o775)


def foreign_object(machine: Machine) -> None:
    machine.cached()
    os.chown(machine.target, STRANGER, STRANGER)


def writable_folder(machine: Machine) -> None:
    machine.cached()
    machine.cache.chmod(0o777)


def writable_for_all_umask(machine: Machine) -> None:
    os.umask(0)


def nothing_for_us_umask(machine: Machine) -> None:
    os.umask(0o277)


def words(machine: Machine) -> None:
    real = machine.compiler(f'cp "{machine.home}/unsealed" "$2"')
    machine.compiler(f'exec "{real}" -o "$2"', "cc ache")
    os.environ["CXX"] = f"'{machine.home}/cc ache' {real} -O1"


def spaces(machine: Machine) -> None:
    machine.compiler(f'cp "{machine.home}/unsealed" "$2"', "my compiler")


def no_fcntl(machine: Machine) -> None:
    sys.modules["fcntl"] = None  # type: ignore[assignment]


def old_name(machine: Machine) -> None:
    os.environ["LTEPASS_CACHE"] = os.environ.pop("LTEPASS_CACHE_DIR")


def held_lock(machine: Machine) -> None:
    """By a process that does not go on."""
    import fcntl

    machine.cache.mkdir()
    handle = os.open(machine.cache / "lock", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    build.BUILD_SECONDS = 1


def cut_short_in_the_wheel(machine: Machine) -> None:
    (machine.home / "prebuilt.so").write_bytes(machine.whole[:9999])
    loading._prebuilt = lambda: machine.home / "prebuilt.so"


LOADS: dict[str, Callable[[Machine], None]] = {
    "nothing is cached": lambda m: None,
    "a good object": lambda m: m.cached(),
    "an empty object": lambda m: m.cached(b""),
    "a header and zeros": lambda m: m.cached(b"\x7fELF" + bytes(2000)),
    "an object that was cut short": cut_short,
    "an object with a byte changed": lambda m: m.cached(m.whole[:4096] + b"\xff" + m.whole[4097:]),
    "an object without its digest": lambda m: m.cached(m.whole[: -build.DIGEST]),
    "text": lambda m: m.cached(b"#!/bin/sh\n"),
    "an object in the wheel that was cut short": cut_short_in_the_wheel,
    "a pipe": pipe,
    "a link to nowhere": nowhere,
    "an object that others can write": writable_object,
    "a folder that others can write": writable_folder,
    "umask 000": writable_for_all_umask,
    "umask 277": nothing_for_us_umask,
    "a compiler of several words": words,
    "a compiler behind spaces": spaces,
    "no fcntl": no_fcntl,
    "the variable's old name": old_name,
    "a lock that nobody gives back": held_lock,
}
if ROOT:
    LOADS["somebody else's object"] = foreign_object


def not_executable(machine: Machine) -> None:
    machine.compiler("").chmod(0o644)


def no_program(machine: Machine) -> None:
    machine.compiler("", shebang="#!/no/such/interpreter")


def hanging(machine: Machine) -> None:
    """Its child would outlive it."""
    machine.compiler(f'sleep 1000 & echo $! > "{machine.home}/child"; wait')
    build.BUILD_SECONDS = 1


def env(**values: str) -> Callable[[Machine], None]:
    return lambda machine: os.environ.update(values)


def file_in_the_way(machine: Machine) -> None:
    machine.cache.write_text("")


def foreign_folder(machine: Machine) -> None:
    machine.cached()
    os.chown(machine.cache, STRANGER, STRANGER)


def link_to_a_foreign_folder(machine: Machine) -> None:
    machine.cached()
    os.chown(machine.cache, STRANGER, STRANGER)
    (machine.home / "link").symlink_to(machine.cache)
    os.environ["LTEPASS_CACHE_DIR"] = str(machine.home / "link")


def shared_folder(machine: Machine) -> None:
    machine.cached()
    machine.cache.chmod(0o1777)


def no_home(machine: Machine) -> None:
    del os.environ["LTEPASS_CACHE_DIR"]
    os.environ.pop("HOME", None)
    os.setuid(STRANGER)


def home_of_others(machine: Machine) -> None:
    del os.environ["LTEPASS_CACHE_DIR"]
    os.environ["HOME"] = "/"
    os.setuid(STRANGER)


def read_only(machine: Machine) -> None:
    machine.cache.mkdir()
    os.chown(machine.cache, STRANGER, STRANGER)
    machine.cache.chmod(0o500)
    os.setuid(STRANGER)


def no_room(machine: Machine) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


# name -> (what happens, a part of the one warning)
REFUSES: dict[str, tuple[Callable[[Machine], object], str]] = {
    "no compiler": (env(CXX="/does/not/exist"), "install g++"),
    "a quote that is not closed": (env(CXX='g++ "'), "no C++ compiler was found"),
    "a compiler that may not run": (not_executable, "no C++ compiler was found"),
    "a compiler without its interpreter": (no_program, "cannot be run"),
    "a compiler that fails": (lambda m: m.compiler("echo out of ideas >&2; exit 1"), "out of ideas"),
    "a compiler that says no words": (lambda m: m.compiler(r"printf '\377\376' >&2; exit 1"), "exit status 1"),
    "a compiler that is killed": (lambda m: m.compiler("kill -9 $$"), "exit status -9"),
    "a compiler that hangs": (hanging, "took more than 1 s"),
    "a compiler that writes nothing": (lambda m: m.compiler("exit 0"), "wrote no object"),
    "a compiler that writes text": (lambda m: m.compiler('echo hello > "$2"'), "just built cannot be loaded"),
    "an unknown ISA": (env(LTEPASS_ISA="nonsense"), "LTEPASS_ISA is 'nonsense'"),
    "an ISA that is a path": (env(LTEPASS_ISA="../../x"), "LTEPASS_ISA is '../../x'"),
    "a folder in the object's place": (folder, "cannot be used"),
    "a file in the cache's place": (file_in_the_way, "LTEPASS_CACHE_DIR"),
    "a folder that all share": (shared_folder, "others may write"),
    "a file system that is full": (no_room, "ltepass computes"),
}
if ROOT:
    REFUSES |= {
        "somebody else's folder": (foreign_folder, f"belongs to user {STRANGER}"),
        "a link to somebody else's folder": (link_to_a_foreign_folder, f"belongs to user {STRANGER}"),
        "no home": (no_home, "there is no home folder"),
        "the root as home": (home_of_others, "cannot be used"),
        "a folder that cannot be written": (read_only, "cannot be used"),
    }


def observe(prepare: Callable[[Machine], object], home: Path, source: Path) -> dict[str, Any]:
    machine = Machine(home, source)
    prepare(machine)
    args, out = make(Recipe(T=9)), []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            out.append(routed_ffn.routed_ffn(*args))
    expected = reference.routed_ffn(*args)
    calls, cache = home / "calls", machine.cache
    return {
        "loaded": loading._loaded,
        "warnings": [str(w.message) for w in seen],
        "close": all(torch.allclose(y, expected, rtol=1e-4, atol=1e-5) for y in out),
        "builds": calls.read_text().count("call") if calls.exists() else 0,
        "left": sorted(p.name for p in cache.iterdir()) if cache.is_dir() and os.access(cache, os.R_OK) else [],
        "modes": [oct(p.stat().st_mode & 0o7777) for p in (cache, *cache.glob("*.so"))] if cache.is_dir() else [],
    }


def in_child(prepare: Callable[[Machine], object], home: Path, source: Path, answer: Path) -> None:
    """What `observe` sees, in `answer`, which was opened before the child becomes somebody else."""
    with answer.open("w") as file:
        pid = os.fork()
        if pid == 0:
            try:
                file.write(json.dumps(observe(prepare, home, source)))
                file.flush()
            except BaseException as error:
                os.write(2, f"{home.name}: {type(error).__name__}: {error}\n".encode())
                os._exit(1)
            os._exit(0)
        os.waitpid(pid, 0)


def main() -> None:
    out, source = Path(sys.argv[1]), Path(sys.argv[2])
    results = {}
    for i, (name, prepare) in enumerate({**LOADS, **{n: p for n, (p, _) in REFUSES.items()}}.items()):
        answer = out / f"{i}.json"
        in_child(prepare, out / str(i), source, answer)
        text = answer.read_text()
        results[name] = json.loads(text) if text else "it did not come back"
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
