"""report.html: the table, the plots and both continuations in one file that needs no other."""

from __future__ import annotations

from html import escape

from ltepass.demo.options import command_line
from ltepass.demo.results import Generated, Results, machine_line
from ltepass.demo.table import rows
from ltepass.pages import plots
from ltepass.pages.html import document, figure, grid, note, section, table


def page(results: Results) -> str:
    """results: the whole of results.json, every stage finished."""
    stages, options = results["stages"], results["options"]
    sparsity = list(stages["quality"]["sparsity"].values())
    losses = {"dense fine-tuning": stages["tune_dense"]["losses"], **stages["train"]["losses"]}
    timed = (
        f"{stages['speed']['tokens_timed']} tokens a side, taking turns token by token; bare: the dense model with "
        "every FFN replaced by identity, which tells what the FFNs take"
    )
    return document(
        "ltepass demo",
        [
            note(command_line(options)),
            note(machine_line(results)),
            table(("what", "measured"), rows(results), "what the demo measured"),
            section(
                "Sparsity of each layer",
                figure(plots.sparsity_per_layer(sparsity, options["target_sparsity"]), "measured on held-out text"),
            ),
            section(
                "Training loss",
                figure(plots.curves(losses, "optimizer step", "task loss (nats per token)"), "on the same batches"),
            ),
            section("Time of one token", figure(plots.token_times(stages["speed"]["ms"]), timed)),
            _continuations(stages["generate"]),
        ],
    )


def _continuations(generated: Generated) -> str:
    sides = (("fine-tuned dense model", generated["dense"]), ("LTE, lowered", generated["lowered"]))
    return section(
        "Greedy continuation",
        note("Prompt"),
        f"<pre>{escape(generated['prompt'])}</pre>",
        grid([f"{note(title)}<pre>{escape(text)}</pre>" for title, text in sides]),
    )
