"""The command `rlhf`: makes sure that `flows`, `tasks` and `rlhf_core` are ours, then runs it.

Two of these names are common. Where another distribution or a folder of PYTHONPATH has the same
one, Python takes whichever comes first, and the error would name a module that nobody has heard of.
So this file, whose name is nobody else's, looks before it imports.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("rlhf_core", "tasks", "flows")
DISTRIBUTION = "rlhf-pipeline"


def main() -> None:
    """The entry point of the command."""
    if sentence := clash(Path(__file__).parent):
        print(f"rlhf: {sentence}", file=sys.stderr)
        sys.exit(2)
    import_module("flows.__main__").main()


def clash(ours: Path, packages: Sequence[str] = PACKAGES) -> str:
    """What stands in the place of one of our packages, and the way out; empty when nothing does.

    Args:
        ours: the folder that our packages lie in.
    """
    for name in packages:
        spec = find_spec(name)
        found = [] if spec is None else list(spec.submodule_search_locations or [spec.origin or ""])
        if str(ours / name) not in found:
            return _sentence(name, found[0] if found else "")
    return ""


def _sentence(name: str, place: str) -> str:
    if not place:
        return f"The package {name} is missing: install {DISTRIBUTION} again."
    others = sorted(set(packages_distributions().get(name, [])) - {DISTRIBUTION})
    if others:
        return (
            f"The distribution {others[0]} has a package {name} too ({place}), and Python takes "
            f"that one: uninstall it, or install {DISTRIBUTION} into an environment of its own."
        )
    return (
        f"Python takes the package {name} from {place}: take that folder out of PYTHONPATH, or "
        "rename what lies there."
    )


if __name__ == "__main__":
    main()
