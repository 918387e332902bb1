"""The names of a checkpoint as the class has them that is being loaded: of sites, and of the tensors in its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ltepass.routed.sites import FFNSite
from ltepass.saving.tensor_checks import ROUTER, Header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_prefix(model: nn.Module, sites: list[FFNSite]) -> list[FFNSite]:
    """Paths as this class has them: `AutoModel` drops the head, and with it the prefix that the causal LM puts before.

    The list comes back as it was where no prefix fits; `check_sites` then says what is missing.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    renames: tuple[Callable[[str], str], ...] = (
        str,
        lambda path: "" if path == prefix else path.removeprefix(prefix + "."),
        lambda path: f"{prefix}.{path}" if path else prefix,
    )
    for rename in renames if prefix else (str,):
        if all(rename(site.down) in names for site in sites):
            return [site.renamed(rename) for site in sites]
    return sites


def as_loaded(model: PreTrainedModel, sites: list[FFNSite], header: Header) -> tuple[Header, bool]:
    """The header by the names under which transformers will load it, and whether it converts some of the weights.

    Its classes may have other names in their files: another prefix, `ffn` for `mlp`, experts one by one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if not isinstance(rule, WeightRenaming)]
    known = {**model.state_dict(), **{f"{site.router}.{name}": True for site in sites for name in ROUTER}}
    named: Header = {}
    for key in sorted(header, key=dot_natural_key):
        name, rule = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, rule = key, None
        if rule is None:
            named[name] = header[key]
    return named, len(named) < len(header)
