"""Prepare: convert the user's data, or simulated data, into the three tables of the pipeline.

1. Read each source and check every row (`sources`, `formats`).
2. Drop rows that teach nothing: pairs of identical answers, duplicates.
3. Split by prompt. A source with its own evaluation data decides for its prompts; a hash of seed
   and prompt decides for the others. So a prompt is on the same side in all tables.
4. Derive missing tables: demonstrations are the chosen answers, prompts are the distinct prompts of
   the other two tables.
5. Measure lengths with the model's tokenizer, and count the texts that later stages will cut.
6. Write the tables and `validation.json`.

All this is about one prompt at a time, so large data are prepared in shards, by a hash of the
prompt. The number of shards changes how much memory it takes, and nothing that is written.
"""

import glob
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from rlhf_core import figures
from rlhf_core.data.assembly import (
    CleanTables,
    ParsedFacts,
    assemble,
    facts_of,
    fill,
    split_by_prompt,
)
from rlhf_core.data.chat_tokens import (
    TextError,
    asks_for_the_date,
    encode_prompt,
    encode_response,
    set_date,
)
from rlhf_core.data.encoding import Prompt, encode_all_prompts, encode_all_responses
from rlhf_core.data.formats import ParsedSource, Parsing
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.data.mapped.training import training_dialogues
from rlhf_core.data.origins.counts import ORIGIN, Origin, Origins
from rlhf_core.data.origins.of_votes import OriginsOfVotes
from rlhf_core.data.origins.tables import shown
from rlhf_core.data.pairs import BATCH, all_the_same
from rlhf_core.data.prepared import KEPT, SPLITS, Split, canonical_prompt, table_path
from rlhf_core.data.shards.parts import Parts, Shelf
from rlhf_core.data.shards.spill import Spill, shards_for
from rlhf_core.data.shards.totals import Measures, TableTotals, Totals
from rlhf_core.data.sources import Fault, Row, SourceRows, reread_rows, size_of
from rlhf_core.data.validation import LENGTHS, Validation, answer_columns
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.metrics import SilentLogger, StageLogger, counted
from rlhf_core.settings.data import SNAPSHOT, DataConfig, LengthLimits, TableConfig
from rlhf_core.settings.fields import TABLE_KINDS, TableKind, names_in
from rlhf_core.settings.model import ModelConfig
from rlhf_core.simulation import simulate
from rlhf_core.types import Report
from rlhf_core.work import Work

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


_PURPOSE: Mapping[Split, str] = {"train": "training", "eval": "evaluation"}


def reading_of(config: DataConfig, kind: TableKind) -> Reading:
    """How the settings say that one table is to be read."""
    table = config.table(kind)
    return Reading(
        {value: vote for vote, values in table.votes.items() for value in values},
        frozenset(table.ignore),
        table.score_margin,
        config.prompt_template,
        config.prompt_style,
        tuple(dict.fromkeys(table.keep)),
        licence=table.licence,
    )


@dataclass(frozen=True, kw_only=True)
class DataReport(Report):
    """How much data there is, and what is wrong with it; `validation` has the details."""

    validation: Validation
    demonstrations_train: int
    demonstrations_eval: int
    preferences_train: int
    preferences_eval: int
    prompts_train: int
    prompts_eval: int
    dropped: int
    ties: int
    known_answers: int  # among the preferences
    machine_votes: int  # among them too, of judges
    contradictory_pairs: int
    shared_prompts: int
    truncated: int
    lost_tokens: int  # of answers, cut off by a later stage
    same_after_cut: int  # preferences whose answers are the same tokens then


