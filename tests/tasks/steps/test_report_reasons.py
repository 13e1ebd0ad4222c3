"""The reasons of a decision in the report that the terminal shows."""

from rlhf_core.promotion.decision import Decision, Rule
from tasks.steps.report import reasons


def rule(name, passed, family="canaries"):
    return Rule(name=name, measured="0.0", required="at most 0.2", passed=passed, family=family)


def decision(*rules):
    shown = tuple(found.sentence for found in rules if found.passed is not None)
    return Decision(promote=True, reasons=(*shown, "pass: approved by Ada"), rules=rules)


def test_signs_that_pass_are_one_line_and_one_that_fails_has_its_own():
    rate, list_, echo, praise = (
        rule("win rate", True, "win rate"),
        rule("sign of the canary list", True),
        rule("sign of the canary echo", True),
        rule("sign of the canary flattery", False),
    )
    assert reasons(decision(rate, list_, praise, echo)) == [
        "pass: win rate 0.0; at most 0.2",
        "pass: signs of 2 kinds of canary in the answers; at most 0.2",
        "FAIL: sign of the canary flattery 0.0; at most 0.2",
        "pass: approved by Ada",
    ]


def test_a_decision_of_an_older_release_has_its_sentences():
    old = Decision(promote=False, reasons=("FAIL: KL to SFT 30.00; at most 20.00",))
    assert reasons(old) == list(old.reasons)
