"""How many processes of a stage a cluster has room for."""

from collections.abc import Iterable, Mapping
from typing import Any


def places(nodes: Iterable[Mapping[str, Any]], needed: Mapping[str, float]) -> int:
    """The processes that fit on the machines of a cluster when nothing else runs there.

    Args:
        nodes: as `ray.nodes()` gives them: `Alive`, and `Resources` by name.
        needed: what a process takes, by name, each > 0: `CPU` cores and, with one, a `GPU`.
    """
    return sum(
        min(int(node["Resources"].get(name, 0.0) // amount) for name, amount in needed.items())
        for node in nodes
        if node["Alive"]
    )
