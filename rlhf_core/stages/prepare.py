"""Prepare: convert the user's data, or simulated data, into the three tables of the pipeline.

1. Read each source and check every row (`sources`, `formats`).
2. Drop rows that teach nothing: pairs of identical answers, duplicates.
3. Split by prompt. A source with its own evaluation data decides for its prompts; a hash of seed
   and prompt decides for the others. So a prompt is on the same side in all tables.
4. Derive missing tables: demonstrations are the chosen answers, prompts are the distinct prompts of
   the other two tables.
5. Measure lengths with the model's tokenizer, and count the texts that later stages will cut.
6. Write the tables and `validation.json`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.backbone.base_model import ModelConfig, load_tokenizer
from rlhf_core.config import FileOrHub, Section
from rlhf_core.data.assembly import (
    CleanTable,
    CleanTables,
    assemble,
    fill,
    shared_prompts,
    split_by_prompt,
)
from rlhf_core.data.chat_tokens import (
    TextError,
    asks_for_the_date,
    encode_prompt,
    encode_response,
    set_date,
)
from rlhf_core.data.encoding import Prompt
from rlhf_core.data.formats import ParsedSource, parse
from rlhf_core.data.forms.fields import FIELDS, names_in
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.origins.counts import Origin
from rlhf_core.data.origins.of_votes import OriginsOfVotes
from rlhf_core.data.origins.tables import origins_of, shown
from rlhf_core.data.pairs import all_the_same, with_winners
from rlhf_core.data.prepared import (
    COLUMNS,
    SPLITS,
    TABLE_KINDS,
    Split,
    TableKind,
    canonical_prompt,
    known_answers,
    training_texts,
    votes_of_machines,
    write_table,
)
from rlhf_core.data.sources import Fault, SourceRows, read_rows
from rlhf_core.data.validation import (
    TableSummary,
    Validation,
    contradictory_pairs,
    count_tokens,
    count_truncated,
    count_written_controls,
    measure_cut,
    summarise_lengths,
)
from rlhf_core.data.vote_details import word
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.metrics import SilentLogger, StageLogger, counted
from rlhf_core.simulation import SimulationConfig, simulate
from rlhf_core.types import Report
from rlhf_core.work import Work

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LATEST = "latest"  # of data.preferences.snapshot
SNAPSHOT = "preferences"  # the role of a snapshot among the inputs of the stage
_PURPOSE: Mapping[Split, str] = {"train": "training", "eval": "evaluation"}


class TableConfig(Section):
    """The source of one table."""

    path: FileOrHub = Field(
        "",
        description="A .jsonl, .json, .csv or .parquet file (also .gz), a save_to_disk folder, or "
        "the hub id of a data set; empty = none",
    )
    split: str = Field("train", description="Split of a Hugging Face data set")
    subset: str = Field("", description="Subset (configuration) of a hub data set")
    eval_path: FileOrHub = Field(
        "", description="Separate evaluation data; empty = `path`, split by prompt"
    )
    eval_split: str = Field(
        "", description="Split with the evaluation data; empty = split by prompt"
    )
    fields: dict[str, str] = Field(
        {},
        description="Fields that are called otherwise: ours -> a column of the source, a dotted "
        'path such as `question.text`, or a template such as `"{instruction}\\n{input}"`',
    )
    votes: dict[str, list[str]] = Field(
        {},
        description="Values of votes that differ: `a`, `b` or `tie` -> the source's, one or more",
    )
    score_margin: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Margin for each point between the scores or ranks of two answers (raw reward)",
    )
    ignore: list[str] = Field(
        [], description="Columns and keys of messages to leave out on purpose"
    )
    keep: list[str] = Field(
        [],
        description="Columns or dotted paths to keep beside each vote, or beside each prompt: the "
        "report card shows the accuracy by each of their values, and an evaluation the win rate",
    )
    licence: str = Field(
        "",
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="Licence of the rows that name none in a column `licence` or `license`; "
        "`rlhf lineage` finds models by it",
    )
    limit: int = Field(
        0, ge=0, description="Use only the first rows of each source (rows; 0 = all)"
    )

    @field_validator("votes", mode="before")
    @classmethod
    def _values_as_words(cls, votes: object) -> object:
        """One value or several, of which YAML reads 1 as a number and yes as a truth value."""
        if not isinstance(votes, dict):
            return votes
        listed = {vote: v if isinstance(v, list) else [v] for vote, v in votes.items()}
        return {vote: [word(value) for value in values] for vote, values in listed.items()}

    @field_validator("votes")
    @classmethod
    def _known_votes(cls, votes: dict[str, list[str]]) -> dict[str, list[str]]:
        unknown = sorted(votes.keys() - {"a", "b", "tie"})
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not a vote; write the vote first, 'a', 'b' or 'tie', and then "
                "the values of the source that mean it"
            )
        counts = Counter(value for values in votes.values() for value in values)
        if twice := [value for value, count in counts.items() if count > 1]:
            raise ValueError(f"the value {twice[0]!r} is listed twice; it can mean one vote only")
        return votes

    @property
    def named(self) -> str:
        """What is read, in words; empty if there is nothing."""
        return self.path

    def evaluation(self) -> tuple[str, str] | None:
        """Path and split of the evaluation data; None if the data are split by prompt."""
        if not self.eval_path and not self.eval_split:
            return None
        return self.eval_path or self.path, self.eval_split or self.split

    @model_validator(mode="after")
    def _evaluation_apart(self) -> "TableConfig":
        if self.evaluation() and not self.named:
            raise ValueError("evaluation data are set but `path` is empty: set the training data")
        if self.evaluation() == (self.path, self.split) and self.path:
            raise ValueError("the evaluation data are the training data: change one of the two")
        return self


class PreferencesConfig(TableConfig):
    """The source of the preferences: a file, a data set, or the votes in the preference store."""

    store: str = Field(
        "",
        pattern=r"^([a-z0-9]([a-z0-9-]*[a-z0-9])?)?$",
        max_length=100,
        description="A project of the preference store, whose votes are read instead of `path`; "
        "empty = none",
    )
    snapshot: str = Field(
        "",
        pattern=r"^(latest|[0-9a-f]{6,64})?$",
        description="Which votes of the project in `store`: latest = those that count when the run "
        "begins, or the digest of a snapshot (at least its first 6 digits); empty = latest",
    )

    @property
    def named(self) -> str:
        """What is read, in words; empty if there is nothing."""
        if not self.store:
            return self.path
        which = self.snapshot if self.snapshot not in ("", LATEST) else ""
        return f"the feedback project {self.store}{f' at snapshot {which[:16]}' if which else ''}"

    @property
    def only_store(self) -> bool:
        """Whether all votes come from the store."""
        return bool(self.store) and not self.eval_path

    @model_validator(mode="after")
    def _one_source(self) -> "PreferencesConfig":
        if self.snapshot and not self.store:
            raise ValueError(
                "snapshot names votes of the preference store, but store is empty: set store to "
                "the feedback project, or remove snapshot"
            )
        if self.store and self.path:
            raise ValueError(
                "path and store are both set, and votes come from one of them: remove one"
            )
        if self.only_store and (self.split != "train" or self.subset or self.eval_split):
            raise ValueError(
                "split, subset and eval_split choose within a data set, which the store is not: "
                "remove them, or set eval_path to a data set"
            )
        return self


class DataConfig(Section):
    """The data: simulated, or the user's own files and data sets."""

    source: Literal["simulated", "files"] = Field(
        "simulated", description="`simulated` draws the data, `files` reads the three tables below"
    )
    simulation: SimulationConfig = Field(
        default_factory=SimulationConfig, description="Used when `source` is `simulated`"
    )
    demonstrations: TableConfig = Field(
        default_factory=TableConfig,
        description="prompt, response; if absent, the chosen answers of the preferences",
    )
    preferences: PreferencesConfig = Field(
        default_factory=PreferencesConfig,
        description="prompt, chosen, rejected; or dialogues; or pairs with votes; or a project of "
        "the preference store",
    )
    prompts: TableConfig = Field(
        default_factory=TableConfig,
        description="prompt; if absent, the prompts of the other two tables",
    )
    prompt_style: Literal["text", "chat"] = Field(
        "text",
        description="How a text prompt is used: `text` continues it as it is, `chat` "
        "sends it as a user message through the model's chat template",
    )
    prompt_template: str = Field(
        "{prompt}",
        description="Template of a text prompt; {prompt} stands for the text, and any other column "
        "for its text, e.g. {input} or {system}",
    )
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the prompts split off for evaluation"
    )
    allow_shared_prompts: bool = Field(
        False, description="Allow a prompt to be in both training and evaluation data"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="Stop at a bad row, or leave it out and count it"
    )

    @property
    def reads_files(self) -> bool:
        """Whether anything is read from a file or a hub, which may change."""
        tables = [self.table(kind) for kind in TABLE_KINDS]
        return any(table.path or table.eval_path for table in tables)

    def table(self, kind: TableKind) -> TableConfig:
        """The settings of one table."""
        tables: dict[TableKind, TableConfig] = {
            "demonstrations": self.demonstrations,
            "preferences": self.preferences,
            "prompts": self.prompts,
        }
        return tables[kind]

    def reading(self, kind: TableKind) -> Reading:
        """How the settings say that one table is to be read."""
        table = self.table(kind)
        return Reading(
            {value: vote for vote, values in table.votes.items() for value in values},
            frozenset(table.ignore),
            table.score_margin,
            self.prompt_template,
            self.prompt_style,
            tuple(dict.fromkeys(table.keep)),
            licence=table.licence,
        )

    @field_validator("preferences", mode="before")
    @classmethod
    def _of_a_file(cls, table: object) -> object:
        """Settings of a table that know nothing of the store."""
        if isinstance(table, TableConfig) and not isinstance(table, PreferencesConfig):
            return table.model_dump()
        return table

    @model_validator(mode="after")
    def _template_takes_a_text(self) -> "DataConfig":
        if not names_in(self.prompt_template):
            raise ValueError(
                f"prompt_template {self.prompt_template!r} does not contain {{prompt}}: write it "
                "where the text belongs"
            )
        return self

    @model_validator(mode="after")
    def _prompts_have_columns(self) -> "DataConfig":
        if self.prompts.keep and not self.prompts.path:
            raise ValueError(
                "prompts.keep names columns of the prompts, but prompts.path is empty, so they are "
                "taken from the other tables: set prompts.path, which may be the file of one of "
                "those, or remove prompts.keep"
            )
        return self

    @model_validator(mode="after")
    def _known_fields(self) -> "DataConfig":
        for kind in TABLE_KINDS:
            if kind == "demonstrations" and self.table(kind).keep:
                raise ValueError(
                    f"{kind}.keep has no meaning: columns are kept beside votes and prompts; move "
                    "it to preferences.keep or prompts.keep, or remove it"
                )
            for field in self.table(kind).fields:
                if field not in FIELDS[kind]:
                    known = ", ".join(FIELDS[kind])
                    raise ValueError(
                        f"{kind}.fields: unknown field '{field}'; the fields are: {known}"
                    )
        return self


