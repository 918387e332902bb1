"""What `ltepass train` learns from: rows of a file or a data set, as blocks of token ids.

    text                    rows after one another, cut into blocks; every token is learned
    prompt, completion      a row a block, padded; the completion is learned
    messages                likewise, by the tokenizer's chat template; every token is learned

These are the rows that TRL's trainers take, in the same columns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.commands.hub import look_for_hub
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError, first_line, shown
from ltepass.routed.token_masks import IGNORED
from ltepass.whole_file import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, object]
Columns = dict[str, Tensor]  # input_ids and labels [n, T] int64; attention_mask [n, T] where rows are padded
Example = tuple[list[int], int]  # token ids, and how many of them are given, not learned
KINDS = (("text",), ("prompt", "completion"), ("messages",))
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILES = (".txt", ".json", ".jsonl", ".ndjson", ".parquet")
NEEDS = "pip install 'ltepass[data]'"


def read_rows(source: str, split: str = "train") -> list[Row]:
    """Rows of a text file (one), of JSON lines, a parquet file, or a data set: a folder, or a name of the hub.

    Raises ConfigError where it cannot be read, and where the rows are not all of one kind of KINDS.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], list[Row]]] = {".parquet": _parquet}
    readers |= dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_lines)
    if path.is_dir() or not (path.exists() or path.suffix.lower() in FILES or not HUB_NAME.fullmatch(source)):
        rows = _data_set(source, split)
    elif path.suffix.lower() in readers:
        rows = readers[path.suffix.lower()](path)
    else:
        rows = [{"text": text_of(path)}]
    if not rows:
        raise ConfigError(f"{source} has no rows; expected some")
    _kind(source, rows)
    return rows


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is no JSON ({error}); expected an object a line") from error
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} of {path} is {shown(row)}; expected an object a line")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"a parquet file needs pyarrow ({error}); {NEEDS}") from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {first_line(error)}") from error
    return rows


def _data_set(source: str, split: str) -> list[Row]:
    """A folder that `save_to_disk` wrote, one of data files, or a name of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"a data set needs the library datasets ({error}); {NEEDS}") from error
    if not Path(source).exists():
        look_for_hub()
    saved = [(Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")]
    try:
        found = datasets.load_from_disk(source) if any(saved) else datasets.load_dataset(source)
        part = found[split] if isinstance(found, dict) else found
    except KeyError as error:
        raise ConfigError(f"{source} has no split {split!r}; expected one of {', '.join(found)}") from error
    except Exception as error:  # of the library, of Arrow, of the network: it promises no classes
        raise ConfigError(
            f"{source!r} is no data set that can be read or reached: {first_line(error)}; expected a file, a "
            "folder or a name of the hub"
        ) from error
    return list(part)


def _kind(source: str, rows: list[Row]) -> tuple[str, ...]:
    kind = next((kind for kind in KINDS if set(kind) <= rows[0].keys()), None)
    if kind is None:
        raise ConfigError(
            f"{source} has the columns {', '.join(rows[0])}; expected text, or prompt and completion, or messages"
        )
    for number, row in enumerate(rows, 1):
        if odd := [name for name in kind if not isinstance(row.get(name), str if name == "text" else (str, list))]:
            raise ConfigError(f"{odd[0]} of row {number} of {source} is {shown(row.get(odd[0]))}; expected text")
    return kind


def tokenised(rows: list[Row], tokenizer: PreTrainedTokenizerBase, length: int) -> Columns:
    """Blocks of `length` tokens; a row that is longer is cut, and one of which nothing would be learned left out."""
    if "text" in rows[0]:
        # the mark of a text's end, as in pretraining
        text = (tokenizer.eos_token or "\n\n").join(str(row["text"]) for row in rows)
        blocks = token_blocks(tokenizer, text, length)
        return {"input_ids": blocks, "labels": blocks}
    examples = _chat_examples if "messages" in rows[0] else _completions
    kept = [(ids[:length], given) for ids, given in examples(rows, tokenizer) if given < min(len(ids), length)]
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    columns = {
        "input_ids": [ids + [padding] * (length - len(ids)) for ids, _ in kept],
        "labels": [[IGNORED] * given + ids[given:] + [IGNORED] * (length - len(ids)) for ids, given in kept],
        "attention_mask": [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in kept],
    }
    return {name: torch.tensor(values, dtype=torch.int64).view(-1, length) for name, values in columns.items()}


def _completions(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    for row in rows:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            given = len(_templated(tokenizer, prompt, add_generation_prompt=True))
            yield _templated(tokenizer, prompt + completion), given
        elif isinstance(prompt, str) and isinstance(completion, str):
            given_ids = list(tokenizer(prompt)["input_ids"])
            ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            yield given_ids + ids + end, len(given_ids)
        else:
            raise ConfigError("a row has a prompt and a completion of two kinds; expected two texts or two lists")


def _chat_examples(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    for row in rows:
        yield _templated(tokenizer, row["messages"]), 0


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: object, *, add_generation_prompt: bool = False
) -> list[int]:
    if tokenizer.chat_template is None:
        raise ConfigError("the model's tokenizer has no chat template; expected rows of text, or prompt and completion")
    try:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        )
    except Exception as error:  # whatever a template raises
        raise ConfigError(f"the chat template refuses {shown(messages)}: {error}") from error


def digest(columns: Mapping[str, Tensor]) -> str:
    """Of all numbers of a training's data."""
    found = hashlib.sha256()
    for name, tensor in sorted(columns.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]
