"""The policy that `mlflow models serve` runs: prompts in, texts out.

This file is copied into the exported model and runs without this package, so it needs only torch
and transformers. A copy of `rlhf_core.data.chat_tokens` lies beside the model, so that a text has
the same tokens as in training.
"""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

BATCH = 32


class ServedPolicy(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Continues each row of the column `prompt`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and tokenizer, on the accelerator if there is one."""
        directory = context.artifacts["model"]
        spec = spec_from_file_location("chat_tokens", context.artifacts["chat_tokens"])
        self.text: Any = module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(self.text)  # type: ignore[union-attr]
        card = json.loads((Path(directory) / "rlhf.json").read_text(encoding="utf-8"))
        self.chat = card.get("chat", False)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True
        )
        self.model = model.to(self.device).eval()
        self.context = getattr(model.config, "max_position_embeddings", None)
        # Whatever else an older version keeps there was no part of what was evaluated.
        self.model.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

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
        room = None if self.context is None else self.context - options["max_new_tokens"]
        if room is not None and room < 1:
            raise ValueError(
                f"max_new_tokens {options['max_new_tokens']} leaves no room for a prompt; this "
                f"model holds {self.context} tokens"
            )
        rows = [self.encode(prompt, room) for prompt in prompts]
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
        return [self.decode(row) for row in tokens[:, width:].tolist()]

    def encode(self, prompt: str, room: int | None) -> list[int]:
        """Prompt tokens, at most `room` of them.

        A policy that was trained on messages gets the prompt as a user message.
        """
        asked = [{"role": "user", "content": prompt}] if self.chat else prompt
        ids: list[int] = self.text.encode_prompt(asked, self.tokenizer, room)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of response tokens, up to the first that ends it."""
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends
        stop = next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
        return str(self.text.decode(ids[:stop], self.tokenizer))


mlflow.models.set_model(ServedPolicy())
