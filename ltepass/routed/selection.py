"""Which sites a user wants gated, and what may differ from site to site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ltepass.errors import ConfigError
from ltepass.routed.sites import FFNSite, Refusal

# A pattern such as "model.layers.*.mlp", several of them, or a function of the site.
Which = str | Sequence[str] | Callable[[FFNSite], bool]
PER_SITE = ("group_size",)  # all that a site keeps of its settings; what else there is holds for the whole model
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Of `ltepass.transform`. Patterns are matched with a site's name and its owner's path, letter for letter."""

    only: Which | None = None
    skip: Which | None = None
    per_site: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for pattern, settings in (self.per_site or {}).items():
            unknown = [name for name in settings if name not in PER_SITE]
            if unknown:
                raise ConfigError(
                    f"per_site[{pattern!r}] has {unknown[0]!r}; expected {' or '.join(PER_SITE)}, which may differ "
                    "from site to site; give the others in LTEConfig, for the whole model"
                )
            size = settings.get("group_size")
            if "group_size" in settings and size != "auto" and (type(size) is not int or size < 1):
                raise ConfigError(
                    f'per_site[{pattern!r}]: group_size is {size!r}; expected "auto" or an integer of at least 1'
                )

    def split(self, sites: Sequence[FFNSite]) -> tuple[list[FFNSite], list[Refusal]]:
        """The sites to gate, and a refusal for each that is left out. Raises ConfigError where none is left."""
        chosen = list(sites) if self.only is None else _matched("only", self.only, sites)
        skipped = _matched("skip", self.skip, sites)
        kept = [s for s in chosen if s not in skipped]
        if sites and not kept:
            raise ConfigError(
                f"only and skip leave out all {len(sites)} FFN sites; expected one at least; {_names(sites)}"
            )
        why = {s: "skip names it" if s in skipped else "only does not name it" for s in sites if s not in kept}
        refused = [
            Refusal(module=s.owner, node="", check="left out", reason=reason, nearest=s.down)
            for s, reason in why.items()
        ]
        return kept, refused

    def group_size(self, site: FFNSite, default: int | str, sites: Sequence[FFNSite]) -> int | str:
        """The size that per_site gives a site. Raises ConfigError where two patterns give it two sizes."""
        sizes = {
            pattern: settings["group_size"]
            for pattern, settings in (self.per_site or {}).items()
            if "group_size" in settings and site in _matched("per_site", pattern, sites)
        }
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"per_site gives {site.name} {' and '.join(f'{v!r} by {p!r}' for p, v in sizes.items())}; expected one "
                "size a site; make the patterns narrower"
            )
        return next(iter(sizes.values()), default)


def _matched(argument: str, which: Which | None, sites: Sequence[FFNSite]) -> list[FFNSite]:
    if which is None:
        return []
    if callable(which):
        return [s for s in sites if which(s)]
    patterns = [which] if isinstance(which, str) else list(which)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(
                f"{argument} holds {pattern!r}; expected names or patterns of sites, or a function of a site; "
                f"{_names(sites)}"
            )
        if not any(_names_it(pattern, s) for s in sites):
            raise ConfigError(f"{argument} names {pattern!r}, which no FFN site has; {_names(sites)}")
    return [s for s in sites if any(_names_it(pattern, s) for pattern in patterns)]


def _names_it(pattern: str, site: FFNSite) -> bool:
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.owner, pattern)


def _names(sites: Iterable[FFNSite]) -> str:
    names = [s.name for s in sites]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"the sites are {', '.join(names[:SHOWN])}{more}; see ltepass.report, or `ltepass inspect`"
