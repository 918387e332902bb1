"""README.md of a saved model, as the hub shows it: what it comes from, how it loads, how sparse and how good it is.

`save_pretrained` of a routed model writes it, and the trainers, which know more. One without MARK was written by
somebody else, and stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from torch import distributed, nn

from ltepass.errors import one_line
from ltepass.routed.report_tables import span
from ltepass.routed.routed import Routed, state_of
from ltepass.version import __version__
from ltepass.whole_file import whole_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from transformers import PreTrainedModel

CARD = "README.md"
MARK = "<!-- ltepass writes this file anew at each save; without this line it leaves the file alone -->"
PAPER = "2402.06126"
TAGS = ("ltepass", "sparsity", f"arxiv:{PAPER}")
UNKNOWN = "unknown"  # a licence's name that the hub has
LONGEST = 120  # characters of a name


class Measured(TypedDict):
    """Perplexities over label tokens of held-out rows; sparsity: by site; tokens_per_s: by side, "dense" and "lowered";
    machine: that these are of. None: not measured."""

    held_out: str
    dense_perplexity: float | None
    perplexity: float | None
    sparsity: dict[str, float]
    tokens_per_s: dict[str, float] | None
    machine: NotRequired[str]


def write_card(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    measured: Measured | None = None,
    *,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write a routed model's card into its folder, unless somebody else's is there. Raises OSError.

    license: None takes the base model's, where its card lies on this disk.
    """
    path = Path(folder) / CARD
    if os.path.lexists(path) and not _is_ours(path):
        return
    with whole_file(path) as file:
        file.write_text(card_text(model, measured, license=license, tags=tags), encoding="utf-8")


def _is_ours(path: Path) -> bool:
    try:
        return MARK in path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def card_text(
    model: PreTrainedModel, measured: Measured | None = None, *, license: str | None = None, tags: Sequence[str] = ()
) -> str:
    """Metadata in YAML, and Markdown, in which names stand as code."""
    from huggingface_hub import ModelCard, ModelCardData

    base = _base(model)
    license = license or base.license or UNKNOWN
    data = ModelCardData(
        base_model=base.hub_name,
        library_name="transformers",
        license=license,
        pipeline_tag="text-generation" if _auto_class(model) == "AutoModelForCausalLM" else None,
        tags=[*TAGS, *tags],
    )
    routed = Routed.of(model, "the model card")
    parts = (
        [MARK],
        _what(model, routed, base.name, license),
        _how_to_load(model),
        _figures(measured),
        _layers(routed, measured),
    )
    body = "\n\n".join("\n".join(part) for part in parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}\n"))


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a model was loaded from. name: of a folder its last part; hub_name: where it is one of the hub."""

    name: str | None = None
    hub_name: str | None = None
    license: str | None = None


def _base(model: PreTrainedModel) -> Base:
    """Nothing is fetched: a card that lies in the model's folder, or in the hub's cache, tells its licence."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    source = str(model.config.name_or_path or "")
    if source and os.path.isdir(source):
        card = Path(source) / CARD
        held = _metadata(card)
        if "ltepass" in _tags(held):  # saved before, by us: the folder is not what the model was made from
            hub_name = _word(held.base_model)
            return Base(name=hub_name or _said_base(card), hub_name=hub_name, license=_word(held.license))
        return Base(name=Path(source).resolve().name, license=_word(held.license))
    try:
        validate_repo_id(source)
    except HFValidationError:  # none, or a folder that is there no more
        return Base(name=os.path.basename(source) or None)
    cached = try_to_load_from_cache(source, CARD)
    held = _metadata(Path(cached) if isinstance(cached, str) else None)
    return Base(name=source, hub_name=source, license=_word(held.license))


