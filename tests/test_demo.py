"""The demo end to end on the tiny model, and its parts: timing arithmetic, the table, what an interruption leaves."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import ltepass
from examples.results.demo_table import BEGIN, END, with_table
from ltepass.commands.generate import generate
from ltepass.commands.load import load
from ltepass.config import ROUTERS
from ltepass.demo import training_loop
from ltepass.demo.options import DemoOptions, Options, command_line
from ltepass.demo.results import STAGE_NAMES, Folder, Results, Stages
from ltepass.demo.run import STAGES, run_demo
from ltepass.demo.table import markdown, rows
from ltepass.demo.task import load_task
from ltepass.errors import ConfigError, TrainingError
from ltepass.measure.quality import compare, perplexity
from ltepass.measure.sparsity import sparsity_of_tail
from ltepass.measure.timing import summary, time_decoding, without_ffns
from ltepass.measure.token_bytes import router_share
from ltepass.routed.routed import routers_of
from tests.models.zoo import build


def model() -> Any:
    return build("llama")


def routed() -> Any:
    made = ltepass.transform(model(), config=ltepass.LTEConfig(group_size=5, grouping="identity"))
    ltepass.set_mode(made, "hard")
    return made


@pytest.fixture(scope="module", params=ROUTERS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """One whole run on the tiny model with each router, shared by the tests below."""
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(DemoOptions(model="tiny", steps=8, router=request.param), out)


def test_results_hold_what_their_types_say(tiny: tuple[Path, Results]) -> None:
    _, found = tiny
    assert set(found) == set(Results.__annotations__)
    assert set(found["options"]) == set(Options.__annotations__)
    assert list(found["stages"]) == list(STAGE_NAMES) == list(Stages.__annotations__)
    fields = {name: set(stage) for name, stage in cast(dict[str, dict[str, object]], found["stages"]).items()}
    for stage, types in get_type_hints(Stages).items():
        assert fields[stage] == set(get_type_hints(types)), stage


def test_every_stage_ran_and_the_table_has_every_row(tiny: tuple[Path, Results]) -> None:
    out, results = tiny
    assert list(results["stages"]) == [name for name, _, _ in STAGES]
    assert json.loads((out / "results.json").read_text()) == results
    wanted = ("FFN sites", "dense perplexity", "fine-tuning", "LTE perplexity", "min / mean / max", "decode, dense")
    text = markdown(results)
    for row in (
        *wanted,
        "decode, lowered",
        "speed-up",
        "FFN weights that a token reads",
        "logits equal | yes",
        "eager",
    ):
        assert row in text, row


def test_saved_model_is_the_one_that_was_measured(tiny: tuple[Path, Results]) -> None:
    from transformers import AutoModelForCausalLM

    out, results = tiny
    saved = AutoModelForCausalLM.from_pretrained(out / "lte").eval()
    test = load_task("tiny").test
    assert perplexity(saved, test) == pytest.approx(results["stages"]["quality"]["perplexity"], rel=1e-5)
    assert results["stages"]["reload"] | {"seconds": 0, "peak_gb": 0} == {
        "equal": True,
        "max_difference": 0.0,
        "seconds": 0,
        "peak_gb": 0,
    }


def test_the_folder_goes_on_as_the_demo_says(tiny: tuple[Path, Results]) -> None:
    out, results = tiny
    task, generated = load_task("tiny"), results["stages"]["generate"]
    assert generate(str(out / "lte"), "caf\u00e9 \n with", new_tokens=1).startswith("caf\u00e9 \n with")
    text = generate(str(out / "lte"), generated["prompt"], new_tokens=task.new_tokens)
    assert text == generated["prompt"] + generated["lowered"]


def test_a_proxy_needs_no_training_of_its_own(tiny: tuple[Path, Results]) -> None:
    stages, options = tiny[1]["stages"], tiny[1]["options"]
    linear = options["router"] == "linear"
    assert set(stages["train"]["losses"]) == ({"LTE, hard stage"} if linear else set())
    assert stages["calibrate"]["group_size"] == (8 if linear else 1)
    if not linear:
        assert stages["quality"]["perplexity"] < 1.05 * stages["tune_dense"]["perplexity"]
    assert ("--router linear" in command_line(options)) == linear


def test_plain_formats_of_the_same_model_stand_beside_it(tiny: tuple[Path, Results]) -> None:
    quality, tuned = tiny[1]["stages"]["quality"], tiny[1]["stages"]["tune_dense"]["perplexity"]
    shares = {name: plain["bytes_share"] for name, plain in quality["plain"].items()}
    assert shares == {"int8": pytest.approx(0.25, abs=0.01), "Q4_1": pytest.approx(5 / 32)}
    assert all(plain["perplexity"] != tuned for plain in quality["plain"].values())
    assert quality["plain"]["int8"]["perplexity"] == pytest.approx(tuned, rel=1e-2)
    assert "int8: " in markdown(tiny[1])


def test_quality_is_measured_outside_the_training_domain_too(tiny: tuple[Path, Results]) -> None:
    """Each kind of text has its own figures, over the better of the two dense models there."""
    out, results = tiny[0], copy.deepcopy(tiny[1])
    quality, task = results["stages"]["quality"], load_task("tiny")
    tuned, base = (load(str(out / name)) for name in ("dense", "base"))
    kinds = {"Python reference": task.test, "graph theory": task.others["graph theory"], "C++": task.others["C++"]}
    assert list(quality["texts"]) == list(kinds)
    row = dict(rows(results))["in the training domain and outside it: perplexity over the better dense model "
                              "(95 % interval), FFN sparsity, 2,048 tokens a text"]  # fmt: skip
    for kind, blocks in kinds.items():
        found, model = quality["texts"][kind], load(str(out / "lte"))
        better = min((tuned, base), key=lambda dense: perplexity(dense, blocks))
        expected = compare(model, better, blocks)
        assert [found["perplexity"], found["dense"]] == pytest.approx([expected.perplexity, expected.dense_perplexity])
        over = expected.ratio
        assert [found["ratio"], found["low"], found["high"]] == pytest.approx([over.value, over.low, over.high])
        shares = ltepass.measure_sparsity(model, blocks[:, None]).values()
        assert found["sparsity"] == pytest.approx(sum(shares) / len(shares))
        assert f"{kind}: {over}, {found['sparsity']:.1%}" in row
    assert quality["perplexity"] == quality["texts"]["Python reference"]["perplexity"]
    del quality["texts"]
    assert not [value for what, value in rows(results) if "outside" in what]


def test_page_is_one_file(tiny: tuple[Path, Results]) -> None:
    page = (tiny[0] / "report.html").read_text()
    assert page.count("<svg") == 3
    for outside in ('src="', 'href="http', "<link", "<script"):
        assert outside not in page
    assert "Greedy continuation" in page


def test_a_second_call_runs_nothing_again(tiny: tuple[Path, Results]) -> None:
    out, results = tiny
    start = time.perf_counter()
    assert run_demo(DemoOptions(model="tiny", steps=8, router=results["options"]["router"]), out) == results  # type: ignore[arg-type]
    assert time.perf_counter() - start < 20


def test_other_options_do_not_mix_into_a_folder(tmp_path: Path) -> None:
    Folder(tmp_path, DemoOptions(seed=1))
    with pytest.raises(ConfigError, match="--fresh"):
        Folder(tmp_path, DemoOptions(seed=2))
    Folder(tmp_path, DemoOptions(seed=2), fresh=True)


def test_the_summary_says_how_much_faster_and_what_the_ffns_take() -> None:
    """Worked by hand: 10 ms dense, 4 ms bare, so the FFNs take 6."""
    times = {"dense": [0.010] * 4, "lowered": [0.008] * 4, "bare": [0.004] * 4}
    out = summary(times, active=0.4, router=0.1)
    assert out["speedup"] == pytest.approx(1.25)
    assert out["ffn_share_of_time"] == pytest.approx(0.6)
    assert out["tokens_per_s"]["dense"]["median"] == pytest.approx(100)


def test_bare_model_shares_weights_and_leaves_the_dense_one_alone() -> None:
    dense = model()
    sites = ltepass.report(routed()).sites
    before = dense(torch.arange(9)[None]).logits
    bare = without_ffns(dense, sites)
    assert isinstance(bare.get_submodule("model.layers.0.mlp"), nn.Identity)
    assert bare.get_parameter("lm_head.weight") is dense.lm_head.weight
    assert torch.equal(dense(torch.arange(9)[None]).logits, before)
    assert not torch.equal(bare(torch.arange(9)[None]).logits, before)


def test_router_share_counts_bytes() -> None:
    made = routed()
    sites = ltepass.report(made).sites
    assert router_share(made, sites) == pytest.approx((12 * 24 + 12) / (3 * 24 * 60))


def test_timing_gives_every_side_every_token_but_the_warm_up() -> None:
    times = time_decoding({"a": model(), "b": model()}, torch.arange(7), torch.arange(11), warmup=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 8, "b": 8}


def test_perplexity_is_the_models_own_loss() -> None:
    made, blocks = model(), torch.arange(30).view(2, 15)
    losses = [made(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    assert perplexity(made, blocks) == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_sparsity_of_a_timing_leaves_the_prompt_out() -> None:
    made, ids = routed(), torch.arange(10)
    kept: list[Tensor] = []
    handles = [r.register_forward_hook(lambda _, __, logits: kept.append(logits)) for r in routers_of(made)]
    with torch.no_grad():
        made(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    expected = torch.stack([(logits[0, 7:] <= 0).float().mean() for logits in kept]).mean().item()
    assert sparsity_of_tail(made, ids, skip=7) == pytest.approx(expected)


def test_batches_use_every_block_before_any_twice() -> None:
    blocks = torch.arange(10)[:, None]
    first = torch.cat(training_loop.batches(blocks, 4, 5, seed=3)).flatten()
    assert sorted(first[:10].tolist()) == list(range(10))
    assert torch.equal(first, torch.cat(training_loop.batches(blocks, 4, 5, seed=3)).flatten())
    assert not torch.equal(first, torch.cat(training_loop.batches(blocks, 4, 5, seed=4)).flatten())


def test_tuning_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Stopped after step 2 and resumed with a fresh model object: bit by bit the uninterrupted run."""
    steps = training_loop.batches(torch.arange(60).view(6, 10), 2, 5, seed=0)
    whole, part, file = model(), model(), tmp_path / "state.pt"
    losses = training_loop.tune(whole, steps, file, lambda *_: None, lambda: False)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        training_loop.tune(part, steps, file, lambda step, _: seen.append(step), lambda: seen == [0, 1])
    resumed = model()
    assert training_loop.tune(resumed, steps, file, lambda *_: None, lambda: False) == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not file.exists()


