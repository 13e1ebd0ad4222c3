"""Does a tournament of checkpoints find a better policy than the last one, when that is hacked?

    python benchmarks/tournament.py --seeds 10 --work .rlhf/bench/tournament

In the demo with a low price of KL, PPO over-optimises its reward model with some seeds. For each
seed the six policies along the way and SFT meet on training prompts, under each of several judges:
the truth; the reward model that the policy learnt from; another reward model, from the votes of
other people; and people, by their votes. What is compared is the true reward of the choice and of
the last policy, on held-out prompts that no tournament has seen, with many answers to each. Writes
the table into `benchmarks/README.md`, and what was measured into results.jsonl in --work, so that a
second call only measures what is missing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import torch
from pages import put_between
from scipy import stats
from tournament_worlds import CHECKPOINTS, World

from rlhf_core.evaluation.tournament.result import LAST
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import clustered_bootstrap
from rlhf_core.seeding import generator
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.stages.tournament import MILESTONE, hold_tournament
from rlhf_core.work import Work

PAGE = Path(__file__).parent / "README.md"
BEGIN = "<!-- written by tournament.py -->"
END = "<!-- end of what tournament.py has written -->"
TRUTH = "rlhf_core.simulation:true_reward"
JUDGES = {
    "truth": ("the truth", JudgeConfig()),
    "careful": (
        "other people, careful ones",
        JudgeConfig(source="tournament_worlds:careful_votes"),
    ),
    "people": (
        "other people, of the kind that voted",
        JudgeConfig(source="tournament_worlds:votes"),
    ),
    "other": (
        "a reward model from the votes of other people",
        JudgeConfig(source="models:/other/1"),
    ),
    "trained_on": (
        "the reward model that the policy learnt from",
        JudgeConfig(source="reward_model"),
    ),
}


class Found(NamedTuple):
    """What a tournament of one seed chose under one judge."""

    kl_coef: float
    seed: int
    judge: str
    chosen: int  # iteration
    verdicts: int
    true_reward: float  # of the choice
    last: float  # true reward of the last policy
    best: float  # and of the best of the checkpoints, which nobody knows
    gain: tuple[float, float, float]  # the choice minus the last, paired by prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--judges", nargs="+", choices=list(JUDGES), default=list(JUDGES))
    parser.add_argument("--kl-coef", type=float, default=0.03, help="price of a nat, in reward")
    parser.add_argument("--answers", type=int, default=16, help="to a held-out prompt, measured")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    for seed in range(arguments.seeds):
        world = World(arguments.work, seed, arguments.kl_coef)
        for judge in arguments.judges:
            found.append(hold(world, judge, arguments.answers))
            print(json.dumps(found[-1]._asdict()), flush=True)
    section = table(found, arguments)
    print(section)
    put_between(section, PAGE, BEGIN, END)


def hold(world: World, judge: str, each: int) -> Found:
    """The tournament of a seed under a judge, and what its choice is worth."""
    path = world.root / "results.jsonl"
    key = {"kl_coef": world.kl_coef, "seed": world.seed, "judge": judge}
    for line in path.read_text().splitlines() if path.is_file() else ():
        known = json.loads(line)
        if [known[name] for name in key] == list(key.values()):
            return Found(**known)
    config = world.config()
    *along, last = sorted(world.policies)
    inputs = {
        "sft": world.sft,
        "reward": world.reward,
        "data": world.data,
        LAST: world.policies[last],
        **{f"{MILESTONE}{n}": world.policies[n] for n in along},
    }
    if judge == "other":
        inputs["judge"] = world.other_reward
    sections = {"sampling": config.sampling, "judge": JUDGES[judge][1]}
    settings = TournamentConfig(checkpoints=CHECKPOINTS, true_reward=TRUTH * (judge != "other"))
    result = hold_tournament(
        settings, Work(inputs=inputs, sections=sections, seed=world.seed)
    ).tournament
    truths = {
        n: torch.tensor(world.truth(f"{n}", directory, each), dtype=torch.float64)
        for n, directory in world.policies.items()
    }
    chosen = result.entrant(result.chosen).iteration
    assert chosen is not None
    difference = truths[chosen] - truths[last]
    prompts = torch.arange(len(difference))
    draws = generator(world.seed, f"benchmark/{judge}")
    made = Found(
        **key,
        chosen=chosen,
        verdicts=result.verdicts,
        true_reward=truths[chosen].mean().item(),
        last=truths[last].mean().item(),
        best=max(values.mean().item() for values in truths.values()),
        gain=tuple(clustered_bootstrap(difference, prompts, generator=draws)),
    )
    with path.open("a") as file:
        file.write(json.dumps(made._asdict()) + "\n")
    return made


def table(found: Sequence[Found], arguments: argparse.Namespace) -> str:
    """Lines of Markdown: each seed, and the mean gain of each judge over the seeds."""
    judges = list(dict.fromkeys(row.judge for row in found))
    by_seed: dict[int, dict[str, Found]] = {}
    for row in found:
        by_seed.setdefault(row.seed, {})[row.judge] = row
    titles = " | ".join(JUDGES[judge][0] for judge in judges)
    lines = [
        f"| seed | last policy | best checkpoint | {titles} |",
        "|---|---|---|" + "---|" * len(judges),
    ]
    for seed, rows in by_seed.items():
        any_row = next(iter(rows.values()))
        cells = [f"{any_row.last:.3f}", f"{any_row.best:.3f}", *(_cell(rows[j]) for j in judges)]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    hacked = {seed for seed, rows in by_seed.items() if _hacked(next(iter(rows.values())))}
    for title, seeds in (
        ("mean gain over the last policy", set(by_seed)),
        ("the same where the last policy is hacked", hacked),
        ("and where it is not", set(by_seed) - hacked),
    ):
        if seeds:
            lines.append(_means(title, [row for row in found if row.seed in seeds], judges))
    text = (
        f"True reward on held-out prompts, {arguments.answers} answers to each; "
        f"`configs/demo.yaml` with `ppo.kl_coef` {arguments.kl_coef:g}. A cell: iteration of the "
        "choice, its true reward, and by how much it exceeds that of the last policy, with the "
        "95 % bootstrap over prompts. Last lines: the means of these differences with the 95 % "
        "interval of Student's t over seeds. A last policy is called hacked when an earlier "
        "checkpoint has a higher true reward."
    )
    return "\n".join([*lines, "", text])


def _hacked(row: Found) -> bool:
    return row.best > row.last


def _means(title: str, found: Sequence[Found], judges: Sequence[str]) -> str:
    """The last lines: means over seeds."""
    one = [row for row in found if row.judge == judges[0]]
    ends = [f"{mean(row.last for row in one):.3f}", f"{mean(row.best for row in one):.3f}"]
    gains = [[row.gain[0] for row in found if row.judge == judge] for judge in judges]
    cells = [f"**{over_seeds(each)}**" for each in gains]
    return f"| {title}, {len(one)} seeds | {' | '.join(ends + cells)} |"


def _cell(row: Found) -> str:
    if not any(row.gain):
        return f"{row.chosen}: the last"
    value, low, high = Interval(*row.gain)
    return f"{row.chosen}: {row.true_reward:.3f}, {value:+.3f} [{low:+.3f}, {high:+.3f}]"


def over_seeds(values: Sequence[float]) -> str:
    """A mean with its interval by Student's t."""
    if len(values) < 2:
        return f"{mean(values):+.3f}"
    reach: Any = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean(values):+.3f} ± {reach:.3f}"


if __name__ == "__main__":
    main()
