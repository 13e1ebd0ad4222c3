"""The peer's supervised fine-tuning: TRL's SFTTrainer. Prints one line of JSON.

The loss counts completions only. With --packing a row is a block of --max-length tokens, filled
with several texts by TRL's best-fit-decreasing strategy. --dtype bfloat16 is autocast over float32
weights. TRL recomputes activations by default, which is off here: it costs time.
"""

import argparse
import contextlib
import sys
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from peer_lora import adapters
from peer_steps import StepClock
from report import Clock, changed, report
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from work import COMPLETION, PROMPT, add_arguments, sft_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, "sft")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    steps = arguments.warmup + arguments.iterations
    n = arguments.batch * steps
    if arguments.packing:  # enough to fill the blocks of all steps, with some to spare
        n = round(1.1 * n * arguments.max_length / (sum(PROMPT + COMPLETION) / 2))
    rows = sft_rows(n, model.config.vocab_size, arguments.seed)
    micro_batch = arguments.micro_batch or arguments.batch
    clock = Clock("update")
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                max_steps=steps,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=arguments.batch // micro_batch,
                max_length=arguments.max_length,
                packing=arguments.packing,
                # Padded rows come in the order in which our side reads them; blocks lie sorted by
                # the length of their texts, so they are drawn.
                train_sampling_strategy="random" if arguments.packing else "sequential",
                bf16=arguments.dtype == "bfloat16",
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
        read: list[tuple[int, int]] = []  # tokens and texts of every micro-batch
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> Any:
            tokens = sum(len(example["input_ids"]) for example in examples)
            texts = sum(len(example.get("seq_lengths", [tokens])) for example in examples)
            read.append((tokens, texts))
            return collate(examples)

        trainer.data_collator = counted
        trainer.train()
    accumulated = arguments.batch // micro_batch
    per_step = [
        tuple(map(sum, zip(*read[i : i + accumulated], strict=True)))
        for i in range(0, steps * accumulated, accumulated)
    ]
    tokens, texts = zip(*per_step, strict=True)
    report(
        f"trl {trl.__version__}",
        "sft",
        arguments,
        clock,
        tokens,
        texts_per_iteration=sum(texts) / steps,
        changed=changed(trainer.args),
    )


if __name__ == "__main__":
    main()
