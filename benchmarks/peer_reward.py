"""The peer's reward model: TRL's RewardTrainer. Prints one line of JSON.

Tokens are those of both texts of a pair, the prompt in each. --dtype bfloat16 is autocast over
float32 weights. TRL recomputes activations by default, which is off here: it costs time.
"""

import argparse
import contextlib
import sys
import tempfile

import torch
import trl
from datasets import Dataset
from peer_lora import adapters
from peer_steps import StepClock
from report import Clock, changed, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from work import add_arguments, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "reward")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=1, dtype=torch.float32
    )
    steps = arguments.warmup + arguments.iterations
    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in pairs(
            arguments.batch * steps, model.config.vocab_size, arguments.seed
        )
    ]
    micro_batch = arguments.micro_batch or arguments.batch
    clock = Clock("update")
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
                bf16=arguments.dtype == "bfloat16",
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
        trainer.train()
    lengths = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    batches = range(0, len(rows), arguments.batch)
    tokens = [sum(lengths[i : i + arguments.batch]) for i in batches]
    changes = changed(trainer.args)
    report(f"trl {trl.__version__}", "reward", arguments, clock, tokens, changed=changes)


if __name__ == "__main__":
    main()