def _said_base(card: Path) -> str | None:
    """The base model's name in the table of a card of ours."""
    said = re.search(r"^\| base model \| `(.+)` \|$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return said and said[1]


def _metadata(path: Path | None) -> ModelCardData:
    """Of somebody's card; empty where there is none, or none that can be read."""
    from huggingface_hub import ModelCard, ModelCardData

    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data if path is not None else ModelCardData()
    except Exception:  # whatever a file of others does to YAML's parser: no save fails for it
        return ModelCardData()


def _word(value: object) -> str | None:
    return one_line(value)[:LONGEST] if isinstance(value, str) else None


def _tags(data: ModelCardData) -> list[str]:
    return [tag for tag in data.tags if isinstance(tag, str)] if isinstance(data.tags, list) else []


def _what(model: PreTrainedModel, routed: Routed, base: str | None, license: str) -> list[str]:
    config = routed.config
    sizes = sorted({site.group_size for site in routed.sites})
    neurons = "single neurons" if sizes == [1] else f"groups of {', '.join(map(str, sizes))} neurons"
    each = "in each FFN" if config["budget"] == "layer" else "over all FFNs"
    rest = "keep the value that 4-bit weights give them" if routed.tiered else "are not computed"
    unknown = "unknown; the base model's holds"
    return [
        f"# {_code(base or type(model).__name__)} with LTE routers",
        "",
        f"Before each FFN of this {_code(type(model).__name__)} stands a router that chooses, for each token, which "
        f"neurons are active; the others {rest} "
        f"([Learn To be Efficient](https://arxiv.org/abs/{PAPER})). Made with ltepass {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {_code(base) if base else 'not known'} |",
        f"| licence | {unknown if license == UNKNOWN else _code(license)} |",
        f"| routers | {len(routed.sites)}, {config['router']}, of {neurons} |",
        f"| target | {config['target_sparsity']:.0%} of neurons inactive, {each} |",
    ]


def _how_to_load(model: PreTrainedModel) -> list[str]:
    auto = _auto_class(model)
    return [
        "## How to load",
        "",
        "Where ltepass is installed, transformers loads the routers too; elsewhere it warns and loads the dense model.",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("name or folder")',
        "",
        "import ltepass",
        "",
        "model = ltepass.lower(model)  # each FFN becomes one sparse op; only the active neurons are read",
        "```",
    ]


def _auto_class(model: PreTrainedModel) -> str:
    from transformers.models.auto import modeling_auto

    name = type(model).__name__
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM"
    encoder_decoder = name in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    return "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModel"


def _figures(measured: Measured | None) -> list[str]:
    lines = ["## Quality and speed", ""]
    if measured is None:
        return [*lines, "Not measured when this was saved."]
    speed = measured["tokens_per_s"]
    lines += [f"On {measured['held_out']} of held-out text.", ""]
    lines += ["| | dense, as it came | sparse, as saved | ratio |", "|---|---|---|---|"]
    lines += [_row("perplexity", measured["dense_perplexity"], measured["perplexity"], 3)]
    if measured["sparsity"]:
        lines += [
            f"| inactive neurons, min / mean / max of the FFNs | 0% | {span(list(measured['sparsity'].values()))} | |"
        ]
    if speed is not None:
        lines += [_row("tokens/s of decoding, eager", speed["dense"], speed["lowered"], 1)]
        lines += ["", f"Time was taken on {_code(measured.get('machine', 'a machine not named'))}."]
    if measured["dense_perplexity"] is not None:
        lines += ["", "Of perplexity the ratio holds what training gave beside what sparsity took."]
    return lines


def _row(what: str, dense: float | None, ours: float | None, digits: int) -> str:
    cells = ["not measured" if value is None else f"{value:.{digits}f}" for value in (dense, ours)]
    ratio = f"x{ours / dense:.3f}" if dense and ours else ""
    return f"| {what} | {cells[0]} | {cells[1]} | {ratio} |"


def _layers(routed: Routed, measured: Measured | None) -> list[str]:
    """expected: by the calibrated table, at the thresholds that were saved."""
    found = measured["sparsity"] if measured is not None else {}
    lines = ["## Sparsity of each layer", "", "| FFN | neurons | expected | measured |", "|---|---|---|---|"]
    for site, router in routed:
        below = router.quantiles <= router.threshold  # of points that stand at shares of 0 to 1
        calibrated = not router.quantiles.isnan().any()
        expected = f"{max(0, int(below.sum()) - 1) / (len(below) - 1):.0%}" if calibrated else "not calibrated"
        share = f"{found[site.name]:.1%}" if site.name in found else "not measured"
        lines.append(f"| {_code(site.name)} | {site.d_ff} | {expected} | {share} |")
    return lines


def _code(text: str) -> str:
    """A name of others, in which nothing is Markdown or HTML, nor ends a table's cell."""
    plain = one_line(text).replace("`", "'").replace("|", "¦").strip()
    return f"`{plain[:LONGEST] or '?'}`"


def is_saved_routed(model: object) -> bool:
    """Whether this very model's `save_pretrained` writes routers that load again."""
    quantiser = getattr(getattr(model, "config", None), "quantization_config", None)
    adapter_alone = getattr(model, "_hf_peft_config_loaded", False)
    return (
        isinstance(model, nn.Module)
        and state_of(model) is not None
        and hasattr(quantiser, "state")
        and not adapter_alone
    )


def write_cards() -> None:
    """From now on `save_pretrained` and `push_to_hub` of routed models write their card; of others they do as ever.

    On transformers' class, for copies and pickles of a routed model are routed too. Idempotent.
    """
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel.save_pretrained, "writes_card"):
        PreTrainedModel.save_pretrained = _with_card(PreTrainedModel.save_pretrained)
        PreTrainedModel._upload_modified_files = _with_card_uploaded(PreTrainedModel._upload_modified_files)


def _with_card(save: Callable[..., None]) -> Callable[..., None]:
    @wraps(save)
    def save_pretrained(
        self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: object, **kwargs: object
    ) -> None:
        save(self, save_directory, *args, **kwargs)
        writes = args[0] if args else kwargs.get("is_main_process", True)
        if writes and _is_first_process() and os.path.isdir(save_directory) and is_saved_routed(self):
            write_card(self, save_directory)

    save_pretrained.writes_card = True  # type: ignore[attr-defined]
    return save_pretrained


def _is_first_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _with_card_uploaded(upload: Callable[..., object]) -> Callable[..., object]:
    """A push puts the hub's own card into the folder, or an empty one where the hub has none, and uploads then."""

    @wraps(upload)
    def upload_modified_files(
        self: PreTrainedModel,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        *args: object,
        token: str | bool | None = None,
        **kwargs: object,
    ) -> object:
        path = Path(working_dir) / CARD
        if is_saved_routed(self) and (_is_ours(path) or not _on_hub(repo_id, token)):
            tags = _tags(_metadata(path))  # the call's
            path.unlink(missing_ok=True)
            write_card(self, working_dir, tags=tags)
        return upload(self, working_dir, repo_id, *args, token=token, **kwargs)

    return upload_modified_files


def _on_hub(repo_id: str, token: str | bool | None) -> bool:
    from huggingface_hub import HfApi

    return bool(HfApi().file_exists(repo_id, CARD, token=token))
