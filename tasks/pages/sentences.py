"""What came of a run, in sentences that need no knowledge of training."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from rlhf_core.evaluation.scorecard import Comparison, Scorecard
from rlhf_core.promotion.decision import Decision
from tasks.pages.charts import interval
from tasks.pages.facts import Facts
from tasks.pages.texts import number, shown

_JUDGES = {
    "true_reward": "the known truth",
    "reward_model": "the reward model that the policy was trained to please",
}


Kind: TypeAlias = Literal["good", "bad", "waiting", "none"]


class Verdict(NamedTuple):
    """A run in a sentence; what speaks for or against the policy follows."""

    kind: Kind
    sentence: str
    details: tuple[str, ...]


class Row(NamedTuple):
    """A rule of the gate, as a row of a table."""

    family: str
    name: str
    measured: str
    required: str
    level: str  # p-value and level of a test
    shows: str  # the smallest effect that so many prompts can show
    answer: str  # pass, FAIL or n/a


def verdict(facts: Facts) -> Verdict:
    """What came of a run."""
    decision, policy = facts.decision, facts.models.get("policy")
    name = policy.uri if policy else "The new policy"
    if decision is None:
        kind: Kind = "bad" if facts.status in ("FAILED", "KILLED") else "none"
        return Verdict(kind, _unfinished(facts), ())
    said = tuple(filter(None, [win_sentence(facts.scorecard), _trouble(facts)]))
    failed = [shown(name, 300) for name in refusals(decision)]
    if decision.promote:
        return Verdict("good", f"{name} passed every rule and became the champion.", said)
    if facts.promoted:
        by = f" by {shown(facts.approved_by, 100)}" if facts.approved_by else ""
        return Verdict("good", f"{name} was approved{by} and became the champion.", said)
    if facts.waits:
        return Verdict("waiting", f"{name} waits for a person to approve it.", said)
    stays = "the champion stays" if facts.compared_with else "there is still no champion"
    why = f" What speaks against it: {_list(failed)}." if failed else ""
    return Verdict("bad", f"{name} was not promoted, and {stays}.{why}", said)


def _unfinished(facts: Facts) -> str:
    stage = next((s.name for s in facts.stages if s.status not in ("FINISHED", "RUNNING")), "")
    place = f" in the stage {stage}" if stage else ""
    error = next((s.error for s in facts.stages if s.error), facts.error)
    why = f": {shown(error, 500)}" if error else "."
    words = {
        "FAILED": f"This run failed{place}{why}",
        "KILLED": f"This run was stopped{place}{why}",
        "RUNNING": "This run has not come to a decision yet.",
        "SCHEDULED": "This run waits, and has not come to a decision yet.",
    }
    return words.get(facts.status, "This run ended without a decision about promotion.")


def _trouble(facts: Facts) -> str:
    """How a run ended that came to a decision and was not finished all the same."""
    words = {"FAILED": "failed", "KILLED": "was stopped"}
    if facts.status not in words:
        return ""
    why = shown(facts.error or "no reason is known", 300)
    return f"After the decision the run {words[facts.status]}: {why}"


def win_sentence(scorecard: Scorecard | None) -> str:
    """How the policy does against SFT, and who says so; empty if they were not compared."""
    match = scorecard.comparison("policy", "sft") if scorecard else None
    if match is None:
        return ""
    return (
        f"Its answers win {interval(match.win_rate)} of the comparisons with those of the SFT "
        f"model, as judged by {judge(match)}, on {match.basis}."
    )


def judge(match: Comparison) -> str:
    """Who compared, in words."""
    return _JUDGES.get(match.judge, shown(match.judge, 200))


def gate(decision: Decision) -> list[Row]:
    """The rules of the gate, what failed first; in a decision of an earlier release, sentences."""
    rows = []
    for rule in decision.rules:
        level = "" if rule.p is None or rule.alpha is None else f"{rule.p:.2g} < {rule.alpha:.2g}"
        if level and rule.p is not None and rule.alpha is not None and rule.p >= rule.alpha:
            level = f"{rule.p:.2g} ≥ {rule.alpha:.2g}"
        shows = rule.shows
        if not shows and rule.smallest_effect is not None:
            shows = number(rule.smallest_effect)
        row = Row(rule.family, rule.name, rule.measured, rule.required, level, shows, rule.answer)
        rows.append(row)
    rows = rows or [_from_sentence(reason) for reason in decision.reasons]
    order = {"FAIL": 0, "pass": 1}
    return sorted(rows, key=lambda row: order.get(row.answer, 2))


def _from_sentence(reason: str) -> Row:
    answer, _, rest = reason.partition(": ")
    measured, _, required = rest.partition("; ")
    name = re.match(r"[^\d]*[a-zA-Z-]*\d?(?=\s[-\d.]+(\s|$))", measured)
    if not required or name is None:
        return Row("", rest, "", "", "", "", answer)
    return Row("", name[0].strip(), measured[name.end() :].strip(), required, "", "", answer)


def notes(decision: Decision) -> list[str]:
    """What was said beside the rules: who approved, what the person is asked, why it is void."""
    if not decision.rules:
        return []
    sentences = {rule.sentence for rule in decision.rules}
    return [reason for reason in decision.reasons if reason not in sentences]


def refusals(decision: Decision) -> list[str]:
    """What failed, by name."""
    failed = [row.name for row in gate(decision) if row.answer == "FAIL"]
    beside = (note for note in notes(decision) if note.startswith("FAIL: "))
    return [*failed, *(note.removeprefix("FAIL: ") for note in beside)]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
