"""A Report as sections of a page: what was found and refused, how sparse it is, and which experts are used."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from ltepass.pages import plots
from ltepass.pages.html import facts, figure, folded, grid, note, plot, section, table
from ltepass.routed.report_tables import Report, span
from ltepass.routed.site_scores import SiteScores, ranges
from ltepass.routed.sites import FFNSite

SHOWN = 6  # histograms, and numbers of experts, that stand there before the others are folded
PERCENTS = (0, 5, 25, 50, 75, 95, 100)


def sections(report: Report) -> list[str]:
    """HTML of everything that the report knows; what it does not know has no section."""
    return [part for make in (_facts, _sites, _refusals, _sparsity, _scores, _use, _notes) for part in make(report)]


def _facts(report: Report) -> Iterator[str]:
    config, refused = report.config, len(report.refusals)
    shares = list(report.sparsity.values())
    known = {
        "FFN sites": f"{len(report.sites)}, and {refused} candidate{'s' if refused != 1 else ''} refused",
        "router": f"{config.get('router', 'linear')}, grouping {report.grouping}",
        "mode": " and ".join(sorted(set(report.modes.values()))),
        "lowered": report.lowered or "no",
        "target sparsity": f"{config['target_sparsity']:.0%}" if "target_sparsity" in config else "",
        "measured sparsity": span([sum(shares) / len(shares)]) if shares else "not measured",
    }
    if report.bits is not None:
        at = "FFN bits a weight, read by a token at the sparsity that thresholds were placed for"
        known[at] = f"{report.bits.read:.2f} of {report.bits.held:.2f} held"
    yield facts({name: text for name, text in known.items() if text})


def _sites(report: Report) -> Iterator[str]:
    headings = ("site", "activation", "d_model", "d_ff", "group", "experts", "mode", "threshold", "inactive")
    rows = [_site_row(site, report) for site in report.sites]
    tokens = max((scores.tokens for scores in report.scores.values()), default=0)
    how = f"measured on {tokens:,} tokens" if tokens else "as the calibration's table has it" if report.scores else ""
    yield section(
        "Sites", table(headings, rows, "FFN sites"), note(f"inactive: share of experts, {how}") if how else ""
    )


def _site_row(site: FFNSite, report: Report) -> tuple[str, ...]:
    scores = report.scores.get(site.name)
    experts = str(site.n_experts) if site.group_size else "-"
    threshold = "-" if scores is None or scores.threshold is None else f"{scores.threshold:.3f}"
    return (
        site.name,
        f"{site.activation}{', gated' if site.gate is not None else ''}",
        site.width,
        str(site.d_ff),
        str(site.group_size or "-"),
        experts,
        report.modes.get(site.name, "-"),
        threshold,
        f"{share:.1%}" if (share := _inactive(report, site.name)) is not None else "-",
    )


def _inactive(report: Report, name: str) -> float | None:
    """Measured, else as the table has it; None where neither is known."""
    scores = report.scores.get(name)
    return report.sparsity.get(name, None if scores is None else scores.inactive)


def _refusals(report: Report) -> Iterator[str]:
    headings = ("module", "node", "check", "reason", "nearest miss")
    rows = [(r.module or "-", r.node or "-", r.check, r.reason, r.nearest or "-") for r in report.refusals]
    if rows:
        yield section("Refused", table(headings, rows, "candidates refused"))


def _sparsity(report: Report) -> Iterator[str]:
    shares = [share for site in report.sites if (share := _inactive(report, site.name)) is not None]
    if len(shares) == len(report.sites):
        measured = "measured" if report.sparsity else "expected of the calibration's table"
        caption = f"Inactive neurons of each layer, {measured}: {span(shares)}"
        target = report.config.get("target_sparsity")
        drawn = plot(lambda: plots.sparsity_per_layer(shares, target), caption, "")
        yield section("Sparsity of each layer", drawn)


def _scores(report: Report) -> Iterator[str]:
    if not report.scores:
        return
    tokens = max(scores.tokens for scores in report.scores.values())
    of = f"{tokens:,} tokens" if tokens else "the calibration's tokens"
    rows = [
        (name, "-" if s.threshold is None else f"{s.threshold:.3f}", *(f"{s.quantiles[p]:.3f}" for p in PERCENTS))
        for name, s in report.scores.items()
    ]
    headings = ("site", "threshold", *(f"{percent} %" for percent in PERCENTS))
    numbers = table(headings, rows, "percentiles of the routers' logits")
    yield section(
        "Scores around the threshold",
        note(f"An expert is active for a token whose logit lies right of the line. Logits of {of}."),
        *_histograms(report.scores),
        folded("the numbers", numbers) if plots.available() else numbers,
    )


def _histograms(scores: dict[str, SiteScores]) -> Iterator[str]:
    if not plots.available():
        return
    drawn = [
        figure(
            plots.score_histogram(site.quantiles, site.threshold),
            f"{name}: {site.inactive:.1%} below",
            alt=f"Histogram of the router's logits at {name}; {site.inactive:.1%} lie at or below the threshold",
        )
        for name, site in scores.items()
    ]
    yield grid(drawn[:SHOWN])
    if drawn[SHOWN:]:
        yield folded(f"{len(drawn) - SHOWN} more", grid(drawn[SHOWN:]))


def _use(report: Report) -> Iterator[str]:
    used = {name: scores.use for name, scores in report.scores.items() if scores.use}
    if not used:
        return
    of = {site.name: "neurons" if site.group_size == 1 else "experts" for site in report.sites}
    spreads = [(min(use), statistics.median(use), max(use)) for use in used.values()]
    rows = [
        (
            name,
            str(len(use)),
            str(len(report.scores[name].dead)),
            str(len(report.scores[name].always_on)),
            *(f"{share:.1%}" for share in (min(use), statistics.median(use), max(use))),
        )
        for name, use in used.items()
    ]
    tokens = min(report.scores[name].tokens for name in used)
    words = " and ".join(sorted(set(of.values())))
    headings = ("site", words, "dead", "always on", "least used", "median", "most used")
    named = [line for name in used for line in _named(name, of[name], report.scores[name])]
    yield section(
        f"Use of {words}",
        note(f"Share of {tokens:,} tokens that each is active for. Dead: for none of them. Always on: for all."),
        plot(
            lambda: plots.spread_by_site(spreads, "tokens (%)"),
            f"How often {words} of each site are used",
            table(headings, rows, f"use of {words}"),
        ),
        *(named or [note(f"None of them is dead or always on over these {tokens:,} tokens.")]),
    )


def _named(name: str, what: str, scores: SiteScores) -> Iterator[str]:
    """Which of one site's experts are dead, and which always on; a long list is folded."""
    for state, numbers in (("dead", scores.dead), ("always on", scores.always_on)):
        if numbers:
            listed = note(ranges(numbers))
            heading = f"{name}: {len(numbers)} {state} of {len(scores.use or ())} {what}"
            yield folded(heading, listed) if len(numbers) > SHOWN else note(f"{heading}: {ranges(numbers)}")


def _notes(report: Report) -> Iterator[str]:
    lines = [*report.notes, *report.untried, *report.paths]
    if lines:
        yield section("Notes", *map(note, lines))
