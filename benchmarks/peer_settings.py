"""Find the settings with which the peer is fastest on this machine; run it with the peer's Python.

    benchmarks/.peer/bin/python benchmarks/peer_settings.py sft --model .rlhf/bench/gpt2 --threads 1

All settings run one after the other in one process, in rotating order, in some rounds. CPU seconds
a token are compared, so that a machine with other work will do. The arguments are those of
`peer_WORK.py`, and the allocator is tuned. Prints a table in Markdown: the best first.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import sys
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parent.parent))

from flows.local.allocator import ENVIRONMENT

TRAINED = {
    "float32": "",
    "float32, eager": "--attention eager",
    "autocast": "--dtype autocast",
    "autocast, eager": "--dtype autocast --attention eager",
    "bfloat16": "--dtype bfloat16",
    "bfloat16, eager": "--dtype bfloat16 --attention eager",
}
SETTINGS = {
    "ppo": TRAINED
    | {
        "autocast, frozen models in bfloat16": "--dtype autocast --frozen bfloat16",
        "bfloat16, no cache in training": "--dtype bfloat16 --no-cache",
        "float32, products rounded": "--products medium",
    },
    "sft": TRAINED
    | {
        "float32, padding-free": "--padding-free",
        "float32, by length": "--grouped",
        "autocast, padding-free": "--dtype autocast --padding-free",
        "bfloat16, padding-free": "--dtype bfloat16 --padding-free",
        "bfloat16, padding-free, eager": "--dtype bfloat16 --padding-free --attention eager",
        "bfloat16, by length": "--dtype bfloat16 --grouped",
    },
    "reward": TRAINED,
}


def measure(work: str, options: list[str]) -> float:
    """Milliseconds of processors a token."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    script = importlib.import_module(f"peer_{work}")
    sys.argv = [f"peer_{work}.py", *options]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        script.main()
    gc.collect()
    line = json.loads(said.getvalue().splitlines()[-1])
    return 1000 * line["cpu_seconds"] / line["tokens_per_iteration"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", help="only these, with semicolons between")
    arguments, rest = parser.parse_known_args()
    known = SETTINGS[arguments.work]
    names = arguments.settings.split(";") if arguments.settings else list(known)
    if unknown := sorted(set(names) - known.keys()):
        parser.error(f"no such setting: {'; '.join(unknown)}; there are {'; '.join(known)}")
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # They are read when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            found[name].append(measure(arguments.work, rest + known[name].split()))
            print(f"{name}: {found[name][-1]:.2f} ms", file=sys.stderr, flush=True)
    print("| setting | CPU ms a token (least to most) |\n|---|---|")
    for name, numbers in sorted(found.items(), key=lambda item: median(item[1])):
        print(f"| {name} | {median(numbers):.2f} ({min(numbers):.2f}–{max(numbers):.2f}) |")


if __name__ == "__main__":
    main()
