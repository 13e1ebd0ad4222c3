"""A world so small that a training stage takes a second, and every training stage on it.

What the tests of invariants, resume and recorded trajectories run.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from rlhf_core.config import Section
from rlhf_core.data.prepared import write_table
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig
from rlhf_core.stages.table import STAGES, run_stage
from rlhf_core.types import PromptBatch, Report, Responses, Rollout
from rlhf_core.work import Work

MODEL = ModelConfig(fresh=FreshModelConfig(layers=2, width=16, heads=2, context=32, vocab_size=290))
SAMPLING = SamplingConfig(max_prompt_length=6, max_new_tokens=8, temperature=0.9, batch_size=3)
JUDGED = {"sampling": SAMPLING, "judge": JudgeConfig()}  # the sections of an evaluation
THINGS = ("room", "film", "bed", "song")
GOOD, BAD = ("good", "warm"), ("bad", "cold")

STEPS = {"learning_rate": 3e-3, "batch_size": 8, "micro_batch_size": 3}
UPDATES = {
    "learning_rate": 1e-3,
    "iterations": 3,
    "rollout_size": 8,
    "batch_size": 4,
    "micro_batch_size": 3,
    "epochs": 2,
    "update_kl_limit": 0.01,  # some iterations end early
}
KL = {"kl_horizon": 100, "kl_target": 0.5}
LORA = {"lora_rank": 2, "lora_layers": 1}
SEVERAL = (RewardTerm(weight=0.5), RewardTerm(source="tiny:brevity", weight=0.1))

CONFIGS: dict[str, Section] = {
    "sft": SFTConfig(**STEPS, epochs=4, max_length=14, evaluations=4),
    "reward_model": RewardModelConfig(**STEPS, epochs=4, max_length=14, normalization_samples=8),
    "reward_model_members": RewardModelConfig(
        **STEPS, **LORA, epochs=4, max_length=14, normalization_samples=8, members=3
    ),
    "ppo": PPOConfig(**UPDATES, **KL, critic_learning_rate=2e-4),
    "ppo_lora": PPOConfig(**UPDATES, **KL, **LORA, critic_learning_rate=2e-4),
    "rloo": RLOOConfig(**UPDATES, **KL, group_size=2),
    "grpo": GRPOConfig(**UPDATES, group_size=4, rewards=SEVERAL),
    "dpo": DPOConfig(**STEPS, epochs=4, max_length=14),
}


def change(config, **settings):
    """A config with some other settings."""
    return type(config)(**dict(config) | settings)


def brevity(prompts, responses):
    """A reward that no model gives."""
    return [-len(response) for response in responses]


@dataclass(frozen=True)
class World:
    """Prepared data and the models that stages start from."""

    data: Path
    sft: Path
    reward: Path
    reward_adapter: Path  # trained as an adapter of `sft`
    ensemble: Path  # of three members, trained as adapters of `sft`

    @classmethod
    def build(cls, directory: Path) -> "World":
        """Write the data and train the models, in a second or two."""
        directory.mkdir(parents=True, exist_ok=True)
        names = ("data", "sft", "reward", "reward_adapter", "ensemble")
        world = cls(*(directory / name for name in names))
        write_tables(world.data)
        longer = {"epochs": 12, "learning_rate": 1e-2}
        run(change(CONFIGS["sft"], **longer), world, world.sft)
        longer["epochs"] = 3
        run(change(CONFIGS["reward_model"], **longer), world, world.reward)
        run(change(CONFIGS["reward_model"], **longer, **LORA), world, world.reward_adapter)
        run(change(CONFIGS["reward_model_members"], **longer), world, world.ensemble)
        return world


def write_tables(data: Path) -> None:
    """Prompts, demonstrations and preferences; some demonstrations praise and some do not."""
    data.mkdir()
    for split, articles in (("train", ("the", "a", "this")), ("eval", ("my",))):
        prompts = [f"{article} {thing}" for article in articles for thing in THINGS]
        words = [(one, two) for one in GOOD + BAD for two in GOOD + BAD]
        said = [f" is {one} and {two}" for one, two in words]
        shown = [(p, said[(5 * i) % len(said)]) for i, p in enumerate(prompts * 2)]
        votes = [
            (p, *cast(i, f" is {GOOD[i % 2]}", f" is {BAD[i // 2 % 2]} and {BAD[0]}"), i % 3 / 10)
            for i, p in enumerate(prompts * 2)
        ]
        for kind, columns, rows in (
            ("prompts", ["prompt"], [(p,) for p in prompts]),
            ("demonstrations", ["prompt", "response"], shown),
            ("preferences", ["prompt", "response_a", "response_b", "vote", "margin"], votes),
        ):
            frame = pd.DataFrame(rows, columns=columns)
            frame.insert(0, "id", [f"{split}-{i}" for i in range(len(frame))])
            if kind == "preferences":
                people = [("x", "y", "z")[i % 3] for i in range(len(frame))]
                first = [("a", "b", "")[i // 3 % 3] for i in range(len(frame))]
                frame = frame.assign(annotator=people, shown_first=first, gold=False)
                frame = frame.assign(time="", source="")
            write_table(frame, data, kind, split)


def cast(number: int, better: str, worse: str) -> tuple[str, str, str]:
    """Two answers and the vote on them: a tie now and then, and the better one on either side."""
    if number % 7 == 0:
        return better, worse, "tie"
    return (worse, better, "b") if number % 2 else (better, worse, "a")


def work_of(
    stage: str,
    world: World,
    output: Path,
    *,
    lora: bool = False,
    sampling: SamplingConfig = SAMPLING,
    model: ModelConfig = MODEL,
    **settings: object,
) -> Work:
    """What the stage table says that a stage is called with, in this world."""
    spec = STAGES[stage]
    reward = world.reward_adapter if lora else world.reward
    inputs = {"data": world.data, "sft": world.sft, "reward": reward}
    roles = {*spec.inputs, *(role for role in spec.optional_inputs if role in inputs)}
    kinds = spec.outputs + spec.optional_outputs
    sections = {"sampling": sampling, "model": model}
    return Work(
        inputs={role: inputs[role] for role in sorted(roles)},
        # A model on its own lies in `output` itself.
        outputs={kind: output if (kind,) == spec.outputs else output / kind for kind in kinds},
        sections={name: sections[name] for name in spec.sections},
        **settings,
    )


def stage_of(config: Section) -> str:
    """The stage whose settings these are."""
    return next(name for name, spec in STAGES.items() if isinstance(config, spec.config))


def run(config: Section, world: World, output: Path, **settings: object) -> Report:
    """The stage of a config, with its models in `output`."""
    stage, lora = stage_of(config), bool(getattr(config, "lora_rank", 0))
    return run_stage(stage, config, work_of(stage, world, output, lora=lora, **settings))


def digest(output: Path) -> dict[str, str]:
    """SHA-256 of all weights below a folder."""
    files = sorted(output.rglob("*.safetensors"))
    assert files
    return {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def newest(directory: Path) -> dict[str, dict]:
    """The state in the newest checkpoint of a folder."""
    folder = max(directory.glob("step-" + 8 * "[0-9]"))
    with torch.serialization.safe_globals([PromptBatch, Responses, Rollout]):
        return torch.load(folder / "state.pt", weights_only=True)


def first_gradients(directory: Path, learner: str) -> dict[str, torch.Tensor]:
    """The gradient of the first update, after clipping, from the checkpoint behind it.

    AdamW's first moment starts at 0, so that after one step it is (1 - 0.9) times the gradient.
    """
    state = newest(directory)["learners"][learner]
    matrices = [name for name, p in state["parameters"].items() if p.ndim >= 2]
    vectors = [name for name, p in state["parameters"].items() if p.ndim < 2]
    moments = state["adamw"]["state"]
    assert {m["step"].item() for m in moments.values()} == {1}
    return {name: moments[i]["exp_avg"] / 0.1 for i, name in enumerate(matrices + vectors)}


def trajectory(stage: str, world: World, output: Path) -> list[dict[str, float]]:
    """The metrics of a stage, step by step, and its report."""
    log = MemoryLogger()
    report = run(CONFIGS[stage], world, output, logger=log)
    return [*(values for _, values in log.history), report.summary()]
