"""Does PPO with LoRA on one trunk learn as well as with all weights? Reward at equal samples.

    python benchmarks/learning.py --model .rlhf/bench/smol --reward .rlhf/bench/smol-reward \\
        --output docs/images

The same prompts, seed and number of responses; the reward is the sentiment of the response, which
no model has to learn first, so that only the optimisation differs. Prints one line of JSON and
draws the curves.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import torch

from rlhf_core.figures import BLUE, ORANGE, blank
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import PPOConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.work import Work

PLACES = ("hotel", "restaurant", "film", "phone", "museum", "train", "book", "garden")
WAYS = ("One sentence about the {}:", "My opinion of the {} is that it", "The {} was", "This {}")
WAYS_TO_LEARN = {
    "all weights": {"learning_rate": 3e-5, "critic_learning_rate": 3e-5},
    "LoRA": {
        "learning_rate": 3e-4,
        "critic_learning_rate": 3e-4,
        "lora_rank": 16,
        "lora_layers": 8,
    },
}


class Told(MemoryLogger):
    """Prints each score immediately, since the run takes a while."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        super().metrics(values, step)
        if "objective/score" in values:
            score, kl = values["objective/score"], values["objective/kl"]
            number = len(self.series("objective/score"))
            print(f"iteration {number:3}  score {score:6.3f}  KL {kl:6.3f}", file=sys.stderr)


def sentiment(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """How friendly a text is, from -1 to 1."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reward", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--response-length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {name: learn(arguments, settings) for name, settings in WAYS_TO_LEARN.items()}
    draw({name: curve for name, (curve, _, _) in found.items()}, arguments)
    line = {
        name: {
            "first_third": mean(curve[: len(curve) // 3]),
            "last_third": mean(curve[-(len(curve) // 3) :]),
            "kl": kl,
            "seconds": round(seconds, 1),
        }
        for name, (curve, kl, seconds) in found.items()
    }
    print(json.dumps({"samples": arguments.batch * arguments.iterations, **line}))


def learn(
    arguments: argparse.Namespace, settings: dict[str, float]
) -> tuple[list[float], float, float]:
    """Mean reward of each iteration, the last KL, and how long it took."""
    logger = Told()
    config = PPOConfig(
        iterations=arguments.iterations,
        rollout_size=arguments.batch,
        batch_size=arguments.batch // 2,
        epochs=4,
        kl_coef=0.02,
        rewards=(RewardTerm(source="learning:sentiment"),),
        **settings,
    )
    sampling = SamplingConfig(max_prompt_length=16, max_new_tokens=arguments.response_length)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [way.format(place) for place in PLACES for way in WAYS]
        (folder / "prompts.train.jsonl").write_text(
            "".join(json.dumps({"id": str(i), "prompt": row}) + "\n" for i, row in enumerate(rows))
        )
        work = Work(
            inputs={"sft": arguments.model, "reward": arguments.reward, "data": folder},
            outputs={kind: folder / kind for kind in ("policy", "critic")},
            sections={"sampling": sampling},
            seed=arguments.seed,
            logger=logger,
        )
        train_ppo(config, work)
    values = [values for _, values in logger.history if "objective/score" in values]
    curve = [value["objective/score"] for value in values]
    return curve, values[-1]["objective/kl"], time.perf_counter() - begun


def draw(curves: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    figure = blank(6.4, 4.0)
    axes = figure.add_subplot()
    for (name, curve), color in zip(curves.items(), (BLUE, ORANGE), strict=True):
        samples = [arguments.batch * number for number in range(1, len(curve) + 1)]
        axes.plot(samples, curve, color=color, alpha=0.3)
        smooth = [mean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
        axes.plot(samples, smooth, color=color, label=f"{name}, mean of 5 iterations")
    axes.set_title("PPO on SmolLM2-135M: reward at equal samples", loc="left", fontsize=11)
    axes.set_xlabel("responses")
    axes.set_ylabel("sentiment of the response")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(arguments.output / "lora_learning.png", dpi=100)


if __name__ == "__main__":
    main()
