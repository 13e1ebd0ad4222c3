"""Valid inputs to be damaged: data in every format, a config, a tiny model, a home with MLflow."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

CONFIG = """\
# A config to be damaged.
project: fuzz
seed: 3
data:
  source: simulated
  simulation: {prompts: 20, demonstrations: 40, preference_pairs: 40, annotators: {count: 3}}
  prompt_style: text
  prompt_template: "{prompt}"
  eval_fraction: 0.3
  preferences:
    path: ""
    fields: {}
    limit: 0
model:
  source: ""
  fresh: {layers: 1, width: 32, heads: 2, context: 96, vocab_size: 400}
sampling: {max_prompt_length: 24, max_new_tokens: 24, temperature: 1.0}
sft: {epochs: 1, max_length: 80, learning_rate: 1.0e-3}
reward_model: {max_length: 80, normalization_samples: 32}
algorithm: ppo
ppo:
  iterations: 2
  rollout_size: 16
  batch_size: 16
  epochs: 1
  kl_coef: 0.1
evaluation:
  prompts: 8
  samples_per_prompt: 1
  best_of: 2
promotion:
  min_win_rate: 0.6
"""


def pairs() -> list[dict[str, Any]]:
    """Preferences as pairs."""
    return [
        {
            "prompt": f"Say {n} kind words",
            "chosen": f"Kind words, {n} of them",
            "rejected": f"No, not {n}",
            "annotator": f"ann-{n % 3}",
        }
        for n in range(24)
    ]


def ballots() -> list[dict[str, Any]]:
    """Preferences with votes."""
    return [
        {
            "id": str(n),
            "prompt": f"Say {n} kind words",
            "response_a": f"Kind words, {n} of them",
            "response_b": f"No, not {n}",
            "votes": [{"annotator": "ann-1", "vote": "a"}, {"annotator": "ann-2", "vote": "tie"}],
        }
        for n in range(24)
    ]


def dialogues() -> list[dict[str, Any]]:
    """Preferences as messages."""
    question = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]

    def dialogue(number: int, answer: str) -> list[dict[str, str]]:
        asked = {"role": "user", "content": str(number)}
        return [*question, asked, {"role": "assistant", "content": answer}]

    return [
        {"chosen": dialogue(n, "Hello, friend"), "rejected": dialogue(n, "No")} for n in range(24)
    ]


FORMS = (pairs, ballots, dialogues)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    """Rows as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    """A table as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """The rows as files, by suffix."""
    found = {
        ".jsonl": as_lines(rows),
        ".json": json.dumps(rows, indent=1).encode(),
        ".parquet": as_parquet(pa.Table.from_pylist(rows)),
        ".jsonl.gz": gzip.compress(as_lines(rows), mtime=0),
    }
    return found if "votes" in rows[0] else found | {".csv": as_csv(rows)}


def save_folder(rows: list[dict[str, Any]], folder: Path, *, split: bool) -> None:
    """A `save_to_disk` folder, with splits or without."""
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(rows)
    (datasets.DatasetDict({"train": made}) if split else made).save_to_disk(str(folder))


def save_model(folder: Path) -> None:
    """A policy of one layer with its tokenizer, chat template and card."""
    logging.disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate((*alphabet, "<|end|>", "<|pad|>"))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(vocab), n_positions=512, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=None, eos_token_id=vocab["<|end|>"], pad_token_id=vocab["<|pad|>"],
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "rlhf.json").write_text(json.dumps({"kind": "policy", "dtype": "float32"}))