def prepare_data(config: DataConfig, work: Work) -> DataReport:
    """Write the prepared tables and the validation report.

    Args:
        work: output data; sections model, whose tokenizer measures lengths, and limits; input
            preferences, the JSON lines of the snapshot, if `config.preferences` names a store.

    Raises: ConfigError or DataError naming file, line and field, before anything is written.
    """
    output, logger = work.outputs["data"], work.logger
    model, limits = work.section(ModelConfig), work.section(LengthLimits)
    snapshot = work.inputs.get(SNAPSHOT)
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.preparing-"
    for left in output.parent.glob(f"{glob.escape(prefix)}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=prefix, dir=output.parent) as name:
        found = _prepare(config, model, limits, work.seed, logger, snapshot, Path(name))
        logger.progress(2, 3, "writing the tables")
        output.mkdir(parents=True, exist_ok=True)
        for kind in TABLE_KINDS:
            logger.phase(f"writing the {kind}")
            for split in SPLITS:
                table_path(Path(name), kind, split).replace(table_path(output, kind, split))
    text = found.validation.model_dump_json(indent=2) + "\n"
    (output / "validation.json").write_text(text, encoding="utf-8")
    found.origins.write(output)
    logger.progress(3, 3, "data prepared")
    return _report(found.validation, _length_histograms(found.lengths), shown(found.origins))


def inspect(
    config: DataConfig,
    model: ModelConfig,
    limits: LengthLimits,
    seed: int,
    logger: StageLogger | None = None,
    snapshot: Path | None = None,
) -> Validation:
    """Compute only the validation report; no table is kept.

    Args:
        snapshot: as the input preferences of `prepare_data`.

    Raises: ConfigError or DataError, as `prepare_data` does.
    """
    logger = logger or SilentLogger()
    with TemporaryDirectory(prefix="rlhf-") as name:
        return _prepare(config, model, limits, seed, logger, snapshot, Path(name)).validation


class _Prepared(NamedTuple):
    """What is known of tables that were prepared."""

    validation: Validation
    lengths: Mapping[TableKind, pd.DataFrame]
    origins: Origins


class _Sources(NamedTuple):
    """The sources of all tables, parsed, shard by shard."""

    facts: Mapping[TableKind, ParsedFacts]
    shards: int
    take: Callable[[int], CleanTables]  # each once


def _prepare(
    config: DataConfig,
    model: ModelConfig,
    limits: LengthLimits,
    seed: int,
    logger: StageLogger,
    snapshot: Path | None,
    folder: Path,
) -> _Prepared:
    """Write the tables into a folder, a shard of the prompts at a time."""
    logger.progress(0, 3, "reading the data")
    if config.source == "simulated":
        sources = _simulated(config, seed)
    else:
        sources = _from_files(config, model, logger, snapshot, folder)
    totals, parts, kept = Totals(sources.facts), Parts(folder), Shelf(folder, sources.shards)
    for shard in range(sources.shards):
        logger.phase("splitting by prompt", shard, sources.shards)
        tables = fill(split_by_prompt(sources.take(shard), config.eval_fraction, seed))
        totals.add(tables)
        parts.write(shard, tables)
        kept.put(shard, tables)
        del tables
    totals.close()
    _check_sides(totals, config)
    _check_shared(totals, config)
    parts.merge(folder)
    logger.progress(1, 3, "measuring lengths")
    logger.phase("loading the tokenizer")
    from rlhf_core.backbone.base_model import load_tokenizer  # with all of transformers

    shown_first = PreparedRows(folder, "demonstrations", "train")
    tokenizer = load_tokenizer(model, training_dialogues(shown_first))
    day = date.today()
    set_date(tokenizer, day)
    measures = Measures(sources.facts, tokenizer, limits)
    for shard in range(sources.shards):
        measures.add(kept.take(shard), partial(counted, logger))
    for split in SPLITS:
        votes = totals.tables["preferences"].kept[split]
        if measures.same[split] == votes:
            setting = "reward_model.max_length"
            raise DataError(all_the_same(votes, limits.reward, setting, _PURPOSE[split]))
    validation = measures.report(totals, day, sources.shards)
    return _Prepared(validation, measures.lengths(), totals.origins())


# --- reading -------------------------------------------------------------------------------------


def _simulated(config: DataConfig, seed: int) -> _Sources:
    drawn = simulate(config.simulation, seed)
    frames: dict[TableKind, pd.DataFrame] = {
        "demonstrations": drawn.demonstrations,
        "preferences": drawn.preferences,
        "prompts": drawn.prompts,
    }
    parsed = {
        kind: ParsedSource(
            frame.astype(object).assign(ballot=0),
            "simulated",
            len(frame),
            (),
            {},
            origins=[Origin.of(("simulated",), ())] * len(frame),
        )
        for kind, frame in frames.items()
    }
    facts = {kind: facts_of([source]) for kind, source in parsed.items()}
    return _Sources(
        facts, 1, lambda _: {kind: assemble(kind, {"": found}) for kind, found in parsed.items()}
    )


def _from_files(
    config: DataConfig,
    model: ModelConfig,
    logger: StageLogger,
    snapshot: Path | None,
    folder: Path,
) -> _Sources:
    if not config.preferences.named:
        raise ConfigError(
            "data.source is 'files' but there are no preferences; set "
            "data.preferences.path, or set data.source to 'simulated'"
        )
    if config.preferences.store and snapshot is None:
        raise ConfigError(
            f"data.preferences.store is '{config.preferences.store}', which only a task reads: run "
            "the stage as one, or write the snapshot to a file with `rlhf feedback export`"
        )
    # A fresh model's tokenizer is trained on the data, and its template rejects nothing.
    tokenizer = None
    if model.source:
        from rlhf_core.backbone.base_model import load_tokenizer

        tokenizer = load_tokenizer(model, ())
    # The tokens of a template with a date are counted when the date is known.
    measured = tokenizer is not None and not asks_for_the_date(tokenizer)
    files = {kind: _files(config, kind, snapshot) for kind in TABLE_KINDS}
    size = sum(
        size_of(file.path, config.table(kind).limit)
        for kind, parts in files.items()
        for file in parts.values()
    )
    spill = Spill(folder, shards_for(size))
    parsed: dict[TableKind, list[ParsedSource]] = {}
    for kind, parts in files.items():
        for split, file in parts.items():
            logger.phase(f"reading the {kind}")
            more = {KEPT: config.table(kind).keep, LENGTHS: measured}
            spill.begin(kind, split, [name for name, has in more.items() if has])
            found = _parse(config, kind, file, tokenizer, partial(spill.add, kind, split))
            parsed.setdefault(kind, []).append(found)
    _check_template(config, [source for found in parsed.values() for source in found])
    facts = {kind: facts_of(found) for kind, found in parsed.items()}
    return _Sources(facts, spill.shards, partial(_take, spill))


def _take(spill: Spill, shard: int) -> CleanTables:
    return {
        kind: assemble(
            kind, {split: ParsedSource(frame, "", 0, (), {}) for split, frame in parts.items()}
        )
        for kind, parts in spill.take(shard).items()
    }


class _File(NamedTuple):
    """A source of a table."""

    path: str
    split: str
    named: str = ""  # what messages call it instead of its path


def _files(config: DataConfig, kind: TableKind, snapshot: Path | None) -> dict[str, _File]:
    """The sources of a table by their split, "" where the prompts decide."""
    settings = config.table(kind)
    train = _File(settings.path, settings.split)
    if kind == "preferences" and config.preferences.store:
        train = _File(str(snapshot), settings.split, config.preferences.named)
    if not train.path:
        return {}
    evaluation = settings.evaluation()
    return {"": train} if evaluation is None else {"train": train, "eval": _File(*evaluation)}


def _check_template(config: DataConfig, sources: Sequence[ParsedSource]) -> None:
    for name in names_in(config.prompt_template):
        if all(name in source.lacks for source in sources):
            raise ConfigError(
                f"data.prompt_template names {{{name}}}, but no source has such a field; "
                f"correct the name, or write {{{{{name}}}}} for the text {{{name}}} itself"
            )


def _parse(
    config: DataConfig,
    kind: TableKind,
    file: _File,
    tokenizer: "PreTrainedTokenizerBase | None",
    put: Callable[[Row, int], None],
) -> ParsedSource:
    """Put in the votes or texts of a source, one after the other; return what else is known."""
    settings = config.table(kind)
    source = reread_rows(file.path, split=file.split, subset=settings.subset, limit=settings.limit)
    if file.named:
        source = replace(source, source=file.named)
    parsing = Parsing(source, kind, settings.fields, reading_of(config, kind))
    known = OriginsOfVotes.beside(Path(file.path)) if file.named else None
    rejected: list[Fault] = []
    numbers = count()
    for examples in _by_row(parsing.examples(), whole=parsing.form.join is not None):
        if tokenizer is not None:
            examples, faults = _readable(examples, source, kind, settings, tokenizer)
            rejected += faults
        if known is not None:
            origins = known.of(pd.DataFrame(examples), [example[ORIGIN] for example in examples])
            examples = [{**e, ORIGIN: o} for e, o in zip(examples, origins, strict=True)]
        for example in examples:
            put(example, next(numbers))
    parsing.columns.note_unused_template()
    every = sorted([*parsing.faults, *rejected], key=lambda fault: fault.number)
    if every and config.on_bad_row == "error":
        them = "it" if len(every) == 1 else f"all {len(every)} bad rows of this source"
        raise DataError(
            f"{every[0]}; fix the row, or set data.on_bad_row to 'drop' to leave {them} out"
        )
    return ParsedSource(
        pd.DataFrame(),
        source.source,
        len(source.rows) + len(source.unreadable),
        every,
        parsing.skipped,
        parsing.columns.lacks,
        parsing.columns.notes,
    )


def _by_row(examples: Iterable[Row], *, whole: bool) -> Iterator[list[Row]]:
    """Examples, many at a time; all that a row became are together.

    Args:
        whole: an example may be made of several rows, so all of them are.
    """
    held: list[Row] = []
    for example in examples:
        if len(held) >= BATCH and not whole and example.get("row") != held[-1].get("row"):
            yield held
            held = []
        held.append(example)
    if held:
        yield held


def _readable(
    examples: list[Row],
    source: SourceRows,
    kind: TableKind,
    settings: TableConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[Row], list[Fault]]:
    """The examples with their lengths, without those with a text that the model's template or
    tokenizer rejects, which are bad rows like others."""
    answers = answer_columns(kind)
    try:
        return _measured(examples, answers, tokenizer), []
    except DataError:
        faults = _rejected(examples, ("prompt", *answers), source, settings, tokenizer)
    left = [example for example in examples if example.get("row", 0) not in faults]
    return _measured(left, answers, tokenizer), list(faults.values())


def _measured(
    examples: list[Row], answers: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[Row]:
    """The examples with the tokens of their texts, as `count_tokens` counts them."""
    prompts = encode_all_prompts([example["prompt"] for example in examples], tokenizer)
    asked = [(example, not isinstance(example["prompt"], str)) for example in examples]
    texts = [(str(example[name]), chat) for example, chat in asked for name in answers]
    found = map(len, encode_all_responses(texts, tokenizer))
    return [
        {**example, LENGTHS: (len(prompt), *islice(found, len(answers)))}
        for example, prompt in zip(examples, prompts, strict=True)
    ]


def _rejected(
    examples: Sequence[Row],
    fields: Sequence[str],
    source: SourceRows,
    settings: TableConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[int, Fault]:
    """Why rows are rejected, by their numbers."""
    columns = source.columns()
    seen: dict[str, str] = {}  # text -> why it is rejected; empty if it is not
    faults: dict[int, Fault] = {}
    for example in examples:
        number, chat = example.get("row", 0), not isinstance(example["prompt"], str)
        for field in fields:
            key = canonical_prompt(example[field])
            if key not in seen:
                seen[key] = _why_rejected(example[field], field, chat, tokenizer)
            if seen[key]:
                place = settings.fields.get(field, field)
                where = (source.source, source.unit, number, place if place in columns else "")
                faults.setdefault(number, Fault(*where, "rejected by the template", seen[key]))
    return faults


def _why_rejected(
    text: Prompt, field: str, chat: bool, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    try:
        if field == "prompt":
            encode_prompt(text, tokenizer)
        else:
            encode_response(str(text), tokenizer, chat=chat)
    except TextError as error:
        return str(error)
    return ""


# --- checking ------------------------------------------------------------------------------------


def _check_sides(totals: Totals, config: DataConfig) -> None:
    for kind, table in totals.parsed():  # before those that are derived from them
        if not table.kept.total():
            raise DataError(_nothing_left(kind, table, "train", config))
    for kind, table in totals.tables.items():
        for split in SPLITS:
            if not table.kept[split]:
                raise DataError(_nothing_left(kind, table, split, config))


def _nothing_left(kind: TableKind, table: TableTotals, split: Split, config: DataConfig) -> str:
    start = f"no {kind} are left for {_PURPOSE[split]}: of {table.rows} rows ({table.source}) "
    if not table.kept.total():
        reasons = ", ".join(f"{reason} {count}" for reason, count in table.dropped.items())
        return f"{start}all were dropped ({reasons}); check the fields and the data"
    return (
        f"{start}{table.kept.total()} with {table.distinct} distinct prompts are all on the "
        f"other side; change data.eval_fraction ({config.eval_fraction}) or the seed, or add "
        f"separate evaluation data (data.{kind}.eval_path or eval_split)"
    )


def _check_shared(totals: Totals, config: DataConfig) -> None:
    shared = totals.shared
    if shared and not config.allow_shared_prompts:
        first = totals.shared_first
        examples = ", ".join(repr(key if len(key) <= 60 else f"{key[:59]}…") for key in first)
        count = "1 prompt is" if shared == 1 else f"{shared} prompts are"
        raise DataError(
            f"{count} in both training and evaluation data, for example {examples}; remove "
            "them from one of the two, or set data.allow_shared_prompts to true"
        )


# --- reporting -----------------------------------------------------------------------------------


def _report(validation: Validation, lengths: "Figure", origins: pd.DataFrame) -> DataReport:
    tables = validation.tables
    return DataReport(
        validation=validation,
        demonstrations_train=tables["demonstrations"].train,
        demonstrations_eval=tables["demonstrations"].eval,
        preferences_train=tables["preferences"].train,
        preferences_eval=tables["preferences"].eval,
        prompts_train=tables["prompts"].train,
        prompts_eval=tables["prompts"].eval,
        dropped=sum(sum(table.dropped.values()) for table in tables.values()),
        ties=validation.ties,
        known_answers=validation.known_answers,
        machine_votes=validation.machine_votes,
        contradictory_pairs=validation.contradictory_pairs,
        shared_prompts=validation.shared_prompts,
        truncated=sum(validation.truncated.values()),
        lost_tokens=sum(validation.lost.values()),
        same_after_cut=validation.same_after_cut,
        tables={
            "data_rows": validation.rows_table(),
            "data_lengths": validation.lengths_table(),
            "data_truncated": validation.truncated_table(),
            "data_origins": origins,
        },
        figures={"data_lengths": lengths},
    )


def _length_histograms(counts: Mapping[TableKind, pd.DataFrame]) -> "Figure":
    """Histograms of text lengths, one panel for each table."""
    figure = figures.blank(9.6, 3.2)
    panels = figure.subplots(1, len(counts))
    for axes, (kind, lengths) in zip(panels, counts.items(), strict=True):
        axes.hist(lengths.to_numpy(), bins=30, histtype="step", label=list(lengths.columns))
        axes.set_title(kind, loc="left", fontsize=11)
        axes.set_xlabel("length (tokens)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    panels[0].set_ylabel("texts")
    return figure
