"""Which step of a pipeline does not improve on the one before it, in words.

    demonstrations     SFT does not beat the base model
    reward_model       the best of n SFT answers by the reward model does not beat SFT
    policy_training    best-of-n beats SFT, and the policy does not
    none               each beats the one before, as far as that was measured
    unknown            nothing of this can be told

All by the same judge on the same prompts. The first fault in this order is named, since what comes
later rests on it, and the words tell about all. An interval that contains one half shows no
improvement, but that is no fault yet: with few prompts it may hide a good one. So a step fails only
if its interval also excludes a win rate that would be plainly worth it, `WORTH`.
"""

from typing import Literal

from rlhf_core.evaluation.scorecard import ArmName, Comparison, Diagnosis, PairedDifference
from rlhf_core.settings.judge import REWARD_MODEL

WORTH = 0.65  # a win rate that a useful step has
_Outcome = Literal["beats", "fails", "unclear"]
_TITLES: dict[ArmName, str] = {
    "base": "the base model",
    "sft": "SFT",
    "best_of_n": "best-of-n",
    "policy": "the policy",
    "champion": "the champion",
}


def diagnose(
    comparisons: tuple[Comparison, ...],
    differences: tuple[PairedDifference, ...] = (),
    *,
    best_of: int,
    no_base: str = "",
    signs: str = "",
) -> Diagnosis:
    """Name the step that does not improve on the one before it.

    Args:
        comparisons: those that are missing are not judged.
        best_of: the n of best-of-n; with 1 it is SFT.
        no_base: why there is no base model, a sentence without its full stop.
        signs: a sentence on the canaries that the policy's answers look like.
    """
    found = {(c.candidate, c.opponent): c for c in comparisons}
    base, best, policy = (
        found.get(pair) for pair in (("sft", "base"), ("best_of_n", "sft"), ("policy", "sft"))
    )
    says = [_said(match) for match in (base, best, policy) if match is not None]
    if base is None and no_base:
        says.append(f"The base model was not compared: {no_base}.")
    own = best is not None and best.judge == REWARD_MODEL
    steps = {
        "demonstrations": _outcome(base),
        # It chose these answers itself, or there was nothing to choose from.
        "reward_model": "unclear" if own or best_of == 1 else _outcome(best),
        "policy_training": _outcome(policy),
    }
    fault: Literal["none", "demonstrations", "reward_model", "policy_training", "unknown"]
    if steps["demonstrations"] == "fails":
        fault = "demonstrations"
        says.append(
            "So the demonstrations are at fault: imitating them makes no better answers. Look at "
            "them, and at how well SFT learnt them (held_out/loss)."
        )
    elif steps["reward_model"] == "fails":
        fault = "reward_model"
        says.append(
            "So the reward model is at fault: the answers that it likes best are no better than "
            "any. A policy cannot learn more from it; look at its report card and at the votes."
        )
    elif steps["policy_training"] == "fails" and (own or steps["reward_model"] == "beats"):
        fault = "policy_training"
        says.append(
            "So the training of the policy is at fault: the reward model finds better answers, and "
            "the policy did not learn to give them. Look at its curves: reward, KL, monitor."
        )
    elif own and best_of > 1 and steps["policy_training"] == "beats":
        fault = "unknown"
        says.append(
            "The judge is the reward model, of which best-of-n are the favourites and which the "
            "policy was trained to please, so this cannot show whether the reward model is right; "
            "name another judge (judge.source)."
        )
    elif _all_beat(steps["policy_training"], steps["reward_model"], base, steps["demonstrations"]):
        fault = "none"
        says.append("So no step is at fault.")
    else:
        fault = "unknown"
        says.append(
            "So it cannot be told whether a step is at fault: "
            f"{_prompts(comparisons)} are too few for what was measured; raise evaluation.prompts "
            "or data.eval_fraction."
        )
    says += [_difference(each) for each in differences]
    return Diagnosis(fault=fault, says=" ".join(filter(None, [*says, signs])))


def _all_beat(
    policy: _Outcome, reward_model: _Outcome, base: Comparison | None, demonstrations: _Outcome
) -> bool:
    """A policy that beats SFT shows that the reward model was good for something."""
    sound = reward_model == "beats" or policy == "beats"
    return policy == "beats" and sound and (base is None or demonstrations == "beats")


def _outcome(match: Comparison | None) -> _Outcome:
    if match is None:
        return "unclear"
    if match.win_rate.low > 0.5:
        return "beats"
    return "fails" if match.win_rate.high < WORTH else "unclear"


def _said(match: Comparison) -> str:
    """What a comparison shows, e.g. `SFT beats the base model: it wins 0.81 [0.73, 0.87].`"""
    ours, theirs = _TITLES[match.candidate], _TITLES[match.opponent]
    rate = match.win_rate
    words = {
        "beats": f"{ours} beats {theirs}",
        "fails": f"{ours} does not beat {theirs}",
        "unclear": f"whether {ours} beats {theirs} cannot be told",
    }[_outcome(match)]
    if rate.high < 0.5:
        words = f"{ours} is worse than {theirs}"
    sentence = f"{words}: it wins {_interval(rate)} of its comparisons by {match.judge}"
    if match.length_controlled is not None:
        sentence += f", {_interval(match.length_controlled)} at equal length"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _difference(each: PairedDifference) -> str:
    ours, theirs = _TITLES[each.first], _TITLES[each.second]
    low, high = each.difference.low, each.difference.high
    more = "more often than" if low > 0 else "less often than" if high < 0 else "about as often as"
    return (
        f"{ours[0].upper()}{ours[1:]} beats {_TITLES[each.opponent]} {more} {theirs} does: the "
        f"difference is {each.difference.value:+.2f} [{low:+.2f}, {high:+.2f}]."
    )


def _interval(rate: tuple[float, float, float]) -> str:
    return f"{rate[0]:.2f} [{rate[1]:.2f}, {rate[2]:.2f}]"


def _prompts(comparisons: tuple[Comparison, ...]) -> str:
    fewest = min((match.prompts for match in comparisons), default=0)
    return "1 held-out prompt" if fewest == 1 else f"{fewest} held-out prompts"
