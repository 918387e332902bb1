"""The committed list: why each thing that the census does not find is left alone.

A sentence that begins with PARTS says that the named linear is no FFN's in spite of its name; others admit a dense FFN
that is not gated, and count against the coverage.
"""

from __future__ import annotations

PARTS = "No FFN:"

NO_DENSE_FFN = "every FFN is a stack of experts, or a state-space layer stands in its place"

# Architectures that transformers itself does not build or run from a default config on this machine.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm library, which is not a dependency",
    "gemma4_assistant": "a drafter that runs on another model's key-value states; it has no forward from token ids",
    "gemma4_unified_assistant": "a drafter that runs on another model's key-value states; no forward from token ids",
}

# Linears with an FFN's name that are no site: {architecture: {part of the path: sentence}}.
UNFOUND: dict[str, dict[str, str]] = {
    "axk2": {
        "input_layernorm.mlp.fc2": f"{PARTS} the MLP is a norm's gate of low rank, its output goes into a sigmoid."
    },
    "bitnet": {
        "mlp.down_proj": "A norm over all hidden units stands before the down projection: each unit depends on the "
        "others, and a gate does not commute with it."
    },
    "gemma3n_text": {
        "layers.0.mlp.down_proj": "The layer keeps the hidden units above a cutoff that is made of their mean and "
        "deviation (it is sparse by design): each unit depends on the others, and a gate does not commute with it."
    },
    "SegFormer": {
        "mlp.fc2": "A convolution over tokens stands between the linears: a hidden unit depends on its neighbours' "
        "tokens, so no router of one token sees all that it is made of."
    },
    "zamba2": {
        "feed_forward.down_proj": "Each call adds another adapter of low rank to the shared up projection: a neuron is "
        "made of two matrices that read different inputs, and its order would tie every layer's adapter."
    },
    "zaya": {"mlp.gate.": f"{PARTS} it belongs to the deep MLP that is the model's own router of experts."},
}

# Sites whose gates do not show in the output of the tiny model, so that its comparisons say little.
INVISIBLE: dict[str, str] = {}

# What each check of the finder refuses, and why that is right.
CHECKS: dict[str, str] = {
    "capture": "no graph shows these linears: the module is not reached by the inputs, and cannot be traced alone",
    "up": "no linear feeds this one through elementwise operations",
    "activation": "two linears with nothing nonlinear between them are one linear of low rank",
    "one source": "gate and up projection read different tensors, so no router sees all that a neuron depends on",
    "elementwise": "an operation between the linears makes a hidden unit depend on more than its own neuron and token",
    "norm": "a statistic over the hidden units makes each depend on the others, so switching one off changes the rest",
    "size": "too many operations lie between the linears for this to be an activation",
    "private": "something else reads the hidden units, so their order and values are not free",
    "index": "it cannot be followed which row of which parameter makes which neuron",
    "strided rows": "a neuron's rows are no strided slice of the up weight",
    "same token": "the output for a token depends on other tokens: not `token in, same token out`",
    "residual width": "the output is not as wide as the input: a head or an adapter",
    "output": "the output goes into a squashing function: a gate, or a deeper MLP",
    "bias": "the bias is computed and no parameter",
    "tied": "another part of the model reads the same parameter",
    "owner": "there is no linear module to gate around",
    "experts": "the model's own router picks from this stack already, and the sparse op takes one matrix and no stack",
}
