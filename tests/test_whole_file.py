"""A file is there whole, or as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltepass.whole_file import whole_file


def test_what_was_written_takes_its_place_and_what_failed_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with whole_file(path) as file:
        file.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def cut() -> None:
        with whole_file(path) as file:
            file.write_text("tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
