"""The sites of a checkpoint as the model has them that is being loaded, compared with it and with the weight files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ltepass.passes.find.owner import as_gated_now
from ltepass.routed.sites import FFNSite, LTEState
from ltepass.saving.forward_checks import check_forwards
from ltepass.saving.site_checks import check_sites
from ltepass.saving.tensor_checks import ROUTER, Header, check_present, check_routers, check_weights, has_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checked_sites(model: PreTrainedModel, state: LTEState, header: Header | None) -> list[FFNSite]:
    """The state's sites as this model has them, compared with it and with the files; none where those hold no router.

    header: of all weight files; None where the weights come from elsewhere. Raises CheckpointError; changes nothing.
    """
    sites = _fit_prefix(model, state.sites)
    if header is None:
        check_sites(model, sites)
    elif not has_routers(state.sites, header):
        return []
    else:
        named, converted = _as_loaded(model, sites, header)
        check_routers(sites, state.config, named)
        check_sites(model, sites)
        check_weights(model, named)
        if not converted:
            check_present(model, sites, named)
    sites = as_gated_now(model, sites)
    check_forwards(model, sites)
    return sites


def _as_loaded(model: PreTrainedModel, sites: list[FFNSite], header: Header) -> tuple[Header, bool]:
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


def _fit_prefix(model: nn.Module, sites: list[FFNSite]) -> list[FFNSite]:
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
