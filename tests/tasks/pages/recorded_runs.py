"""Runs in a real MLflow, recorded by hand: what the pages are made from."""

import math

import pandas as pd
import pytest
from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.evaluation.scorecard import Arm, Comparison, Diagnosis, JudgeFacts, Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.decision import Decision, Look, Rule
from rlhf_core.rewards.canaries import CanaryResult
from rlhf_core.types import Report
from tasks.pages.facts import gather
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.record.stage import open_stage


class Training(Section):
    kl_coef: float = Field(0.1, description="Weight.")
    iterations: int = Field(5, description="Updates.")


class Base(Section):
    source: str = Field("", description="Model.")


class Pipeline(Section):
    project: str = Field("p", description="Name.")
    algorithm: str = Field("ppo", description="Algorithm.")
    model: Base = Field(Base(), description="Model.")
    ppo: Training = Field(Training(), description="Policy.")
    dpo: Training = Field(Training(iterations=7), description="Another.")


DEFAULTS = Pipeline(dpo=Training()).model_dump(mode="json")


def arm(name, reward, length=20.0):
    return Arm(
        name=name,
        proxy_reward=Interval(reward, reward - 0.1, reward + 0.1),
        true_reward=None,
        kl=Interval(2.0, 1.5, 2.5),
        perplexity=math.inf,
        length=length,
        distinct_1=0.1,
        distinct_2=0.2,
    )


def scorecard(win=0.75, judge="an endpoint"):
    match = Comparison(
        candidate="policy",
        opponent="sft",
        judge=judge,
        wins=7,
        ties=1,
        losses=2,
        prompts=10,
        win_rate=Interval(win, win - 0.2, win + 0.2),
        length_controlled=Interval(win - 0.1, win - 0.3, win + 0.1),
        unanswered=3,
    )
    canary = CanaryResult(
        kind="padded",
        beats_real=Interval(0.25, 0.1, 0.4),
        prompts=10,
        answers=10,
        left_out=0,
        example="",
    )
    return Scorecard(
        arms=(arm("sft", 0.0), arm("policy", 1.0)),
        comparisons=(match,),
        judge=JudgeFacts(
            name="an endpoint",
            pairs=10,
            unanswered=3,
            consistency=Interval(0.9, 0.8, 1.0),
            canaries=(canary,),
            requests=26,
            tokens=4321,
            seconds=75.0,
        ),
        diagnosis=Diagnosis(fault="reward_model", says="The reward model is at fault."),
    )


RULES = (
    Rule(
        name="win rate over sft",
        measured="0.750",
        required="above 0.5",
        passed=True,
        family="win rate",
        p=0.012,
        alpha=0.025,
        shows="0.08 in 80 % of the evaluations",
    ),
    Rule(name="length", measured="41 tokens", required="at most 40", passed=False),
    Rule(name="canaries", measured="none", required="at most 0.5", passed=None),
)
REFUSED = Decision(
    promote=False,
    reasons=(*(rule.sentence for rule in RULES), "FAIL: not approved by Ada"),
    rules=RULES,
    look=Look(number=2, alpha=0.01, total=0.05, spent=0.02, opponent="models:/p-policy/1"),
)


@pytest.fixture
def recorded(home):
    """A function that records a run and gives its facts and the run."""

    def record(
        answers=(), decision=REFUSED, card=None, curves=None, error="", seed=1, tables=None, **more
    ):
        store = Record.open()
        config = Pipeline(**more)

        def stage(name):
            return open_stage(name, record=store, config=config.ppo, run=run, inputs={})

        try:
            with open_run("p", config, seed=seed) as run:
                for name, steps in (curves or {}).items():
                    with stage(name) as opened:
                        for metric, values in steps.items():
                            for step, value in enumerate(values, start=1):
                                opened.logger.metrics({metric: value}, step)
                        if error:
                            raise RuntimeError(error)
                for name, table in (tables or {}).items():
                    with stage(name) as opened:
                        opened.record(Report(tables={f"{name}_table": pd.DataFrame(table)}))
                if card is not None:
                    with stage("evaluation") as opened:
                        rows = pd.DataFrame(answers, columns=["prompt", "arm", "response"])
                        opened.record(Report(tables={"evaluation_samples": rows}))
                        opened.keep(card)
                if decision is not None:
                    with stage("promotion") as opened:
                        opened.keep(decision)
                    flag = tags.flag(decision.promote)
                    store.add_tags(run.run_id, {tags.PROMOTED: flag})
        except RuntimeError:
            assert error
        found = store.client.get_run(run.run_id)
        return gather(store, found, DEFAULTS), found

    return record
