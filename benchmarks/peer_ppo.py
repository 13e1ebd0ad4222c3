"""The peer's PPO: TRL 1.12.0, the last release that has it. Prints one line of JSON.

Phases: generate is `batch_generation`; score is all from there to the first minibatch (passes of
reference, critic and reward model, advantages); update is all from there to the next generation
(the epochs, statistics, clearing of memory).

Responses have full length: no token ends one. TRL computes in the dtype that the models are loaded
in, which --dtype says; its settings `bf16` and `gradient_checkpointing`, on by default, reach
nothing. --dtype autocast puts its update under autocast, by ACCELERATE_MIXED_PRECISION=bf16:
generation and scoring stay in float32, and --frozen bfloat16 loads reference and reward model so.

--lora-rank trains adapters of the policy; the reference is then the policy without them. The critic
trains all its weights in any case, and the reward model is a model of its own: TRL has no more.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from peer_defaults import Defaults
from peer_lora import adapters
from report import Clock, report
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from work import add_arguments, prompts


class EndOfTraining(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.clock.begin(None)


def time_phases(trainer: PPOTrainer, clock: Clock, length: int) -> None:
    """Set the clock at the trainer's own seams, and see that texts have the length they should."""
    generation, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def timed_generation(*args: Any) -> Any:
        clock.begin("generate")
        written = generation(*args)
        clock.begin("score")
        if written[0].shape[1] != length:
            raise SystemExit(f"texts of {written[0].shape[1]} tokens, not {length}")
        return written

    def timed_accumulate(*models: Any) -> Any:
        if clock.phase == "score":
            clock.begin("update")
        return accumulate(*models)

    ppo_trainer.batch_generation = timed_generation
    trainer.accelerator.accumulate = timed_accumulate
    trainer.add_callback(EndOfTraining(clock))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "ppo")
    arguments = parser.parse_args()
    defaults = Defaults(PPOConfig)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.products)
    if arguments.dtype == "autocast":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    trained = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    loaded = {"dtype": trained, "attn_implementation": arguments.attention}
    frozen = loaded | ({"dtype": arguments.frozen} if arguments.frozen else {})
    policy = AutoModelForCausalLM.from_pretrained(arguments.model, **loaded)
    lora = adapters(policy, arguments)
    # With adapters the reference is the policy without them.
    reference = None if lora else AutoModelForCausalLM.from_pretrained(arguments.model, **frozen)
    critic, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(arguments.reward, **settings)
        for settings in (loaded, frozen)
    )
    if arguments.no_cache:
        for model in filter(None, (policy, reference, critic, reward_model)):
            model.config.use_cache = False  # generation has a setting of its own
    episodes = arguments.batch * (arguments.warmup + arguments.iterations)
    vocabulary, length = policy.config.vocab_size, arguments.prompt_length
    # One batch too many: in the last of a data set TRL would step after every micro-batch.
    rows = prompts(episodes + arguments.batch, length, vocabulary, arguments.seed)
    minibatch = arguments.batch // arguments.minibatches
    micro_batch = arguments.micro_batch or minibatch
    responses = arguments.batch * arguments.response_length
    clock = Clock("generate", arguments.turns, lambda _: responses)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                total_episodes=episodes,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=arguments.batch // micro_batch,
                num_mini_batches=arguments.minibatches,
                num_ppo_epochs=arguments.epochs,
                local_rollout_forward_batch_size=arguments.batch,
                response_length=arguments.response_length,
                stop_token_id=None,
                temperature=1.0,
                num_sample_generations=0,
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
            ),
            processing_class=AutoTokenizer.from_pretrained(arguments.model, padding_side="left"),
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=critic,
            peft_config=lora,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
        )
        # TRL would step once an epoch where there are micro-batches; so it steps every minibatch.
        trainer.accelerator.gradient_accumulation_steps = minibatch // micro_batch
        clock.about = {
            "program": f"trl {trl.__version__}",
            "work": "ppo",
            "dtype": arguments.dtype,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "changed": defaults.changed(trainer.args),
        }
        time_phases(trainer, clock, length + arguments.response_length)
        trainer.train()
    about = clock.about
    report(
        about["program"],
        "ppo",
        arguments,
        clock,
        [responses] * len(clock.laps),
        mixed_precision=about["mixed_precision"],
        changed=about["changed"],
    )


if __name__ == "__main__":
    main()
