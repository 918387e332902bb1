"""What Sphinx wrote as HTML, read again: the passages of a page, and the entries of the index."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Passage:
    """What stands between two marks of a page. title: of its section, or the full name of what it defines."""

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return re.sub(r"\s*\n\s*\n\s*", "\n", "".join(self.parts).replace("¶", "")).strip()


class Page(HTMLParser):
    """Passages of a page that Sphinx made: one begins at every section, definition and mark of the index.

    marks: the passage of each id. What follows a definition goes on with the section that it stands in.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.passages: list[Passage] = []
        self.marks: dict[str, Passage] = {}
        self._open: list[Passage | None] = []  # of the sections and lists that are open; None: of no definition
        self._heading = self._code = False
        self.feed(html)

    def _now(self) -> Passage | None:
        return next((passage for passage in reversed(self._open) if passage), None)

    def _begin(self, title: str) -> Passage:
        self.passages.append(Passage(title))
        return self.passages[-1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        mark, kinds = given.get("id", ""), given.get("class", "").split()
        if tag == "section":
            self._open.append(self._begin(""))
        elif tag == "dl":
            self._open.append(self._begin("") if {"py", "std", "c"} & set(kinds) else None)
        now = self._now()
        if now is None:
            return
        if mark.startswith("index-") and "target" not in kinds and now.text and tag != "dt":
            place = max(i for i, passage in enumerate(self._open) if passage)
            now = self._open[place] = self._begin(now.title)
        if mark:
            self.marks[mark] = now
        if tag == "dt" and "sig" in kinds:
            now.title = now.title or mark
        self._heading = self._heading or tag in ("h1", "h2", "h3", "h4")
        self._code = self._code or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        now = self._now()
        if tag in ("section", "dl") and self._open:
            self._open.pop()
        if now and tag in ("p", "li", "dt", "pre", "h1", "h2", "h3", "h4"):
            now.parts.append("\n\n")
        self._heading = self._heading and tag not in ("h1", "h2", "h3", "h4")
        self._code = self._code and tag != "pre"

    def handle_data(self, data: str) -> None:
        now = self._now()
        if now and self._heading:
            now.title += data.replace("¶", "")
        elif now:
            now.parts.append(data if self._code else re.sub(r"\s+", " ", data))


class Index(HTMLParser):
    """Entries of a general index, each with the address that it points at first."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.entries: list[tuple[str, str]] = []
        self._names: list[str] = []  # of the entries that are open, each below the one before
        self._address = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "li":
            self._names.append("")
        elif tag == "a":
            self._address = dict(attrs).get("href") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "li" and self._names:
            self._names.pop()
        elif tag == "a":
            self._address = ""

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if not self._names or not text or text.startswith("["):  # a further address
            return
        above = self._names[-2] if len(self._names) > 1 else ""
        if above and text.startswith("("):  # another "join() (in module a)"
            above = above.partition(" (")[0]
        self._names[-1] = f"{above} {text}".strip()
        if self._address:
            self.entries.append((self._names[-1], self._address))