class LengthLimits(Section):
    """The lengths at which later stages cut; the report counts longer texts."""

    prompt: int = Field(ge=1, description="Longest prompt in sampling (tokens)")
    sft: int = Field(ge=1, description="Longest prompt and response in fine-tuning (tokens)")
    reward: int = Field(ge=1, description="Longest prompt and answer of the reward model (tokens)")
    response: int = Field(ge=1, description="Longest response that the policy samples (tokens)")


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
    logger.progress(0, 3, "reading the data")
    model, limits = work.section(ModelConfig), work.section(LengthLimits)
    tables = _assemble(config, model, work.seed, logger, work.inputs.get(SNAPSHOT))
    logger.progress(1, 3, "measuring lengths")
    counts, validation = _validate(tables, model, limits, logger)
    logger.progress(2, 3, "writing the tables")
    output.mkdir(parents=True, exist_ok=True)
    for kind, table in tables.items():
        logger.phase(f"writing the {kind}")
        for split in SPLITS:
            write_table(table.side(split), output, kind, split)
    text = validation.model_dump_json(indent=2) + "\n"
    (output / "validation.json").write_text(text, encoding="utf-8")
    origins = origins_of(tables)
    origins.write(output)
    logger.progress(3, 3, "data prepared")
    return _report(validation, _length_histograms(counts), shown(origins))


