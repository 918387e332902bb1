"""How many neurons make an expert of a site, where d_ff allows it."""

from __future__ import annotations

from dataclasses import replace

from ltepass.errors import GroupSizeError
from ltepass.routed.sites import FFNSite

TARGET_GROUP = 32  # the paper's group size


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def auto_group_size(d_ff: int) -> int:
    """The divisor of d_ff nearest to 32 (in ratio), the larger one of two."""
    return nearest_divisors(d_ff, TARGET_GROUP)[0]


def nearest_divisors(n: int, size: int) -> list[int]:
    """Divisors of n, the nearest to `size` (in ratio) first, of two equally near the larger."""
    return sorted(divisors(n), key=lambda d: (max(d, size) / min(d, size), -d))


def with_group_size(site: FFNSite, group_size: int | str, *, alone: bool) -> FFNSite:
    """alone: what is left to us is single neurons."""
    if isinstance(group_size, str):
        group_size = 1 if alone else auto_group_size(site.d_ff)
    return replace(site, group_size=group_size)


def check_group_size(sites: list[FFNSite], group_size: int | str) -> None:
    """Raises GroupSizeError for a size that does not divide a site's d_ff."""
    if isinstance(group_size, str):
        return
    bad = [s for s in sites if s.d_ff % group_size]
    if bad:
        near = {s.d_ff: nearest_divisors(s.d_ff, group_size)[:3] for s in bad}
        raise GroupSizeError(
            f"group_size {group_size} does not divide d_ff at {', '.join(f'{s.name} ({s.d_ff})' for s in bad)}; "
            f'expected a divisor; nearest: {"; ".join(f"{f}: {sorted(ds)}" for f, ds in near.items())}; or pass "auto"'
        )
