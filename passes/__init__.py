"""The passes, and the one place that says in which order they run."""

from __future__ import annotations

from ltepass.passes.capture.capture_graphs import CaptureGraphs
from ltepass.passes.find.find_ffn import FindFFN
from ltepass.passes.graph.pipeline import GraphJob, Pass, TransformJob
from ltepass.passes.group.group_neurons import GroupNeurons
from ltepass.passes.insert.insert_routers import InsertRouters
from ltepass.passes.lower.compile_backend import BACKEND as BACKEND
from ltepass.passes.lower.lay_out_neurons import LayOutNeurons
from ltepass.passes.lower.lower_linears import LowerLinears
from ltepass.passes.lower.lower_routed_ffn import LowerRoutedFFN
from ltepass.passes.lower.lower_tiers import LowerTiers
from ltepass.passes.lower.merge_linears import MergeLinears
from ltepass.passes.lower.pack_tiers import PackTiers
from ltepass.passes.lower.quantise_linears import QuantiseLinears
from ltepass.passes.lower.quantise_routed_ffn import QuantiseRoutedFFN
from ltepass.passes.lower.shortlist_head import ShortlistHead

# What `ltepass.transform` runs. The last two change the model; all checks come before.
TRANSFORM: tuple[Pass[TransformJob], ...] = (
    CaptureGraphs(),
    FindFFN(),
    GroupNeurons(),
    InsertRouters(),
)

# What `ltepass.export` does to a captured step, whose weights are its own.
EXPORT: tuple[Pass[GraphJob], ...] = (
    LowerRoutedFFN(),
    LowerTiers(),
    PackTiers(),
    QuantiseRoutedFFN(),
    LayOutNeurons(),
    MergeLinears(),
    QuantiseLinears(),
    ShortlistHead(),
    LowerLinears(),
)
