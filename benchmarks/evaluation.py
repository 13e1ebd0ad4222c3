"""How fast is the stage `evaluation`, compared with an older commit? CPU time of whole stages.

    git worktree add --detach ../before 2b60228
    python benchmarks/evaluation.py --before ../before --work .rlhf/bench/evaluation
    python benchmarks/evaluation.py --before ../before --work .rlhf/bench/evaluation \\
        --model .rlhf/bench/smol --reward .rlhf/bench/smol-reward --rounds 3

The first is the demo's evaluation: models of its world, which are trained once, and its settings.
The second evaluates SmolLM2 against itself with a little noise. Both trees take turns, in separate
processes, on the same models, prompts and seed. Prints one line of JSON: the median of CPU seconds
on either side, the median of their ratios, the passes over a text that each side computed, and how
far the figures of the two reports are apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # as the command line does; in the tree on the path
    import_module("flows.local.allocator").keep_memory()

TREE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a working tree of the older commit")
    parser.add_argument("--work", type=Path, help="where models are kept")
    parser.add_argument("--model", type=Path, help="SmolLM2 as models.py wrote it; else the demo")
    parser.add_argument("--reward", type=Path, help="its neighbour NAME-reward")
    parser.add_argument("--precision", default="float32", help="of evaluation.precision")
    parser.add_argument("--before-precision", help="that of the older commit, if it is another")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=128, help="at most; SmolLM2 has 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="profile this tree and no other")
    arguments = parser.parse_args()
    if arguments.once is not None:
        print(json.dumps(measure(json.loads(arguments.once))))
        return
    if arguments.work is None or (arguments.before is None and not arguments.profile):
        parser.error("--work and --before are needed")
    arguments.work.mkdir(parents=True, exist_ok=True)
    task = smol(arguments) if arguments.model else demo(arguments)
    task |= {"threads": arguments.threads, "precision": arguments.precision}
    task["config"] |= {"prompts": arguments.prompts}
    task["sampling"] |= {"temperature": arguments.temperature}
    if arguments.profile:
        print(json.dumps(measure(task | {"profile": True})))
        return
    tasks = {"now": task, "before": dict(task)}
    tasks["before"]["precision"] = arguments.before_precision or arguments.precision
    sides: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    for number in range(arguments.rounds):
        order = [("before", arguments.before), ("now", TREE)]
        for side, tree in order if number % 2 == 0 else order[::-1]:
            sides[side].append(run(tree, tasks[side]))
            print(side, sides[side][-1]["cpu_seconds"], file=sys.stderr)
    print(json.dumps(compared(sides)))


def run(tree: Path, task: dict[str, Any]) -> dict[str, Any]:
    """One evaluation by the code of a working tree."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--once", json.dumps(task)]
    threads = str(task["threads"])
    paths = {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        command, env=os.environ | paths, cwd=tree, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluate once in this process, by whatever tree its modules come from."""
    import torch

    stage = import_module("rlhf_core.stages.evaluation")
    networks = import_module("rlhf_core.backbone.networks")
    work = import_module("rlhf_core.work").Work
    torch.set_num_threads(task["threads"])
    passes = {"texts": 0, "calls": 0}
    hidden = networks.Network.hidden

    def counted(network: Any, packed: Any) -> Any:
        passes["texts"] += len(packed.lengths)
        passes["calls"] += 1
        return hidden(network, packed)

    networks.Network.hidden = counted
    config = stage.EvaluationConfig(**task["config"], precision=task["precision"])
    sections = {
        "sampling": stage.SamplingConfig(**task["sampling"]),
        "judge": stage.JudgeConfig(),
    }
    inputs = {role: Path(folder) for role, folder in task["inputs"].items()}
    arguments = work(inputs=inputs, sections=sections, seed=1)
    # The stages before it have drawn figures and read models in the process of a pipeline too.
    stage.evaluate(config.model_copy(update={"prompts": 2, "best_of": 1}), arguments)
    passes |= {"texts": 0, "calls": 0}
    if task.get("profile"):
        profile(lambda: stage.evaluate(config, arguments))
    begun = time.process_time()
    report = stage.evaluate(config, arguments)
    seconds = time.process_time() - begun
    return {"cpu_seconds": round(seconds, 2), "passes": passes, "summary": report.summary()}


def profile(call: Any) -> None:
    """Print where the CPU time goes, by function."""
    import cProfile
    import pstats

    seen = cProfile.Profile(time.process_time)
    seen.runcall(call)
    pstats.Stats(seen, stream=sys.stderr).sort_stats("cumulative").print_stats(150)


def compared(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and the figures that differ most."""
    seconds = {side: [one["cpu_seconds"] for one in runs] for side, runs in sides.items()}
    ratios = [old / new for old, new in zip(seconds["before"], seconds["now"], strict=True)]
    before, now = (sides[side][0]["summary"] for side in ("before", "now"))
    gaps = {name: abs(before[name] - now[name]) for name in before.keys() & now.keys()}
    furthest = sorted(gaps, key=lambda name: -gaps[name])[:3]
    return {
        "cpu_seconds": {side: median(values) for side, values in seconds.items()},
        "ratio": round(median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
        "passes": {side: runs[0]["passes"] for side, runs in sides.items()},
        "figures": len(gaps),
        "equal figures": sum(gap == 0 for gap in gaps.values()),
        "furthest": {name: gaps[name] for name in furthest},
        "only on one side": sorted(before.keys() ^ now.keys()),
    }


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    """The evaluation of configs/demo.yaml, with models of its world."""
    import regimes

    world = regimes.World(arguments.work, "clean", 0)
    reward = world.reward("full-proxy", "proxy", regimes.FULL_REWARD)
    policies = world.policies("full", reward, regimes.PPO)
    inputs = {"data": world.data, "sft": world.sft, "reward": reward, "policy": policies / "000010"}
    return {
        "inputs": {role: str(folder.resolve()) for role, folder in inputs.items()},
        "config": {"samples_per_prompt": 4, "true_reward": "rlhf_core.simulation:true_reward"},
        "sampling": {"max_prompt_length": 24, "max_new_tokens": 48},
    }


def smol(arguments: argparse.Namespace) -> dict[str, Any]:
    """SmolLM2 as the SFT policy, and with noise as the policy; 16 prompts of some 100 tokens."""
    import pandas as pd
    import torch

    from rlhf_core.backbone.networks import Policy
    from rlhf_core.data.prepared import COLUMNS, write_table

    policy, data = (arguments.work / f"{arguments.model.name}-{name}" for name in ("noise", "data"))
    if not policy.exists():
        loaded, tokenizer = Policy.load(arguments.model, "cpu")
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=draws))
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            loaded.save(tokenizer, Path(folder) / "policy", {})
            (Path(folder) / "policy").rename(policy)
    if not data.exists():
        data.mkdir()
        places = ("hotel", "museum", "garden", "train", "market", "library", "harbour", "theatre")
        request = (
            "Please read this note of a traveller and answer it in a few friendly sentences. We "
            "came to the {0} late on a {1} evening, tired and wet, since it had rained all day and "
            "the bus from the station was full. The people at the door were kind and showed us "
            "where to sit; somebody brought tea without being asked. Later the lights went out for "
            "an hour, and an old man told stories about the town until they came back. What would "
            "you say to a friend who wants to visit the {0} next {1}, and why?"
        )
        prompts = [request.format(place, time) for place in places for time in ("spring", "autumn")]
        rows = {"id": [f"prompt-{n}" for n in range(len(prompts))], "prompt": prompts}
        for kind, columns in COLUMNS.items():
            for split in ("train", "eval"):
                filled = kind == "prompts" and split == "eval"
                table = pd.DataFrame(rows) if filled else pd.DataFrame(columns=list(columns))
                write_table(table, data, kind, split)
    inputs = {
        "data": data,
        "sft": arguments.model,
        "reward": arguments.reward,
        "policy": policy,
    }
    return {
        "inputs": {role: str(folder.resolve()) for role, folder in inputs.items()},
        "config": {"samples_per_prompt": 4, "base": False},
        "sampling": {"max_prompt_length": 192, "max_new_tokens": 24, "batch_size": 64},
    }


if __name__ == "__main__":
    main()
