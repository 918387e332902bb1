"""The demo's one table: made from results.json, for the terminal, for Markdown and for the HTML page alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ltepass.demo.options import Options, command_line
from ltepass.demo.results import Results, StageName, Stages, machine_line
from ltepass.measure.quality import Ratio
from ltepass.routed.report_tables import span

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[tuple[str, str]]


def rows(results: Results) -> Rows:
    """(what, measured) for every finished stage, in the order a reader asks."""
    stages, options = results["stages"], results["options"]
    found: Rows = []
    for stage, make in _ROWS:
        if stage in stages:
            found += make(stages, options)
    return found


def _model(stages: Stages, _: Options) -> Rows:
    task = stages["prepare"]
    return [("model", f"{task['name']}, {task['parameters'] / 1e6:.1f} M parameters, {task['dtype']}")]


def _dense(stages: Stages, _: Options) -> Rows:
    test = stages["prepare"]["test"]
    return [(f"dense perplexity, {test} of held-out text", f"{stages['dense']['perplexity']:.2f}")]


def _tuned(stages: Stages, _: Options) -> Rows:
    tune = stages["tune_dense"]
    return [(f"dense perplexity after fine-tuning on {tune['tokens']:,} tokens", f"{tune['perplexity']:.2f}")]


def _sites(stages: Stages, _: Options) -> Rows:
    found = stages["calibrate"]
    size, grouping = found["group_size"], found["grouping"]
    experts = "of single neurons" if size == 1 else f"experts of {size} neurons, grouping {grouping}"
    return [("FFN sites found", f"{found['sites']}, {experts}")]


def _quality(stages: Stages, options: Options) -> Rows:
    quality, tuned = stages["quality"], stages["tune_dense"]["perplexity"]
    sparsity = list(quality["sparsity"].values())
    return [
        (
            f"LTE perplexity at {options['target_sparsity']:.0%} FFN sparsity, trained on the same tokens",
            f"{quality['perplexity']:.2f} ({quality['perplexity'] / tuned:.2f}x the fine-tuned dense model)",
        ),
        ("measured hard sparsity on held-out text, per layer min / mean / max", span(sparsity)),
    ]


def _domains(stages: Stages) -> Rows:
    """In the training domain and outside it; no row of runs from before it was measured."""
    texts = stages["quality"].get("texts")
    if not texts:
        return []
    shown = [
        f"{kind}: {Ratio(value=t['ratio'], low=t['low'], high=t['high'])}, {t['sparsity']:.1%}"
        for kind, t in texts.items()
    ]
    what = "in the training domain and outside it: perplexity over the better dense model (95 % interval), FFN sparsity"
    return [(f"{what}, {min(t['tokens'] for t in texts.values()):,} tokens a text", "; ".join(shown))]


def _speed(stages: Stages, _: Options) -> Rows:
    speed = stages["speed"]
    side = {name: "{median:.1f} ({low:.1f} .. {high:.1f})".format(**s) for name, s in speed["tokens_per_s"].items()}
    how = f"{speed['compile_mode']}, {speed['dtype']}, {speed['threads']} thread{'s' if speed['threads'] != 1 else ''}"
    return [
        (f"decode, dense, tokens/s, median (quartiles); {how}", side["dense"]),
        (f"decode, lowered, tokens/s, median (quartiles); {how}", side["lowered"]),
        ("speed-up", f"{speed['speedup']:.2f}x"),
        (
            f"FFN weights that a token reads, with routers (FFNs: {speed['ffn_share_of_time']:.0%} of a dense token)",
            f"{speed['active_share'] + speed['router_share']:.0%} of the dense model's",
        ),
    ]


def _instead(stages: Stages) -> Rows:
    """What a user gains and loses against plain formats of the same model; nothing of runs that did not measure it."""
    quality, speed = stages["quality"], stages["speed"]
    read = speed["active_share"] + speed["router_share"]
    against = [
        f"{name}: {quality['perplexity'] / plain['perplexity']:.3f}x, {read / plain['bytes_share']:.2f}x"
        for name, plain in quality.get("plain", {}).items()
    ]
    what = "in place of plain formats: perplexity and FFN bytes read over theirs (below 1 is a gain, above a loss)"
    return [(what, "; ".join(against))] if against else []


def _reload(stages: Stages, _: Options) -> Rows:
    reload = stages["reload"]
    equal = "yes" if reload["equal"] else f"NO: largest difference {reload['max_difference']:.2e}"
    return [("saved, loaded in a new process: logits equal", equal)]


_ROWS: tuple[tuple[StageName, Callable[[Stages, Options], Rows]], ...] = (
    ("prepare", _model),
    ("calibrate", _sites),
    ("dense", _dense),
    ("tune_dense", _tuned),
    ("quality", _quality),
    ("quality", lambda stages, _: _domains(stages)),
    ("speed", _speed),
    ("speed", lambda stages, _: _instead(stages)),
    ("reload", _reload),
)


def rich_table(results: Results) -> Table:
    from rich.table import Table

    table = Table(
        show_header=False, show_lines=False, title="ltepass demo", title_justify="left", caption_justify="left"
    )
    table.caption = machine_line(results)
    table.add_column("what", overflow="fold")
    table.add_column("measured", overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: Results) -> str:
    """The same rows for a README, with the machine and the command that made them."""
    lines = ["| what | measured |", "|---|---|"]
    lines += [f"| {what} | {measured} |" for what, measured in rows(results)]
    return "\n".join([*lines, "", f"Measured by `{command_line(results['options'])}` on {machine_line(results)}."])
