"""What a row of the census lacks, and the sentence that justifies it; the counts that the aim is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from examples.coverage.examine import Row
from examples.coverage.known_reasons import NO_DENSE_FFN, NOT_BUILT, PARTS, UNFOUND

WANTED_SHARE = 0.98


def is_causal_lm(row: Row) -> bool:
    from examples.coverage.zoo import causal_lms

    return row.name in causal_lms()


def remark(row: Row) -> str:
    """The sentence that justifies what a row lacks, from the committed list; "" where it lacks nothing."""
    if row.status in ("build", "stopped"):
        return NOT_BUILT.get(row.name, "")
    if row.status == "no dense FFN":
        return NO_DENSE_FFN
    return " ".join(dict.fromkeys(sentence for path in row.unfound.split() if (sentence := why_unfound(row, path))))


def why_unfound(row: Row, path: str) -> str:
    """Why a linear with an FFN's name is no site, from the committed list."""
    return next((why for part, why in UNFOUND.get(row.name, {}).items() if part in path), "")


def unexplained(row: Row) -> list[str]:
    """What a row lacks and the committed list has no sentence for: paths of linears, or the status."""
    if row.status not in ("ok", "no dense FFN"):
        return [] if remark(row) else [row.status]
    return [path for path in row.unfound.split() if not why_unfound(row, path)]


def dense_ffns_missed(row: Row) -> list[str]:
    """Paths of dense FFNs that are no sites: without those that are none in spite of their names."""
    return [path for path in row.unfound.split() if not why_unfound(row, path).startswith(PARTS)]


def summary(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The causal LMs by what became of them; the counts that the aim is about."""
    causal = [r for r in rows if is_causal_lm(r)]
    built = [r for r in causal if r.status not in ("build", "stopped")]
    dense = [r for r in built if r.sites or dense_ffns_missed(r)]
    complete = [r for r in dense if r.status == "ok" and not dense_ffns_missed(r)]
    return {
        "causal LMs": [r.name for r in causal],
        "instantiate and run": [r.name for r in built],
        "have a dense FFN": [r.name for r in dense],
        "get every one": [r.name for r in complete],
        "do not": [r.name for r in dense if r not in complete],
        "have none": [r.name for r in built if r not in dense],
        "do not instantiate": [r.name for r in causal if r not in built],
    }


def summary_lines(rows: Sequence[Row]) -> list[str]:
    groups = summary(rows)
    counts = {name: len(names) for name, names in groups.items()}
    dense, complete = counts["have a dense FFN"], counts["get every one"]
    lines = [
        f"{counts['causal LMs']} causal LMs; {counts['instantiate and run']} instantiate and run; of these {dense} "
        f"have a dense FFN, and {complete} ({complete / max(dense, 1):.1%}) get every one of them."
    ]
    for name in ("do not", "have none", "do not instantiate"):
        if groups[name]:
            lines.append(f"{name[0].upper()}{name[1:]}: {', '.join(groups[name])}.")
    return lines
