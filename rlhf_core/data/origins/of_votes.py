"""Where the votes of the preference store come from, in a file beside those of a snapshot.

The file of a snapshot has what its digest covers, and no more. What the store knows beside that is
in `NAME.origins.jsonl`: a line for each pair, by the id that its votes have, and one for each
annotator with the licence under which they give their votes.

    {"id": "0f3a…", "sources": [...], "licences": [...], "models": [...],
     "prompt_sources": [...], "prompt_licences": [...]}
    {"annotator": "p-7f3a", "licence": "CC BY 4.0"}
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import pandas as pd

from rlhf_core.data.origins.counts import NOWHERE, Origin
from rlhf_core.errors import DataError


class OriginsOfVotes:
    """What a preference store knows of pairs and annotators."""

    def __init__(self, pairs: Mapping[str, Origin], licences: Mapping[str, str]) -> None:
        self._pairs, self._licences = pairs, licences

    @classmethod
    def beside(cls, votes: Path) -> Self | None:
        """What is beside a file of votes; None if there is nothing.

        Raises: DataError when the file cannot be read.
        """
        path = file_beside(votes)
        if not path.is_file():
            return None
        pairs: dict[str, Origin] = {}
        licences: dict[str, str] = {}
        try:
            with path.open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    row = json.loads(line)
                    if "annotator" in row:
                        licences[row["annotator"]] = row["licence"]
                    else:
                        names = (tuple(row.get(field, ())) for field in Origin._fields)
                        pairs[row["id"]] = Origin(*names)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error!r}); fetch the votes again") from error
        return cls(pairs, licences)

    def of(self, votes: pd.DataFrame, origins: Sequence[Origin]) -> list[Origin]:
        """All that is known of where some votes come from.

        Args:
            origins: what the votes themselves say.
        """
        known: dict[tuple[object, ...], Origin] = {}
        found = []
        for key in zip(votes["id"], votes["annotator"], origins, strict=True):
            if key not in known:
                id_, annotator, own = key
                licence = self._licences.get(annotator, "")
                given = Origin((), (licence,) if licence else ())
                known[key] = self._pairs.get(id_, NOWHERE).beside(_of_vote(own)).beside(given)
            found.append(known[key])
        return found


def _of_vote(own: Origin) -> Origin:
    """Of what the vote itself says nothing is about the prompt."""
    return own._replace(prompt_sources=(), prompt_licences=())


def file_beside(votes: Path) -> Path:
    """The file with the origins of a file of votes."""
    return votes.with_name(f"{votes.stem}.origins.jsonl")


def write_beside(
    votes: Path, pairs: Iterable[tuple[str, Origin]], licences: Mapping[str, str]
) -> None:
    """Write what is known of pairs, by the id of their votes, and of annotators."""
    with file_beside(votes).open("w", encoding="utf-8", newline="\n") as file:
        for row in _rows(pairs, licences):
            print(json.dumps(row, ensure_ascii=False), file=file)


def _rows(
    pairs: Iterable[tuple[str, Origin]], licences: Mapping[str, str]
) -> Iterator[Mapping[str, object]]:
    for id_, origin in pairs:
        yield {"id": id_, **{k: v for k, v in origin._asdict().items() if v}}
    for annotator, licence in licences.items():
        yield {"annotator": annotator, "licence": licence}
