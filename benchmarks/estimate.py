"""What `rlhf validate` estimates, beside what a run then takes.

    python benchmarks/estimate.py configs/demo.yaml
    python benchmarks/estimate.py configs/smollm2.yaml --set ppo.iterations=4 ...

It runs `rlhf validate CONFIG --json` and `rlhf run CONFIG` one after the other, in a home of its
own, and looks at the process of the run ten times a second. Other programs make both wait, not
equally long, so process time (user and system) is compared beside the time on the clock. The table
is in benchmarks/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
PAUSE = 0.1


class Look(NamedTuple):
    """A process at a moment."""

    at: float  # seconds since 1970
    cpu: float  # seconds so far
    memory: int  # resident bytes


def look(pid: int) -> Look | None:
    """The process now; None once it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    cpu = (int(stat[11]) + int(stat[12])) / TICKS
    return Look(time.time(), cpu, pages * os.sysconf("SC_PAGE_SIZE"))


def run(command: list[str], home: Path, log: Path) -> list[Look]:
    """Run to the end, and look at it all the while."""
    looks: list[Look] = []
    env = {**os.environ, "RLHF_HOME": str(home)}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)

        def watch() -> None:
            while (found := look(process.pid)) is not None and process.poll() is None:
                looks.append(found)
                time.sleep(PAUSE)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed ({process.returncode}); see {log}")
    return looks


def stages(home: Path) -> dict[str, tuple[float, float]]:
    """Begin and end of each stage of the newest run (seconds since 1970)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = {}
    for one in client.search_runs(experiments, order_by=["attributes.start_time ASC"]):
        if name := one.data.tags.get("stage"):
            found[name] = (one.info.start_time / 1000, (one.info.end_time or 0) / 1000)
    return found


def main() -> None:
    """Estimate, run, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the logs and numbers")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="rlhf-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    more = [part for text in given.overrides for part in ("--set", text)]
    command = [sys.executable, "-P", "-m", "flows"]
    rows: list[dict[str, object]] = []
    for number in range(given.rounds):
        home, guess = folder / f"home-{number}", folder / f"estimate-{number}.json"
        run(
            [*command, "validate", given.config, *more, "--json", str(guess)],
            home,
            folder / f"validate-{number}.log",
        )
        begun = time.time()
        looks = run([*command, "run", given.config, *more], home, folder / f"run-{number}.log")
        estimate = json.loads(guess.read_text())
        windows = stages(home)
        most = 0
        for stage in estimate["stages"]:
            most = max(most, stage["memory"] + stage["copy_of_state"])  # the process keeps it
            start, end = windows[stage["stage"]]
            inside = [one for one in looks if start <= one.at <= end]
            rows.append(
                {
                    "stage": stage["stage"],
                    "work": stage["work"],
                    "estimated_cpu": stage["cpu_seconds"],
                    "cpu": inside[-1].cpu - inside[0].cpu,
                    "estimated_seconds": stage["seconds"],
                    "seconds": end - start,
                    "estimated_memory": most,
                    "memory": max(one.memory for one in inside),
                }
            )
        wall = looks[-1].at - begun
        rest = looks[-1].cpu - sum(float(str(r["cpu"])) for r in rows[-len(estimate["stages"]) :])
        print(f"whole run: estimated {estimate['seconds']:.0f} s, took {wall:.0f} s; "
              f"process time outside the stages {rest:.1f} s, "
              f"start estimated {estimate['start_seconds']:.1f} s; "
              f"the estimate took {estimate['took']:.0f} s")  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    print(
        "| stage | work | process time: estimated | measured | ratio | on the clock: estimated "
        "| measured | memory: estimated | measured | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        e, c = float(str(row["estimated_cpu"])), float(str(row["cpu"]))
        em, m = float(str(row["estimated_memory"])), float(str(row["memory"]))
        print(
            f"| {row['stage']} | {row['work']} | {e:.1f} s | {c:.1f} s | {e / c:.2f} | "
            f"{float(str(row['estimated_seconds'])):.0f} s | {float(str(row['seconds'])):.0f} s | "
            f"{em / 2**20:.0f} MiB | {m / 2**20:.0f} MiB | {em / m:.2f} |"
        )


if __name__ == "__main__":
    main()
