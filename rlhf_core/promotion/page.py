"""The decision as a table and as a page in Markdown."""

from collections.abc import Iterator

from rlhf_core.promotion.decision import FAMILIES, Decision, Look, Rule


def rows(decision: Decision) -> list[dict[str, str | float | None]]:
    """The rules as rows of a table, families together."""
    return [
        {
            "family": rule.family,
            "rule": rule.name,
            "result": rule.answer,
            "measured": rule.measured,
            "required": rule.required,
            "p": rule.p,
            "alpha": rule.alpha,
            "smallest_effect": rule.smallest_effect,
            "shows": rule.shows,
        }
        for family in FAMILIES
        for rule in decision.rules
        if rule.family == family
    ]


def page(decision: Decision) -> str:
    """The decision as Markdown: outcome, budget, a table for each family."""
    outcome = "becomes the champion" if decision.promote else "is not promoted"
    failed = [rule.name for rule in decision.rules if rule.passed is False]
    return "\n".join(
        [
            f"# {decision.candidate or 'The policy'} {outcome}",
            "",
            f"Compared with: {decision.champion or 'SFT alone, there is no champion yet'}. "
            f"Claim: {decision.claim.replace('_', '-')}.",
            *([f"Refused by: {', '.join(failed)}."] if failed and not decision.promote else []),
            *([budget(decision.look)] if decision.look else []),
            *(line for family in FAMILIES for line in _table(family, decision)),
            "",
            "p: how likely such verdicts are if what is asked is untrue. level: what p must be "
            "below, after Holm's correction for the rows of the family. can show: what the truth "
            "has to be so that this many prompts show it in 85 of 100 evaluations, at that level.",
            "",
        ]
    )


def budget(look: Look) -> str:
    """The alpha budget in a sentence."""
    again = ", which was taken before and spends nothing again" if look.again else ""
    return (
        f"Look {look.number} at {look.opponent}{again}: alpha {look.alpha:.4g} of {look.total:g}; "
        f"{look.spent:.4g} is spent, {look.left:.4g} is left for later looks."
    )


def _table(family: str, decision: Decision) -> Iterator[str]:
    found = [rule for rule in decision.rules if rule.family == family]
    if not found:
        return
    tests = any(rule.p is not None for rule in found)
    columns = ["", "rule", "measured", "required", *(["p", "level", "can show"] if tests else [])]
    yield from ("", f"## {family[0].upper()}{family[1:]}", "")
    yield _line(columns)
    yield "|" + "---|" * len(columns)
    for rule in found:
        yield _line([rule.answer, rule.name, rule.measured, rule.required, *_test(rule, tests)])


def _test(rule: Rule, tests: bool) -> list[str]:
    if not tests:
        return []
    return [_number(rule.p), _number(rule.alpha), rule.shows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
