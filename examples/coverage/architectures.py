"""Every architecture of the census, by name."""

from __future__ import annotations

from collections.abc import Callable

from examples.coverage.examine import Example


def entries() -> dict[str, Callable[[], Example]]:
    """Every architecture by name: transformers' causal LMs, then the other families."""
    from functools import partial

    from examples.coverage.zoo import causal_lm, causal_lms
    from examples.coverage.zoo_families import FAMILIES

    return {**{name: partial(causal_lm, name) for name in causal_lms()}, **FAMILIES}