def test_tuning_stops_at_nan(tmp_path: Path) -> None:
    broken = model()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="at step 0"):
        training_loop.tune(broken, [torch.arange(10)[None]], tmp_path / "s.pt", lambda *_: None, lambda: False)


def test_ctrl_c_is_only_noted_and_the_second_one_stops() -> None:
    said: list[str] = []
    with training_loop.ctrl_c_between_steps(said.append) as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(said) == 1


def test_readme_table_goes_between_the_markers() -> None:
    text = f"a\n{BEGIN}\nold\n{END}\nb"
    assert with_table(text, "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    assert with_table(with_table(text, "x"), "new") == with_table(text, "new")
    with pytest.raises(ValueError, match="lacks"):
        with_table("no markers", "new")


def test_train_and_held_out_text_share_no_block() -> None:
    task = load_task("tiny")
    train = {bytes(block.tolist()) for block in task.train}
    assert not any(bytes(block.tolist()) in train for block in task.test)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_in_the_middle_leaves_a_state_that_the_same_command_finishes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ltepass", "demo", "--model", "tiny", "--steps", "40", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "results.json").exists() or "dense" not in (tmp_path / "results.json").read_text():
        assert first.poll() is None, "the demo ended before it was interrupted"
        time.sleep(0.2)
    time.sleep(3)
    os.kill(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "goes on from there" in errors
    assert subprocess.run(command, timeout=400).returncode == 0
    assert rows(json.loads((tmp_path / "results.json").read_text()))
