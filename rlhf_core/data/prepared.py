"""The three prepared tables of the pipeline: columns, files, and the split by prompt.

    demonstrations   {id, prompt, response}
    preferences      {id, prompt, response_a, response_b, vote, shown_first, annotator, gold,
                      margin, time, source}
    prompts          {id, prompt}

A prompt is raw text or a list of chat messages; an answer is always text. A row of the preferences
is one vote, as it was cast; the votes on one pair share its id:

    vote             "a", "b" or "tie"
    shown_first      which answer the annotator saw first, "a" or "b"; "" if unknown
    annotator        who voted; "" for an anonymous vote
    gold             whether the right answer is known, as in a control question; with the
                     annotator `gold` the row is that answer itself, and nobody's vote
    margin           by how much the winner should win, in raw reward; 0 if none was given
    time             when the vote was cast, as the source has it; "" if unknown
    source           where the row comes from

Columns of the user's that `data.preferences.keep` or `data.prompts.keep` names are in an object
`kept`, by name, as text.

`rlhf_core.data.pairs.with_winners` derives who won.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd

from rlhf_core.data.prompts import Prompt
from rlhf_core.data.prompts import canonical_prompt as canonical_prompt
from rlhf_core.data.prompts import prompt_key as prompt_key
from rlhf_core.data.prompts import writable as writable
from rlhf_core.digests import tree_digest
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import GOLD, TableKind

Split: TypeAlias = Literal["train", "eval"]

SPLITS: tuple[Split, ...] = ("train", "eval")
COLUMNS: Mapping[TableKind, tuple[str, ...]] = {
    "demonstrations": ("id", "prompt", "response"),
    "preferences": (
        *("id", "prompt", "response_a", "response_b", "vote", "shown_first"),
        *("annotator", "gold", "margin", "time", "source"),
    ),
    "prompts": ("id", "prompt"),
}
KEPT = "kept"  # a column of preferences and prompts, only where columns of the source are kept
JUDGE = "judge:"  # begins the name of an annotator that is a machine, and votes in both orders
UNKNOWN = "(unknown)"  # what reports call the value of a row that has none in such a column


def known_answers(votes: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of the preferences are known answers, and nobody's votes."""
    return votes["gold"].astype(bool) & (votes["annotator"] == GOLD)


def votes_of_machines(votes: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of the preferences are votes of judges that are machines."""
    return votes["annotator"].astype(str).str.startswith(JUDGE)


def falls_to_eval(key: str, seed: int, fraction: float) -> bool:
    """Whether a prompt is for evaluation: decided by a hash of seed and prompt key, so it is the
    same in every table, row order and process."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def training_texts(demonstrations: pd.DataFrame) -> Iterator[str]:
    """Prompts and responses as plain texts, for training a fresh tokenizer."""
    return map(training_text, demonstrations["prompt"], demonstrations["response"])


def training_text(prompt: Prompt, response: str) -> str:
    """A prompt and its response as plain text."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    return "\n".join([*(message["content"] for message in messages), response])


def write_table(frame: pd.DataFrame, directory: Path, kind: TableKind, split: Split) -> None:
    """Write one prepared table as JSON lines."""
    with table_path(directory, kind, split).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(table_lines(frame, kind))


def table_lines(frame: pd.DataFrame, kind: TableKind) -> Iterator[str]:
    """The lines of a prepared table."""
    names = [*COLUMNS[kind], *([KEPT] if KEPT in frame else [])]
    # Not DataFrame.to_json, which rounds numbers to ten digits.
    for values in zip(*(frame[name] for name in names), strict=True):
        yield json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False) + "\n"


def read_table(
    directory: Path, kind: TableKind, split: Split, *, limit: int | None = None
) -> pd.DataFrame:
    """One prepared table. Texts and messages are objects, `gold` is bool, `margin` float.

    Of a table that may be large, `rlhf_core.data.mapped` has the rows without all of them in
    memory. Votes prepared by version 0.1.0, with the winner first, are converted to the current
    columns.

    Args:
        limit: only the first rows; None = all.

    Raises: DataError when the directory does not have it.
    """
    with table_file(directory, kind, split).open(encoding="utf-8", newline="\n") as lines:
        records = [to_columns(json.loads(line), kind) for line in islice(lines, limit)]
    kept = [KEPT] if any(KEPT in record for record in records) else []
    frame = pd.DataFrame(records, columns=[*COLUMNS[kind], *kept], dtype=object)
    return frame.astype({"gold": bool, "margin": float}) if kind == "preferences" else frame


def table_file(directory: Path, kind: TableKind, split: Split) -> Path:
    """The file of a prepared table.

    Raises: DataError when the directory does not have it.
    """
    path = table_path(directory, kind, split)
    if not path.is_file():
        raise DataError(f"there is no prepared table {path}; prepare the data first")
    return path


def to_columns(record: dict[str, Any], kind: TableKind) -> dict[str, Any]:
    """A row of a prepared file in the current columns; version 0.1.0 wrote `chosen`, `rejected` and
    `tie` for a vote."""
    if kind != "preferences" or "chosen" not in record:
        return record
    answers = {"response_a": record["chosen"], "response_b": record["rejected"]}
    vote = "tie" if record["tie"] else "a"
    unknown = {"shown_first": "", "gold": False, "time": "", "source": ""}
    return {**record, **answers, "vote": vote, **unknown}


def date_of(directory: Path) -> date:
    """What a chat template takes for today in all stages on these data: the day of their report, or
    the present day if that names none."""
    try:
        report = json.loads((directory / "validation.json").read_text(encoding="utf-8"))
        return date.fromisoformat(report["template_date"])
    except (OSError, ValueError, TypeError, KeyError):
        return date.today()


def digest(directory: Path) -> str:
    """A digest of the prepared tables, sixteen hexadecimal digits.

    `validation.json` is excluded: its token counts change with the tokenizer, the data do not.
    """
    return tree_digest(directory, "*.jsonl")[:16]


def table_path(directory: Path, kind: TableKind, split: Split) -> Path:
    """Where the file of a prepared table is, or is to be."""
    return directory / f"{kind}.{split}.jsonl"
