"""The rules that are tests: win rates, protected slices, signs of canaries in the answers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_core.evaluation import intervals
from rlhf_core.evaluation.scorecard import Arm, ArmName, Comparison, PromptSlice, Scorecard
from rlhf_core.functional.holm import holm, passes
from rlhf_core.promotion.decision import Family, Rule
from rlhf_core.promotion.evidence import (
    can_show,
    least_excess,
    p_above,
    p_excess_below,
    p_of_interval,
    smallest_effect,
)
from rlhf_core.settings.promotion import PromotionConfig

LONGER = 1.25  # times, beyond which a win rate has to be known at equal length
_FEW = ", which so few prompts cannot show"


@dataclass(frozen=True)
class Claim:
    """A claim with its p-value, before it has a level."""

    family: Family
    name: str
    measured: str
    required: str
    p: float
    prompts: int
    least: float  # the share that has to be exceeded

    def at(self, level: float) -> Rule:
        """The row of the table, at its level."""
        enough = self.least <= 0 or can_show(self.prompts, self.least, level)
        effect = smallest_effect(self.prompts, self.least, level)
        return Rule(
            name=self.name,
            family=self.family,
            measured=self.measured,
            required=self.required + ("" if enough else _FEW),
            passed=enough and passes(self.p, level),
            p=self.p,
            alpha=level,
            smallest_effect=effect,
            shows=self._shows(effect),
        )

    def _shows(self, effect: float | None) -> str:
        if effect is None:
            return "nothing, even if all are won"
        if self.least <= 0:
            return "any win"
        return f"a true win rate of {self.least + effect:.3f}"


@dataclass(frozen=True)
class Excess:
    """The claim that a sign is in hardly more answers of the policy than of SFT."""

    name: str
    measured: str
    required: str
    p: float
    prompts: int
    most: float

    def at(self, level: float) -> Rule:
        """The row of the table, at its level."""
        least = least_excess(self.prompts, level)
        enough = least < self.most
        return Rule(
            name=self.name,
            family="canaries",
            measured=self.measured,
            required=self.required + ("" if enough else _FEW),
            passed=enough and passes(self.p, level),
            p=self.p,
            alpha=level,
            smallest_effect=least,
            shows=f"an excess below {least:.3f}, if no answer has the sign",
        )


def with_levels(tests: Sequence[Claim | Excess], alpha: float) -> list[Rule]:
    """The rows of one family, each at its level by Holm."""
    levels = holm([test.p for test in tests], alpha)
    return [test.at(level) for test, level in zip(tests, levels, strict=True)]


# --- win rates -----------------------------------------------------------------------------------


def win_rates(config: PromotionConfig, scorecard: Scorecard, alpha: float) -> list[Rule]:
    """The win rates over SFT and over the champion, if there is one: raw, then at equal length.

    Raises: ValueError when a comparison is missing.
    """
    tests, rules = list[Claim](), list[Rule]()
    for match, least, required in _matches(config, scorecard):
        name, measured = f"win rate over {match.opponent}", _measured(match)
        if not match.points:
            # An evaluation of an older release: its interval is all that is known.
            rules.append(_old_win_rate(name, measured, match, least, alpha))
            continue
        known = points(match)
        p = p_above(known, least)
        tests.append(Claim("win rate", name, measured, required, p, len(known), least))
    return [*rules, *with_levels(tests, alpha), *_at_equal_length(config, scorecard, alpha)]


def _at_equal_length(config: PromotionConfig, scorecard: Scorecard, alpha: float) -> list[Rule]:
    """What is left of the win rates if longer answers have no advantage."""
    family: Family = "win rate at equal length"
    tests, rules = list[Claim](), list[Rule]()
    for match, least, required in _matches(config, scorecard):
        rate, name = match.length_controlled, f"win rate over {match.opponent} at equal length"
        if rate is not None:
            p = p_of_interval(rate, least)
            tests.append(
                Claim(family, name, intervals.in_words(rate), required, p, match.prompts, least)
            )
        else:
            rules.append(_without_equal_length(name, match, least, scorecard))
    return [*with_levels(tests, alpha), *rules]


def _without_equal_length(name: str, match: Comparison, least: float, scorecard: Scorecard) -> Rule:
    """Nobody can tell it when hardly any answer is as short as the other: it must not matter."""
    family: Family = "win rate at equal length"
    ours, theirs = scorecard.arm("policy"), scorecard.arm(match.opponent)
    if not match.points or least <= 0 or ours is None or theirs is None:
        return absent(name, family, "not measured")
    return Rule(
        name=name,
        family=family,
        measured=f"is unknown; the answers have {ours.length:.1f} tokens, the others "
        f"{theirs.length:.1f}",
        required=f"without it, at most {LONGER:g} times as long",
        passed=ours.length <= LONGER * theirs.length,
    )


def _matches(
    config: PromotionConfig, scorecard: Scorecard
) -> Iterator[tuple[Comparison, float, str]]:
    """The comparisons that decide, with the win rate that has to be exceeded and what is asked."""
    opponents: tuple[Literal["sft", "champion"], ...] = ("sft", "champion")
    for opponent in opponents if scorecard.arm("champion") is not None else opponents[:1]:
        match = scorecard.comparison("policy", opponent)
        if match is None:
            raise ValueError(f"a promotion needs the comparison of policy and {opponent}")
        least = config.asked(opponent)
        required = f"must be shown to exceed {least:g}"
        if config.claim == "non_inferior":
            required += f", so as to be worse by less than {config.margin:g}"
        yield match, least, required


def _old_win_rate(name: str, measured: str, match: Comparison, least: float, alpha: float) -> Rule:
    enough = intervals.can_show(match.prompts, least)
    return Rule(
        name=name,
        family="win rate",
        measured=measured,
        required=f"the lower bound must exceed {least:g}{'' if enough else _FEW}",
        passed=enough and passes(p_of_interval(match.win_rate, least), alpha),
    )


def _measured(match: Comparison) -> str:
    return f"{intervals.in_words(match.win_rate)} by {match.judge}, from {match.basis}"


def points(match: Comparison, only: Sequence[int] | None = None) -> list[float]:
    """The means of the prompts that have one: of all, or of those at some positions."""
    found = match.points if only is None else [match.points[i] for i in only]
    return [point for point in found if point is not None]


# --- slices --------------------------------------------------------------------------------------


def slices(config: PromotionConfig, scorecard: Scorecard, alpha: float) -> list[Rule]:
    """Each value of a protected column: the policy is not worse there than the champion, or SFT."""
    if not config.protected:
        return [absent("protected slices", "slices", "none is named (promotion.protected)")]
    opponent: ArmName = "sft" if scorecard.arm("champion") is None else "champion"
    match = scorecard.comparison("policy", opponent)
    if match is None:
        raise ValueError(f"a promotion needs the comparison of policy and {opponent}")
    least = 0.5 - config.slice_margin
    tests, rules = list[Claim](), list[Rule]()
    for column in config.protected:
        parts = [part for part in scorecard.slices if part.column == column]
        if not parts:
            rules.append(_no_such_column(column))
        for part in parts:
            test = _slice_test(part, match, least)
            if can_show(test.prompts, least, alpha):
                tests.append(test)
            else:
                rules.append(_small_slice(config, test))
    return [*with_levels(tests, alpha), *rules]


def _slice_test(part: PromptSlice, match: Comparison, least: float) -> Claim:
    known = points(match, part.prompts) if match.points else []
    mean = math.fsum(known) / len(known) if known else math.nan
    prompts = f"{len(known)} prompt{'' if len(known) == 1 else 's'}"
    return Claim(
        family="slices",
        name=f"win rate over {match.opponent} where {part.name}",
        measured=f"{mean:.3f} on {prompts}",
        required=f"must be shown to exceed {least:g} (0.5 less promotion.slice_margin)",
        p=p_above(known, least) if known else 1.0,
        prompts=len(known),
        least=least,
    )


def _small_slice(config: PromotionConfig, test: Claim) -> Rule:
    skipped = config.small_slices == "skip"
    return Rule(
        name=test.name,
        family="slices",
        measured=test.measured,
        required=test.required + _FEW + ("; left out (promotion.small_slices)" if skipped else ""),
        passed=None if skipped else False,
        shows="nothing, even if all are won",
    )


def _no_such_column(column: str) -> Rule:
    return Rule(
        name=f"win rate where {column}",
        family="slices",
        measured="is unknown, since the evaluation prompts have no such column, or one value in it",
        required="name it in data.prompts.keep, or take it out of promotion.protected",
        passed=False,
    )


# --- signs of canaries ---------------------------------------------------------------------------


def signs(config: PromotionConfig, scorecard: Scorecard, alpha: float) -> list[Rule]:
    """Each kind of canary: hardly more answers of the policy than of SFT show its sign."""
    policy, sft = scorecard.arm("policy"), scorecard.arm("sft")
    assert policy is not None
    assert sft is not None
    kinds = [kind for kind in policy.signs if kind in sft.signs]
    name = "signs of canaries in the answers"
    if config.max_sign_excess >= 1:
        return [absent(name, "canaries", "no requirement (promotion.max_sign_excess 1)")]
    if not kinds:
        return [absent(name, "canaries", "not measured")]
    match = scorecard.comparison("policy", "sft")
    prompts = match.prompts if match is not None else 0
    tests = [_excess(kind, policy, sft, prompts, config.max_sign_excess) for kind in kinds]
    return with_levels(tests, alpha)


def _excess(kind: str, policy: Arm, sft: Arm, prompts: int, most: float) -> Excess:
    ours, theirs = policy.signs[kind].value, sft.signs[kind].value
    return Excess(
        name=f"sign of the canary {kind}",
        measured=f"in {ours:.3f} of the answers, in {theirs:.3f} of SFT's",
        required=f"the excess must be shown to be below {most:g}",
        p=p_excess_below(ours, theirs, prompts, most) if prompts else 1.0,
        prompts=prompts,
        most=most,
    )


def absent(name: str, family: Family, why: str) -> Rule:
    """A row that does not apply, and why."""
    return Rule(name=name, family=family, measured=why, required="", passed=None)
