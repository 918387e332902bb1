"""The page of a report: it names all that was found, escapes it, fetches nothing, and is readable on a phone."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import ltepass
from ltepass.commands.training_run import Losses, losses_of
from ltepass.pages import plots
from ltepass.pages.html import table
from ltepass.routed.routed import routers_of
from ltepass.routed.site_scores import ranges
from ltepass.routed.sites import Refusal
from tests.models.zoo import build

VOID = {"meta", "br", "img", "link", "input", "hr"}
NASTY = 'a<script src="http://x.test/y.js">&amp;"$x^$'
IDS = torch.randint(0, 61, (4, 32), generator=torch.Generator().manual_seed(1))


class Page(HTMLParser):
    """Its text, tags, ids, and what it would fetch. Fails where tags do not close in their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.open += [] if tag in VOID else [tag]
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.links.append(value or "")
            if name == "id":
                self.ids[value or ""] += 1
            if name == "style":
                self.links += re.findall(r"url\((.*?)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data
        elif self.open[-1] == "style":
            assert "@import" not in data
            self.links += re.findall(r"url\((.*?)\)", data)


def read(html: str) -> Page:
    """A page as it has to be: nothing from outside, no script, no id twice."""
    page = Page(html)
    assert all(link.startswith("#") for link in page.links), page.links
    assert all(link[1:] in page.ids for link in page.links), "what is linked is there"
    assert page.ids.most_common(1)[0][1] == 1 if page.ids else True
    assert not {"script", "link", "img", "iframe", "object"} & page.tags.keys()
    return page


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = ltepass.LTEConfig(group_size=12)
    return ltepass.transform(build("llama"), config=config, calibration=[IDS])


def test_a_page_of_the_calibration_names_every_site_and_draws_its_scores(model: nn.Module) -> None:
    report = ltepass.report(model)
    page = read(report.to_html("mine"))
    for name in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert page.text.count(name) >= 2, "in the table and at its histogram"
    assert page.tags["svg"] == 3, "sparsity, and two histograms"
    assert "as the calibration's table has it" in page.text
    assert "dead" not in page.text, "no token was seen"
    assert page.tags["h1"] == page.tags["main"] == 1


def test_batches_give_what_measure_sparsity_gives(model: nn.Module) -> None:
    report = ltepass.report(model, batches=[IDS])
    assert report.sparsity == pytest.approx(ltepass.measure_sparsity(model, [IDS]), abs=1e-6)
    scores = report.scores["model.layers.0.mlp"]
    assert scores.tokens == IDS.numel()
    below = sum(value <= (scores.threshold or 0) for value in scores.quantiles) - 1
    assert below / 100 == pytest.approx(scores.inactive, abs=0.02), "the quantiles are of the same tokens"
    assert set(report.modes.values()) == set(ltepass.report(model).modes.values()), "the mode is as it was"


def test_without_a_text_the_table_says_what_the_thresholds_leave(model: nn.Module) -> None:
    sparse = copy.deepcopy(model)
    ltepass.set_sparsity(sparse, 0.7)
    assert [s.inactive for s in ltepass.report(sparse).scores.values()] == pytest.approx([0.7, 0.7], abs=0.011)
    ltepass.set_sparsity(sparse, 0.0)
    report = ltepass.report(sparse)
    assert [s.inactive for s in report.scores.values()] == [0, 0]
    assert json.loads(json.dumps(report.scores["model.layers.0.mlp"].threshold)) is None, "JSON has no infinity"
    read(report.to_html())


def test_dead_and_always_on_experts_are_named(model: nn.Module) -> None:
    crafted = copy.deepcopy(model)
    router = next(iter(routers_of(crafted)))
    with torch.no_grad():
        for expert, logit in ((1, 50.0), (3, -50.0), (4, -50.0)):
            router.weight[expert] = 0
            assert router.bias is not None
            router.bias[expert] = logit
    report = ltepass.report(crafted, batches=[IDS])
    first, second = report.scores.values()
    assert (first.dead, first.always_on) == ([3, 4], [1])
    assert not second.dead
    page = read(report.to_html())
    assert "model.layers.0.mlp: 2 dead of 5 experts: 3-4" in page.text
    assert "model.layers.0.mlp: 1 always on of 5 experts: 1" in page.text
    assert page.text.count("dead of 5") == 1, "the other site has none"


def test_ranges_are_short() -> None:
    assert ranges([3, 17, 18, 19, 21]) == "3, 17-19, 21"
    assert ranges([]) == ""


def test_names_of_a_model_are_escaped(model: nn.Module) -> None:
    report = ltepass.report(model, batches=[IDS])
    site = replace(report.sites[0], name=NASTY)
    scores = {NASTY: replace(report.scores[report.sites[0].name], use=[0.0, 1.0, 0.5, 0.5, 0.5])}
    refusal = Refusal(module=NASTY, node=NASTY, check="match", reason=NASTY, nearest=NASTY)
    hard = replace(report, sites=[site], scores=scores, refusals=[refusal], modes={NASTY: "hard"}, notes=[NASTY])
    page = read(hard.to_html(NASTY))
    assert page.text.count(NASTY) >= 8
    assert "1 candidate refused" in page.text


def test_a_notebook_gets_a_block_and_no_page(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)  # drawn above
    monkeypatch.setattr("ltepass.pages.html.available", lambda: False)
    html = ltepass.report(model)._repr_html_()
    page = read(html)
    assert "model.layers.1.mlp" in page.text
    assert not {"html", "body", "title", "main"} & page.tags.keys()
    rules = re.sub(r"@media.*?\{", "", html[html.index("<style>") + 7 : html.index("</style>")])
    selectors = [rule.strip() for rule in re.findall(r"([^{}]+)\{", rules)]
    assert all(part.strip().startswith(".ltepass") for s in selectors for part in s.split(",")), "its own style alone"


def test_without_matplotlib_the_page_has_the_numbers(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltepass.pages.html.available", lambda: False)
    monkeypatch.setattr(plots, "available", lambda: False)
    page = read(ltepass.report(model, batches=[IDS]).to_html())
    assert page.tags["svg"] == page.tags["details"] == 0
    assert page.tags["table"] == 3, "sites, percentiles and use"


def test_text_is_readable_on_its_ground() -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for lines of a plot."""
    from ltepass.pages.html import DARK, LIGHT

    for colours in (LIGHT, DARK):
        for ground in ("page", "box"):
            for name, least in (("ink", 4.5), ("grey", 4.5), ("blue", 4.5), ("orange", 3.0), ("green", 3.0)):
                assert contrast(colours[name], colours[ground]) >= least, (name, ground)


def contrast(one: str, other: str) -> float:
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_table_without_rows_is_nothing_and_one_of_numbers_is_aligned() -> None:
    assert table(("a", "b"), [], "none") == ""
    assert table(("a", "b"), [("x", "1.5"), ("y", "-")], "some").count('class="number"') == 3


def test_losses_come_from_the_newest_checkpoint(tmp_path: Path) -> None:
    for step, losses in ((4, [(2, 9.0)]), (10, [(5, 3.0), (10, 2.0)])):
        folder = tmp_path / "hard" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        history = [{"step": s, "loss": 30.0, "lte_task_loss": loss} for s, loss in losses] + [{"step": 10, "eta": 1}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    expected: dict[str, Losses] = {"hard": [(5, 3.0), (10, 2.0)]}
    assert losses_of(tmp_path) == expected
    assert losses_of(tmp_path / "nothing") == {}


HARNESS = """<!doctype html><iframe id="f" style="border:0;width:{width}px;height:900px" src="{page}"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  document.title = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    ground: getComputedStyle(page.querySelector(".ltepass")).backgroundColor,
    smallest: Math.min(...[...page.querySelectorAll("svg text")].filter((t) => t.getClientRects().length)
      .map((t) => t.getBoundingClientRect().height)),
  }});
}};
</script>"""
Seen = dict[str, int | str | list[str]]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], Seen]:
    """What headless Chromium makes of a page at a width, in a mode."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    folder = tmp_path_factory.mktemp("browser")

    def run(html: str, width: int, mode: str) -> Seen:
        (folder / "page.html").write_text(html, encoding="utf-8")
        (folder / "harness.html").write_text(HARNESS.format(width=width, page="page.html"))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--no-first-run"]
        flags += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        flags += [f"--blink-settings=preferredColorScheme={0 if mode == 'dark' else 1}", "--window-size=1600,1000"]
        flags += ["--virtual-time-budget=5000", "--dump-dom", (folder / "harness.html").as_uri()]
        done = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=120)
        (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
        seen: Seen = json.loads(title)
        return seen

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_a_request(
    model: nn.Module, browse: Callable[[str, int, str], Seen], width: int, mode: str
) -> None:
    report = ltepass.report(model, batches=[IDS])
    refusal = Refusal(
        module="model.layers.0." + "very_long_name_" * 8, node="", check="match", reason=NASTY, nearest=""
    )
    html = replace(report, refusals=[refusal]).to_html()
    seen = browse(html, width, mode)
    assert seen["overflow"] == 0
    assert seen["requests"] == []
    assert seen["ground"] == ("rgb(17, 24, 39)" if mode == "dark" else "rgb(255, 255, 255)")
    assert isinstance(seen["smallest"], float | int)
    assert seen["smallest"] >= 10, "labels of plots, in CSS pixels"
    worse = html.replace("<h1>", '<img src="http://outside.test/x.png"><div style="width: 3000px">wide</div><h1>')
    seen = browse(worse, width, mode)
    assert seen["requests"] == ["http://outside.test/x.png"], "a request would be seen"
    assert seen["overflow"] != 0
