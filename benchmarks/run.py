"""This project's training on a given amount of work. Prints one line of JSON; `--peer` runs TRL.

    python benchmarks/run.py ppo --model DIR --reward DIR --batch 16
    python benchmarks/run.py sft --model DIR --batch 8 --peer

The stages' own functions run on token ids of the right number, so nothing but training is measured:
no data are read, no report is written. Phases of PPO: generate; score (log-probabilities of policy
and reference, values, rewards, advantages); update (the epochs of policy and critic).
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from flows.local import allocator  # before torch is imported

if __name__ == "__main__":
    allocator.keep_memory()

import torch
from report import Clock, report
from work import add_arguments, pairs, prompts, sft_rows

from rlhf_core.backbone.networks import Network, Policy, ScalarModel, start_adapter
from rlhf_core.backbone.sampling import PolicySampler
from rlhf_core.data.pairs import Pair
from rlhf_core.engines.engine import Builtin
from rlhf_core.onpolicy.experience import Collector, PromptTable
from rlhf_core.rewards.scoring import load_reward
from rlhf_core.seeding import generator
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.training import TrainingSection
from rlhf_core.stages import ppo, reward_model, sft
from rlhf_core.training.learner import Learner, adapt
from rlhf_core.training.ranks import Ranks
from rlhf_core.work import Work

PEERS = {"ppo": "peer-ppo", "sft": "peer", "reward": "peer"}  # their environments, see README.md


def run_ppo(arguments: argparse.Namespace, clock: Clock) -> Iterator[int]:
    """One iteration after another; yields the response tokens of each."""
    minibatch = arguments.batch // arguments.minibatches
    config = ppo.PPOConfig(
        rollout_size=arguments.batch,
        batch_size=minibatch,
        micro_batch_size=arguments.micro_batch or minibatch,
        epochs=arguments.epochs,
        update_kl_limit=0,
        precision=arguments.dtype,
        lora_rank=arguments.lora_rank,
        lora_layers=arguments.lora_layers,
    )
    work = Work(
        inputs={"sft": arguments.model, "reward": arguments.reward},
        seed=arguments.seed,
        device=arguments.device,
    )
    networks = ppo.load_networks(config, work)
    networks.policy.model.config.eos_token_id = -1  # no token ends a response
    policy, critic = (Learner(n, config, 1000) for n in (networks.policy, networks.critic))
    sampling = SamplingConfig(
        max_prompt_length=arguments.prompt_length,
        max_new_tokens=arguments.response_length,
        batch_size=arguments.batch,
    )
    collector = TimedCollector(
        policy=networks.policy,
        reference=networks.reference,
        critic=networks.critic,
        reward=load_reward(
            config.rewards,
            {},
            networks.tokenizer,
            work.device,
            config.precision,
            max_length=sampling.max_length,
            loaded=networks.rewards,
        ),
        engine=Builtin(
            PolicySampler(networks.policy, sampling.temperature), networks.policy, sampling
        ),
        config=config,
        sampling=sampling,
        draws=generator(arguments.seed, "benchmark"),
        ranks=Ranks(),
    )
    optimise = partial(
        ppo.optimise,
        policy=policy,
        critic=critic,
        config=config,
        temperature=sampling.temperature,
        ranks=Ranks(),
        check=lambda: None,
    )
    vocabulary = networks.policy.model.config.vocab_size
    rows = prompts(
        arguments.batch * (arguments.warmup + arguments.iterations),
        arguments.prompt_length,
        vocabulary,
        arguments.seed,
    )
    clock.tokens_of = lambda _: arguments.batch * arguments.response_length
    for start in range(0, len(rows), arguments.batch):
        batch = rows[start : start + arguments.batch]
        clock.begin("generate")
        rollout = collector.timed(clock).roll_out(
            PromptTable([""] * len(batch), batch, list(range(len(batch))))
        )
        targets, _ = ppo.assign_credit(rollout, config.kl_coef, config=config)
        clock.begin("update")
        for epoch in range(arguments.epochs):
            for number in range(arguments.minibatches):
                picked = list(range(number * minibatch, (number + 1) * minibatch))
                optimise(rollout, targets, picked, first=epoch == number == 0)
        clock.begin(None)
        yield int(rollout.responses.mask.sum())
    if arguments.deterministic:
        clock.about["digest"] = weights_digest(networks.policy, networks.critic)


def weights_digest(*networks: Network) -> str:
    """SHA-256 of all weights, to the bit."""
    sha = hashlib.sha256()
    for network in networks:
        for name, weight in sorted(network.state_dict().items()):
            sha.update(name.encode())
            sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


class TimedCollector(Collector):
    """Starts the clock's next phase when the texts are sampled and scoring begins."""

    clock: Clock

    def timed(self, clock: Clock) -> "TimedCollector":
        object.__setattr__(self, "clock", clock)
        return self

    def _score(self, *inputs: Any) -> Any:
        if self.clock.phase == "generate":
            self.clock.begin("score")
        return super()._score(*inputs)


