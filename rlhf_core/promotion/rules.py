"""Rules that decide whether a policy may become the champion. Each is a row of a table."""

from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.promotion.claims import signs, slices, win_rates
from rlhf_core.promotion.decision import Decision, Rule
from rlhf_core.promotion.facts import Facts
from rlhf_core.promotion.integrity import integrity
from rlhf_core.promotion.looks import first_alpha
from rlhf_core.promotion.requirements import alarms, judge, limits, reward_model
from rlhf_core.settings.promotion import PromotionConfig

NOTHING = Facts()


def decide(config: PromotionConfig, scorecard: Scorecard, facts: Facts = NOTHING) -> Decision:
    """Decide whether to promote the policy of a scorecard: no rule that applies may fail.

    Raises: ValueError when the scorecard lacks the policy or SFT.
    """
    rules = tuple(apply_rules(config, scorecard, facts))
    digests = {facts.files.candidate: facts.files.digest} if facts.files else {}
    return Decision(
        promote=allows(rules),
        reasons=tuple(rule.sentence for rule in rules if rule.passed is not None),
        rules=rules,
        look=facts.look,
        claim=config.claim,
        digests=digests,
    )


def allows(rules: list[Rule] | tuple[Rule, ...]) -> bool:
    """Whether every rule passes that applies."""
    return all(rule.passed is not False for rule in rules)


def apply_rules(
    config: PromotionConfig, scorecard: Scorecard, facts: Facts = NOTHING
) -> list[Rule]:
    """Apply every rule, in the order in which they are shown.

    The families of win rates and of slices have the alpha of the look each, shared by Holm: what
    they claim is asked again at every look. Signs of canaries, as the bounds, are asked of each
    policy as if it were the first.

    Raises: ValueError when the scorecard lacks the policy or SFT.
    """
    policy, sft = scorecard.arm("policy"), scorecard.arm("sft")
    if policy is None or sft is None:
        raise ValueError("a promotion needs a scorecard with the arms policy and sft")
    first = first_alpha(config.alpha)
    alpha = first if facts.look is None else facts.look.alpha
    return [
        *win_rates(config, scorecard, alpha),
        *slices(config, scorecard, alpha),
        *signs(config, scorecard, first),
        *limits(config, policy, sft),
        alarms(config, facts.alarms),
        *reward_model(config, facts.report_card),
        *judge(config, scorecard),
        *integrity(config, scorecard, facts.files),
    ]
