"""The data: simulated, or the files, data sets and votes that make the three tables."""

from collections import Counter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config import FileOrHub, Section
from rlhf_core.settings.fields import FIELDS, TABLE_KINDS, TableKind, names_in, word
from rlhf_core.settings.simulation import SimulationConfig

LATEST = "latest"  # of data.preferences.snapshot

SNAPSHOT = "preferences"  # the role of a snapshot among the inputs of the stage


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
