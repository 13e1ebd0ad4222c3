"""Does it help a reward model to know who voted?

    python benchmarks/annotators.py simulation              # known truth, a linear reward model
    python benchmarks/annotators.py demo --work FOLDER      # the policy that follows from it
    python benchmarks/annotators.py votes                   # votes that people cast, in --data

Each prints a table as Markdown, and with --write puts it into README.md. Simulation: about half a
minute of a core; demo: two for each seed and world, and what was made there is not made again;
votes: two.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import torch
from annotators_demo import auc, demo_section, with_interval
from annotators_linear import SimulatedVotes, fit_linear, simulate_votes
from annotators_votes import votes_section
from pages import put_between

from rlhf_core.functional.annotators import DEFAULT_PRIOR, Prior

HERE = Path(__file__).resolve().parent
LABELS = 3000
FIRST = 100  # seed of the simulation; the constants were chosen on seeds 0 to 19
VARIANCES = Prior(*(x**0.5 for x in DEFAULT_PRIOR))  # the same numbers, read as variances
WORLDS = {
    "biased, 2 % known answers": {"gold": 0.02, "clean": False},
    "biased, none": {"gold": 0.0, "clean": False},
    "clean, 2 % known answers": {"gold": 0.02, "clean": True},
    "clean, none": {"gold": 0.0, "clean": True},
}


def simulation_section(seeds: int) -> str:
    """The table of the simulation, as Markdown."""
    rows = [
        "| annotators, known answers | pooled | aware | aware minus pooled | finds spammers, AUC |",
        "|---|---|---|---|---|",
    ]
    for title, settings in WORLDS.items():
        found = [
            _measure(simulate_votes(FIRST + seed, labels=LABELS, **settings))
            for seed in range(seeds)
        ]
        pooled, aware, spammers = (list(column) for column in zip(*found, strict=True))
        gains = [b - a for a, b in zip(pooled, aware, strict=True)]
        area = "–" if settings["clean"] else f"{mean(spammers):.3f} (least {min(spammers):.3f})"
        rows.append(
            f"| {title} | {mean(pooled):.3f} | **{mean(aware):.3f}** | {with_interval(gains)} | "
            f"{area} |"
        )
        print(rows[-1], flush=True)
    others = {
        "known answers with a = 1": {"gold_reliability": 1.0},
        "known answers with a = 8": {"gold_reliability": 8.0},
        "the numbers of the priors as variances": {"prior": VARIANCES},
    }
    worlds = [
        simulate_votes(FIRST + seed, labels=LABELS, gold=0.02, clean=False) for seed in range(seeds)
    ]
    for title, settings in others.items():
        accuracy = [w.accuracy(fit_linear(w.votes, aware=True, **settings).weights) for w in worlds]
        rows.append(f"| biased, 2 % known answers; {title} | | {mean(accuracy):.3f} | | |")
        print(rows[-1], flush=True)
    blind = [_without_sides(world) for world in worlds]
    accuracy = [w.accuracy(fit_linear(w.votes, aware=True).weights) for w in blind]
    rows.append(f"| biased, 2 % known answers; unknown sides | | {mean(accuracy):.3f} | | |")
    print(rows[-1], flush=True)
    return "\n".join(
        [
            *rows,
            "",
            f"{LABELS:,} labels of one vote a pair; {seeds} seeds; share of other pairs of which "
            "the truly better answer gets the higher reward; a difference with the 95 % interval "
            "of Student's t over seeds. Seeds from 100; constants were chosen on 0 to 19.",
        ]
    )


def _without_sides(world: SimulatedVotes) -> SimulatedVotes:
    cast = world.votes.cast
    nowhere = cast._replace(side=torch.zeros_like(cast.side))
    return replace(world, votes=replace(world.votes, cast=nowhere))


def _measure(world: SimulatedVotes) -> tuple[float, float, float]:
    pooled = world.accuracy(fit_linear(world.votes, aware=False).weights)
    aware = fit_linear(world.votes, aware=True)
    reliability = aware.habits.values[: len(world.spammer), 0].tolist()
    spammers = auc(reliability, world.spammer.tolist(), world.usual.tolist())
    return pooled, world.accuracy(aware.weights), spammers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=("simulation", "demo", "votes"))
    parser.add_argument("--seeds", type=int, help="20 of the simulation, 5 of the demo")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".rlhf" / "bench" / "annotators")
    about = "demo: measure nothing more, only show what was"
    parser.add_argument("--kept", action="store_true", help=about)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small tensors
    if arguments.study == "simulation":
        section = simulation_section(arguments.seeds or 20)
    elif arguments.study == "demo":
        section = demo_section(arguments.seeds or 5, arguments.work, kept=arguments.kept)
    else:
        section = votes_section(arguments.data)
    print(section)
    if arguments.write:
        begin = f"<!-- annotators, {arguments.study}: written by annotators.py -->"
        end = f"<!-- end of annotators, {arguments.study} -->"
        put_between(section, HERE / "README.md", begin, end)


if __name__ == "__main__":
    main()
