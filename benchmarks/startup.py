"""What the start of the demo costs: CPU seconds of each process until the first stage begins.

    python benchmarks/startup.py [--against CHECKOUT] [--runs 5]

Start-up is what `rlhf run configs/demo.yaml` does in an empty home before its first stage begins
to read data: imports, the temporary Prefect server, the two databases. The clock stops at the
first line of progress of a stage, which this script waits for, and the run is ended. With another
checkout of this repository the two take turns, and each start has an empty home.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
FIRST_STAGE = "prepare: "
NAMES = {
    "flows run": "command",
    "prefect_app": "Prefect server",
    "reaper": "reaper",
}


def cpu_seconds(root: int) -> dict[str, float]:
    """CPU seconds of a process and of those below it, by name; ended children count as theirs."""
    parents, seconds, lines = {}, {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        # utime, stime, and those of children that were waited for
        seconds[int(folder.name)] = sum(map(int, fields[11:15])) / TICKS
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    found: dict[str, float] = defaultdict(float)
    for pid in family & seconds.keys():
        name = next((name for part, name in NAMES.items() if part in lines[pid]), "other")
        found[name] += seconds[pid]
    return found


def start(checkout: Path) -> dict[str, float]:
    """Start the demo of a checkout in an empty home, until its first stage begins."""
    with tempfile.TemporaryDirectory(prefix="rlhf-startup-") as folder:
        output = Path(folder) / "output"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RLHF_")},
            "RLHF_HOME": f"{folder}/home",
            "PYTHONPATH": str(checkout),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        began = time.monotonic()
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows", "run", "configs/demo.yaml"],
                cwd=checkout,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while FIRST_STAGE not in output.read_text(errors="replace"):
                if process.poll() is not None:
                    raise SystemExit(f"the demo of {checkout} ended:\n{output.read_text()}")
                time.sleep(0.02)
            clock, found = time.monotonic() - began, cpu_seconds(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
        found["all processes"] = sum(found.values())
        return found | {"seconds on the clock": clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"here": HERE}
    if options.against is not None:
        checkouts = {"there": options.against.resolve(), **checkouts}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.runs):
        for name, checkout in checkouts.items():
            found[name].append(start(checkout))
            print(name, json.dumps({key: round(v, 2) for key, v in found[name][-1].items()}))
    columns = sorted({key for runs in found.values() for run in runs for key in run})
    print(f"\n| median of {options.runs} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in found.items():
        values = [statistics.median(run.get(key, 0.0) for run in runs) for key in columns]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    if options.against is not None:
        pairs = zip(found["there"], found["here"], strict=True)
        ratios = [one["all processes"] / other["all processes"] for one, other in pairs]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"\nCPU seconds there / here: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