def inspect(
    config: DataConfig,
    model: ModelConfig,
    limits: LengthLimits,
    seed: int,
    logger: StageLogger | None = None,
    snapshot: Path | None = None,
) -> Validation:
    """Compute only the validation report; nothing is written.

    Args:
        snapshot: as the input preferences of `prepare_data`.

    Raises: ConfigError or DataError, as `prepare_data` does.
    """
    logger = logger or SilentLogger()
    tables = _assemble(config, model, seed, logger, snapshot)
    return _validate(tables, model, limits, logger)[1]


def _assemble(
    config: DataConfig,
    model: ModelConfig,
    seed: int,
    logger: StageLogger,
    snapshot: Path | None,
) -> CleanTables:
    if config.source == "simulated":
        sources = _simulated(config, seed)
    else:
        sources = _from_files(config, model, logger, snapshot)
    logger.phase("splitting by prompt")
    tables = fill(split_by_prompt(sources, config.eval_fraction, seed))
    _check_sides(tables, config)
    _check_shared(tables, config)
    return tables


# --- reading -------------------------------------------------------------------------------------


def _simulated(config: DataConfig, seed: int) -> CleanTables:
    drawn = simulate(config.simulation, seed)
    frames: dict[TableKind, pd.DataFrame] = {
        "demonstrations": drawn.demonstrations,
        "preferences": drawn.preferences,
        "prompts": drawn.prompts,
    }
    return {
        kind: assemble(
            kind,
            {
                "": ParsedSource(
                    frame.astype(object).assign(ballot=0),
                    "simulated",
                    len(frame),
                    (),
                    {},
                    origins=[Origin.of(("simulated",), ())] * len(frame),
                )
            },
        )
        for kind, frame in frames.items()
    }


