"""Soft, hard or dense: what the gates of a whole model do."""

from __future__ import annotations

from torch import nn

from ltepass.config import Mode, check_mode
from ltepass.routed import padding
from ltepass.routed.routed import Routed
from ltepass.routed.undo import verb
from ltepass.sparsity.thresholds import remember_densities


@verb
def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switch every router. Paper section 4.2.

    Arguments:
        model: a transformed model, not lowered.
        mode: "soft" and "hard" as the paper has them; "dense" leaves the gates open.
    Returns: None.
    Raises: ConfigError, NotTransformedError, LoweredError.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> set(ltepass.report(model).modes.values())
        {'hard'}
    """
    check_mode(mode)
    switch(Routed.trained(model, "set_mode"), mode)


def switch(routed: Routed, mode: Mode) -> None:
    """Every router to this mode."""
    for router in routed.all_routers():
        router.mode = mode
        router.recorder.calls.clear()
    if mode == "soft":
        padding.attach(routed)  # what a forward leaves for the losses begins anew with the next
    else:
        padding.detach(routed.model)
    remember_densities(routed)
