"""What is known of all shards together: counts, lengths, and what is wrong with the data."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rlhf_core.data.assembly import CleanTables, ParsedFacts, shared_prompts
from rlhf_core.data.chat_tokens import asks_for_the_date
from rlhf_core.data.origins.counts import DERIVED, Count, Origins, Table, in_order
from rlhf_core.data.origins.tables import counts_of
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import SPLITS, Split, known_answers, votes_of_machines
from rlhf_core.data.validation import (
    TableSummary,
    Validation,
    contradictory_pairs,
    count_tokens,
    count_truncated,
    measure_cut,
    summarise_lengths,
    with_written_controls,
)
from rlhf_core.metrics import Between, uncounted
from rlhf_core.settings.data import LengthLimits
from rlhf_core.settings.fields import TABLE_KINDS, TableKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TableTotals:
    """What the report says of one table."""

    source: str = ""
    rows: int = 0  # of a derived table; those of a source are known when it is read
    kept: Counter[Split] = field(default_factory=Counter)
    prompts: Counter[Split] = field(default_factory=Counter)
    distinct: int = 0  # prompts
    dropped: Counter[str] = field(default_factory=Counter)


class Totals:
    """Counts of the cleaned tables, shard after shard."""

    def __init__(self, facts: Mapping[TableKind, ParsedFacts]) -> None:
        self._facts = facts
        self.tables: dict[TableKind, TableTotals] = defaultdict(TableTotals)
        self.shared = 0
        self.shared_first: list[str] = []
        self._counts: list[Counter[Count]] = []
        self._side: Counter[str] = Counter()

    def add(self, tables: CleanTables) -> None:
        """Count the tables of a shard."""
        for kind, table in tables.items():
            total = self.tables[kind]
            total.source = table.source
            total.rows += table.rows
            total.dropped.update(table.dropped)
            total.distinct += table.frame["key"].nunique()
            for split in SPLITS:
                side = table.side(split)
                total.kept[split] += len(side)
                total.prompts[split] += side["key"].nunique()
        shared = shared_prompts(tables)
        self.shared += len(shared)
        self.shared_first = sorted([*self.shared_first, *shared[:3]])[:3]
        for number, counts in enumerate(counts_of(tables)):
            if number == len(self._counts):
                self._counts.append(Counter())
            for count in counts:
                self._counts[number][count.model_copy(update={"rows": 0})] += count.rows

    def close(self) -> None:
        """After the last shard: add what is known of the sources as a whole."""
        for kind, facts in self._facts.items():
            total = self.tables[kind]
            total.source, total.rows = facts.source, facts.rows
            total.dropped.update(facts.dropped)

    def parsed(self) -> Iterator[tuple[TableKind, TableTotals]]:
        """The tables that have sources of their own."""
        return ((kind, self.tables[kind]) for kind in self._facts)

    def origins(self) -> Origins:
        """Where the rows come from."""
        counts = [
            count.model_copy(update={"rows": rows})
            for group in self._counts
            for count, rows in group.items()
        ]
        tables = {
            kind: Table(
                source=total.source,
                derived=total.source in DERIVED,
                train=total.kept["train"],
                eval=total.kept["eval"],
            )
            for kind, total in self.tables.items()
        }
        return Origins(tables=tables, counts=in_order(counts))


class Measures:
    """Lengths and faults of the cleaned tables, shard after shard."""

    def __init__(
        self,
        facts: Mapping[TableKind, ParsedFacts],
        tokenizer: "PreTrainedTokenizerBase",
        limits: LengthLimits,
    ) -> None:
        self._facts, self._tokenizer, self._limits = facts, tokenizer, limits
        self._counts: dict[TableKind, list[pd.DataFrame]] = {kind: [] for kind in TABLE_KINDS}
        self._numbers: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._controls: set[bytes] = set()
        self.same: Counter[str] = Counter()  # by split

    def add(self, tables: CleanTables, between: Between = uncounted) -> None:
        """Measure the tables of a shard."""
        preferences = with_winners(tables["preferences"].frame)
        known = known_answers(preferences)
        frames = {k: table.frame for k, table in tables.items()} | {"preferences": preferences}
        counts = count_tokens(frames, self._tokenizer, between)
        limits = {"sft": self._limits.sft, "reward": self._limits.reward}
        lost, same = measure_cut(frames, counts, self._tokenizer, **limits)
        self._lost.update(dict.fromkeys(lost, 0))
        self._lost.update(lost)
        self.same.update(preferences["split"][same].tolist())
        for kind, frame in counts.items():
            self._counts[kind].append(frame.astype(np.int32))
        self._controls |= {
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for text in with_written_controls(frames, self._tokenizer)
        }
        self._numbers.update(
            ties=int(preferences["tie"].sum()),
            known_sides=int((preferences["shown_first"] != "").sum()),
            timed=int((preferences["time"] != "").sum()),
            gold=int((preferences["gold"].astype(bool) & ~known).sum()),
            known_answers=int(known.sum()),
            machine_votes=int(votes_of_machines(preferences).sum()),
            contradictory_pairs=contradictory_pairs(preferences),
        )

    def lengths(self) -> dict[TableKind, pd.DataFrame]:
        """The length of every text in tokens."""
        return {
            kind: pd.concat(parts, ignore_index=True).astype(np.int64)
            for kind, parts in self._counts.items()
        }

    def report(self, totals: Totals, day: date, shards: int) -> Validation:
        """The report on all tables."""
        counts = self.lengths()
        return Validation(
            tables={kind: _summary(total) for kind, total in totals.tables.items()},
            bad_rows=[fault for facts in self._facts.values() for fault in facts.bad_rows],
            unread=[note for facts in self._facts.values() for note in facts.unread],
            shared_prompts=totals.shared,
            lengths=summarise_lengths(counts),
            truncated=count_truncated(counts, **self._limits.model_dump()),
            lost=dict(self._lost),
            same_after_cut=self.same.total(),
            written_controls=len(self._controls),
            template_date=day.isoformat() if asks_for_the_date(self._tokenizer) else "",
            vocabulary=len(self._tokenizer),
            shards=shards,
            **self._numbers,
        )


def _summary(total: TableTotals) -> TableSummary:
    return TableSummary(
        source=total.source,
        rows=total.rows,
        examples=sum(total.kept.values()) + total.dropped.total(),
        train=total.kept["train"],
        eval=total.kept["eval"],
        eval_prompts=total.prompts["eval"],
        dropped=dict(sorted(total.dropped.items())),
    )
