"""The whole pipeline: data, SFT, reward model, policy, tournament, evaluation, promotion."""

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from flows.config import PipelineConfig, default_settings
from flows.pipeline_flow import pipeline_flow
from rlhf_core.doubts import doubts
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.evaluation.tournament.result import TournamentResult
from rlhf_core.promotion.decision import Decision
from tasks.feedback.asking.waiting import suspended_for_people
from tasks.feedback.ordering.beside import Begin, ordered_beside
from tasks.prefect.approval import ask_person
from tasks.record.run import open_run
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun
from tasks.registry.registered import find_model
from tasks.steps.data import prepare_data
from tasks.steps.evaluation import evaluate
from tasks.steps.judge import check_judge
from tasks.steps.policy import TrainedPolicy, check_engine, find_rewards, train_policy
from tasks.steps.promotion import pin_champion, promote
from tasks.steps.report import write_report
from tasks.steps.report_card import check_report_card, write_report_card
from tasks.steps.reward_model import check_base_model, train_held_out, train_reward_model
from tasks.steps.sft import train_sft
from tasks.steps.tournament import hold_tournament

Forceable: TypeAlias = Literal[
    "prepare", "sft", "reward_model", "report_card", "policy", "tournament", "evaluation"
]


log = logging.getLogger("tasks.flow")  # below the loggers that Prefect shows


class Trained(BaseModel):
    """The models of a pipeline, by explicit version, and their data."""

    model_config = ConfigDict(frozen=True)

    data: DatasetRef
    sft: ModelRef
    reward_model: ModelRef
    report_card: ReportCard  # of the reward model
    policy: ModelRef  # the last one, or the one that the tournament chose
    critic: ModelRef | None
    tournament: TournamentResult | None = None

    @property
    def models(self) -> dict[str, ModelRef]:
        """The models by kind, the critic only if there is one."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return {"sft": self.sft, "reward": self.reward_model, "policy": self.policy, **critic}


class PipelineResult(Trained):
    """What a pipeline made, and how the policy compares."""

    run: PipelineRun
    scorecard: Scorecard
    decision: Decision
    report: str


@pipeline_flow("rlhf")
def rlhf(config: PipelineConfig, force: tuple[Forceable, ...] = ()) -> PipelineResult:
    """Turn demonstrations and preferences into a policy, and promote it if it is better.

    Stages that were run before with the same settings, inputs and code are reused from the
    registry.

    Args:
        config: the settings of all stages.
        force: stages to run again even if a result can be reused.
    """
    forced = forced_stages(force, config)
    for sentence in doubts(config.chosen):
        log.warning("%s", sentence)
    with (
        open_run(config.project, config, config.seed, force=forced) as run,
        suspended_for_people(run),
        ordered_beside(config.data) as order_queue,
    ):
        trained = train_models(config, run, order_queue)
        champion = pin_champion(run, trained.policy)
        scorecard = evaluate_policy(config, trained, champion, run)
        question = config.promotion, scorecard, trained.policy, champion, run
        card = trained.report_card
        decision = promote(*question, ask_person(*question, card), card)
        return PipelineResult(
            **dict(trained),
            run=run,
            scorecard=scorecard,
            decision=decision,
            report=write_report(
                scorecard,
                decision,
                trained.report_card,
                config.algorithm,
                trained.models,
                run,
                trained.tournament,
                default_settings(),
            ),
        )


def train_models(
    config: PipelineConfig, run: PipelineRun, order_queue: Begin | None = None
) -> Trained:
    """Prepare the data, then train each model on those before it.

    Args:
        order_queue: called with a reward model that was trained and has passed its gate.
    """
    other_rewards = find_rewards(config.policy, config.evaluation.true_reward)
    check_judge(config.judge, run.project)
    check_engine(config.policy, config.sampling)
    if config.model.source and not (config.sft.reuse or config.reward_model.reuse):
        check_base_model(config.model)
    data = prepare_data(config.data, config.model, config.length_limits, run)

    if config.sft.reuse:
        sft = find_model(config.sft.reuse)
    else:
        sft = train_sft(config.sft, config.model, data, run)

    if config.reward_model.reuse:
        reward_model = find_model(config.reward_model.reuse)
    else:
        reward_model = train_reward_model(config.rewarded, config.sampling, sft, data, run)
    report_card = write_report_card(
        config.examination, config.sampling, reward_model, sft, data, run
    )
    check_report_card(config.reward_gate, report_card, reward_model)
    if order_queue is not None and not config.reward_model.reuse:
        order_queue(reward_model)

    if config.trains_held_out:
        other_rewards["held_out"] = train_held_out(
            config.reward_model, config.sampling, sft, data, run
        )

    trained = train_policy(
        config.algorithm,
        config.optimised,
        config.sampling,
        sft,
        reward_model,
        other_rewards,
        data,
        run,
    )
    tournament = None
    chosen = trained.policy
    if config.tournament.on:
        chosen, tournament = choose_policy(config, sft, trained, reward_model, data, run)
    return Trained(
        data=data,
        sft=sft,
        reward_model=reward_model,
        report_card=report_card,
        policy=chosen,
        critic=trained.critic,
        tournament=tournament,
    )


def choose_policy(
    config: PipelineConfig,
    sft: ModelRef,
    trained: TrainedPolicy,
    reward_model: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> tuple[ModelRef, TournamentResult]:
    """The strongest of the policies along the training, by a tournament."""
    found = hold_tournament(
        config.contest, config.sampling, config.judge, sft, trained, reward_model, data, run
    )
    return found.policy, found.tournament


def evaluate_policy(
    config: PipelineConfig, trained: Trained, champion: ModelRef | None, run: PipelineRun
) -> Scorecard:
    """Compare the policy with SFT, best-of-n and the champion, if there is one."""
    return evaluate(
        config.evaluation,
        config.sampling,
        config.judge,
        trained.sft,
        trained.policy,
        trained.reward_model,
        champion,
        trained.data,
        run,
    )


def forced_stages(force: Sequence[Forceable], config: PipelineConfig) -> list[str]:
    """The stage names in MLflow; the policy stage is named after its algorithm, and with the reward
    model goes the held-out one."""
    names = [config.algorithm if stage == "policy" else stage for stage in force]
    held_out = config.trains_held_out and "reward_model" in force
    return [*names, "held_out"] if held_out else names
