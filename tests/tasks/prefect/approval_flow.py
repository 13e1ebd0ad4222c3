"""The end of a pipeline as a flow of its own, for a worker and for the tests of the approval."""

from prefect import flow

from rlhf_core.evaluation.scorecard import Arm, Comparison, Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.decision import Decision
from rlhf_core.settings.promotion import PromotionConfig
from tasks.prefect.approval import ask_person
from tasks.record.run import open_run
from tasks.registry.refs import ModelRef
from tasks.steps.promotion import pin_champion, promote


def exactly(value):
    return Interval(value, value, value)


def arm(name, kl):
    return Arm(
        name=name,
        proxy_reward=exactly(0.0),
        true_reward=None,
        kl=exactly(kl),
        perplexity=3.0,
        length=20.0,
        distinct_1=0.5,
        distinct_2=0.8,
    )


def scorecard(kl=4.0):
    """A policy that wins 80 % against SFT."""
    win = Comparison(
        candidate="policy",
        opponent="sft",
        judge="true_reward",
        wins=8,
        ties=0,
        losses=2,
        prompts=10,
        win_rate=Interval(0.8, 0.61, 0.9),
    )
    return Scorecard(arms=(arm("sft", 0.0), arm("policy", kl)), comparisons=(win,))


@flow(name="approval")
def approval(config: PromotionConfig, version: int, kl: float = 4.0) -> Decision:
    """Promote a version of `toy-policy`, if rules and person allow it."""
    candidate = ModelRef(name="toy-policy", version=version)
    with open_run("toy", config, 0) as run:
        champion = pin_champion(run, candidate)
        question = config, scorecard(kl), candidate, champion, run
        return promote(*question, ask_person(*question))
