"""Whether a tensor is still what something was made of."""

from __future__ import annotations

from torch import Tensor


class Source:
    """A weight as it was when something was made of it. A copy or a pickle of the model takes its own for unchanged."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.seen = _state(weight)

    def is_still(self, weight: Tensor | None) -> bool:
        """Whether this is the weight, and nobody wrote to it since. What is written through `.data` is not seen."""
        return weight is self.weight and _state(self.weight) == self.seen

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.__init__(state["weight"])  # type: ignore[misc]  # versions are counted anew


def _state(weight: Tensor) -> tuple[object, ...]:
    return weight.dtype, weight.device, 0 if weight.is_inference() else weight._version
