"""The section of README.md that table.py writes, from what it measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rows import ROWS, Side
from turns import Line

BUSY = 0.5  # cores: a round in which others used more during a turn is marked
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


def read(path: Path) -> list[Line]:
    """The lines that have been measured."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest(entries: Sequence[Line], name: str) -> list[Line]:
    """The rounds of a row, of the commit that was measured last."""
    mine = [e for e in entries if e.get("row") == name and "round" in e]
    return [e for e in mine if e["commit"] == mine[-1]["commit"]] if mine else []


def values(rounds: Sequence[Line], side: Side, key: str) -> list[float]:
    """A number of a side, of the rounds that have it."""
    return [e["sides"][side][key] for e in rounds if side in e["sides"]]


def ratios(rounds: Sequence[Line], side: Side) -> list[float]:
    """Ours over a side, round by round."""
    pairs = (e["sides"] for e in rounds if {"ours", side} <= e["sides"].keys())
    return [s["ours"]["tokens_per_second"] / s[side]["tokens_per_second"] for s in pairs]


def median_range(numbers: Sequence[float], digits: int) -> str:
    """Median (least to most)."""
    if not numbers:
        return "–"
    text = f"{median(numbers):,.{digits}f}"
    if len(numbers) == 1:
        return text
    return f"{text} ({min(numbers):,.{digits}f}–{max(numbers):,.{digits}f})"


def disturbed(rounds: Sequence[Line]) -> int:
    """In how many rounds others kept more than half a core busy during a turn."""
    return sum(any((turn["others"] or 0) > BUSY for turn in e["sides"].values()) for e in rounds)


def peak_of(entries: Sequence[Line], like: Line) -> dict[str, dict[str, float]]:
    """The best peaks of the machine that a round was measured on, by threads and precision."""
    best: dict[str, dict[str, float]] = {}
    for entry in entries:
        if "peak" in entry and entry["cpu"] == like["cpu"] and entry["cores"] == like["cores"]:
            for threads, found in entry["peak"].items():
                if threads.isdecimal():
                    known = best.setdefault(threads, {})
                    for key in ("float32", "bfloat16", "copy_gb_s"):
                        known[key] = max(known.get(key, 0.0), found[key])
    return best


def share(entries: Sequence[Line], rounds: Sequence[Line], name: str, side: Side) -> str:
    """The useful operations a second of a side, in percent of the peak of its number format."""
    row, speeds = ROWS[name], values(rounds, side, "tokens_per_second")
    peaks = peak_of(entries, rounds[-1]).get(threads_of(entries, rounds), {})
    if not speeds or not peaks:
        return "–"
    peak = peaks[row.precision if side == "ours" else row.peer_precision]
    return f"{100 * rounds[-1]['operations'][side] * median(speeds) / (1e9 * peak):.0f} %"


def about(entries: Sequence[Line], rounds: Sequence[Line]) -> dict[str, Line]:
    """What each side of a row said of itself."""
    told = rounds[-1]["row"], rounds[-1]["commit"]
    lines = [e["about"] for e in entries if "about" in e and (e["row"], e["commit"]) == told]
    return lines[-1] if lines else {}


def threads_of(entries: Sequence[Line], rounds: Sequence[Line]) -> str:
    """How many threads a row was computed with."""
    return str(about(entries, rounds).get("ours", {}).get("threads", 2))


