"""The demo's world in three regimes: what a policy gains, and what it only seems to gain.

    python benchmarks/overoptimisation.py --regimes clean flips shared --seeds 3 \\
        --work .rlhf/bench/regimes --output docs/images

In each regime and for each seed: SFT, a reward model on one half of the votes (the proxy), another
on the other half (held out), and PPO against the proxy with a low price of KL; policies along the
way, and best-of-n of SFT, are measured on held-out prompts by proxy, held-out reward model and
truth. Prints the fits and a table, and draws the chart. What is made is kept in --work, so that a
second call only measures what is missing; a line of JSON for each run goes to results.jsonl there.
"""

import argparse
from itertools import product
from pathlib import Path as Folder

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import regimes
import torch
from regimes import Judge, World

from rlhf_core.evaluation.chart import Chart, draw
from rlhf_core.evaluation.overoptimisation import MEASURES, Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--regimes", nargs="+", choices=list(regimes.REGIMES), default=list(regimes.REGIMES)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Folder, required=True, help="where models are kept")
    parser.add_argument("--output", type=Folder, help="folder of the picture")
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    parser.add_argument("--answers", type=int, default=2, help="of a policy to each prompt")
    parser.add_argument("--pool", type=int, default=32, help="answers of SFT to each prompt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    paths: dict[str, list[Path]] = {regime: [] for regime in arguments.regimes}
    for seed, regime in product(range(arguments.seeds), arguments.regimes):
        world = World(arguments.work, regime, seed)
        judge = Judge(world, arguments.prompts, arguments.answers)
        proxy = world.reward("reward-proxy", "proxy", regimes.REWARD)
        paths[regime] += [
            regimes.on_policy(judge, "single", proxy, arguments.pool),
            regimes.best_of_n(judge, "single", proxy, arguments.pool),
        ]
    charts = [
        Chart(
            title=f"{regimes.TITLES[regime]}, {arguments.seeds} seeds",
            paths=tuple(found),
            kl_budget=regimes.PPO.kl_budget,
        )
        for regime, found in paths.items()
    ]
    for chart in charts:
        print(f"\n## {chart.title}\n")
        print("\n".join(table(chart)))
        print("\n" + "\n".join(f"* {fit.sentence()}" for fit in chart.fits()))
    if arguments.output is not None:
        draw(charts).savefig(arguments.output / "overoptimisation.png", dpi=100)


def table(chart: Chart) -> list[str]:
    """Lines of Markdown: the last policy of each run, and its best on the way by the truth."""
    lines = [
        "| run | KL at the end | reward model | held-out | truth | best truth (its KL) |",
        "|---|---|---|---|---|---|",
    ]
    for path in chart.of("on_policy"):
        last, best = path.points[-1], max(path.points, key=lambda p: p.gains["truth"].value)
        cells = [last.kl, *(last.gains[measure] for measure in MEASURES)]
        texts = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in cells]
        peak = f"{best.gains['truth'].value:.2f} ({best.kl.value:.1f})"
        lines.append(f"| {path.name} | {' | '.join(texts)} | {peak} |")
    return lines


if __name__ == "__main__":
    main()
