"""What `ltepass.report(model)` returns: the sites found, the candidates refused, printed as rich tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ltepass.routed.batches import Batch
from ltepass.routed.ffn_bits import FFNBits, ffn_bits
from ltepass.routed.routed import Routed
from ltepass.routed.site_scores import SiteScores, calibrated_scores, measured_scores
from ltepass.routed.sites import FFNSite, Refusal
from ltepass.routed.undo import verb

if TYPE_CHECKING:  # rich is imported when a report is shown
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class Report:
    """What transform found and did; prints as tables, and a notebook shows it as a page.

    Arguments:
        sites: every FFN that has a router. refusals: every candidate left alone, with the reason.
        config: the settings. grouping: the method that ordered the neurons. lowered: None, or the scope.
        linears: how many beside the FFNs call an op of ours (scope "model" finds them in its graphs, and counts none).
        notes: what lowering kept as it was, and why. untried: owners that the self check did not run.
        paths: what the op does on this CPU, for a few numbers of tokens.
        bits: of FFN weights that a token reads, and that are held; None before calibration.
        modes: router mode by site name. sparsity: measured share of inactive neurons by site name, empty until
            measured.
        scores: by site name, how its router's logits lie around the threshold: of the batches that `report` was given,
            else of the calibration; empty before one.
    Raises: nothing.
    Example:
        >>> print(str(ltepass.report(model)).splitlines()[0].strip())
        2 FFN sites, grouping output_aware, not lowered
    """

    sites: list[FFNSite]
    refusals: list[Refusal]
    config: dict[str, Any]
    grouping: str
    lowered: str | None
    notes: list[str]
    linears: int = 0
    untried: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    bits: FFNBits | None = None
    modes: dict[str, str] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    scores: dict[str, SiteScores] = field(default_factory=dict)

    def to_html(self, title: str = "ltepass report", more: Sequence[str] = ()) -> str:
        """One page of HTML: no script, nothing fetched, dark where the reader's system is. Plots need matplotlib.

        more: sections of HTML to add at the end, as `ltepass report --html` adds training, frontier and speed.
        """
        from ltepass.pages.html import document
        from ltepass.routed.report_page import sections

        return document(title, [*sections(self), *more])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from ltepass.pages.html import block
        from ltepass.routed.report_page import sections

        return block(sections(self))

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(*_tables(self))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


@verb
def report(
    model: nn.Module, sparsity: dict[str, float] | None = None, *, batches: Iterable[Batch] | None = None
) -> Report:
    """What transform found and did to a model.

    Arguments:
        model: a transformed model.
        sparsity: measured share of inactive neurons by site name, shown beside each site where given.
        batches: model inputs, or token id tensors, on which sparsity, scores and the use of experts are measured in
            hard mode; the model must not be lowered.
    Returns: a Report; `to_html()` of it is a page.
    Raises: NotTransformedError; with batches LoweredError, and CalibrationError where a site sees no token.
    Example:
        >>> ltepass.report(model, ltepass.measure_sparsity(model, batches)).modes
        {'model.layers.0.mlp': 'dense', 'model.layers.1.mlp': 'dense'}
    """
    routed = Routed.of(model, "report") if batches is None else Routed.trained(model, "report of batches")
    scores = calibrated_scores(routed) if batches is None else measured_scores(routed, batches)
    measured = {name: site.inactive for name, site in scores.items() if site.use is not None}
    state = routed.state
    return Report(
        sites=list(state.sites),
        refusals=list(state.refusals),
        config=dict(state.config),
        grouping=state.grouping,
        lowered=state.lowered,
        notes=list(state.notes),
        linears=state.linears,
        untried=list(state.untried),
        paths=_paths(routed) if state.lowered else [],
        bits=ffn_bits(routed),
        modes={site.name: router.mode for site, router in routed},
        sparsity=measured | (sparsity or {}),
        scores=scores,
    )


def _paths(routed: Routed) -> list[str]:
    """Lines of the report: one for each stretch of token counts that the op treats alike, where the model is on the
    CPU.
    """
    from ltepass.kernels.cpu.which_path import which_path

    site = routed.sites[0]
    parameter = next(routed.model.get_submodule(site.up).parameters())
    if parameter.device.type != "cpu":
        return []
    tokens: dict[str, list[int]] = {}
    coded = routed.routers[0].coded
    for T in (1, 2, 8, 32, 128, 512, 2048):
        dtype = parameter.dtype if coded is None else torch.int8 if coded.format == "int8" else torch.uint8
        path = which_path(T, site.d_model, site.d_ff, site.n_experts, dtype)
        tokens.setdefault(path, []).append(T)
    return [
        f"{' '.join(map(str, counts))} token{'s' if counts[-1] > 1 else ''}: {path}" for path, counts in tokens.items()
    ]


def _tables(report: Report) -> Iterator[Table | Text]:
    from rich.table import Table
    from rich.text import Text

    plural = "s" if len(report.sites) != 1 else ""
    lowered = f"lowered: {report.lowered}" if report.lowered else "not lowered"
    lowered += f", {report.linears} linears beside" if report.linears else ""
    table = Table(
        title=f"{len(report.sites)} FFN site{plural}, grouping {report.grouping}, {lowered}",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for heading in ("site", "kind", "activation", "d_model", "d_ff", "group", "experts", "mode"):
        left = heading in ("site", "kind", "activation", "mode")
        # Names and shares give way where the terminal is narrow: they can be read in several lines.
        least = 13 if heading == "site" else None
        table.add_column(
            heading, justify="left" if left else "right", overflow="fold", no_wrap=heading != "site", min_width=least
        )
    if report.sparsity:
        table.add_column("sparsity", justify="right", min_width=len("sparsity"))
    for alike in alike_sites(report.sites, report.modes):
        table.add_row(*_row(alike, report))
    yield table
    if share := report.config.get("hidden_sparsity"):
        yield Text(f"of active neurons, the smallest {share:.0%} are left out of the down projection (hidden_sparsity)")
    if share := report.config.get("input_sparsity"):
        yield Text(f"the smallest {share:.0%} of each FFN's inputs are left out of up and gate (input_sparsity)")
    if share := report.config.get("low_bit_sparsity"):
        yield Text(f"of all neurons, the {share:.0%} that score least add nothing (low_bit_sparsity)")
    if report.bits is not None:
        beside = " (and the weights of dense mode beside)" if report.config.get("inactive") == "low_bit" else ""
        yield Text(
            f"bits a weight of the FFNs, with routers and scales: a token reads {report.bits.read:.2f} of "
            f"{report.bits.held:.2f}{beside}"
        )
    if report.refusals:
        yield refusals_table(report.refusals)
    for line in (*report.notes, *report.untried, *report.paths):
        yield Text(line)


def _row(alike: Sequence[FFNSite], report: Report) -> tuple[str, ...]:
    site = alike[0]
    shares = [report.sparsity[s.name] for s in alike if s.name in report.sparsity]
    return (
        pattern([s.name for s in alike]),
        site.kind,
        f"{site.activation}{', gated' if site.gate is not None else ''}",
        site.width,
        str(site.d_ff),
        str(site.group_size or "-"),
        str(site.n_experts) if site.group_size else "-",
        report.modes.get(site.name, "-"),
        *([span(shares) if shares else "not measured"] if report.sparsity else []),
    )


def span(shares: Sequence[float]) -> str:
    """One share, or min / mean / max of several, in percent."""
    values = (min(shares), sum(shares) / len(shares), max(shares)) if len(shares) > 1 else tuple(shares)
    return " / ".join(f"{value:.1%}" for value in values)


def alike_sites(sites: Sequence[FFNSite], modes: dict[str, str]) -> list[list[FFNSite]]:
    """Sites that differ only in a layer number go into one row; order is kept."""
    rows: dict[tuple[object, ...], list[FFNSite]] = {}
    for site in sites:
        shape = (site.kind, site.activation, site.gate is None, site.width, site.d_ff, site.group_size)
        rows.setdefault((re.sub(r"\d+", "#", site.name), *shape, modes.get(site.name)), []).append(site)
    return list(rows.values())


def pattern(names: Sequence[str]) -> str:
    """`model.layers.0.mlp`, `model.layers.1.mlp` -> `model.layers.{0..1}.mlp (2)`; gaps are not shown."""
    if len(names) == 1:
        return names[0]
    numbers = [re.findall(r"\d+", name) for name in names]
    spans = iter([(min(map(int, column)), max(map(int, column))) for column in zip(*numbers, strict=True)])

    def show(_: re.Match[str]) -> str:
        low, high = next(spans)
        return str(low) if low == high else f"{{{low}..{high}}}"

    return f"{re.sub(r'[0-9]+', show, names[0])} ({len(names)})"


def refusals_table(refusals: Sequence[Refusal]) -> Table:
    """A rich table of candidates left alone, alike ones in one row."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{len(refusals)} candidate{'s' if len(refusals) != 1 else ''} refused", title_justify="left")
    for heading in ("module", "node", "check", "reason", "nearest miss"):
        table.add_column(heading, overflow="fold", min_width=max(map(len, heading.split())))
    rows: dict[tuple[str, ...], list[Refusal]] = {}
    for refusal in refusals:
        key = (re.sub(r"\d+", "#", refusal.module), refusal.check, *_unnumbered(refusal))
        rows.setdefault(key, []).append(refusal)
    for (_, check, reason, nearest), alike in rows.items():
        node = alike[0].node + (", ..." if len(alike) > 1 else "")
        cells = (pattern([r.module for r in alike]), node or "-", check, reason, nearest or "-")
        table.add_row(*map(Text, cells))  # plain text: these words may come from a checkpoint
    return table


def _unnumbered(refusal: Refusal) -> tuple[str, str]:
    """Reasons name graph nodes such as `linear_17`; without the numbers, alike refusals share a row."""
    return re.sub(r"_\d+", "", refusal.reason), re.sub(r"_\d+", "", refusal.nearest)
