"""Runs pipelines that differ in a few settings, and compares reward and KL of each."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from flows.cli.loading import anchored_override, parse_override
from flows.config import PipelineConfig
from flows.pipeline_flow import pipeline_flow
from flows.rlhf import evaluate_policy, train_models
from rlhf_core.config import Section
from rlhf_core.errors import ConfigError, NumericsError, UserError
from rlhf_core.settings.data import DataConfig
from tasks.history.sweep import Outcome, SweepPoint, record_sweep
from tasks.record.run import open_run
from tasks.steps.data import pin_preferences


class SweepConfig(Section):
    """A pipeline, and the settings to try in it."""

    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description='Settings to vary, with their values: {"ppo.kl_coef": [0.02, 0.1]}; '
        "every combination is run",
    )
    seeds: int = Field(1, ge=1, description="Runs of each combination, with consecutive seeds")
    pipeline: PipelineConfig = Field(
        default_factory=PipelineConfig, description="The settings that all points share"
    )

    @model_validator(mode="after")
    def _every_point_is_valid(self) -> Self:
        list(self.points())
        return self

    def points(self) -> "Iterator[Point]":
        """Each combination with each seed.

        Raises: ValueError for an unknown setting or an invalid value.
        """
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            for seed in range(self.pipeline.seed, self.pipeline.seed + self.seeds):
                content = self.pipeline.model_dump(mode="json") | {"seed": seed}
                for key, value in chosen.items():
                    _put(content, key, value)
                about = SweepPoint(values=chosen, seed=seed)
                try:
                    config = PipelineConfig.model_validate(content)
                except ValidationError as error:
                    first = error.errors()[0]
                    place = ".".join(map(str, first["loc"]))
                    raise ValueError(f"{about.label}: {place}: {first['msg']}") from None
                yield Point(about, config)


class Point(NamedTuple):
    """One pipeline of a sweep."""

    about: SweepPoint
    config: PipelineConfig

    def at(self, data: DataConfig, pinned: DataConfig) -> "Point":
        """The same on the snapshot that `data` was pinned to, unless it chooses its own votes."""
        own, votes = self.config.data, pinned.preferences
        chosen = (own.preferences.store, own.preferences.snapshot)
        if chosen != (data.preferences.store, data.preferences.snapshot):
            return self
        preferences = own.preferences.model_copy(update={"snapshot": votes.snapshot})
        content = own.model_copy(update={"preferences": preferences})
        return self._replace(config=self.config.model_copy(update={"data": content}))


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.name` in nested `content`."""
    *sections, last = key.split(".")
    for section in sections:
        content = content.get(section) if isinstance(content, dict) else None  # type: ignore[assignment]
    if not isinstance(content, dict) or last not in content:
        raise ValueError(f"the grid has '{key}', but there is no such setting")
    content[last] = value


@pipeline_flow("sweep")
def sweep(config: SweepConfig) -> str:
    """Run every point, one after the other, and compare their reward and KL.

    Stages that several points share run once. Nothing is promoted; use `rlhf promote` with the run
    that you choose. If a point fails, the others still run.

    Returns: the report, as Markdown.

    Raises: UserError at the end if a point failed.
    """
    pipeline = config.pipeline
    with open_run(pipeline.project, config, pipeline.seed, kind="sweep") as run:
        pinned = pin_preferences(pipeline.data, run)
        points = [point.at(pipeline.data, pinned) for point in config.points()]
        outcomes = [_try_point(point, run.run_id) for point in points]
        report = record_sweep(outcomes, run)
        if failed := [outcome for outcome in outcomes if outcome.problem]:
            raise UserError(
                f"{len(failed)} of {len(outcomes)} points failed, {failed[0].point.label} first: "
                f"{failed[0].problem}\n\n{report}"
            )
        return report


def _try_point(point: Point, parent: str) -> Outcome:
    try:
        return sweep_point(point.config, point.about, parent)
    except (UserError, NumericsError) as error:
        return Outcome(point=point.about, problem=str(error))


@pipeline_flow("sweep-point", "{about.label}")
def sweep_point(config: PipelineConfig, about: SweepPoint, parent: str) -> Outcome:
    """One pipeline of the sweep, without promotion."""
    with open_run(config.project, config, config.seed, parent=parent) as run:
        trained = train_models(config, run)
        scorecard = evaluate_policy(config, trained, None, run)
        return Outcome.of(about, scorecard, trained.policy, run)


def as_sweep(pipeline: PipelineConfig, grid: Sequence[str], seeds: int) -> SweepConfig:
    """The sweep that repeated `--grid ppo.kl_coef=0.02,0.1` and `--seeds` describe.

    Raises: ConfigError for text of another form, or for an invalid value.
    """
    settings: dict[str, list[Any]] = {}
    for text in grid:
        key = ".".join(parse_override(text).path)
        values = text.partition("=")[2].split(",")
        settings[key] = [
            anchored_override(parse_override(f"{key}={value}"), PipelineConfig).value
            for value in values
        ]
    try:
        return SweepConfig(pipeline=pipeline, grid=settings, seeds=seeds)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()
        )
        raise ConfigError(f"--grid: {problems}") from None
