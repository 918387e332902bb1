"""report.html: the table, the plots and both continuations in one file that needs no other."""

from __future__ import annotations

from html import escape

from ltepass.demo import plots
from ltepass.demo.options import command_line
from ltepass.demo.results import Generated, Results
from ltepass.demo.table import machine_line, rows

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 860px; margin: 2.5rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
p.note { color: #6b7280; font-size: 0.9rem; margin: 0.3rem 0; }
table { border-collapse: collapse; width: 100%; } td { padding: 0.45rem 0.6rem; border-bottom: 1px solid #e5e7eb; }
td:last-child { font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; } svg { width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
pre { white-space: pre-wrap; background: #f9fafb; border: 1px solid #e5e7eb; border-radius: 6px; padding: 0.8rem;
      font-size: 0.85rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; } }
"""


def page(results: Results) -> str:
    """results: the whole of results.json, every stage finished."""
    stages, options = results["stages"], results["options"]
    table = "".join(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in rows(results))
    sparsity = list(stages["quality"]["sparsity"].values())
    losses = {"dense fine-tuning": stages["tune_dense"]["losses"], **stages["train"]["losses"]}
    body = [
        "<h1>ltepass demo</h1>",
        f'<p class="note">{escape(command_line(options))}<br>{escape(machine_line(results))}</p>',
        f"<table>{table}</table>",
        "<h2>Sparsity of each layer on held-out text</h2>",
        _figure(plots.sparsity_per_layer(sparsity, options["target_sparsity"])),
        "<h2>Training loss on the same batches</h2>",
        _figure(plots.curves(losses, "optimizer step", "task loss (nats per token)")),
        "<h2>Time of one token</h2>",
        _figure(plots.token_times(stages["speed"]["ms"])),
        f'<p class="note">{stages["speed"]["tokens_timed"]} tokens a side, taking turns token by token; '
        "bare: the dense model with every FFN replaced by identity, which tells what the FFNs take</p>",
        *_continuations(stages["generate"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ltepass demo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _continuations(generated: Generated) -> list[str]:
    sides = "".join(
        f"<div><p class='note'>{escape(title)}</p><pre>{escape(text)}</pre></div>"
        for title, text in (("fine-tuned dense model", generated["dense"]), ("LTE, lowered", generated["lowered"]))
    )
    return [
        "<h2>Greedy continuation</h2>",
        f"<p class='note'>Prompt</p><pre>{escape(generated['prompt'])}</pre>",
        f'<div class="pair">{sides}</div>',
    ]
