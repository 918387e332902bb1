"""A captured graph whose nodes know the module that they came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch.fx import Node

from ltepass.passes.graph.leaves_and_linears import Flow
from ltepass.passes.graph.node_kinds import is_movement, op_name
from ltepass.passes.graph.shared_names import join
from ltepass.passes.graph.walk import strip_identity


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph of (a part of) a root module.

    prefix: path of the captured part in the root, "" for all of it.
    aliases: paths of modules that the root holds under several, to the first of them.
    sharers: names of parameters that several modules hold, to the paths of these modules.
    """

    flow: Flow
    prefix: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    sharers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def stack(self, node: Node) -> list[str]:
        """Paths of the module calls that a node stands in, outermost first; [""] is the root."""
        raw = node.meta.get("nn_module_stack") or {}
        paths = [re.sub(r"@\d+", "", str(path)) for path, _ in raw.values()]
        joined = [join(self.prefix, path) for path in paths]
        return list(dict.fromkeys(self.aliases.get(p, p) for p in (self.prefix, *joined)))

    def only_linears(self, path: str) -> bool:
        """Whether what the graph holds of this module's calls is products with leaf weights, and views around them."""
        return path not in self._busy

    @cached_property
    def _busy(self) -> set[str]:
        """Paths of modules that compute something besides products with leaf weights."""
        flow = self.flow
        busy: set[str] = set()
        for node in flow.nodes():
            product = flow.linear(node) is not None or flow.product(node) is not None
            plain = product or is_movement(node) or strip_identity(node) is not node
            if not plain and op_name(node) not in (None, "_assert_tensor_metadata", "size", "sym_size", "getattr"):
                busy.update(self.stack(node))
        return busy
