"""Measure the table of README.md and write it there.

    python benchmarks/table.py                                  # measures missing cells
    python benchmarks/table.py --rows ppo-gpt2,sft-gpt2 --rounds 5
    python benchmarks/table.py --try                            # every cell once, on tiny work
    python benchmarks/table.py --write                          # writes README.md from the results

A cell is measured in a separate process. Three sides take turns: ours, whose allocator is always
tuned; the peer; and the peer with the allocator tuned by the same variables. Each measurement is
appended to table.jsonl immediately, so nothing is lost when this is stopped: the same command
measures only the missing cells of the current commit.
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
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pages import put_between

from flows.local.allocator import ENVIRONMENT

Side = Literal["ours", "peer", "tuned"]
Line = dict[str, Any]

HERE = Path(__file__).parent
ROOT = HERE.parent
SIDES: tuple[Side, ...] = ("ours", "peer", "tuned")
PEERS = {"ppo": ".peer-ppo", "sft": ".peer", "reward": ".peer"}
BEGIN, END = "<!-- written by table.py -->", "<!-- end of what table.py has written -->"
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of /proc/cpuinfo, that matter here
TINY = {
    "ppo": "--batch 2 --response-length 8 --epochs 1 --iterations 1",
    "sft": "--batch 2 --iterations 1",
    "reward": "--batch 2 --iterations 1",
}
# Settings of a trainer that follow from the amount of work, or reach no number.
SIZES = {
    *(
        "batch_size",
        "local_batch_size",
        "local_mini_batch_size",
        "local_rollout_forward_batch_size",
    ),
    *("max_length", "max_steps", "micro_batch_size", "mini_batch_size", "num_ppo_epochs"),
    *("num_total_batches", "per_device_train_batch_size", "response_length", "seed"),
    *("packing", "total_episodes", "world_size", "activation_checkpointing"),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: one amount of work for all sides."""

    title: str
    work: Literal["ppo", "sft", "reward"]
    model: Literal["gpt2", "smol"]
    options: str  # of run.py and of the peer's script alike
    rounds: int

    @property
    def group(self) -> str:
        """What it is summed up with."""
        if "--lora-rank" in self.options:
            return "LoRA"
        return f"{self.model}, {'bfloat16' if 'bfloat16' in self.options else 'float32'}"


LORA = "--lora-rank 16 --lora-layers 8"
BF16 = "--dtype bfloat16"
ROWS = {  # the most important first, in case it is stopped early
    "ppo-gpt2": Row("PPO, gpt2", "ppo", "gpt2", "--iterations 2", 3),
    "sft-gpt2": Row("SFT, gpt2", "sft", "gpt2", "--iterations 4", 3),
    "reward-gpt2": Row("reward model, gpt2", "reward", "gpt2", "--iterations 4", 3),
    "ppo-smol": Row("PPO, smol, 8 samples", "ppo", "smol", "--batch 8 --iterations 1", 1),
    "sft-smol": Row("SFT, smol", "sft", "smol", "--iterations 1", 1),
    "reward-smol": Row("reward model, smol", "reward", "smol", "--iterations 1", 1),
    "ppo-smol-lora": Row(
        "PPO, smol, 8 samples, LoRA rank 16 in the last 8 of 30 blocks",
        "ppo",
        "smol",
        f"--batch 8 --iterations 1 {LORA}",
        1,
    ),
    "ppo-gpt2-bf16": Row("PPO, gpt2, bfloat16", "ppo", "gpt2", f"--iterations 2 {BF16}", 2),
    "sft-gpt2-bf16": Row("SFT, gpt2, bfloat16", "sft", "gpt2", f"--iterations 4 {BF16}", 2),
    "reward-gpt2-bf16": Row(
        "reward model, gpt2, bfloat16", "reward", "gpt2", f"--iterations 4 {BF16}", 2
    ),
    "sft-smol-bf16": Row("SFT, smol, bfloat16", "sft", "smol", f"--iterations 1 {BF16}", 1),
    "reward-smol-bf16": Row(
        "reward model, smol, bfloat16", "reward", "smol", f"--iterations 1 {BF16}", 1
    ),
    "sft-gpt2-packed": Row(
        "SFT, gpt2, packed blocks of the peer", "sft", "gpt2", "--packing --iterations 3", 1
    ),
    "ppo-smol-bf16": Row(
        "PPO, smol, 8 samples, bfloat16", "ppo", "smol", f"--batch 8 --iterations 1 {BF16}", 1
    ),
}


