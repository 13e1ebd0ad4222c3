"""The peer's reward model: TRL's RewardTrainer. Prints one line of JSON.

Tokens are those of both texts of a pair, the prompt in each. --dtype autocast is autocast over
float32 weights, TRL's default; bfloat16 loads the model in it, so that weights and optimizer state
are bfloat16 too. TRL recomputes activations by default, which is off here: it costs time.
"""

import argparse
import contextlib
import sys
import tempfile

import torch
import trl
from datasets import Dataset
from peer_defaults import Defaults
from peer_lora import adapters
from peer_steps import StepClock
from report import Clock, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from work import add_arguments, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "reward")
    arguments = parser.parse_args()
    defaults = Defaults(RewardConfig)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.products)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model,
        num_labels=1,
        dtype=torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32,
        attn_implementation=arguments.attention,
    )
    steps = arguments.warmup + arguments.iterations
    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in pairs(
            arguments.batch * steps, model.config.vocab_size, arguments.seed
        )
    ]
    micro_batch = arguments.micro_batch or arguments.batch
    lengths = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    tokens = [sum(lengths[i : i + arguments.batch]) for i in range(0, len(rows), arguments.batch)]
    clock = Clock("update", arguments.turns, tokens.__getitem__)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                max_steps=steps,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=arguments.batch // micro_batch,
                max_length=arguments.max_length,
                train_sampling_strategy="sequential",  # the order in which our side reads them
                bf16=arguments.dtype != "float32",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
            ),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            train_dataset=Dataset.from_list(rows),
            callbacks=[StepClock(clock)],
            peft_config=adapters(model, arguments),
        )
        clock.about = {
            "program": f"trl {trl.__version__}",
            "work": "reward",
            "dtype": arguments.dtype,
            "changed": defaults.changed(trainer.args),
        }
        trainer.train()
    about = clock.about
    report(about["program"], "reward", arguments, clock, tokens, changed=about["changed"])


if __name__ == "__main__":
    main()
