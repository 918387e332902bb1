"""The frontier's view of domains: what methods cost on texts of the training domain and on others, from its rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from examples.compare.frontier_rows import OUTSIDE, Row


def domains_view(rows: Sequence[Row], preset: str) -> list[str]:
    """Lines of a table with a column a text; none where no row of the preset has an interval."""
    here = [r for r in rows if r["preset"] == preset and r.get("ratio")]
    texts = sorted({(r["domain"] == OUTSIDE, r["text"]) for r in here})
    if not texts:
        return []
    names = [f"{text} (outside)" if outside else text for outside, text in texts]
    tokens = sorted({int(r["measured_tokens"]) for r in here})
    lines = [
        "",
        f"## Inside and outside the training domain, preset {preset}",
        "",
        "Perplexity over dense, the better of tuned and untuned on that text, with the 95 % interval of paired "
        f"differences per block (of several seeds, the widest); measured sparsity in brackets. "
        f"{' .. '.join(f'{t:,}' for t in dict.fromkeys((tokens[0], tokens[-1])))} tokens a text.",
        "",
        f"| method | sparsity | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    points = dict.fromkeys((r["method"], r["target_sparsity"]) for r in here)
    for method, target in points:
        cells = [
            _cell([r for r in here if (r["method"], r["target_sparsity"], r["text"]) == (method, target, text)])
            for _, text in texts
        ]
        lines.append(f"| {method} | {float(target):.0%} | {' | '.join(cells)} |")
    return lines


def _cell(rows: Sequence[Row]) -> str:
    """Of one method, point and text, over seeds."""
    if not rows:
        return "-"
    low, high = min(float(r["ratio_low"]) for r in rows), max(float(r["ratio_high"]) for r in rows)
    ratio, sparsity = (statistics.fmean(float(r[name]) for r in rows) for name in ("ratio", "ffn_sparsity"))
    return f"x{ratio:.3f} ({low:.3f} .. {high:.3f}) [{sparsity:.1%}]"
