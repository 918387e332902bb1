"""Every error a user can meet. A class names the mistake; its text says what was seen, expected, and what to do."""

from __future__ import annotations


class LTEError(ValueError):
    """Base of all errors that ltepass raises for something the user can put right."""


class NoFFNFoundError(LTEError):
    """No FFN site was found in the model; the text lists the refusals."""


class AlreadyTransformedError(LTEError):
    """The model holds routers already."""


class NotTransformedError(LTEError):
    """The model holds no routers, and the call needs them."""


class AmbiguousModelError(LTEError):
    """Several transformed models stand inside the module given, and the call needs one."""


class GroupSizeError(LTEError):
    """An explicit group size does not divide a site's d_ff."""


class ConfigError(LTEError):
    """A configuration value is outside what it may be."""


class CaptureError(LTEError):
    """The model could not be captured as a graph with the example inputs given."""


class MetaWeightsError(LTEError):
    """Real weights are needed, and the model is on the meta device."""


class CalibrationError(LTEError):
    """A calibrated table is missing or cannot be made."""


class DisplacedHookError(LTEError):
    """A gate's hook was displaced: the forward would be silently wrong."""


class SourceNameError(LTEError):
    """A name cannot be written into the source of a generated forward."""


class ConcurrencyError(LTEError):
    """A forward met a call of another thread that has the model to itself for a time."""


class ExportError(LTEError):
    """A model cannot become a package that decodes, or a folder holds none that this machine can run."""


class GateError(LTEError):
    """A gate that was just inserted does not act, or changes what the dense model computes."""


class ShardedError(LTEError):
    """A gate was handed a part of its FFN's hidden units: the rest is on another device."""


class LoweredError(LTEError):
    """The call is not possible on a lowered model; `ltepass.unlower` makes it possible."""


class LoweringError(LTEError):
    """The model cannot be lowered in its present state."""


class TrainingError(LTEError):
    """The training set-up would give wrong gradients, or training has diverged."""


class PruningError(LTEError):
    """Nothing can be pruned as asked, or what would be left does not run."""


class CheckpointError(LTEError):
    """A checkpoint is corrupt or was not written by ltepass."""


class CacheError(LTEError):
    """The cache folder is missing, not ours, or holds what is not ours."""


def one_line(text: str) -> str:
    """Without line breaks, terminal escapes and the like: text from a checkpoint is shown to users."""
    return "".join(c if c.isprintable() else " " for c in text)


def first_line(error: BaseException) -> str:
    """What an error of others says, for a message of ours."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


def shown(value: object, limit: int = 60) -> str:
    """The repr of something foreign, for a message: unprintable characters escaped, cut short."""
    try:
        text = one_line(ascii(value))
    except (RecursionError, ValueError):  # nested without end, or an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
