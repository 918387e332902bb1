"""`python -m examples.bench.speed_page` writes examples/results/speed.md and its plot from the kept measurements."""

from __future__ import annotations

from pathlib import Path

from examples.bench.old_rows import ModelRecord
from examples.bench.plot import draw
from examples.bench.table import markdown
from examples.results.demo_table import with_table
from ltepass.measure.records import OpRecord, TokenRecord, read

BEGIN, END = "<!-- speed: written by `python -m examples.bench.speed_page` -->", "<!-- end of speed -->"
FOLDER = Path("examples/results")
OP_CSV, TOKEN_CSV, PLOT = FOLDER / "bench_op.csv", FOLDER / "bench_token.csv", FOLDER / "bench_op.svg"
OLD_CSV = FOLDER / "bench_model.csv"
PAGE = FOLDER / "speed.md"


def section(root: Path) -> str:
    """The text between the markers, from the CSV files below `root`."""
    return markdown(
        read(root / OP_CSV, OpRecord), read(root / TOKEN_CSV, TokenRecord), read(root / OLD_CSV, ModelRecord)
    )


def main() -> None:
    records = read(OP_CSV, OpRecord)
    PAGE.write_text(with_table(PAGE.read_text(), section(Path()), BEGIN, END))
    if records:
        draw(PLOT, records)
    print(f"{PAGE} and {PLOT} now show {OP_CSV}, {TOKEN_CSV} and {OLD_CSV}")


if __name__ == "__main__":
    main()