def _from_files(
    config: DataConfig, model: ModelConfig, logger: StageLogger, snapshot: Path | None
) -> CleanTables:
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
    tokenizer = load_tokenizer(model, ()) if model.source else None
    parts: dict[TableKind, dict[str, ParsedSource]] = {}
    for kind in TABLE_KINDS:
        found = snapshot if kind == "preferences" and config.preferences.store else None
        if config.table(kind).path or found:
            logger.phase(f"reading the {kind}")
            parts[kind] = _read(config, kind, tokenizer, found)
    _check_template(config, [source for found in parts.values() for source in found.values()])
    tables = {kind: assemble(kind, found) for kind, found in parts.items()}
    for kind, table in tables.items():
        if table.frame.empty:  # before other tables are derived from it
            raise DataError(_nothing_left(kind, table, "train", config))
    return tables


def _read(
    config: DataConfig,
    kind: TableKind,
    tokenizer: PreTrainedTokenizerBase | None,
    snapshot: Path | None,
) -> dict[str, ParsedSource]:
    """The sources of a table by their split, "" where the prompts decide."""
    settings = config.table(kind)
    evaluation = settings.evaluation()
    if snapshot is None:
        train = _parse(config, kind, settings.path, settings.split, tokenizer)
    else:
        named = config.preferences.named
        train = _parse(config, kind, str(snapshot), settings.split, tokenizer, named)
    if evaluation is None:
        return {"": train}
    return {"train": train, "eval": _parse(config, kind, *evaluation, tokenizer)}


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
    path: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None,
    named: str = "",
) -> ParsedSource:
    """The votes or texts of a source; `named` is what messages call it instead of its path."""
    settings = config.table(kind)
    source = read_rows(path, split=split, subset=settings.subset, limit=settings.limit)
    if named:
        source = replace(source, source=named)
    table = parse(source, kind, settings.fields, config.reading(kind))
    if named and (known := OriginsOfVotes.beside(Path(path))):
        table = replace(table, origins=known.of(table.frame, table.origins))
    if tokenizer is not None:
        table = _without_unreadable(table, source, kind, settings, tokenizer)
    if table.faults and config.on_bad_row == "error":
        count = len(table.faults)
        them = "it" if count == 1 else f"all {count} bad rows of this source"
        raise DataError(
            f"{table.faults[0]}; fix the row, or set data.on_bad_row to 'drop' to leave {them} out"
        )
    return table


