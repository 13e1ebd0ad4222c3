"""Measure the table of README.md and write it there.

    python benchmarks/table.py --minutes 30                     # the most important rows first
    python benchmarks/table.py --rows ppo-gpt2,sft-gpt2 --rounds 7
    python benchmarks/table.py --try                            # every row once, on tiny work
    python benchmarks/table.py --write                          # writes README.md from the results

A row has two or three sides: ours, whose allocator is always tuned; the peer with the allocator
tuned by the same variables; and, in some rows, the peer without them. Each side is a process of its
own, which is started once and warmed up; then the sides take turns, in rotating order, and a round
is one turn of each. A round is appended to table.jsonl when it ends, so nothing is lost when this
is stopped: the same command measures only the missing rounds of the current commit. First the peak
of the machine is measured, of which each row has its share.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from flops import per_token
from pages import put_between
from rows import ROWS, Row, Side
from table_page import read, render
from turns import Line, Others, Program, ProgramError, order
from work import add_arguments

from flows.local.allocator import ENVIRONMENT

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = {"ppo": ".peer-ppo", "sft": ".peer", "reward": ".peer"}
BEGIN, END = "<!-- written by table.py -->", "<!-- end of what table.py has written -->"
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of /proc/cpuinfo, that matter here
ROUNDS = 5
TINY = {
    "ppo": "--batch 2 --response-length 8 --epochs 1",
    "sft": "--batch 2",
    "reward": "--batch 2",
}

# --- measuring ---


def command(row: Row, side: Side, models: Path, options: str) -> list[str]:
    """What a side runs for a row."""
    reward = ["--reward", str(models / f"{row.model}-reward")] if row.work == "ppo" else []
    own = row.ours if side == "ours" else row.peer
    rest = shlex.split(f"{row.options} {own} {options}")
    rest = ["--model", str(models / row.model), *reward, *rest]
    if side == "ours":
        return [sys.executable, str(HERE / "run.py"), row.work, *rest]
    python = HERE / PEERS[row.work] / "bin" / "python"
    return [str(python), str(HERE / f"peer_{row.work}.py"), *rest]


def environment(side: Side) -> dict[str, str]:
    """Its environment: nothing of the peer's comes from ours but the allocator's settings."""
    plain = {k: v for k, v in os.environ.items() if k not in {*ENVIRONMENT, "PYTHONPATH"}}
    plain |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if side == "ours":
        plain["PYTHONPATH"] = str(ROOT)
    return plain if side == "peer" else plain | ENVIRONMENT


def commit() -> str:
    """The last commit that changed what is measured; with a + where there are changes since."""
    names = ("table", "rows", "turns", "run", "report", "work", "flops", "peak", "models")
    scripts = [HERE / f"{name}.py" for name in names] + sorted(HERE.glob("peer_*.py"))
    measured = ["rlhf_core", "flows/local/allocator.py", *map(str, scripts)]

    def git(*arguments: str) -> str:
        words = ["git", "-C", str(ROOT), *arguments, "--", *measured]
        return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("diff", "--name-only", "HEAD") else "")


def machine() -> dict[str, str]:
    """The processor and those of its features that matter here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    facts = {
        key.strip(): value.strip()
        for key, separator, value in (line.partition(":") for line in text.splitlines())
        if separator
    }
    flags = facts.get("flags", facts.get("Features", "")).split()
    found = [f for f in FEATURES if f in flags]
    lacking = [f for f in FEATURES if f not in flags]
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "family": f"family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}",
        "features": ", ".join(found) or "none of them",
        "lacking": ", ".join(lacking),
        "cores": str(os.cpu_count()),
        "caches": caches(),
    }


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> str:
    """The sizes of the caches of a core, as Linux tells them."""
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (
            (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = size
    return ", ".join(f"{level} {size}" for level, size in found.items()) or "unknown"


def measure_peak(options: str) -> Line:
    """The line that peak.py prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "peak.py"), *shlex.split(options)],
        env=environment("ours"),
        check=True,
        capture_output=True,
        text=True,
    )
    found: Line = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass
class Measuring:
    """Measures rows, and appends what it finds to a file."""

    models: Path
    output: Path
    options: Mapping[str, str]  # more of them, by kind of work
    rounds: int = ROUNDS
    minutes: float = math.inf  # begins nothing after that
    peak: str = ""  # options of peak.py

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.where = {"commit": commit(), **machine()}

    def run(self, names: Sequence[str]) -> bool:
        """Measure what is missing; whether nothing failed."""
        missing = {name: numbers for name in names if (numbers := self._missing(name))}
        if not missing:
            return True
        self._append({"peak": measure_peak(self.peak)})
        complete = True
        for name, numbers in missing.items():
            if self._late():
                say(f"the time is up before {name}\n")
                break
            try:
                self._row(name, numbers)
            except ProgramError as error:
                complete = False
                say(f"failed\n{error}\n")
        return complete

    def _row(self, name: str, numbers: Sequence[int]) -> None:
        """The rounds of a row: every side is started and warmed up, then they take turns."""
        row, begun, others = ROWS[name], time.monotonic(), Others()
        load = os.getloadavg()[0]
        iterations = f"--warmup 1 --iterations {row.iterations * len(numbers)}"
        with ExitStack() as stack:
            programs: dict[Side, Program] = {}
            for side in row.sides:
                say(f"{name}: {side} starts ... ")
                options = f"{self.options.get(row.work, '')} {iterations}"
                words = command(row, side, self.models, options)
                programs[side] = stack.enter_context(Program(words, environment(side)))
                programs[side].turn(1)
                say("warm\n")
            about = {side: program.about for side, program in programs.items()}
            self._append({"row": name, "about": about, "load_average": load})
            useful = {side: self._operations(row, side) for side in row.sides}
            for number in numbers:
                if self._late():
                    say(f"the time is up before {name}, round {number + 1}\n")
                    return
                found: Line = {}
                say(f"{name}, round {number + 1}:")
                for side in order(row.sides, number):
                    others.begin()
                    turn = programs[side].turn(row.iterations)
                    turn["others"] = others.cores(turn["cpu_seconds"])
                    found[side] = turn
                    say(f" {side} {turn['tokens_per_second']:.1f}")
                now = time.monotonic()
                entry = {"row": name, "round": number, "took": now - begun, "operations": useful}
                self._append({**entry, "sides": found})
                say(f" tokens a second ({now - begun:.0f} s)\n")
                begun = now

    def _operations(self, row: Row, side: Side) -> float:
        """Useful floating-point operations a token."""
        parser = argparse.ArgumentParser()
        add_arguments(parser, row.work)
        options = self.options.get(row.work, "")
        words = command(row, side, self.models, options)
        arguments = parser.parse_args(words[3 if side == "ours" else 2 :])
        return per_token(row.work, arguments, "ours" if side == "ours" else "peer")

    def _missing(self, name: str) -> list[int]:
        here = self.where["commit"]
        lines = read(self.output)
        done = {
            e["round"]
            for e in lines
            if e["commit"] == here and e.get("row") == name and "round" in e
        }
        return [number for number in range(self.rounds) if number not in done]

    def _append(self, entry: Line) -> None:
        line = {**entry, **self.where, "date": date.today().isoformat()}
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _late(self) -> bool:
        return time.monotonic() - self.started > 60 * self.minutes


def say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


# --- the command ---


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, with commas between")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each row")
    parser.add_argument("--models", type=Path, default=ROOT / ".rlhf" / "bench")
    parser.add_argument("--output", type=Path, default=HERE / "table.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after that")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--try", dest="tiny", action="store_true", help="tiny work, kept nowhere")
    what.add_argument("--write", action="store_true", help="measure nothing; write README.md")
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := sorted(set(rows) - ROWS.keys()):
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if arguments.write:
        put_between(render(read(arguments.output)), HERE / "README.md", BEGIN, END)
        return
    with TemporaryDirectory() as folder:
        measuring = Measuring(
            models=arguments.models,
            output=Path(folder) / "tiny.jsonl" if arguments.tiny else arguments.output,
            options={
                work: f"--threads {arguments.threads} {tiny if arguments.tiny else ''}"
                for work, tiny in TINY.items()
            },
            rounds=1 if arguments.tiny else arguments.rounds,
            minutes=arguments.minutes,
            peak=f"--threads {arguments.threads}"
            + (" --sizes 256 --megabytes 16" if arguments.tiny else ""),
        )
        complete = measuring.run(rows)
        print(render(read(measuring.output)))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
