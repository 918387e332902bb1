"""Building blocks of a page: one file, no script, nothing fetched; dark where the reader's system is, and phone width.

Everything that is not HTML already is escaped here, names of modules too: they come from checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from zlib import crc32

from ltepass.pages.plots import COLOURS, available

LIGHT = {"page": "#ffffff", "box": "#f9fafb", **COLOURS}
DARK = {
    "page": "#111827",
    "box": "#1f2937",
    "ink": "#e5e7eb",
    "line": "#374151",
    "blue": "#60a5fa",
    "orange": "#fb923c",
    "grey": "#9ca3af",
    "green": "#34d399",
    "pale": "#1e3a5f",
}


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


# All below one class, so that a notebook's own page stays as it is.
STYLE = f"""
.ltepass {{ {_variables(LIGHT)} color-scheme: light dark; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; box-sizing: border-box; max-width: 64rem; margin: 0 auto; padding: 1rem; }}
@media (prefers-color-scheme: dark) {{ .ltepass {{ {_variables(DARK)} }} }}
.ltepass h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 0.2rem; overflow-wrap: anywhere; }}
.ltepass h2 {{ font-size: 1.2rem; margin: 2.2rem 0 0.6rem; }}
.ltepass p {{ margin: 0.3rem 0; max-width: 48rem; overflow-wrap: anywhere; }}
.ltepass .note {{ color: var(--grey); font-size: 0.9rem; }}
.ltepass dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); gap: 0.6rem;
  margin: 1rem 0; }}
.ltepass dl div {{ background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.8rem; }}
.ltepass dt {{ color: var(--grey); font-size: 0.85rem; }}
.ltepass dd {{ margin: 0; font-weight: 600; overflow-wrap: anywhere; }}
.ltepass .wide {{ overflow-x: auto; margin: 0.5rem 0; }}
.ltepass table {{ border-collapse: collapse; font-size: 0.9rem; color: var(--ink); }}
.ltepass th, .ltepass td {{ padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; background: none; }}
.ltepass thead th {{ color: var(--grey); font-weight: 600; white-space: nowrap; }}
.ltepass tbody th {{ font-weight: 600; min-width: 8rem; overflow-wrap: anywhere; }}
.ltepass td {{ min-width: 2rem; overflow-wrap: break-word; }}
.ltepass .number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.ltepass figure {{ margin: 0.5rem 0; max-width: 36rem; }}
.ltepass figcaption {{ font-size: 0.9rem; color: var(--grey); overflow-wrap: anywhere; }}
.ltepass svg {{ display: block; width: 100%; height: auto; }}
.ltepass .grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem; }}
.ltepass .grid figure {{ max-width: 22rem; }}
.ltepass summary {{ cursor: pointer; color: var(--blue); padding: 0.2rem 0; }}
.ltepass pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); border: 1px solid var(--line);
  border-radius: 6px; padding: 0.8rem; margin: 0.3rem 0; font-size: 0.85rem; color: var(--ink); }}
"""
# Around it, where the page is ours: as light or dark as the block.
AROUND = (
    f"body {{ margin: 0; background: {LIGHT['page']}; }}"
    f" @media (prefers-color-scheme: dark) {{ body {{ background: {DARK['page']}; }} }}"
)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page. title: text, the first heading too; parts: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{AROUND}</style></head>\n<body>\n{block([f'<h1>{escape(title)}</h1>', *parts], tag='main')}\n"
        "</body></html>\n"
    )


def block(parts: Sequence[str], *, tag: str = "div") -> str:
    """A part of somebody's page, as a notebook shows it, with its style."""
    return f'<{tag} class="ltepass"><style>{STYLE}</style>\n' + "\n".join(parts) + f"\n</{tag}>"


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "</section>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def facts(pairs: Mapping[str, str]) -> str:
    """What there is to know at a glance, each with its name."""
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs.items()) + "</dl>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """The first cell of a row names it; a column whose cells all begin with a digit or a sign is one of numbers.

    label: what a screen reader calls it. Wider than a phone, it scrolls by itself.
    """
    if not rows:
        return ""
    numbers = [all(re.match(r"[-+x]?\d|-$", cell) for cell in column) for column in zip(*rows, strict=True)]
    kinds = [' class="number"' if number and i else "" for i, number in enumerate(numbers)]
    head = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(headings, kinds, strict=True))
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str, *, alt: str = "") -> str:
    """An SVG that `plots` made, in the page's colours. alt: for who does not see it; the caption if none."""
    key = f"f{crc32(f'{caption} {alt}'.encode()):x}-"  # ids are a page's, and every plot begins its own
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt or caption)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def plot(make: Callable[[], str], caption: str, numbers: str, *, alt: str = "") -> str:
    """A figure with its numbers folded below; where matplotlib is missing, the numbers alone. make: gives the SVG."""
    if not available():
        return f"<p>{escape(caption)}</p>{numbers}"
    return figure(make(), caption, alt=alt) + (folded("the numbers", numbers) if numbers else "")


def folded(summary: str, *parts: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>" + "\n".join(parts) + "</details>"


def grid(parts: Sequence[str]) -> str:
    """Beside each other as far as there is room."""
    return '<div class="grid">' + "\n".join(f"<div>{part}</div>" for part in parts) + "</div>"
