"""calibrate: from a few batches of text, neurons in groups, routers at the target, and the sparsity table.

Part of a dense pass samples tokens to group neurons by; how routers are fitted, `initialise.py` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from torch import nn

from ltepass.calibration.initialise import Inputs, initialise_routers
from ltepass.errors import ConfigError
from ltepass.passes.group.group_neurons import group_by
from ltepass.routed.offloaded import require_weights
from ltepass.routed.routed import Routed, require_whole
from ltepass.routed.undo import verb
from ltepass.sparsity.cuts import place_cuts


@verb
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, grouping: str | None = None, inputs: Inputs = "dense"
) -> None:
    """Group neurons, start routers for the config's target and fill the sparsity table, without training.

    Arguments:
        model: a transformed model, not lowered.
        batches: mappings of model inputs (what a tokenizer or a data collator gives), or token id tensors; padding is
            not seen. A few thousand tokens are enough, and more make better routers (`examples/compare/ablations.py
            --only start` measures what they are worth).
        grouping: a method of `LTEConfig.grouping`; None takes the config's ("auto" is output_aware here). Groups that
            an earlier calibration made by this method stay, as do all for "identity".
        inputs: what routers are fitted to: "dense", what the dense model gives its FFNs, before any training or
            `warm_start`; "hard", what they see once experts are left out (under the present cuts, if any), for a model
            that is used as it is. It passes over the batches 1.6 times from eight batches of 512 tokens on, and up to
            five times with fewer, where "dense" does once. Learned routers are replaced by either. To quantise for
            `inactive="low_bit"` takes six passes more, and a model whose sums over inputs are larger than 0.6 GB (4
            d_model^2 bytes an FFN) a pass for each 0.6 GB. FFNs whose weights a device_map left on disk keep the order
            of their neurons, with a warning.
    Returns: None; mode, training flags, RNG and hooks are as they were.
    Raises: NotTransformedError, LoweredError, ShardedError, ConfigError, MetaWeightsError, CalibrationError (no tokens
        seen).
    Example:
        >>> model = ltepass.transform(dense)
        >>> ltepass.calibrate(model, batches)
        >>> ltepass.set_sparsity(model, 0.7)
    """
    routed = Routed.trained(model, "calibrate")
    require_whole(model, "calibrate")
    routed.require_floats("calibrate")
    if inputs not in get_args(Inputs):
        raise ConfigError(f"inputs is {inputs!r}; expected one of {', '.join(get_args(Inputs))}; see calibrate's docs")
    biased = all(router.bias is not None for router in routed.routers)
    if routed.config["budget"] == "model" and not biased:
        raise ConfigError('budget "model" puts what an FFN matters into its router\'s bias; expected router_bias=True')
    require_weights(model, "calibration")
    batches = list(batches)
    group_by(routed, batches, grouping)
    initialise_routers(routed, batches, inputs)
    place_cuts(routed, batches)
