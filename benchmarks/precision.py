"""Does a policy learn as well in bfloat16 as in float32? In the demo's world, and SmolLM2.

    python benchmarks/precision.py --seeds 3 --work .rlhf/bench/precision
    python benchmarks/precision.py --seeds 3 --work .rlhf/bench/precision \\
        --model .rlhf/bench/smol --reward .rlhf/bench/smol-reward

The first trains, for each seed and precision, an SFT policy, a reward model and a policy by PPO,
all of them in that precision, from the same votes. What is compared is computed in float32: the
true reward of answers to held-out prompts. The second trains SmolLM2 by PPO for a friendly answer,
as `learning.py` does, and compares the reward of the last third of the iterations. What was
measured before is not measured again. Prints the table as Markdown.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import learning
import regimes
import torch
from regimes import FULL_REWARD, PPO, SAMPLING, SFT, Judge, World

from rlhf_core.backbone.networks import Policy
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.stages.sft import train_sft
from rlhf_core.work import Work

PRECISIONS = ("float32", "bfloat16")
VOTES = "clean"
DEMO = {  # what is measured, and how it is written
    "held-out loss of SFT (nats)": ".3f",
    "true reward of SFT": ".2f",
    "accuracy of the reward model": ".3f",
    "true reward of PPO": ".2f",
    "gain of PPO": ".2f",
    "KL to SFT (nats)": ".1f",
}
SMOL = {"reward, first third": ".3f", "reward, last third": ".3f", "last KL (nats)": ".1f"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--model", type=Path, help="SmolLM2 as models.py wrote it; else the demo")
    parser.add_argument("--reward", type=Path, help="its neighbour NAME-reward")
    parser.add_argument("--iterations", type=int, default=PPO.iterations, help="of PPO")
    parser.add_argument("--batch", type=int, default=16, help="of SmolLM2: responses an iteration")
    parser.add_argument("--response-length", type=int, default=16, help="of SmolLM2, tokens")
    parser.add_argument("--prompts", type=int, default=192, help="of the demo: held-out prompts")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    of_demo = arguments.model is None
    measure, columns = (demo, DEMO) if of_demo else (smol, SMOL)
    lines = [
        once(arguments, precision, seed, measure)
        for seed in range(arguments.seeds)
        for precision in PRECISIONS
    ]
    print("\n".join(table(lines, columns)))


def once(
    arguments: argparse.Namespace,
    precision: str,
    seed: int,
    measure: Callable[[argparse.Namespace, str, int], dict[str, float]],
) -> dict[str, Any]:
    """What was measured before of a seed and a precision, or is measured now: a line of JSON."""
    path = arguments.work / "results.jsonl"
    key = {"what": measure.__name__, "precision": precision, "seed": seed}
    key |= {"iterations": arguments.iterations}
    for line in path.read_text().splitlines() if path.is_file() else ():
        record: dict[str, Any] = json.loads(line)
        if {name: record[name] for name in key} == key:
            return record
    begun = time.process_time()
    found = measure(arguments, precision, seed)
    record = {**key, **found, "cpu_seconds": round(time.process_time() - begun, 1)}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), file=sys.stderr)
    return record


def demo(arguments: argparse.Namespace, precision: str, seed: int) -> dict[str, float]:
    """SFT, reward model and PPO in one precision; the answers are measured in float32."""
    world = World(arguments.work, VOTES, seed)
    folder = arguments.work / f"seed-{seed}" / precision
    roles = ("sft", "reward", "policy", "critic")
    models = {role: folder / role for role in roles}
    sections = {"sampling": SAMPLING, "model": regimes.MODEL}

    def work(outputs: tuple[str, ...], *inputs: str) -> Work:
        given = {"data": world.data, **{role: models[role] for role in inputs}}
        made = {role: models[role] for role in outputs}
        return Work(inputs=given, outputs=made, sections=sections, seed=seed)

    narrow = {"precision": precision}
    learnt = train_sft(SFT.model_copy(update=narrow), work(("sft",)))
    judged = train_reward_model(FULL_REWARD.model_copy(update=narrow), work(("reward",), "sft"))
    config = PPO.model_copy(
        update={**narrow, "iterations": arguments.iterations, "keep_every": 0, "kl_budget": 0}
    )
    train_ppo(config, work(("policy", "critic"), "sft", "reward"))
    judge = Judge(world, arguments.prompts, each=4)
    judge.sft, _ = Policy.load(models["sft"], "cpu")
    said = {
        role: judge.texts(Policy.load(models[role], "cpu")[0], judge.each, role)
        for role in ("sft", "policy")
    }
    before, after = (float(said[role].truth.mean()) for role in ("sft", "policy"))
    values = (
        learnt.held_out_loss,
        before,
        judged.accuracy,
        after,
        after - before,
        float(said["policy"].kl.mean()),
    )
    return dict(zip(DEMO, values, strict=True))


def smol(arguments: argparse.Namespace, precision: str, seed: int) -> dict[str, float]:
    """PPO of SmolLM2 with all weights for the sentiment of the answer."""
    arguments.seed = seed
    settings: dict[str, Any] = learning.WAYS_TO_LEARN["all weights"] | {"precision": precision}
    curve, kl, _ = learning.learn(arguments, settings)
    third = max(len(curve) // 3, 1)
    return dict(zip(SMOL, (mean(curve[:third]), mean(curve[-third:]), kl), strict=True))


def table(lines: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Lines of Markdown: each seed, and how far bfloat16 is above float32."""
    seeds = sorted({line["seed"] for line in lines})
    of = {(line["precision"], line["seed"]): line for line in lines}
    heads = [f"seed {seed}: float32 / bfloat16" for seed in seeds]
    rows = [f"| | {' | '.join(heads)} | bfloat16 - float32 |", "|---" * (len(seeds) + 2) + "|"]
    for name, form in columns.items():
        pairs = [tuple(of[p, seed][name] for p in PRECISIONS) for seed in seeds]
        gaps = [narrow - wide for wide, narrow in pairs]
        gap = f"{mean(gaps):+{form}}"
        gap += f" ± {stdev(gaps) / len(gaps) ** 0.5:{form}}" if len(gaps) > 1 else ""
        shown = [f"{wide:{form}} / {narrow:{form}}" for wide, narrow in pairs]
        rows.append(f"| {name} | {' | '.join(shown)} | {gap} |")
    return rows


if __name__ == "__main__":
    main()
