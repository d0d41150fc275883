"""What ``torch.compile`` shall leave alone."""

from __future__ import annotations

import sys

_told = False


def keep_out_of_compilation() -> None:
    """Have ``torch.compile`` run our hooks as they are, between the parts that it compiles.

    They read global state that changes from pass to pass (the context, the running forward), tag nodes
    of the graph, and make objects per call: traced, they are compiled again and again, or fail. Nothing
    is imported for it: as long as dynamo is not loaded, nothing is compiled.
    """
    global _told
    if _told or "torch._dynamo.trace_rules" not in sys.modules:
        return
    for package in ("backpack_ext", "curvature", "backpack"):
        sys.modules["torch._dynamo.trace_rules"].add(package)
    _told = True
