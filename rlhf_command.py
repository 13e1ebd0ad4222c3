"""Entry point of `rlhf`: checks that `flows`, `tasks` and `rlhf_core` are ours, then runs it.

Two of these package names are common. If another distribution or a folder on PYTHONPATH has the
same name, Python imports whichever comes first and fails with a confusing error. This file has a
unique name, so it can check before it imports.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("rlhf_core", "tasks", "flows")
DISTRIBUTION = "rlhf-pipeline"


def main() -> None:
    """The entry point of the command."""
    sys.modules.setdefault("rlhf_command", sys.modules[__name__])  # if this file was started
    leave_when_interrupted()
    if sentence := clash(Path(__file__).parent):
        print(f"rlhf: {sentence}", file=sys.stderr)
        sys.exit(2)
    import_module("flows.__main__").main()


def leave_when_interrupted() -> None:
    """Make Ctrl-C end the process at once, with a word: nothing was begun that could be undone.

    An exception would be raised in the middle of an import. The command takes Ctrl-C over with
    `interruptible`. A process that ignores Ctrl-C, as one in the background does, goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def leaving_when_interrupted() -> Iterator[None]:
    """The same for the length of a block."""
    leave_when_interrupted()
    try:
        yield
    finally:
        interruptible()


def _leave(number: int, frame: object) -> None:
    os.write(2, b"rlhf: Interrupted.\n")
    os._exit(130)


def clash(ours: Path, packages: Sequence[str] = PACKAGES) -> str:
    """What shadows one of our packages and how to fix it; empty if nothing does.

    Args:
        ours: the folder that contains our packages.
    """
    for name in packages:
        spec = find_spec(name)
        found = [] if spec is None else list(spec.submodule_search_locations or [spec.origin or ""])
        if str(ours / name) not in found:
            return _sentence(name, found[0] if found else "")
    return ""


def _sentence(name: str, place: str) -> str:
    if not place:
        return f"The package {name} is missing: reinstall {DISTRIBUTION}."
    others = sorted(set(packages_distributions().get(name, [])) - {DISTRIBUTION})
    if others:
        return (
            f"The distribution {others[0]} also has a package {name} ({place}), and Python imports "
            f"that one: uninstall it, or install {DISTRIBUTION} into a separate environment."
        )
    return (
        f"Python imports the package {name} from {place}: remove that folder from PYTHONPATH, or "
        "rename the package there."
    )


if __name__ == "__main__":
    main()
