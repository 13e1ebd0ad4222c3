"""The reward model that `mlflow models serve` runs: prompts and responses in, rewards out.

This file is copied into the exported model and runs without this package, so it needs only torch
and transformers. A copy of `rlhf_core.data.chat_tokens` lies beside the model, so that a text has
the same tokens as in training. It duplicates the computation of
`rlhf_core.backbone.networks.ScalarModel.scores`; a test compares them.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

BATCH = 32
HEAD = "score.weight"


class ServedReward(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Scores each row of the columns `prompt` and `response`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights, tokenizer and normaliser, on the accelerator if there is one."""
        directory = context.artifacts["model"]
        spec = spec_from_file_location("chat_tokens", context.artifacts["chat_tokens"])
        self.text: Any = module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(self.text)  # type: ignore[union-attr]
        self.card = json.loads((Path(directory) / "rlhf.json").read_text(encoding="utf-8"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        # Body and head apart: transformers has no sequence classifier for some families.
        body = AutoModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
        self.body = body.to(self.device).eval()
        self.head = self.read_head(Path(directory)).to(self.device)
        self.room = (
            getattr(body.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        )

    def read_head(self, directory: Path) -> torch.Tensor:
        """(1, d) weights of the scalar head, in float32."""
        for file in directory.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                if HEAD in list(tensors.keys()):
                    head: torch.Tensor = tensors.get_tensor(HEAD)
                    return head.float()
        raise ValueError(f"{directory} has no tensor {HEAD}; export the reward model again")

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[float]:
        """One reward for each row: (logit - reward_mean) / reward_std, not its sigmoid."""
        pairs = list(zip(model_input["prompt"], model_input["response"], strict=True))
        rewards: list[float] = []
        for start in range(0, len(pairs), BATCH):
            rewards += self.score(pairs[start : start + BATCH])
        return rewards

    @torch.inference_mode()
    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The rewards of one batch, read at the last token of each text."""
        rows = [self.encode(prompt, response) for prompt, response in pairs]
        width = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        places = torch.arange(width, device=self.device)
        hidden = self.body(
            input_ids=ids, attention_mask=(places < lengths[:, None]).long(), use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        logits = (last @ self.head.T).squeeze(-1)
        rewards = (logits - self.card["reward_mean"]) / self.card["reward_std"]
        return [float(reward) for reward in rewards]

    def encode(self, prompt: str, response: str) -> list[int]:
        """Tokens of a pair as the pipeline scores it, cut only to the context of the model.

        Training cuts at `reward_model.max_length` instead, by the same rule. A reward model of
        messages reads the prompt as a user message.
        """
        asked = [{"role": "user", "content": prompt}] if self.card.get("chat") else prompt
        found = self.text.fit(asked, [response], self.tokenizer, self.room)
        return [*found.prompt, *found.responses[0]]


mlflow.models.set_model(ServedReward())
