"""Which sites a user wants gated, and what may differ from site to site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ltepass.errors import ConfigError
from ltepass.routed.sites import FFNSite, Refusal

# A pattern such as "model.layers.*.mlp", several of them, or a function of the site.
Which = str | Sequence[str] | Callable[[FFNSite], bool]
Match = Literal["ffn", "mlp"]  # "mlp": also what is not as wide where it ends as where it begins
MATCHES: tuple[Match, ...] = ("ffn", "mlp")
PER_SITE = ("group_size",)  # all that a site keeps of its settings; what else there is holds for the whole model
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Of `ltepass.transform`. Patterns are matched with a site's name and its owner's path, letter for letter."""

    only: Which | None = None
    skip: Which | None = None
    per_site: Mapping[str, Mapping[str, int | str]] | None = None
    match: Match = "ffn"

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise ConfigError(f"match is {self.match!r}; expected one of {', '.join(MATCHES)}; pass one of these")
        for argument in ("only", "skip"):
            _check_which(argument, getattr(self, argument))
        if not isinstance(self.per_site or {}, Mapping):
            raise ConfigError(f"per_site is {self.per_site!r}; {_EXPECTED}")
        for pattern, settings in (self.per_site or {}).items():
            if not isinstance(pattern, str) or not isinstance(settings, Mapping) or not settings:
                raise ConfigError(f"per_site holds {pattern!r}: {settings!r}; {_EXPECTED}")
            unknown = [name for name in settings if name not in PER_SITE]
            if unknown:
                raise ConfigError(
                    f"per_site[{pattern!r}] has {unknown[0]!r}; expected {' or '.join(PER_SITE)}, which may differ "
                    "from site to site; give the others in LTEConfig, for the whole model"
                )
            size = settings["group_size"]
            if size != "auto" and (type(size) is not int or size < 1):
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
        for left in (s for s in sites if s not in kept):
            same = next((s for s in kept if s.neurons == left.neurons), None)
            if same is not None:  # training or a warm start here would change the weights that run dense there
                raise ConfigError(
                    f"only and skip leave out {left.name} and keep {same.name}, which shares its weights; expected "
                    "both or neither; name both"
                )
        why = {s: "skip names it" if s in skipped else "only does not name it" for s in sites if s not in kept}
        refused = [
            Refusal(module=s.owner, node="", check="left out", reason=reason, nearest=s.down)
            for s, reason in why.items()
        ]
        return kept, refused

    def group_sizes(self, sites: Sequence[FFNSite], default: int | str) -> dict[FFNSite, int | str]:
        """By site: the group size that per_site gives it. Raises ConfigError where that is two sizes, or none's."""
        given: dict[FFNSite, dict[int | str, str]] = {s: {} for s in sites}
        for pattern, settings in (self.per_site or {}).items():
            for site in _matched("per_site", pattern, sites):
                given[site].setdefault(settings["group_size"], pattern)
        for site, sizes in given.items():
            if len(sizes) > 1:
                raise ConfigError(
                    f"per_site gives {site.name} {' and '.join(f'{v!r} by {p!r}' for v, p in sizes.items())}; expected "
                    "one size a site; make the patterns narrower"
                )
        found = {site: next(iter(sizes), default) for site, sizes in given.items()}
        for site, size in found.items():
            same = next(s for s in sites if s.neurons == site.neurons)
            if found[same] != size:  # an order of the neurons makes groups of one size
                raise ConfigError(
                    f"per_site makes groups of {found[same]!r} at {same.name} and of {size!r} at {site.name}, which "
                    "shares its weights; expected one size for both; name both"
                )
        return found


_EXPECTED = 'expected a mapping such as {"model.layers.0.mlp": {"group_size": 16}}'


def _check_which(argument: str, which: object) -> None:
    if which is None or isinstance(which, str) or callable(which):
        return
    wrong = which if not isinstance(which, Sequence) else next((p for p in which if not isinstance(p, str)), None)
    if wrong is not None:
        raise ConfigError(
            f"{argument} holds {wrong!r}; expected a name or pattern of sites, a list of these, or a function of a site"
        )


def _asked(argument: str, which: Callable[[FFNSite], bool], site: FFNSite) -> bool:
    answer = which(site)
    if not isinstance(answer, bool):  # a function that forgets its return would silently choose nothing
        raise ConfigError(f"{argument} answers {answer!r} for {site.name}; expected True or False; return one")
    return answer


def _matched(argument: str, which: Which | None, sites: Sequence[FFNSite]) -> list[FFNSite]:
    if which is None:
        return []
    if callable(which):
        return [s for s in sites if _asked(argument, which, s)]
    patterns = [which] if isinstance(which, str) else list(which)
    for pattern in patterns:
        if not any(_names_it(pattern, s) for s in sites):
            raise ConfigError(f"{argument} names {pattern!r}, which no FFN site has; {_names(sites)}")
    return [s for s in sites if any(_names_it(pattern, s) for pattern in patterns)]


def _names_it(pattern: str, site: FFNSite) -> bool:
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.owner, pattern)


def _names(sites: Iterable[FFNSite]) -> str:
    names = [s.name for s in sites]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"the sites are {', '.join(names[:SHOWN])}{more}; see ltepass.report, or `ltepass inspect`"
