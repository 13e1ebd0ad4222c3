"""Robust rewards, each against a single reward model, in the demo's regimes of known truth.

    python benchmarks/robust_rewards.py --seeds 3 --work .rlhf/bench/regimes

The true reward that PPO gains over SFT by the time that it has moved 7 nats, with one reward model
(LoRA), with all of its weights, with an ensemble of four combined in each way, and with the score
of one reward model shaped in each way. Everything else is equal: votes, seeds, SFT policy, settings
of LoRA and of PPO. Shares --work with overoptimisation.py, which makes the row `single`; what was
measured before is not measured again. Prints the table as Markdown.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path as Folder
from statistics import mean
from typing import Any, NamedTuple

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import regimes
import torch
from regimes import FULL_REWARD, PPO, REWARD, Judge, World
from scipy import stats

from rlhf_core.evaluation.overoptimisation import Path, gain_at
from rlhf_core.settings.rewards import ShapingSection
from rlhf_core.settings.training import RewardModelConfig

MEMBERS = 4
STOP = 12.0  # nats: beyond what is compared, a run only costs time
ENSEMBLE = REWARD.model_copy(update={"members": MEMBERS})


class Variant(NamedTuple):
    """A reward model, and how PPO uses it."""

    title: str
    folder: str  # of the reward model, in the world
    reward: RewardModelConfig
    settings: dict[str, Any]  # of PPO


def _ensemble(how: str) -> Variant:
    title = f"ensemble of {MEMBERS}, {how.replace('_', ' ')}"
    return Variant(title, "ensemble-proxy", ENSEMBLE, {"combine_members": how})


def _shaped(title: str, **shaping: Any) -> Variant:
    return Variant(title, "reward-proxy", REWARD, {"shaping": ShapingSection(**shaping)})


VARIANTS = {
    "single": Variant("one reward model", "reward-proxy", REWARD, {}),
    "full": Variant("one reward model, all weights", "full-proxy", FULL_REWARD, {}),
    "min": _ensemble("min"),
    "mean": _ensemble("mean"),
    "mean_minus_variance": _ensemble("mean_minus_variance"),
    "weight_average": _ensemble("weight_average"),
    "clip": _shaped("score clipped to ± 2", clip=2.0),
    "whiten": _shaped("score whitened, clipped to ± 2", transform="whiten", clip=2.0),
    "sigmoid": _shaped("sigmoid against 4 references", transform="sigmoid", reference_answers=4),
    "length": _shaped("0.05 a token beyond 30", length_limit=30, length_penalty=0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    worlds, names = list(regimes.REGIMES), list(VARIANTS)
    parser.add_argument("--regimes", nargs="+", choices=worlds, default=worlds)
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    about = "passes of the reward models over the votes"
    parser.add_argument("--epochs", type=int, default=REWARD.epochs, help=about)
    parser.add_argument("--kl", type=float, default=7.0, help="nats at which they are compared")
    parser.add_argument("--work", type=Folder, required=True, help="where models are kept")
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    parser.add_argument("--answers", type=int, default=2, help="of a policy to each prompt")
    parser.add_argument("--pool", type=int, default=32, help="answers of SFT to each prompt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = list(dict.fromkeys(["single", *arguments.variants]))
    found: dict[tuple[str, str], list[Path]] = {}
    for name in chosen:
        for seed in range(arguments.seeds):
            for regime in arguments.regimes:
                world = World(arguments.work, regime, seed)
                judge = Judge(world, arguments.prompts, arguments.answers)
                path = learn(judge, name, arguments.pool, arguments.epochs)
                found.setdefault((name, regime), []).append(path)
    for regime in arguments.regimes:
        paths = {name: found[name, regime] for name in chosen}
        print(f"\n## {regimes.TITLES[regime]}\n")
        print("\n".join(table(paths, arguments.kl)))


def learn(judge: Judge, name: str, pool: int, epochs: int) -> Path:
    """A run of PPO with a variant, measured."""
    variant = VARIANTS[name]
    suffix = "" if epochs == REWARD.epochs else f"-{epochs}-epochs"
    settings = variant.reward.model_copy(update={"epochs": epochs})
    reward = judge.world.reward(variant.folder + suffix, "proxy", settings)
    stop = PPO.kl_budget if name == "single" else STOP  # which is drawn in the chart as well
    config = PPO.model_copy(update={"kl_budget": stop, **variant.settings})
    return regimes.on_policy(judge, name + suffix, reward, pool, config)


def table(paths: dict[str, list[Path]], kl: float) -> list[str]:
    """Lines of Markdown: the true gain of each variant, and its ratio to that of `single`."""
    lines = [
        f"| reward | true reward gained at {kl:g} nats, each seed | mean | minus one model's | "
        f"ratio to it | best on the way | last point below {STOP:g} nats, each seed (its nats) |",
        "|---|---|---|---|---|---|---|",
    ]
    single = [gain_at(path, "truth", kl) for path in paths["single"]]
    for name, runs in paths.items():
        gains = [gain_at(path, "truth", kl) for path in runs]
        each = ", ".join("not reached" if g is None else f"{g:.2f}" for g in gains)
        pairs = [(g, s) for g, s in zip(gains, single, strict=True) if None not in (g, s)]
        cells = [VARIANTS[name].title, each, *_compared(pairs)]
        best = mean(max(gain for _, gain in path.series("truth")) for path in runs)
        last = [[p for p in path.points if p.kl.value <= STOP][-1] for path in runs]
        ends = ", ".join(f"{p.gains['truth'].value:.2f} ({p.kl.value:.1f})" for p in last)
        lines.append(f"| {' | '.join(cells)} | {best:.2f} | {ends} |")
    return lines


def _compared(pairs: Sequence[tuple[float | None, float | None]]) -> list[str]:
    """Mean gain, difference and ratio of pairs of gains, with 95 % intervals over seeds."""
    numbers = [(gain, one) for gain, one in pairs if gain is not None and one is not None]
    if not numbers:
        return ["", "", ""]
    gains, ones = zip(*numbers, strict=True)
    ratio = f"{mean(gains) / mean(ones):.2f}" if mean(ones) > 0 else "one model gains nothing"
    return [over_seeds(gains), over_seeds([g - o for g, o in numbers]), ratio]


def over_seeds(values: Sequence[float]) -> str:
    """A mean with its interval by Student's t."""
    if len(values) < 2:
        return f"{mean(values):.2f}"
    reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean(values):.2f} ± {reach:.2f}"


if __name__ == "__main__":
    main()