# --- measuring ---


def command(row: Row, side: Side, models: Path, options: str) -> list[str]:
    """What a side runs for a row."""
    reward = ["--reward", str(models / f"{row.model}-reward")] if row.work == "ppo" else []
    rest = ["--model", str(models / row.model), *reward, *shlex.split(f"{row.options} {options}")]
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


def measure(row: Row, side: Side, models: Path, options: str) -> Line:
    """The line that the program of a side prints.

    Raises: subprocess.CalledProcessError when it fails.
    """
    done = subprocess.run(
        command(row, side, models, options),
        env=environment(side),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    result: Line = json.loads(done.stdout.splitlines()[-1])
    return result


def commit() -> str:
    """The last commit that changed what is measured; with a + where there are changes since."""
    measured = ["rlhf_core", "flows/local/allocator.py", *(str(file) for file in HERE.glob("*.py"))]

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
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "features": ", ".join(name for name in FEATURES if name in flags) or "none of them",
        "cores": str(os.cpu_count()),
    }


def run(
    rows: Sequence[str],
    rounds: int | None,
    models: Path,
    output: Path,
    options: Mapping[str, str],
    *,
    minutes: float = math.inf,
) -> bool:
    """Measure what is missing, and begin nothing after so many minutes; whether nothing failed."""
    complete, now, where, started = True, commit(), machine(), time.monotonic()
    for name in rows:
        row = ROWS[name]
        for number in range(rounds or row.rounds):
            # Each side comes first, second and last in turn.
            for side in SIDES[number % 3 :] + SIDES[: number % 3]:
                done = {(e["row"], e["side"], e["round"], e["commit"]) for e in read(output)}
                if (name, side, number, now) in done:
                    continue
                if time.monotonic() - started > 60 * minutes:
                    say(f"the time is up before {name}, round {number + 1}: {side}\n")
                    return complete
                say(f"{name}, round {number + 1}: {side} ... ")
                begun = time.monotonic()
                try:
                    result = measure(row, side, models, options.get(row.work, ""))
                except subprocess.CalledProcessError as error:
                    complete = False
                    say(f"failed\n{error.stderr[-2000:]}\n")
                    continue
                entry = {"row": name, "side": side, "round": number, "commit": now, **where}
                entry |= {"date": date.today().isoformat(), "result": result}
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                seconds = time.monotonic() - begun
                say(f"{result['tokens_per_second']:.1f} tokens a second ({seconds:.0f} s)\n")
    return complete


def say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


# --- the section of README.md ---


