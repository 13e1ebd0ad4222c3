"""What a report card means, in sentences: what is good, what is doubtful, what nobody can tell."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.intervals import FEW_PROMPTS
from rlhf_core.rewards.canaries import MOST_BEATEN

STRONG_CORRELATION = 0.5  # a rule of thumb: a quarter of the variance of the ranks
_NAMED = 3


class Finding(NamedTuple):
    """A sentence about a reward model, and what to do about it."""

    kind: Literal["good", "doubt", "unknown"]
    says: str
    advice: str = ""


def findings(card: ReportCard) -> list[Finding]:
    """Every finding, in the order of the card."""
    return [
        *_accuracy(card),
        *_ceiling(card),
        *_leaks(card),
        *_calibration(card),
        *_slices(card),
        *_length(card),
        *_canaries(card),
        *_members(card),
    ]


def verdict(card: ReportCard) -> str:
    """The whole card in a sentence."""
    found = findings(card)
    doubts = sum(finding.kind == "doubt" for finding in found)
    unknown = sum(finding.kind == "unknown" for finding in found)
    if card.accuracy is None:
        return "Nobody can tell what this reward model is worth: no held-out vote has a winner."
    said = "Nothing on the report card speaks against this reward model"
    if doubts:
        speak = "thing speaks" if doubts == 1 else "things speak"
        said = f"{doubts} {speak} against relying on this reward model"
    if unknown:
        said += f"; {unknown} {'question' if unknown == 1 else 'questions'} could not be answered"
    return f"{said}."


def _accuracy(card: ReportCard) -> Iterator[Finding]:
    accuracy, longer, quality = card.accuracy, card.longer, card.quality
    if accuracy is None or longer is None or quality is None:
        ties = f" ({_count(card.ties, 'tie')})" if card.ties else ""
        yield Finding(
            "unknown",
            f"No held-out vote has a winner{ties}, so nothing is known about its accuracy.",
            "Raise data.eval_fraction, or add evaluation preferences with a winner.",
        )
        return
    basis = f"{_count(accuracy.votes, 'held-out vote')} on {_count(accuracy.prompts, 'prompt')}"
    if accuracy.share.high < 0.5:
        yield Finding(
            "doubt",
            f"It is worse than chance: it is right on {accuracy} of {basis}.",
            "Check that the votes are not read the wrong way round (data.preferences.votes).",
        )
    elif not quality.exceeds(0.5):
        yield Finding(
            "doubt",
            f"It is no better than chance, as far as {basis} can tell: it is right on {accuracy}.",
            "Collect more preferences, or raise data.eval_fraction for a sharper answer.",
        )
    else:
        yield Finding("good", f"It is better than chance: it is right on {accuracy} of {basis}.")
    if accuracy.prompts < FEW_PROMPTS:
        yield Finding(
            "unknown",
            f"The card rests on {_count(accuracy.prompts, 'prompt')}, which say little about "
            "others, however they turn out.",
            "Raise data.eval_fraction, or add evaluation preferences.",
        )
    if longer.share.value >= accuracy.share.value:
        yield Finding(
            "doubt",
            f'It does not beat the rule "prefer the longer", which is right on {longer}.',
            "Collect pairs of answers of like length, or lower the share of pairs that length "
            "decides.",
        )
    elif longer.share.high < accuracy.share.low:
        yield Finding("good", f'It beats the rule "prefer the longer", which has {longer}.')
    else:
        yield Finding(
            "unknown",
            f'Its accuracy is above that of the rule "prefer the longer", {longer}, but not '
            "clearly.",
            "Compare the accuracy where the shorter answer won with that where the longer did.",
        )
    first = card.first_shown
    if first is not None and not first.share.low <= 0.5 <= first.share.high:
        side = "first" if first.share.value > 0.5 else "second"
        yield Finding(
            "doubt",
            f"The votes prefer the answer shown {side} (shown first: {first}), which a reward "
            "model cannot see and should not learn.",
            "Show the answers in random order.",
        )


def _ceiling(card: ReportCard) -> Iterator[Finding]:
    if card.accuracy is None:
        return
    agreement = card.agreement
    if agreement is None:
        yield Finding(
            "unknown",
            "No pair has the votes of two people, so nobody can tell how much of the rest is "
            "disagreement among the annotators.",
            "Have some of the pairs judged by two people or more.",
        )
        return
    if agreement.alarm:
        yield Finding(
            "doubt",
            f"ALARM, a leak: where several people voted it is right on {agreement.accuracy}, but "
            f"people agree so little ({agreement.pairwise}) that no model which has not seen the "
            f"votes exceeds {agreement.limit:.3f}.",
            "Look for training data that contain these votes, or for traces of the outcome in the "
            "texts.",
        )
    elif agreement.accuracy.share.high < agreement.majority.share.low:
        yield Finding(
            "good",
            f"Annotators predict each other better ({agreement.majority}) than the model predicts "
            f"them ({agreement.accuracy}), so there is more to learn from such votes.",
        )
    else:
        yield Finding(
            "good",
            f"It predicts a vote ({agreement.accuracy}) about as well as other annotators do "
            f"({agreement.majority}).",
        )


def _leaks(card: ReportCard) -> Iterator[Finding]:
    leaks = card.leaks
    if leaks is None:
        return
    if not leaks.votes:
        yield Finding(
            "good",
            "No held-out vote is on a prompt, or on two answers compared with each other, of "
            "the training votes.",
        )
        return
    elsewhere = "" if card.elsewhere is None else f" On the others it is right on {card.elsewhere}."
    votes = card.votes + card.ties
    yield Finding(
        "doubt",
        f"{leaks.votes} of {_count(votes, 'held-out vote')} are on a prompt or on two answers that "
        f"are in the training votes, word for word or nearly.{elsewhere}",
        "Take the accuracy on the others for the true one, or give evaluation data of their own "
        "(data.preferences.eval_path).",
    )


def _calibration(card: ReportCard) -> Iterator[Finding]:
    if card.log_loss is not None and (card.log_loss.low or 0.0) > math.log(2):
        yield Finding(
            "doubt",
            f"Its probabilities are worse than a coin's: log-loss {card.log_loss} nats a vote, a "
            "coin has 0.693.",
            "Smooth the labels (reward_model.label_smoothing), or train for fewer epochs.",
        )
    error, noise, accuracy = card.calibration_error, card.calibration_noise, card.accuracy
    if error is None or noise is None or accuracy is None or card.confidence is None:
        return
    if error.value <= noise:
        yield Finding(
            "good",
            f"Its probabilities are as good as a calibrated model's: calibration error "
            f"{error.value:.3f}, and one has up to {noise:.3f} on as many votes.",
        )
        return
    over = card.confidence > accuracy.share.value
    yield Finding(
        "doubt",
        f"It is {'over' if over else 'under'}-confident: it gives the answer that it prefers "
        f"{card.confidence:.3f} on average and is right on {accuracy.share.value:.3f}; calibration "
        f"error {error}, of which noise explains {noise:.3f}.",
        "Smooth the labels (reward_model.label_smoothing), or train for fewer epochs."
        if over
        else "Train longer or at a higher rate; the order of the answers is right all the same.",
    )


def _slices(card: ReportCard) -> Iterator[Finding]:
    worse = sorted(
        (part for part in card.slices if part.worse), key=lambda part: part.accuracy.share.value
    )
    if worse:
        named = ", ".join(f"{p.column} = {p.value} ({p.accuracy})" for p in worse[:_NAMED])
        more = f" and {len(worse) - _NAMED} more" if len(worse) > _NAMED else ""
        yield Finding(
            "doubt",
            f"It is clearly worse on {_count(len(worse), 'slice')} than on the whole: "
            f"{named}{more}.",
            "Collect preferences there, or look at how these votes were cast.",
        )
    elif card.slices:
        yield Finding(
            "good",
            f"None of {_count(len(card.slices), 'judged slice')} is clearly worse than the whole.",
        )
    elif card.accuracy is not None:
        yield Finding(
            "unknown",
            f"No slice has {_count(card.min_slice_prompts, 'prompt')}, so none is judged.",
            "Raise data.eval_fraction, or lower report_card.min_slice_prompts and look at the "
            "intervals.",
        )


def _length(card: ReportCard) -> Iterator[Finding]:
    short, long = card.shorter_won, card.longer_won
    if short is not None and long is not None:
        says = (
            f"it is right on {short} where the shorter answer won and on {long} where the longer "
            "did"
        )
        if short.share.high < long.share.low:
            yield Finding(
                "doubt",
                f"It prefers length: {says}.",
                "Use a penalty for length in the reward of the policy, or balance the pairs.",
            )
        elif long.share.high < short.share.low:
            yield Finding(
                "doubt",
                f"It prefers brevity: {says}.",
                "Balance the pairs by length.",
            )
        else:
            yield Finding("good", f"Length does not decide: {says}.")
    found = card.length_correlation
    if found is None:
        if card.samples:
            yield Finding(
                "unknown",
                "All samples of the SFT policy have one length or one reward, so there is no "
                "correlation of the two.",
                "Raise sampling.temperature or report_card.samples.",
            )
        return
    low, high = found.low, found.high
    if low is None or high is None:
        yield Finding(
            "unknown",
            f"The samples of the SFT policy are on too few prompts to tell how reward and length "
            f"go together (Spearman {found.value:.2f}).",
            "Raise data.eval_fraction.",
        )
    elif abs(found.value) > STRONG_CORRELATION and (low > 0 or high < 0):
        longer = "longer" if found.value > 0 else "shorter"
        yield Finding(
            "doubt",
            f"On samples of the SFT policy {longer} answers get the better reward: Spearman "
            f"{found}.",
            "Read the samples: is it length, or what comes with it? A penalty for length holds it.",
        )
    else:
        yield Finding(
            "good", f"On samples of the SFT policy reward is not length: Spearman {found}."
        )


def _canaries(card: ReportCard) -> Iterator[Finding]:
    if not card.canaries:
        return
    better = [canary for canary in card.canaries if canary.caught()]
    worse = [canary for canary in card.canaries if canary.beats_real.high <= MOST_BEATEN]
    unsure = [canary for canary in card.canaries if canary not in worse + better]
    for canary in better:
        value, low, high = canary.beats_real
        yield Finding(
            "doubt",
            f"A bad answer beats the real one: {canary.kind}, on {value:.3f} [{low:.3f}, "
            f"{high:.3f}] of {_count(canary.prompts, 'prompt')}.",
            "A policy will find it. Add pairs with such an answer as the rejected one, or stop at "
            "it with reward_gate.max_canary_share.",
        )
    if unsure:
        named = ", ".join(canary.kind for canary in unsure)
        yield Finding(
            "unknown",
            f"The reward of these bad answers is not clearly below that of real ones: {named}.",
            "Look at the table of canaries; more held-out prompts give sharper answers.",
        )
    if worse:
        of = f"all {len(worse)}" if len(worse) == len(card.canaries) else f"{len(worse)}"
        yield Finding("good", f"It rates {of} kinds of bad answers below real ones.")


def _members(card: ReportCard) -> Iterator[Finding]:
    if card.members is None:
        return
    values = [share.share.value for share in card.members.accuracies]
    yield Finding(
        "good",
        f"Its {len(values)} members are right on {min(values):.3f} to {max(values):.3f}, and "
        f"disagree on {card.members.disagreement} of the votes.",
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
