"""The card of a saved model: what it says, whose README.md it leaves alone, and what is pushed to a hub."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, repocard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, TrainingArguments

import ltepass
from ltepass.saving.model_card import MARK, Measured, card_text
from tests.models.zoo import llama

IDS = torch.arange(64).view(4, 16) % 61
SPEED: Measured = {
    "held_out": "4 x 16 tokens",
    "dense_perplexity": 10.0,
    "perplexity": 11.5,
    "sparsity": {"model.layers.0.mlp": 0.48, "model.layers.1.mlp": 0.52},
    "tokens_per_s": {"dense": 10.0, "lowered": 15.0},
    "machine": "a | machine",
}


@cache
def first() -> Any:
    model = llama()
    config = ltepass.LTEConfig(group_size=12, grouping="identity", target_sparsity=0.4)
    ltepass.transform(model, config=config, calibration=[IDS])
    ltepass.set_mode(model, "hard")
    return model


def routed() -> Any:
    return copy.deepcopy(first())


def metadata(card: str | Path) -> ModelCardData:
    data = (ModelCard.load(card) if isinstance(card, Path) else ModelCard(card)).data
    assert isinstance(data, ModelCardData)
    return data


def tags_of(card: str) -> list[str]:
    return metadata(card).tags or []


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_a_saved_model_has_a_card(tmp_path: Path) -> None:
    model = routed()
    ltepass.set_sparsity(model, 0.6)
    model.save_pretrained(tmp_path)
    data, text = metadata(tmp_path / "README.md"), card_of(tmp_path)
    assert data.license == "unknown"
    assert data.base_model is None
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["ltepass", "sparsity", "arxiv:2402.06126"]
    assert "| target | 40% of neurons inactive, in each FFN |" in text
    assert "| `model.layers.1.mlp` | 60 | 60% | not measured |" in text, "at the thresholds that were saved"
    assert 'AutoModelForCausalLM.from_pretrained("' in text
    assert "Not measured" in text


def test_it_tells_what_was_measured() -> None:
    text = card_text(routed(), SPEED)
    assert "| perplexity | 10.000 | 11.500 | x1.150 |" in text
    assert "48.0% / 50.0% / 52.0%" in text
    assert "| tokens/s of decoding, eager | 10.0 | 15.0 | x1.500 |" in text
    assert "| `model.layers.1.mlp` | 60 | 40% | 52.0% |" in text
    some: Measured = {**SPEED, "dense_perplexity": None, "tokens_per_s": None}
    assert "| perplexity | not measured | 11.500 |  |" in card_text(routed(), some)


@pytest.mark.parametrize("kept", [b"# mine", b"\xff", f"text about {MARK}".encode()])
def test_a_readme_of_somebody_else_stays(kept: bytes, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_bytes(kept)
    model = routed()
    model.save_pretrained(tmp_path)
    assert file.read_bytes() == kept
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    assert not file.exists()
    file.unlink()
    model.save_pretrained(tmp_path)
    written = card_of(tmp_path)
    file.write_text(written + "more")
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path) == written, "ours is written anew"
    file.write_text(written.replace(MARK, "") + "more")
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path).endswith("more"), "and no more where its mark was deleted"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_one_and_a_dense_model_has_none(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    twin = copied(routed())
    twin.save_pretrained(tmp_path / "twin")
    assert MARK in card_of(tmp_path / "twin")
    ltepass.remove(twin)
    for name, model in (("removed", twin), ("dense", llama())):
        model.save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "README.md").exists(), name
    routed().save_pretrained(tmp_path / "second", is_main_process=False)
    routed().save_pretrained(tmp_path / "second", False, None)
    assert not (tmp_path / "second" / "README.md").exists()


@pytest.mark.parametrize(
    "name", ["a`|b\n---\nlicense: mit\n---\n# <script>", "../../e`|t", "x: {y", "{{ 7 * 7 }}", "/" + "n" * 500]
)
def test_odd_names_are_names(name: str) -> None:
    model = routed()
    plain = card_text(model).splitlines()
    model.config.name_or_path = name
    text = card_text(model)
    assert len(text.splitlines()) == len(plain)
    assert metadata(text).license == "unknown"
    assert metadata(text).base_model is None
    (title,) = [line for line in text.splitlines() if line.startswith("# ")]
    assert title.startswith("# `")
    assert title.endswith("` with LTE routers")
    assert title.count("`") == 2
    assert len(title) < 160


def test_the_base_model_and_its_licence_follow_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed()
    cached = tmp_path / "cached.md"
    cached.write_text("---\nlicense: mit\n---\nA model.")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(cached))
    model.config.name_or_path = "someone/model"
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for folder in ("first", "second"):
        data = metadata(tmp_path / folder / "README.md")
        assert (data.base_model, data.license) == ("someone/model", "mit"), folder
    (tmp_path / "first/README.md").write_text("---\nlicense: apache-2.0\nbase_model: other/model\n---\n")
    data = metadata(card_text(AutoModelForCausalLM.from_pretrained(tmp_path / "first")))
    assert (data.base_model, data.license) == (None, "apache-2.0"), "a folder of somebody else's: no name of the hub"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    for odd in (": [", "tags: 3\nlicense: [a]", "tags: [{a: b}]\nbase_model: {a: b}", "7"):
        (tmp_path / "first/README.md").write_text(f"---\n{odd}\n---\n")
        data = metadata(card_text(again))
        assert (data.base_model, data.license) == (None, "unknown"), odd


def test_a_base_model_of_no_hub_is_named_in_the_second_card_too(tmp_path: Path) -> None:
    model = routed()
    (tmp_path / "base").mkdir()
    model.config.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for folder in ("first", "second"):
        assert "| base model | `base` |" in card_of(tmp_path / folder), folder
    routed().save_pretrained(tmp_path / "third")
    assert "base model | not known" in card_text(AutoModelForCausalLM.from_pretrained(tmp_path / "third"))


def trainer(folder: Path, **more: Any) -> Any:
    arguments = TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, **more)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    lte = ltepass.LTESettings(soft_steps=0, hard_steps=1)
    return ltepass.LTETrainer(routed(), arguments, lte=lte, train_dataset=rows)


def test_the_trainer_tells_what_its_last_stage_measured(tmp_path: Path) -> None:
    ours = trainer(tmp_path / "out")
    ours.fit()
    ours.save_model()
    written = card_of(tmp_path / "out")
    assert "| perplexity | not measured | " in written
    assert "batches of held-out text" in written
    assert "%" in written.splitlines()[-1].rpartition("|")[0].rpartition("|")[2]
    ltepass.set_sparsity(ours.model, 0.9)
    ours.save_model()
    assert "Not measured" in card_of(tmp_path / "out"), "thresholds have moved since"


class Hub:
    """What HfApi is asked for, without a network. card: the one that is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, card: str | None = None) -> None:
        self.files: dict[str, bytes] = {}
        hub, held = self, card

        def download(*args: object, **kwargs: object) -> str:
            if held is None:
                raise EntryNotFoundError("no card")
            return held

        class Url:
            repo_id = "me/lte"

        def commit(api: HfApi, repo_id: str, operations: list[Any], **kwargs: object) -> None:
            hub.files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}

        def upload(api: HfApi, *, folder_path: str, **kwargs: object) -> None:
            hub.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.is_file()}

        monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Url)
        monkeypatch.setattr(HfApi, "create_commit", commit)
        monkeypatch.setattr(HfApi, "upload_folder", upload)
        monkeypatch.setattr(HfApi, "file_exists", lambda *args, **kwargs: held is not None)
        monkeypatch.setattr(repocard, "hf_hub_download", download)

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()


