"""The entry that a checkpoint's config holds: a transformed model's sites and settings as JSON, written and read.

Reading trusts nothing: every field has its type and its syntax, none is missing, none is unknown. What it says about
the model is checked later, against the model (site_checks.py). Raises CheckpointError, and nothing else.

version 1: the rows of a site repeat the name of their parameter in `neurons`, `up_rows`, ...
version 2: each name stands once in `parameters`; `neurons` counts in that list, `up_rows`, ... count in `neurons`.
version 3: `config` says which kind of router there is.
version 4: `config` says what inactive neurons keep.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from ltepass.config import BUDGETS, INACTIVE, PROXY_SCALES, QUANTISERS, ROUTERS, SEEDS, LTEConfig
from ltepass.errors import CheckpointError, ConfigError, shown
from ltepass.grouping_methods import AUTO, GROUPINGS
from ltepass.routed.json_entry import ADVICE, LARGEST, Entry, Json
from ltepass.routed.site_json import VERSION, read_site, write_site
from ltepass.routed.sites import LTEState, Refusal
from ltepass.routed.tiered_router import why_no_tiers
from ltepass.version import __version__

METHOD = "lte"

_RELEASE = re.compile(r"[0-9A-Za-z.+_-]{1,40}")


def write_state(state: LTEState) -> dict[str, Json]:
    """What config.json holds of a transformed model."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "written_by": __version__,
        "config": dict(state.config),
        "grouping": state.grouping,
        "sites": [write_site(site) for site in state.sites],
        "refusals": [asdict(refusal) for refusal in state.refusals],
    }


def read_state(value: object) -> LTEState:
    """The state that an entry of config.json describes. Raises CheckpointError."""
    written = value if isinstance(value, dict) else {}
    version = written.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(_newer(written.get("written_by"), version))
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"the checkpoint's LTE entry has version {shown(version)}; this ltepass reads versions 1 to {VERSION}; "
            "load it with the ltepass that wrote it, or delete quantization_config to load it dense"
        )
    entry = Entry("quantization_config", value)
    state = LTEState(
        config=_read_config(entry.take("config"), version),
        grouping=entry.one_of("grouping", GROUPINGS),
        sites=[read_site(site, f"site {i}", version) for i, site in enumerate(entry.list("sites"))],
        refusals=[_read_refusal(r, f"refusal {i}") for i, r in enumerate(entry.list("refusals"))],
    )
    if not state.sites:
        entry.wrong("sites", "at least one site")
    if state.config["inactive"] == "low_bit" and any(map(why_no_tiers, state.sites)):
        entry.wrong("sites", "none that cannot keep low bits")
    if entry.text("quant_method", default=METHOD) != METHOD:
        entry.wrong("quant_method", METHOD)
    entry.text("written_by", default="")
    entry.end("version")
    return state


def _newer(release: object, version: int) -> str:
    known = isinstance(release, str) and _RELEASE.fullmatch(release) is not None
    writer, needed = (f"ltepass {release}", f"ltepass {release} or newer") if known else ("a newer one",) * 2
    return (
        f"the checkpoint's LTE entry has version {shown(version)} and was written by {writer}; this is ltepass "
        f"{__version__}, which reads versions 1 to {VERSION}; install {needed}, or delete quantization_config to load "
        "it dense"
    )


def _read_refusal(value: object, where: str) -> Refusal:
    entry = Entry(where, value)
    refusal = Refusal(
        **{f.name: entry.text(f.name) for f in fields(Refusal) if f.name != "nearest"},
        nearest=entry.text("nearest", default=""),
    )
    entry.end()
    return refusal


def _read_config(value: object, version: int) -> dict[str, Any]:
    entry = Entry("config", value)
    for f in fields(LTEConfig):
        later = f.name in _LATER and version < _LATER[f.name]
        setting = entry.take(f.name, f.default if later else ...)
        if not _CONFIG[f.name](setting):
            entry.wrong(f.name, f"what LTEConfig takes as {f.name}")
    entry.end()
    try:
        return LTEConfig(**entry.seen).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"config: {error}; {ADVICE}") from error


# Settings that came later, and the first version that always has them.
_LATER = {
    "budget": 2,
    "hidden_sparsity": 2,
    "input_sparsity": 2,
    "router": 3,
    "proxy_scales": 3,
    "inactive": 4,
    "low_bit_sparsity": 4,
    "low_bit_quantiser": 4,
}


def _number(value: object) -> bool:
    return type(value) in (int, float)


_CONFIG: dict[str, Callable[[object], bool]] = {
    "group_size": lambda v: v == "auto" or (type(v) is int and v < LARGEST),
    "target_sparsity": _number,
    "grouping": lambda v: isinstance(v, str) and v in (AUTO, *GROUPINGS),
    "budget": lambda v: isinstance(v, str) and v in BUDGETS,
    "hidden_sparsity": _number,
    "input_sparsity": _number,
    "router": lambda v: isinstance(v, str) and v in ROUTERS,
    "proxy_scales": lambda v: isinstance(v, str) and v in PROXY_SCALES,
    "inactive": lambda v: isinstance(v, str) and v in INACTIVE,
    "low_bit_sparsity": _number,
    "low_bit_quantiser": lambda v: isinstance(v, str) and v in QUANTISERS,
    "router_bias": lambda v: type(v) is bool,
    "tau": _number,
    "seed": lambda v: type(v) is int and v in SEEDS,
}
