"""The peer's supervised fine-tuning: TRL's SFTTrainer. Prints one line of JSON.

The loss counts completions only. With --packing a row is a block of --max-length tokens, filled
with several texts by TRL's best-fit-decreasing strategy; with --padding-free the rows of a step are
one row, with a mask between texts. --dtype autocast is autocast over float32 weights, TRL's
default; bfloat16 loads the model in it, so that weights and optimizer state are bfloat16 too. TRL
recomputes activations by default, which is off here: it costs time.
"""

import argparse
import contextlib
import sys
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from peer_defaults import Defaults
from peer_lora import adapters
from peer_steps import StepClock
from report import Clock, report
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from work import COMPLETION, PROMPT, add_arguments, sft_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "sft")
    arguments = parser.parse_args()
    defaults = Defaults(SFTConfig)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.products)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32,
        attn_implementation=arguments.attention,
    )
    steps = arguments.warmup + arguments.iterations
    n = arguments.batch * steps
    if arguments.grouped:  # TRL sorts 50 batches at a time
        n = max(n, 50 * arguments.batch)
    if arguments.packing:  # enough to fill the blocks of all steps, with some to spare
        n = round(1.1 * n * arguments.max_length / (sum(PROMPT + COMPLETION) / 2))
    rows = sft_rows(n, model.config.vocab_size, arguments.seed)
    micro_batch = arguments.micro_batch or arguments.batch
    accumulated = arguments.batch // micro_batch
    read: list[tuple[int, int]] = []  # tokens and texts of every micro-batch

    def of_step(step: int) -> tuple[int, int]:
        micro_batches = read[step * accumulated : (step + 1) * accumulated]
        tokens, texts = zip(*micro_batches, strict=True)
        return sum(tokens), sum(texts)

    clock = Clock("update", arguments.turns, lambda step: of_step(step)[0])
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                max_steps=steps,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulated,
                # No text is as long; TRL wants no limit where it does not cut.
                max_length=None if arguments.padding_free else arguments.max_length,
                packing=arguments.packing,
                padding_free=arguments.padding_free,
                # Padded rows come in the order in which our side reads them; blocks lie sorted by
                # the length of their texts, so they are drawn.
                train_sampling_strategy="group_by_length"
                if arguments.grouped
                else "random"
                if arguments.packing
                else "sequential",
                bf16=arguments.dtype != "float32",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
            ),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            train_dataset=Dataset.from_dict(
                {
                    "input_ids": [prompt + completion for prompt, completion in rows],
                    "labels": [[-100] * len(prompt) + completion for prompt, completion in rows],
                }
            ),
            callbacks=[StepClock(clock)],
            peft_config=adapters(model, arguments),
        )
        clock.about = {
            "program": f"trl {trl.__version__}",
            "work": "sft",
            "dtype": arguments.dtype,
            "changed": defaults.changed(trainer.args),
        }
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> Any:
            tokens = sum(len(example["input_ids"]) for example in examples)
            texts = sum(len(example.get("seq_lengths", [tokens])) for example in examples)
            read.append((tokens, texts))
            return collate(examples)

        trainer.data_collator = counted
        trainer.train()
    tokens, texts = zip(*map(of_step, range(steps)), strict=True)
    report(
        clock.about["program"],
        "sft",
        arguments,
        clock,
        tokens,
        texts_per_iteration=sum(texts) / steps,
        changed=clock.about["changed"],
    )


if __name__ == "__main__":
    main()
