"""Runs and versions as the pipeline leaves them, by its own functions, without training."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, Field

from rlhf_core.config import Section
from rlhf_core.data.origins.counts import FILE, Count, Origins, Table
from tasks.record.record import Record
from tasks.record.stage import open_stage
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref


class Toy(Section):
    votes: str = Field("all", description="votes")
    source: str = Field("", description="source")
    rewards: list[dict[str, str]] = Field([], description="rewards")


def votes(annotator, count, *, split="train", half="first_half", sources=("forum",), **more):
    """Votes of an annotator."""
    return Count(
        table="preferences",
        split=split,
        half=half if split == "train" else "",
        annotator=annotator,
        sources=sources,
        rows=count,
        **more,
    )


class World:
    """A home in which stages are opened and published."""

    def __init__(self, record: Record, run: PipelineRun, scratch: Path) -> None:
        self.record, self.run, self._scratch = record, run, scratch
        self._model = scratch / "model"
        self._model.mkdir(parents=True, exist_ok=True)
        (self._model / "model.safetensors").write_bytes(b"nobody loads it")

    def data(self, *counts: Count, derived: bool = False, inputs: Mapping[str, Ref] = {}):
        """Prepared data with these rows; the tables themselves are a line that makes the digest."""
        folder = self._scratch / f"data-{len(list(self._scratch.iterdir()))}"
        folder.mkdir()
        (folder / "preferences.train.jsonl").write_text(json.dumps({"is": folder.name}) + "\n")
        sides = {
            kind: {
                side: sum(c.rows for c in counts if (c.table, c.split) == (kind, side))
                for side in ("train", "eval")
            }
            for kind in ("preferences", "demonstrations", "prompts")
        }
        tables = {
            kind: Table(source=f"/data/{kind}.jsonl", derived=derived, **of)
            for kind, of in sides.items()
        }
        Origins(tables=tables, counts=counts).write(folder)
        return self.stored(folder, inputs)

    def stored(self, folder: Path, inputs: Mapping[str, Ref] = {}) -> DatasetRef:
        """A folder of prepared data as the output of a stage."""
        with self._opened("prepare", inputs, Toy()) as stage:
            return stage.publish_data(folder)

    def without_counts(self, data: DatasetRef) -> None:
        """As an earlier version left it."""
        self.file_of(data, FILE).unlink()

    def file_of(self, data: DatasetRef, name: str) -> Path:
        """An artifact of prepared data, where MLflow keeps it."""
        root = self.record.client.get_run(data.run_id).info.artifact_uri.removeprefix("file://")
        return Path(root) / "data" / name

    def stage(
        self,
        name: str,
        *kinds: str,
        copies: Mapping[str, ModelRef] = {},
        config: BaseModel | None = None,
        more: Mapping[str, BaseModel] = {},
        **inputs: Ref,
    ) -> dict[str, ModelRef]:
        """A stage that made versions of these kinds."""
        named = {role.replace("__", "."): ref for role, ref in inputs.items()}
        with self._opened(name, named, config or Toy(), more) as stage:
            return stage.publish(dict.fromkeys(kinds, self._model), copies) if kinds else {}

    def failing(self, name: str, *kinds: str, **inputs: Ref) -> None:
        """A stage that fails after it has published."""
        with self._opened(name, inputs, Toy()) as stage:
            stage.publish(dict.fromkeys(kinds, self._model))
            raise RuntimeError

    def _opened(self, name, inputs, config, more: Mapping[str, BaseModel] = {}):
        return open_stage(
            name,
            record=self.record,
            config=config,
            run=self.run,
            inputs=inputs,
            extra_sections=more,
        )

    def pipeline(self, data: DatasetRef) -> dict[str, ModelRef]:
        """SFT, reward model and PPO on the same data, with an evaluation."""
        sft = self.stage("sft", "sft", data=data)["sft"]
        reward = self.stage("reward_model", "reward", sft=sft, data=data)["reward"]
        made = self.stage("ppo", "policy", "critic", sft=sft, reward=reward, data=data)
        self.stage("report_card", reward=reward, sft=sft, data=data)
        policy = made["policy"]
        self.stage("evaluation", policy=policy, sft=sft, reward=reward, data=data)
        return {"sft": sft, "reward": reward, **made}


def forget(folder: Path) -> None:
    """Delete a folder of artifacts, as a purge does."""
    shutil.rmtree(folder)
