"""The policy that `mlflow models serve` runs: prompts in, texts out.

This file is copied into the exported model and runs without this package, so it needs only torch
and transformers. Its tokenization duplicates `rlhf_core.data.encoding.encode_prompt`; a test
compares the two.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 32


class ServedPolicy(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Continues each row of the column `prompt`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and tokenizer, on the accelerator if there is one."""
        directory = context.artifacts["model"]
        card = json.loads((Path(directory) / "rlhf.json").read_text(encoding="utf-8"))
        self.chat = card.get("chat", False)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True
        )
        self.model = model.to(self.device).eval()

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """One text for each prompt. `params`: max_new_tokens, temperature (0 = greedy), seed."""
        options = {"max_new_tokens": 64, "temperature": 0.0, "seed": 0, **(params or {})}
        prompts = model_input["prompt"].tolist()
        torch.manual_seed(options["seed"])
        texts: list[str] = []
        for start in range(0, len(prompts), BATCH):
            texts += self.complete(prompts[start : start + BATCH], options)
        return texts

    @torch.inference_mode()
    def complete(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        """One batch of responses, without the prompts and without special tokens."""
        room = self.model.config.max_position_embeddings - options["max_new_tokens"]
        if room < 1:
            raise ValueError(
                f"max_new_tokens {options['max_new_tokens']} leaves no room for a prompt; this "
                f"model holds {self.model.config.max_position_embeddings} tokens"
            )
        rows = [self.encode(prompt)[-room:] for prompt in prompts]
        if not all(rows):
            raise ValueError("a prompt is empty; write at least one word")
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        hot = options["temperature"] > 0
        sampling = {"temperature": options["temperature"], "top_k": 0, "top_p": 1.0} if hot else {}
        tokens = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=options["max_new_tokens"],
            do_sample=hot,
            pad_token_id=pad,
            **sampling,
        )
        new = tokens[:, width:]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def encode(self, prompt: str) -> list[int]:
        """Prompt tokens, with the begin-of-sequence token once where the tokenizer uses one.

        A policy that was trained on messages gets the prompt as a user message.
        """
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        bos = self.tokenizer.bos_token_id
        uses_bos = bos is not None and self.tokenizer("").input_ids[:1] == [bos]
        return [bos, *ids] if uses_bos and ids[:1] != [bos] else ids


mlflow.models.set_model(ServedPolicy())
