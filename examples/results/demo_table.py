"""`python -m examples.results.demo_table [OUT]` writes the demo's table into README.md, between its two markers.

The numbers themselves are kept beside it (KEPT), so that a test can tell whether the table was made from them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from ltepass.demo.table import markdown

BEGIN, END = "<!-- demo table: written by `make readme` -->", "<!-- end of demo table -->"
KEPT = Path("examples/results/demo.json")


def with_table(readme: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The README text with what stands between the markers replaced. Raises ValueError where a marker is missing."""
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"README.md lacks the lines {begin!r} and {end!r}; put them where the table belongs")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "lte-demo")
    readme = Path("README.md")
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "results.json", KEPT)
    readme.write_text(with_table(readme.read_text(), markdown(json.loads(KEPT.read_text()))))
    print(f"README.md now holds the table of {out}/results.json, which is kept as {KEPT}")


if __name__ == "__main__":
    main()
