"""Old names of modules: what was pickled by an earlier version holds them, and still loads.

One row a module, old to new. Nothing of ours imports by an old name.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

MOVED = {
    "ltepass.kernels.routed_int8_reference": "ltepass.kernels.routed_codes_reference",
    "ltepass.routed.int8_ffn": "ltepass.routed.coded_ffn",
    "ltepass.kernels.backward": "ltepass.kernels.routed_ffn_backward",
    "ltepass.exporting.decoder": "ltepass.exporting.run_exported",
    "ltepass.exporting.generation": "ltepass.exporting.run_exported",
    "ltepass.routed.watching": "ltepass.routed.observers",
    "ltepass.passes.capture.replaced_forwards": "ltepass.passes.capture.guard_replaced_forwards",
    "ltepass.commands.trained": "ltepass.commands.training_run",
    "ltepass.cli.options": "ltepass.cli.output_and_errors",
    "ltepass.passes.capture.export_module": "ltepass.passes.capture.capture_graphs",
    "ltepass.kernels.linear_checks": "ltepass.kernels.linear",
    "ltepass.passes.lower.compile_model": "ltepass.passes.lower.compile_backend",
    "ltepass.routed.token_hooks": "ltepass.routed.token_masks",
    "ltepass.routed.sharding": "ltepass.routed.routed",
    "ltepass.routed.model_parts": "ltepass.routed.batches",
    "ltepass.exporting.ops_library": "ltepass.exporting.export_model",
    "ltepass.exporting.bytes_read": "ltepass.exporting.folder",
    "ltepass.measure.repetition": "ltepass.measure.quality",
    "ltepass.measure.paired": "ltepass.measure.quality",
    "ltepass.measure.decoding_speed": "ltepass.measure.timing",
    "ltepass.demo.on_text": "ltepass.demo.stages",
    "ltepass.calibration.proxy_scale": "ltepass.calibration.initialise",
    "ltepass.routed.logits": "ltepass.routed.samples",
    "ltepass.passes.find.site_names": "ltepass.passes.find.find_ffn",
    "ltepass.energy": "ltepass.calibration.energy",
    "ltepass.ridge": "ltepass.calibration.ridge",
    "ltepass.sensitivity": "ltepass.calibration.sensitivity",
    "ltepass.training.warm_start": "ltepass.calibration.refit_down",
    "ltepass.models": "ltepass.commands.train",
    "ltepass.commands.models": "ltepass.commands.train",
    "ltepass.demo.plots": "ltepass.pages.plots",
    "ltepass.plots": "ltepass.pages.plots",
    "ltepass.smollm": "ltepass.demo.smollm",
    "ltepass.ops": "ltepass.kernels.routed_ffn",
    "ltepass.kernels.routed_ffn_cpu": "ltepass.kernels.cpu.build",
    "ltepass.kernels.routed_ffn_triton": "ltepass.kernels.gpu.launch",
    "ltepass.kernels.traceable": "ltepass.kernels.dispatch",
    "ltepass.kernels.triton_batch": "ltepass.kernels.gpu.batch",
    "ltepass.kernels.triton_call": "ltepass.kernels.gpu.call",
    "ltepass.kernels.triton_common": "ltepass.kernels.gpu.plan",
    "ltepass.kernels.triton_decode": "ltepass.kernels.gpu.decode",
    "ltepass.kernels.triton_prefill": "ltepass.kernels.gpu.prefill",
    "ltepass.kernels.tuning": "ltepass.kernels.gpu.tuning",
    "ltepass.evaluation": "ltepass.measure.quality",
    "ltepass.capture": "ltepass.passes.capture.capture_graphs",
    "ltepass.capture_parts": "ltepass.passes.capture.capture_graphs",
    "ltepass.example_inputs": "ltepass.passes.capture.example_inputs",
    "ltepass.passes.capture_graphs": "ltepass.passes.capture.capture_graphs",
    "ltepass.passes.normalize": "ltepass.passes.capture.user_graph",
    "ltepass.experts": "ltepass.passes.find.moe_stacks",
    "ltepass.identify": "ltepass.passes.find.identify_activation",
    "ltepass.match": "ltepass.passes.find.match",
    "ltepass.near": "ltepass.passes.find.match",
    "ltepass.passes.find_ffn": "ltepass.passes.find.find_ffn",
    "ltepass.placing": "ltepass.passes.find.region_to_site",
    "ltepass.propagate": "ltepass.passes.find.neuron_rows",
    "ltepass.values": "ltepass.passes.find.match_types",
    "ltepass.dataflow": "ltepass.passes.graph.leaves_and_linears",
    "ltepass.pipeline": "ltepass.passes.graph.pipeline",
    "ltepass.balanced": "ltepass.passes.group.balanced_kmeans",
    "ltepass.grouping": "ltepass.passes.group.group_neurons",
    "ltepass.passes.group.methods": "ltepass.passes.group.group_neurons",
    "ltepass.passes.group_neurons": "ltepass.passes.group.group_neurons",
    "ltepass.guarding": "ltepass.passes.capture.guard_replaced_forwards",
    "ltepass.inline": "ltepass.passes.insert.hooks",
    "ltepass.passes.insert_routers": "ltepass.passes.insert.insert_routers",
    "ltepass.regenerate": "ltepass.passes.insert.generated_forwards",
    "ltepass.passes.insert.forwards": "ltepass.passes.insert.generated_forwards",
    "ltepass.removal": "ltepass.passes.insert.remove_routers",
    "ltepass.selfcheck": "ltepass.passes.insert.try_gated_copy",
    "ltepass.straight": "ltepass.passes.capture.straight_forward",
    "ltepass.compiled": "ltepass.passes.lower.compile_backend",
    "ltepass.lowerable": "ltepass.passes.lower.why_not_ffn",
    "ltepass.lowering": "ltepass.passes.lower.lowered_forward",
    "ltepass.passes.lower.lower_modules": "ltepass.passes.lower.lowered_forward",
    "ltepass.passes.lower_routed_ffn": "ltepass.passes.lower.lower_routed_ffn",
    "ltepass.passes.lower.graph_regions": "ltepass.passes.lower.lower_routed_ffn",
    "ltepass.passes.lower.graph_linears": "ltepass.passes.lower.lower_linears",
    "ltepass.passes.lower.linears": "ltepass.passes.lower.lower_linears",
    "ltepass.stubs": "ltepass.passes.lower.stubs",
    "ltepass.batches": "ltepass.routed.batches",
    "ltepass.losses": "ltepass.routed.soft_losses",
    "ltepass.observing": "ltepass.routed.observers",
    "ltepass.padding": "ltepass.routed.token_masks",
    "ltepass.reporting": "ltepass.routed.report_tables",
    "ltepass.router": "ltepass.routed.router",
    "ltepass.rows": "ltepass.routed.token_masks",
    "ltepass.sites": "ltepass.routed.sites",
    "ltepass.undo": "ltepass.routed.undo",
    "ltepass.checkpoint_checks": "ltepass.saving.site_checks",
    "ltepass.checkpoint_entry": "ltepass.saving.state_json",
    "ltepass.checkpoint_forward": "ltepass.saving.forward_checks",
    "ltepass.checkpoint_tensors": "ltepass.saving.tensor_checks",
    "ltepass.quantizer": "ltepass.saving.quantizer",
    "ltepass.lowered_server": "ltepass.serving.lowered_server",
    "ltepass.request_schema": "ltepass.serving.request_schema",
    "ltepass.cuts": "ltepass.sparsity.cuts",
    "ltepass.training.options": "ltepass.training.stages",
    "ltepass.routed.site_entry": "ltepass.routed.site_json",
    "ltepass.saving.entry": "ltepass.saving.state_json",
    "ltepass.routed.proxy": "ltepass.routed.proxy_router",
    "ltepass.demo.plain": "ltepass.demo.plain_formats",
    "ltepass.commands.decode_table": "ltepass.commands.bench_tables",
    "ltepass.passes.find.regions": "ltepass.passes.find.match_types",
    "ltepass.passes.capture.owner_forward": "ltepass.passes.capture.trace_owner",
    "ltepass.passes.capture.traceable_forwards": "ltepass.passes.capture.straight_forward",
    "ltepass.routed.token_rows": "ltepass.routed.token_masks",
    "ltepass.passes.group.permutations": "ltepass.passes.group.group_neurons",
    "ltepass.passes.lower.weight_layout": "ltepass.passes.lower.lay_out_neurons",
    "ltepass.passes.lower.operands": "ltepass.passes.lower.lowered_forward",
    "ltepass.demo.folder": "ltepass.demo.results",
    "ltepass.sparsity.modes": "ltepass.routed.modes",
    "ltepass.measure.text_blocks": "ltepass.corpora",
    "ltepass.passes.capture.inline_leaves": "ltepass.passes.capture.user_graph",
    "ltepass.passes.capture.export": "ltepass.passes.capture.capture_graphs",
    "ltepass.kernels.hard_ffn": "ltepass.kernels.routed_ffn_backward",
    "ltepass.names": "ltepass.paths",
    "ltepass.training.training_step": "ltepass.training.trainer",
    "ltepass.passes.graph.leaves": "ltepass.passes.graph.leaves_and_linears",
    "ltepass.passes.graph.linears": "ltepass.passes.graph.leaves_and_linears",
    "ltepass.kernels.autograd": "ltepass.kernels.dispatch",
    "ltepass.calibration.warm_start": "ltepass.calibration.refit_down",
    "ltepass.calibration.proxy_start": "ltepass.calibration.initialise",
    "ltepass.demo.speed": "ltepass.measure.timing",
    "ltepass.measure.decoding": "ltepass.measure.timing",
    "ltepass.measure.token_speed": "ltepass.measure.bench_tokens",
    "ltepass.api": "ltepass.transform_and_lower",
    "ltepass.routed.reporting": "ltepass.routed.report_tables",
    "ltepass.passes.insert.regenerated_forwards": "ltepass.passes.insert.generated_forwards",
    "ltepass.cli.running": "ltepass.cli.output_and_errors",
    "ltepass.demo.learning": "ltepass.demo.training_loop",
    "ltepass.passes.find.owner": "ltepass.passes.find.region_to_site",
    "ltepass.passes.insert.guarding": "ltepass.passes.capture.guard_replaced_forwards",
    "ltepass.training.stage_options": "ltepass.training.stages",
    "ltepass.registration": "ltepass.transformers_hook",
    "ltepass.texts": "ltepass.corpora",
    "ltepass.routed.selection": "ltepass.routed.which_sites",
    "ltepass.routed.read_json": "ltepass.routed.json_entry",
    "ltepass.kernels.gpu.traceable": "ltepass.kernels.dispatch",
    "ltepass.routed.padding": "ltepass.routed.token_masks",
    "ltepass.passes.find.near_miss": "ltepass.passes.find.match",
    "ltepass.passes.capture.capture_module": "ltepass.passes.capture.capture_graphs",
    "ltepass.passes.insert.selfcheck": "ltepass.passes.insert.try_gated_copy",
    "ltepass.exporting.package": "ltepass.exporting.export_model",
    "ltepass.passes.lower.backend": "ltepass.passes.lower.compile_backend",
    "ltepass.passes.capture.forward_source": "ltepass.passes.capture.straight_forward",
    "ltepass.passes.insert.generated_classes": "ltepass.passes.insert.generated_forwards",
    "ltepass.routed.recording": "ltepass.routed.recorded_calls",
    "ltepass.passes.capture.parts": "ltepass.passes.capture.capture_graphs",
    "ltepass.passes.find.activation": "ltepass.passes.find.identify_activation",
    "ltepass.passes.insert.activation_check": "ltepass.passes.insert.check_activation",
    "ltepass.passes.lower.plain_linears": "ltepass.passes.lower.why_not_linear",
    "ltepass.passes.lower.why_not": "ltepass.passes.lower.why_not_ffn",
    "ltepass.passes.lower.linear_modules": "ltepass.passes.lower.lower_linear_modules",
    "ltepass.kernels.gpu.common": "ltepass.kernels.gpu.plan",
    "ltepass.passes.insert.guard_forwards": "ltepass.passes.capture.guard_replaced_forwards",
    "ltepass.passes.insert.watch_forwards": "ltepass.passes.capture.guard_replaced_forwards",
    "ltepass.passes.capture.partial_capture": "ltepass.passes.capture.capture_graphs",
    "ltepass.passes.lower.compiled": "ltepass.passes.lower.compile_backend",
}


# Modules whose names are folders now, or that gave names away: where what they held lies.
HELD = {
    "ltepass.routed.sites": ("ltepass.routed.routed",),
    "ltepass.measure.quality": ("ltepass.measure.sparsity",),
    "ltepass.calibration": ("ltepass.calibration.calibrate_model", "ltepass.calibration.initialise"),
    "ltepass.saving": ("ltepass.saving.plain_modules",),
    "ltepass.serving": ("ltepass.serving.middleware",),
    "ltepass.sparsity": (
        "ltepass.sparsity.thresholds",
        "ltepass.routed.modes",
        "ltepass.routed.observers",
        "ltepass.routed.samples",
        "ltepass.measure.sparsity",
    ),
}


def held_by(package: str) -> Callable[[str], object]:
    """The `__getattr__` of a module of HELD."""

    def find(name: str) -> object:
        for module in HELD[package] if not name.startswith("_") else ():
            if name in (values := vars(importlib.import_module(module))):
                return values[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of MOVED, which is the new one under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def register() -> None:
    """Idempotent; called by `import ltepass`."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldNames())
