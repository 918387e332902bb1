"""The rows of the speed table: what must be measured, its target, and how it is printed and drawn.

A row that no GPU filled says "not measured" and keeps its place.

    python -m examples.gpu.results    # writes the rows that have a target from speed.csv into examples/results/gpu.md
"""

from __future__ import annotations

import csv
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

NOT_MEASURED = "not measured"
HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "results" / "gpu.md"
BEGIN, END = "<!-- gpu table: written by examples/gpu/results.py -->", "<!-- end of gpu table -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """table, model, tokens, masks, active_percent, group_size, implementation name the row; target: what it must reach.

    active_percent: share of neurons (routed), of inputs (TEAL) or of neurons after a dense gate (CATS) that are used.
    microseconds: of one FFN call, or of one token; share: active bytes / time over copy bandwidth; speedup: over the
    dense compiled run of the same table and size; spread: between two measurements; note: what a reader must know.
    """

    table: str
    model: str
    tokens: int
    masks: str
    active_percent: int
    group_size: int
    implementation: str
    target: str = ""
    microseconds: str = NOT_MEASURED
    share: str = NOT_MEASURED
    speedup: str = NOT_MEASURED
    spread: str = NOT_MEASURED
    met: str = NOT_MEASURED
    note: str = ""
    device: str = NOT_MEASURED
    software: str = NOT_MEASURED

    @property
    def key(self) -> tuple[object, ...]:
        return (
            self.table,
            self.model,
            self.tokens,
            self.masks,
            self.active_percent,
            self.group_size,
            self.implementation,
        )

    def filled(
        self,
        microseconds: float,
        share: float | None,
        speedup: float | None,
        spread: float,
        note: str = "",
        device: str = NOT_MEASURED,
        software: str = NOT_MEASURED,
    ) -> Row:
        value = {"share": share, "speedup": speedup}.get(self.target.partition(" ")[0])
        met = "" if value is None else "yes" if value >= float(self.target.rpartition(" ")[2]) else "no"
        return replace(
            self,
            microseconds=f"{microseconds:.2f}",
            spread=f"{spread:.3f}",
            met=met,
            share="" if share is None else f"{share:.3f}",
            speedup="" if speedup is None else f"{speedup:.3f}",
            note=note,
            device=device,
            software=software,
        )


MODELS = {"LLaMA-2-7B": (4096, 11008), "Llama-3-8B": (4096, 14336)}
ACTIVE = (50, 20, 10)
BASELINES = ("paper atomics", "TEAL", "CATS")


def expected() -> list[Row]:
    """Every row of the table, unmeasured, in the order it is printed."""
    return [*_one_token(), *_batch(), *_prefill(), *_groups(), *_whole_token()]


def _one_token() -> Iterator[Row]:
    for model in MODELS:
        row = partial(Row, table="FFN, one token", model=model, tokens=1)
        for name in ("dense eager", "dense compiled"):
            yield row(masks="-", active_percent=100, group_size=0, implementation=name)
        for active, share in zip(ACTIVE, (0.88, 0.80, 0.60), strict=True):
            routed = partial(row, masks="random", active_percent=active, group_size=32)
            yield routed(implementation="routed", target=f"share >= {share}")
            yield routed(implementation="routed, down by neuron")
            for name in BASELINES:
                size = 32 if name == "paper atomics" else 1
                yield row(masks="random", active_percent=active, group_size=size, implementation=name)


def _batch() -> Iterator[Row]:
    row = partial(Row, table="FFN, 8 tokens", model="LLaMA-2-7B", tokens=8)
    yield row(masks="-", active_percent=100, group_size=0, implementation="dense compiled")
    for masks, targets in (("independent", (0.95, 1.05, 1.4)), ("shared", (1.8, 3.8, 6.0))):
        for active, target in zip(ACTIVE, targets, strict=True):
            routed = partial(row, masks=masks, active_percent=active, group_size=32)
            yield routed(implementation="routed", target=f"speedup >= {target}")


def _prefill() -> Iterator[Row]:
    for tokens in (512, 2048):
        row = partial(Row, table="FFN, prefill", model="LLaMA-2-7B", tokens=tokens)
        yield row(masks="-", active_percent=100, group_size=0, implementation="dense compiled")
        for active, target in zip(ACTIVE, (0.95, 1.2, 1.4), strict=True):
            routed = partial(row, masks="independent", active_percent=active, group_size=32)
            yield routed(implementation="routed", target=f"speedup >= {target}")


def _groups() -> Iterator[Row]:
    for size in (16, 32, 64, 128):
        row = partial(Row, table="group sizes, one token", model="LLaMA-2-7B", tokens=1, masks="random")
        yield row(active_percent=20, group_size=size, implementation="routed")


def _whole_token() -> Iterator[Row]:
    row = partial(Row, table="whole token, static cache 512", model="LLaMA-2-7B", tokens=1)
    for name in ("dense compiled", "FFNs removed"):
        yield row(masks="-", active_percent=100, group_size=0, implementation=name)
    for active, target in zip(ACTIVE, (1.40, 1.90, 2.15), strict=True):
        routed = partial(row, masks="random", active_percent=active, group_size=32)
        yield routed(implementation="routed", target=f"speedup >= {target}")


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def attempt(measure: Callable[[], object], what: object) -> bool:
    """Whether it went through; what it raised is printed, and stops no other row."""
    try:
        measure()
    except Exception:  # of a compiler, a kernel or a check: whatever it was, the next row is worth having
        print(f"FAILED: {what}\n{traceback.format_exc()}", flush=True)
        return False
    return True


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [_typed(r) for r in csv.DictReader(file)]


def _typed(r: dict[str, str]) -> Row:
    numbers = {name: int(r.pop(name)) for name in ("tokens", "active_percent", "group_size")}
    return Row(**numbers, **r)  # type: ignore[arg-type]  # the rest are strings


def merged(found: Iterable[Row]) -> list[Row]:
    """All expected rows, those measured in place of their empty selves."""
    by_key = {row.key: row for row in found}
    rows = expected()
    unknown = by_key.keys() - {row.key for row in rows}
    assert not unknown, f"measured, but not in the table: {unknown}"
    return [by_key.get(row.key, row) for row in rows]


def table(rows: Iterable[Row]) -> str:
    """Plain text, one line a row, a heading for each table."""
    lines, heading = [], ""
    for row in rows:
        if row.table != heading:
            heading = row.table
            lines += ["", heading, f"  {'':40} {'active':>6} {'us':>12} {'share':>12} {'speed-up':>12}  target"]
        name = f"{row.model} T={row.tokens} {row.implementation}"
        extra = (
            f"{row.masks}" if row.tokens > 1 and row.masks != "-" else f"g={row.group_size}" if row.group_size else ""
        )
        figures = f"{row.microseconds:>12} {row.share:>12} {row.speedup:>12}"
        verdict = f"{row.target} {'' if row.met == NOT_MEASURED else row.met}" if row.target else ""
        lines.append(f"  {name + ' ' + extra:<46} {row.active_percent:>4} % {figures}  {verdict} {row.note}".rstrip())
    return "\n".join(lines)


def markdown(rows: Iterable[Row]) -> str:
    """The rows that have a target, as gpu.md shows them."""
    lines = ["| what | model, tokens | active | time, us | reached | target | met |", "|---|---|---|---|---|---|---|"]
    devices = set()
    for row in rows:
        if not row.target:
            continue
        kind = row.target.partition(" ")[0]
        masks = f", masks {row.masks}" if row.tokens > 1 else ""
        what, model = f"{row.table}{masks}", f"{row.model}, {row.tokens}"
        figures = f"{row.microseconds} | {kind} {getattr(row, kind)} | {row.target} | {row.met}"
        lines.append(f"| {what} | {model} | {row.active_percent} % | {figures} |")
        devices.add(f"{row.device}, {row.software}" if row.device != NOT_MEASURED else NOT_MEASURED)
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(devices))}."])


def plot(path: Path, rows: Iterable[Row]) -> bool:
    """Time of one FFN call against the active share, a line an implementation. False where nothing was measured."""
    measured = [r for r in rows if r.table == "FFN, one token" and r.microseconds != NOT_MEASURED]
    if not measured:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = sorted({r.model for r in measured})
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        of_model = [r for r in measured if r.model == model]
        for name in dict.fromkeys(r.implementation for r in of_model):
            points = [(r.active_percent, float(r.microseconds)) for r in of_model if r.implementation == name]
            if len(points) == 1:
                ax.axhline(points[0][1], linestyle="--", color="grey", label=name)
            else:
                ax.plot(*zip(*points, strict=True), marker="o", label=name)
        ax.set(
            title=f"{model}, one token, bf16, {of_model[0].device}",
            xlabel="active, %",
            ylabel="microseconds",
            ylim=(0, None),
        )
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    from examples.results.demo_table import with_table

    PAGE.write_text(with_table(PAGE.read_text(), markdown(read(HERE / "speed.csv")), BEGIN, END))


if __name__ == "__main__":
    main()
