"""The counts of the tables that are being prepared, and the table of them for people."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import pandas as pd

from rlhf_core.data.assembly import CleanTables
from rlhf_core.data.origins.counts import (
    DERIVED,
    ORIGIN,
    Count,
    Origins,
    TextRow,
    VoteRow,
    count_asked,
    count_chosen,
    count_texts,
    count_votes,
)
from rlhf_core.data.pairs import with_winners
from rlhf_core.settings.fields import TableKind

SHOWN = 200  # rows of the table for people


def counts_of(tables: CleanTables) -> Iterator[Iterable[Count]]:
    """The counts of all tables, of several shards as many each. Of tables that were made of the
    votes, the votes are counted that they were made of, since many people may have chosen the same
    answer."""
    votes = list(_votes(tables["preferences"].frame))
    yield count_votes(votes)
    demonstrations, prompts = tables["demonstrations"], tables["prompts"]
    if demonstrations.source in DERIVED:
        yield count_chosen(votes)
    else:
        yield count_texts("demonstrations", _texts(demonstrations.frame))
    if prompts.source in DERIVED:
        yield count_asked(votes)
        if demonstrations.source not in DERIVED:
            yield count_texts("prompts", _distinct(demonstrations.frame))
    else:
        yield count_texts("prompts", _texts(prompts.frame))


def _votes(frame: pd.DataFrame) -> Iterator[VoteRow]:
    voted = with_winners(frame)
    columns = (voted[name] for name in ("split", "key", "annotator", "chosen", "tie", ORIGIN))
    for split, key, annotator, chosen, tie, origin in zip(*columns, strict=True):
        yield VoteRow(split, key, annotator, None if tie else chosen, origin)


def _texts(frame: pd.DataFrame) -> Iterator[TextRow]:
    for split, key, origin in zip(frame["split"], frame["key"], frame[ORIGIN], strict=True):
        yield TextRow(split, key, origin)


def _distinct(frame: pd.DataFrame) -> Iterator[TextRow]:
    """The different prompts of demonstrations, by where they come from."""
    yield from {row._replace(origin=row.origin.of_prompt) for row in _texts(frame)}


def shown(origins: Origins) -> pd.DataFrame:
    """Rows by table, source and licence, for people; annotators are left out.

    A row that has several sources, as its prompt and answers may, counts for each.
    """
    found: dict[tuple[TableKind, str, str], Counter[str]] = defaultdict(Counter)
    for count in origins.counts:
        for source in count.sources or ("",):
            for licence in count.licences or ("",):
                found[count.table, source, licence][count.split] += count.rows
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -item[1].total(), item[0]))
    rows = [_row(key, sides) for key, sides in ordered[:SHOWN]]
    if len(ordered) > SHOWN:
        rest = sum((sides for _, sides in ordered[SHOWN:]), Counter[str]())
        rows.append(("", f"{len(ordered) - SHOWN} more sources", "", rest["train"], rest["eval"]))
    return pd.DataFrame(rows, columns=["table", "source", "licence", "train", "eval"])


def _row(
    key: tuple[TableKind, str, str], sides: Mapping[str, int]
) -> tuple[str, str, str, int, int]:
    table, source, licence = key
    return (
        table,
        source or "unknown",
        licence or "unknown",
        sides.get("train", 0),
        sides.get("eval", 0),
    )
