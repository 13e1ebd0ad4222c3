"""Answers that were sampled once, kept as files for a judge who takes days.

    FOLDER/NAME.json    texts, and every measure of them to the last bit

A stage that people judge ends before its verdicts are there, and is called again when they are, on
whatever machine. Sampling again would give other answers there than those that people have read.
"""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.errors import DataError
from rlhf_core.evaluation.answers import Answers


def kept(folder: Path | None, name: str, sample: Callable[[], Answers]) -> Answers:
    """The answers of this name in the folder; sampled, and put there, if there are none.

    Args:
        folder: None = nothing is kept.
        name: of the entrant, unique in the stage.

    Raises: DataError when the file is damaged.
    """
    if folder is None:
        return sample()
    path = folder / f"{re.sub(r'[^a-z0-9_.-]', '-', name)}.json"
    if path.exists():
        return _read(path)
    made = sample()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({f.name: _plain(getattr(made, f.name)) for f in fields(made)}))
    part.replace(path)
    return made


def _read(path: Path) -> Answers:
    try:
        content = json.loads(path.read_text())
        values: dict[str, Any] = {f.name: _whole(content[f.name]) for f in fields(Answers)}
        return Answers(**values)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"the answers in {path} are damaged ({type(error).__name__}: {error}); remove the file "
            "to have them sampled again"
        ) from error


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    return value


def _whole(value: object) -> object:
    if isinstance(value, dict):
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
    return value