def render(entries: Sequence[Line]) -> str:
    """The whole section: the table, what it comes to, where and how it was measured."""
    rows = {name: found for name in ROWS if (found := newest(entries, name))}
    if not rows:
        return "Nothing has been measured yet: run `benchmarks/table.py --minutes 30`."
    lines = [
        "| work | numbers | rounds | ours | TRL, tuned | ratio | TRL, plain | ratio "
        "| share of the peak: ours / TRL, tuned | peak memory, MB: ours / TRL, tuned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        row = ROWS[name]
        speeds = {s: values(found, s, "tokens_per_second") for s in ("ours", "tuned", "peer")}
        digits = 0 if max(map(max, filter(None, speeds.values()))) >= 200 else 1
        memory = [values(found, side, "peak_memory_mb") for side in ("ours", "tuned")]
        cells = [
            row.title + " †" * bool(disturbed(found)),
            row.said,
            str(len(found)),
            median_range(speeds["ours"], digits),
            median_range(speeds["tuned"], digits),
            f"**{median_range(ratios(found, 'tuned'), 2)}**",
            median_range(speeds["peer"], digits),
            median_range(ratios(found, "peer"), 2),
            " / ".join(share(entries, found, name, side) for side in ("ours", "tuned")),
            " / ".join(f"{max(numbers):,.0f}" if numbers else "–" for numbers in memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [*marks(rows), *better_in_float32(rows)]
    parts = [lines, notes, [circumstances(entries, rows)], changes(entries, rows)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def marks(rows: dict[str, list[Line]]) -> list[str]:
    """Which rows other work may have disturbed."""
    found = [f"{n} ({disturbed(r)} of {len(r)})" for n, r in rows.items() if disturbed(r)]
    if not found:
        return []
    return [f"† Other work used more than {BUSY} cores in some rounds: {', '.join(found)}."]


def better_in_float32(rows: dict[str, list[Line]]) -> list[str]:
    """Where a side is faster in float32 than in the row that should have its best numbers.

    The two rows were not measured in turns, so their medians are compared.
    """
    lines = []
    for name, found in rows.items():
        wide = rows.get(f"{name}-float32")
        for side, who in (("ours", "this project"), ("tuned", "TRL")):
            if wide and ROWS[name].precision == "bfloat16":
                narrow = median(values(found, side, "tokens_per_second"))
                if (speed := median(values(wide, side, "tokens_per_second"))) > narrow:
                    lines.append(
                        f"* {ROWS[name].title}: {who} was faster in float32 ({speed:,.1f} tokens a "
                        f"second, and {narrow:,.1f} in its row above)."
                    )
    return lines


def circumstances(entries: Sequence[Line], rows: dict[str, list[Line]]) -> str:
    """When, where, of which commit."""
    rounds = [e for found in rows.values() for e in found]
    told = [a for found in rows.values() for a in about(entries, found).values()]

    def all_of(lines: Sequence[Line], key: str) -> str:
        return ", ".join(dict.fromkeys(str(line[key]) for line in lines if key in line))

    peers = [t["program"] for t in told if "changed" in t]
    blas = [e["peak"] for e in entries if "peak" in e]
    lacking = all_of(rounds, "lacking")
    peaks = "; ".join(
        f"{threads} thread{'s' * (threads != '1')}: {p['float32']:.0f} GFLOP/s in float32, "
        f"{p['bfloat16']:.0f} in bfloat16, copies at {p['copy_gb_s']:.0f} GB/s"
        for threads, p in sorted(peak_of(entries, rounds[-1]).items())
    )
    minutes = sum(e["took"] for e in rounds) / 60
    return (
        f"{all_of(rounds, 'date')}, commit {all_of(rounds, 'commit')}; {all_of(rounds, 'cpu')} "
        f"({all_of(rounds, 'family')}) with {all_of(rounds, 'features')}"
        f"{f', without {lacking}' if lacking else ''}; {all_of(rounds, 'cores')} cores, caches "
        f"{all_of(rounds, 'caches')}; threads: {all_of(told, 'threads')}; {all_of(blas, 'blas')}; "
        f"torch {all_of(told, 'torch')}, transformers {all_of(told, 'transformers')}, "
        f"{' and '.join(dict.fromkeys(peers))}. Peak by `peak.py`: {peaks}. The rounds took "
        f"{minutes:.0f} minutes, starting and warming up included. Tokens a second and ratios: "
        "median of the rounds (least to most); a ratio compares the turns of one round."
    )


def changes(entries: Sequence[Line], rows: dict[str, list[Line]]) -> list[str]:
    """What is not TRL's default, as its trainers say."""
    found: dict[str, dict[str, set[str]]] = {}
    for rounds in rows.values():
        for told in about(entries, rounds).values():
            for key, value in told.get("changed", {}).items():
                if key not in SIZES:
                    found.setdefault(told["work"], {}).setdefault(key, set()).add(str(value))
    if not found:
        return []
    lines = [
        "Settings of TRL that differ from its defaults, except sizes, as its trainers report them:",
        "",
    ]
    for work, settings in found.items():
        told = (f"`{k}` {' or '.join(sorted(v))}" for k, v in sorted(settings.items()))
        lines.append(f"* {work}: {', '.join(told)}.")
    return lines