@pytest.mark.parametrize("how", ["push", "save"])
def test_a_push_brings_the_card_along(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub, model = Hub(monkeypatch), routed()
    if how == "push":
        model.push_to_hub("me/lte", tags=["mine"])
        assert "mine" in tags_of(hub.card)
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/lte")
        assert card_of(tmp_path) == hub.card
    assert MARK in hub.card
    assert tags_of(hub.card)[:3] == ["ltepass", "sparsity", "arxiv:2402.06126"]
    assert {"config.json", "model.safetensors"} <= hub.files.keys()
    llama().push_to_hub("me/lte")
    assert MARK not in hub.card, "a dense model's is transformers' own"


@pytest.mark.parametrize("ours", [True, False])
def test_a_card_on_the_hub_stays_where_somebody_wrote_it(
    ours: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "hub.md"
    file.write_text(f"---\nlicense: mit\ntags:\n- old\n---\n{MARK if ours else 'mine'}\n# Old\n")
    hub = Hub(monkeypatch, str(file))
    routed().push_to_hub("me/lte")
    assert ("# Old" in hub.card) != ours
    assert "old" in tags_of(hub.card)


def test_a_trainer_pushes_our_card_with_what_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch)
    ours = trainer(tmp_path / "out", hub_model_id="me/lte")
    ours.fit()
    ours.push_to_hub(license="mit", tags="mine")
    assert "| perplexity | not measured | " in hub.card
    assert metadata(hub.card).license == "mit"
    assert "mine" in tags_of(hub.card)