def read(path: Path) -> list[Line]:
    """The lines that have been measured."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest(entries: Sequence[Line], name: str) -> list[Line]:
    """The lines of a row that are of the commit which was measured last."""
    mine = [entry for entry in entries if entry["row"] == name]
    return [entry for entry in mine if entry["commit"] == mine[-1]["commit"]]


def values(entries: Sequence[Line], side: Side, key: str) -> dict[int, float]:
    """A number of a side by round."""
    return {e["round"]: e["result"][key] for e in entries if e["side"] == side}


def median_range(numbers: Sequence[float], digits: int) -> str:
    """Median (least to most)."""
    if not numbers:
        return "–"
    text = f"{median(numbers):,.{digits}f}"
    if len(numbers) == 1:
        return text
    return f"{text} ({min(numbers):,.{digits}f}–{max(numbers):,.{digits}f})"


def ratios(entries: Sequence[Line], side: Side) -> list[float]:
    """Ours over a side, in each round that has both."""
    ours, theirs = (values(entries, s, "tokens_per_second") for s in ("ours", side))
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def render(entries: Sequence[Line]) -> str:
    """The whole section: the table, where and how it was measured, what it comes to."""
    rows = {name: newest(entries, name) for name in ROWS if any(e["row"] == name for e in entries)}
    lines = [
        "| work | rounds | ours | TRL | ratio | TRL, tuned | ratio | peak memory, MB: ours / TRL / "
        "TRL, tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        speed = {side: list(values(found, side, "tokens_per_second").values()) for side in SIDES}
        digits = 0 if max(map(max, filter(None, speed.values()))) >= 200 else 1
        memory = [list(values(found, side, "peak_memory_mb").values()) for side in SIDES]
        cells = [
            ROWS[name].title,
            str(len({e["round"] for e in found})),
            median_range(speed["ours"], digits),
            median_range(speed["peer"], digits),
            median_range(ratios(found, "peer"), 2),
            median_range(speed["tuned"], digits),
            f"**{median_range(ratios(found, 'tuned'), 2)}**",
            " / ".join(f"{median(numbers):,.0f}" if numbers else "–" for numbers in memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    used = [entry for found in rows.values() for entry in found]
    return "\n".join([*lines, "", *summary(rows), "", *circumstances(used), "", *changes(used)])


def summary(rows: Mapping[str, Sequence[Line]]) -> list[str]:
    """What each group of rows comes to."""
    groups: dict[str, list[Sequence[Line]]] = {}
    for name, found in rows.items():
        groups.setdefault(ROWS[name].group, []).append(found)
    lines = [
        "Ours compared with TRL with the same allocator settings, and with TRL as installed:",
        "",
    ]
    for group, members in groups.items():
        tuned, plain = (
            [median(r) for found in members if (r := ratios(found, side))]
            for side in ("tuned", "peer")
        )
        if tuned and plain:
            lines.append(f"* {group}: {between(tuned)} times as fast, and {between(plain)} times.")
    return lines


def between(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"


def circumstances(entries: Sequence[Line]) -> list[str]:
    """When, where, of which commit."""

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str((e["result"] | e)[key]) for e in entries))

    peers = dict.fromkeys(e["result"]["program"] for e in entries if e["side"] != "ours")
    return [
        f"{all_of('date')}, commit {all_of('commit')}; {all_of('cpu')} with {all_of('features')}, "
        f"{all_of('cores')} cores, {all_of('threads')} threads; torch {all_of('torch')}, "
        f"transformers {all_of('transformers')}, {' and '.join(peers)}. Tokens a second: median "
        "of the rounds (least to most). A round runs the three sides one after the other, in "
        "rotating order and in separate processes; a ratio compares the runs of one round."
    ]


def changes(entries: Sequence[Line]) -> list[str]:
    """What is not TRL's default, as its trainers say."""
    found: dict[str, dict[str, set[str]]] = {}
    for entry in entries:
        result = entry["result"]
        for key, value in result.get("changed", {}).items():
            if key not in SIZES:
                found.setdefault(result["work"], {}).setdefault(key, set()).add(str(value))
    lines = [
        "Settings of TRL that differ from its defaults, except sizes, as its trainers report them:",
        "",
    ]
    for work, settings in found.items():
        told = (f"`{k}` {' or '.join(sorted(v))}" for k, v in sorted(settings.items()))
        lines.append(f"* {work}: {', '.join(told)}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, with commas between")
    parser.add_argument("--rounds", type=int, help="of each row; default: that of the row")
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
        output = Path(folder) / "tiny.jsonl" if arguments.tiny else arguments.output
        rounds = 1 if arguments.tiny else arguments.rounds
        options = {
            work: f"--threads {arguments.threads} {tiny if arguments.tiny else ''}"
            for work, tiny in TINY.items()
        }
        complete = run(rows, rounds, arguments.models, output, options, minutes=arguments.minutes)
        print(render(read(output)))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