def run_sft(arguments: argparse.Namespace, clock: Clock) -> Iterator[int]:
    """One optimizer step after another; yields the tokens of each."""
    policy, _ = Policy.load(arguments.model, arguments.device, arguments.dtype)
    steps = arguments.warmup + arguments.iterations
    rows = sft_rows(64 * arguments.batch * steps, policy.model.config.vocab_size, arguments.seed)
    examples = [sft.Example(prompt + completion, len(prompt)) for prompt, completion in rows]
    room = arguments.batch * arguments.max_length if arguments.packing else None
    batches = texts_by_the_step(examples, steps, arguments.batch, room)
    largest = max(map(len, batches))
    config = sft.SFTConfig(
        batch_size=largest,
        micro_batch_size=arguments.micro_batch or largest,
        lora_rank=arguments.lora_rank,
        lora_layers=arguments.lora_layers,
    )
    learner = learner_of(policy, config, "sft")
    clock.tokens_of = lambda step: sum(len(example.ids) for example in batches[step])
    for batch in batches:
        clock.begin("update")
        sft.accumulate(learner, batch, config, Ranks(), lambda: None)
        learner.step()
        clock.begin(None)
        yield sum(len(example.ids) for example in batch)


def texts_by_the_step(
    examples: list[sft.Example], steps: int, texts: int, room: int | None
) -> list[list[sft.Example]]:
    """As many texts in a step as configured, or as many as fill the blocks of the peer."""
    batches: list[list[sft.Example]] = []
    waiting = iter(examples)
    for _ in range(steps):
        batch = [next(waiting) for _ in range(texts)]
        while room is not None and sum(len(e.ids) for e in batch) < 0.95 * room:
            batch.append(next(waiting))
        batches.append(batch)
    return batches


def run_reward(arguments: argparse.Namespace, clock: Clock) -> Iterator[int]:
    """One optimizer step after another; yields the tokens of each, both texts of a pair counted."""
    model = ScalarModel.from_policy(arguments.model, generator(arguments.seed, "head"))
    model.to(arguments.device).precision = arguments.dtype
    rows = pairs(
        arguments.batch * (arguments.warmup + arguments.iterations),
        model.model.config.vocab_size,
        arguments.seed,
    )
    config = reward_model.RewardModelConfig(
        batch_size=arguments.batch,
        micro_batch_size=arguments.micro_batch or arguments.batch,
        lora_rank=arguments.lora_rank,
        lora_layers=arguments.lora_layers,
    )
    learner = learner_of(model, config, "reward")
    clock.tokens_of = lambda step: sum(
        len(2 * prompt) + len(chosen) + len(rejected)
        for prompt, chosen, rejected in rows[step * arguments.batch :][: arguments.batch]
    )
    for start in range(0, len(rows), arguments.batch):
        batch = [
            Pair(p + chosen, p + rejected, (len(p), len(p)), False, 0.0, False)
            for p, chosen, rejected in rows[start : start + arguments.batch]
        ]
        clock.begin("update")
        reward_model.accumulate(learner, batch, config, Ranks(), lambda: None)
        learner.step()
        clock.begin(None)
        yield sum(len(pair.chosen) + len(pair.rejected) for pair in batch)


def learner_of(network: Network, config: TrainingSection, adapter: str) -> Learner:
    """The settings of what is trained: all weights, or an adapter."""
    adapt(network, config, adapter, seed=0, stream=adapter)
    return Learner(network, config, 1000)


def adapter_reward(arguments: argparse.Namespace, folder: Path) -> Path:
    """A reward model that is an adapter of the policy, so that all networks share one trunk."""
    _, tokenizer = Policy.load(arguments.model, "cpu")
    model = ScalarModel.from_policy(arguments.model, generator(arguments.seed, "head"))
    rank, layers = arguments.lora_rank, arguments.lora_layers
    start_adapter(model, "reward", rank=rank, alpha=32, layers=layers, seed=0)
    model.save(tokenizer, folder, kind="reward", base=arguments.model)
    return folder


def run_peer(work: str) -> None:
    """The peer on the same work: the same arguments in its own environment."""
    python = Path(__file__).parent / f".{PEERS[work]}" / "bin" / "python"
    script = Path(__file__).with_name(f"peer_{work}.py")
    rest = [argument for argument in sys.argv[2:] if argument != "--peer"]
    os.execv(python, [str(python), str(script), *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    works = {"ppo": run_ppo, "sft": run_sft, "reward": run_reward}
    subparsers = parser.add_subparsers(dest="work", required=True)
    for work in works:
        sub = subparsers.add_parser(work)
        add_arguments(sub, work)
        sub.add_argument(
            "--deterministic",
            action="store_true",
            help="torch's deterministic mode, and a digest of the weights (PPO) at the end",
        )
        sub.add_argument("--peer", action="store_true", help="run TRL on the same work instead")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.peer:
        run_peer(arguments.work)
    if arguments.dtype == "autocast":
        parser.error("--dtype autocast is the peer's; ours has float32 and bfloat16")
    torch.set_num_threads(arguments.threads)
    if arguments.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts
        torch.use_deterministic_algorithms(True)
    clock = Clock("generate" if arguments.work == "ppo" else "update", arguments.turns)
    version = f"rlhf-pipeline {metadata.version('rlhf-pipeline')}"
    clock.about = {"program": version, "work": arguments.work, "dtype": arguments.dtype}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.work == "ppo" and arguments.lora_rank:
            arguments.reward = adapter_reward(arguments, Path(folder) / "reward")
        tokens = list(works[arguments.work](arguments, clock))
    report(version, arguments.work, arguments, clock, tokens, digest=clock.about.get("digest"))


if __name__ == "__main__":
    main()