def _without_unreadable(
    table: ParsedSource,
    source: SourceRows,
    kind: TableKind,
    settings: TableConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> ParsedSource:
    """The source without the rows that the model's template or tokenizer rejects, which are bad
    rows like others."""
    columns = source.columns()
    seen: dict[str, str] = {}  # text -> why it is rejected; empty if it is not
    faults: dict[int, Fault] = {}
    for number, record in zip(table.numbers, table.frame.to_dict("records"), strict=True):
        chat = not isinstance(record["prompt"], str)
        for field in ("prompt", *(name for name in COLUMNS[kind] if name.startswith("response"))):
            key = canonical_prompt(record[field])
            if key not in seen:
                seen[key] = _why_rejected(record[field], field, chat, tokenizer)
            if seen[key]:
                place = settings.fields.get(field, field)
                where = (source.source, source.unit, number, place if place in columns else "")
                faults.setdefault(number, Fault(*where, "rejected by the template", seen[key]))
    kept = [number not in faults for number in table.numbers]
    every = sorted([*table.faults, *faults.values()], key=lambda fault: fault.number)
    left = [number for number in table.numbers if number not in faults]
    origins = list(compress(table.origins, kept))
    return replace(table, frame=table.frame[kept], numbers=left, faults=every, origins=origins)


def _why_rejected(text: Prompt, field: str, chat: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        if field == "prompt":
            encode_prompt(text, tokenizer)
        else:
            encode_response(str(text), tokenizer, chat=chat)
    except TextError as error:
        return str(error)
    return ""


# --- checking ------------------------------------------------------------------------------------


def _check_sides(tables: CleanTables, config: DataConfig) -> None:
    for kind, table in tables.items():
        for split in SPLITS:
            if table.side(split).empty:
                raise DataError(_nothing_left(kind, table, split, config))


def _nothing_left(kind: TableKind, table: CleanTable, split: Split, config: DataConfig) -> str:
    start = f"no {kind} are left for {_PURPOSE[split]}: of {table.rows} rows ({table.source}) "
    if table.frame.empty:
        reasons = ", ".join(f"{reason} {count}" for reason, count in table.dropped.items())
        return f"{start}all were dropped ({reasons}); check the fields and the data"
    prompts = table.frame["key"].nunique()
    return (
        f"{start}{len(table.frame)} with {prompts} distinct prompts are all on the "
        f"other side; change data.eval_fraction ({config.eval_fraction}) or the seed, or add "
        f"separate evaluation data (data.{kind}.eval_path or eval_split)"
    )


def _check_shared(tables: CleanTables, config: DataConfig) -> None:
    shared = shared_prompts(tables)
    if shared and not config.allow_shared_prompts:
        examples = ", ".join(repr(key if len(key) <= 60 else f"{key[:59]}…") for key in shared[:3])
        count = "1 prompt is" if len(shared) == 1 else f"{len(shared)} prompts are"
        raise DataError(
            f"{count} in both training and evaluation data, for example {examples}; remove "
            "them from one of the two, or set data.allow_shared_prompts to true"
        )


# --- reporting -----------------------------------------------------------------------------------


def _validate(
    tables: CleanTables, model: ModelConfig, limits: LengthLimits, logger: StageLogger
) -> tuple[dict[TableKind, pd.DataFrame], Validation]:
    """The length of every text in tokens, and the report."""
    logger.phase("loading the tokenizer")
    tokenizer = load_tokenizer(model, training_texts(tables["demonstrations"].side("train")))
    day = date.today()
    set_date(tokenizer, day)
    preferences = with_winners(tables["preferences"].frame)
    known = known_answers(preferences)
    frames = {kind: table.frame for kind, table in tables.items()} | {"preferences": preferences}
    counts = count_tokens(frames, tokenizer, partial(counted, logger))
    logger.phase("measuring what is cut")
    lost, same = measure_cut(frames, counts, tokenizer, sft=limits.sft, reward=limits.reward)
    for split in SPLITS:
        side = same[preferences["split"] == split]
        if side.all():
            setting = "reward_model.max_length"
            raise DataError(all_the_same(len(side), limits.reward, setting, _PURPOSE[split]))
    validation = Validation(
        tables={kind: _summary(table) for kind, table in tables.items()},
        bad_rows=[fault for table in tables.values() for fault in table.bad_rows],
        unread=[note for table in tables.values() for note in table.unread],
        ties=int(preferences["tie"].sum()),
        known_sides=int((preferences["shown_first"] != "").sum()),
        timed=int((preferences["time"] != "").sum()),
        gold=int((preferences["gold"].astype(bool) & ~known).sum()),
        known_answers=int(known.sum()),
        machine_votes=int(votes_of_machines(preferences).sum()),
        contradictory_pairs=contradictory_pairs(preferences),
        shared_prompts=len(shared_prompts(tables)),
        lengths=summarise_lengths(counts),
        truncated=count_truncated(counts, **limits.model_dump()),
        lost=lost,
        same_after_cut=int(same.sum()),
        written_controls=count_written_controls(frames, tokenizer),
        template_date=day.isoformat() if asks_for_the_date(tokenizer) else "",
        vocabulary=len(tokenizer),
    )
    return counts, validation


def _summary(table: CleanTable) -> TableSummary:
    return TableSummary(
        source=table.source,
        rows=table.rows,
        examples=len(table.frame) + table.dropped.total(),
        train=len(table.side("train")),
        eval=len(table.side("eval")),
        eval_prompts=table.side("eval")["key"].nunique(),
        dropped=dict(sorted(table.dropped.items())),
    )


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
