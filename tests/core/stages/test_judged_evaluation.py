"""Who judges an evaluation, what is known of that judge, and what it said."""

import sys

import pytest

from rlhf_core.data.prepared import read_table
from rlhf_core.errors import ConfigError, VerdictsPendingError
from rlhf_core.evaluation.judged import Said, position_consistency
from rlhf_core.judges.judge import Cost, Pair, Verdict
from rlhf_core.rewards.canaries import BY_SCORE, KINDS
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig
from rlhf_core.stages import evaluation
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.work import Work

CONFIG = EvaluationConfig(base=False, prompts=8, samples_per_prompt=2, best_of=4, sample_rows=3)
COMPARING = [kind for kind in KINDS if kind not in BY_SCORE]
MODULE = """
GOOD = {"good", "fine", "warm", "nice"}

def praise(prompts, responses):
    return [float(sum(word in GOOD for word in text.split())) for text in responses]

def count(text):
    return sum(word in GOOD for word in text.split())

def nicer(prompts, answers_a, answers_b):
    gaps = [count(a) - count(b) for a, b in zip(answers_a, answers_b)]
    words = ["tie" if gap == 0 else "a" if gap > 0 else "b" for gap in gaps]
    return [(word, f"{gap:+d} good words") for word, gap in zip(words, gaps)]

def first(prompts, answers_a, answers_b):
    return ["a"] * len(prompts)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "toy_judges.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_judges", raising=False)
    return "toy_judges"


@pytest.fixture
def run(toy_sft, toy_reward, prepared, toy_sampling, logger):
    """An evaluation in which the policy is the SFT policy."""

    def run(judge, true_reward="", rows=3, **more):
        given = {"sft": toy_sft, "policy": toy_sft, "reward": toy_reward, "data": prepared}
        work = Work(
            inputs=given | more.pop("inputs", {}),
            sections={"sampling": toy_sampling, "judge": judge},
            logger=logger,
            **more,
        )
        changes = {"true_reward": true_reward, "sample_rows": rows}
        return evaluate(CONFIG.model_copy(update=changes), work)

    return run


def results(report):
    return [
        (c.candidate, c.opponent, c.wins, c.ties, c.losses) for c in report.scorecard.comparisons
    ]


def test_a_function_judges_as_the_truth_that_it_repeats(run, module):
    by_truth = run(JudgeConfig(), f"{module}:praise")
    by_function = run(JudgeConfig(source=f"{module}:nicer"))
    assert results(by_function) == results(by_truth)
    assert {c.judge for c in by_function.scorecard.comparisons} == {"toy_judges:nicer"}
    facts = by_function.scorecard.judge
    assert facts.name == "toy_judges:nicer"
    assert (facts.pairs, facts.unanswered) == (8 * 2 + 8 + 8, 0)
    assert facts.consistency.value == 1
    assert (facts.requests, facts.remembered, facts.tokens, facts.seconds) == (0, 0, 0, 0)
    assert [canary.kind for canary in facts.canaries] == COMPARING


def test_a_judge_with_a_preference_for_a_position_ties_and_is_reported(run, module):
    report = run(JudgeConfig(source=f"{module}:first"))
    for comparison in report.scorecard.comparisons:
        assert (comparison.wins, comparison.losses) == (0, 0)
    facts, summary = report.scorecard.judge, report.summary()
    assert (facts.consistency.value, facts.consistency.low) == (0, 0)
    assert facts.consistency.high < 0.5
    assert summary["judge/consistency_high"] == facts.consistency.high
    assert summary["judge/canary/echo"] == 0.5


def test_the_verdicts_are_in_a_table_with_reasons(run, module):
    report = run(JudgeConfig(source=f"{module}:nicer"))
    table = report.tables["evaluation_verdicts"]
    arms = table[["a", "b"]].drop_duplicates().to_numpy().tolist()
    assert arms == [["policy", "sft"], ["best_of_n", "sft"], ["policy", "best_of_n"]]
    assert table.groupby(["a", "b"], sort=False).size().tolist() == [3, 3, 3]
    first = table.iloc[0]
    assert first["reason"].endswith(" good words") or first["answer_a"] == first["answer_b"]
    canaries = report.tables["evaluation_judge_canaries"]
    assert list(canaries["canary"]) == COMPARING


def test_truth_and_reward_model_meet_the_canaries_too(run, module):
    """Against what people wrote: no more than the prompts of the held-out demonstrations."""
    for report, name in (
        (run(JudgeConfig(), f"{module}:praise"), "true_reward"),
        (run(JudgeConfig()), "reward_model"),
    ):
        facts = report.scorecard.judge
        assert facts.name == name
        assert facts.consistency is None
        assert {"cut_off", "constant"} <= {canary.kind for canary in facts.canaries}
        assert "evaluation_verdicts" not in report.tables
        assert "judge/consistency" not in report.summary()


def test_the_reward_model_can_judge_where_a_truth_is_known(run, module):
    report = run(JudgeConfig(source="reward_model"), f"{module}:praise")
    assert results(report) == results(run(JudgeConfig()))
    assert {c.judge for c in report.scorecard.comparisons} == {"reward_model"}
    assert report.scorecard.arm("sft").true_reward is not None


def test_a_registered_reward_model_judges_by_its_scores(run, toy_reward):
    judge = JudgeConfig(source="models:/another/2", canary_prompts=3)
    report = run(judge, inputs={"judge": toy_reward})
    assert results(report) == results(run(JudgeConfig()))
    assert report.scorecard.judge.name == "another-2"
    assert {canary.prompts for canary in report.scorecard.judge.canaries} <= {1, 2, 3}


def test_canaries_of_what_people_wrote_and_of_samples_where_nobody_wrote_anything(
    run, module, prepared, tmp_path
):
    people = run(JudgeConfig(source=f"{module}:nicer")).tables["evaluation_judge_canaries"]
    wrote = set(read_table(prepared, "demonstrations", "eval")["response"])
    by_kind = dict(zip(people["canary"], people["example"], strict=True))
    assert by_kind["off_topic"] in wrote
    empty = tmp_path / "empty"
    empty.mkdir()
    for file in prepared.iterdir():
        (empty / file.name).write_bytes(file.read_bytes())
    (empty / "demonstrations.eval.jsonl").write_text("")
    report = run(JudgeConfig(source=f"{module}:nicer"), rows=8, inputs={"data": empty})
    samples = report.tables["evaluation_samples"]
    by_kind = {canary.kind: canary.example for canary in report.scorecard.judge.canaries}
    assert by_kind["off_topic"] in set(samples.loc[samples["arm"] == "sft", "response"]) - wrote


class Silent:
    """Leaves every pair of one prompt unanswered."""

    name = "silent"
    cost = Cost(requests=7, remembered=2, tokens=90, seconds=1.5)

    def endpoint(self, config):
        return self

    def remembered(self, judge, identity):
        return judge

    def __call__(self, pairs):
        silent = sorted({pair.prompt for pair in pairs})[0]
        return [Verdict(None if pair.prompt == silent else "tie", "x") for pair in pairs]


def test_what_an_endpoint_did_not_answer_and_what_it_cost_is_reported(run):
    judge = JudgeConfig(source="endpoint", endpoint=EndpointConfig(model="m"))
    report = run(judge, rows=16, judging=Silent())
    facts, summary = report.scorecard.judge, report.summary()
    assert facts.unanswered == sum(c.unanswered for c in report.scorecard.comparisons) > 0
    assert facts.pairs == 8 * 2 + 8 + 8
    assert (facts.requests, facts.remembered, facts.tokens, facts.seconds) == (7, 2, 90, 1.5)
    assert summary["judge/tokens"] == 90
    assert "unanswered" in set(report.tables["evaluation_verdicts"]["winner"])


def test_a_function_that_fails_ends_the_evaluation_in_a_sentence(run, module):
    with pytest.raises(ConfigError, match="toy_judges:no_such' cannot be imported"):
        run(JudgeConfig(source=f"{module}:no_such"))


# ---- by hand ----


def said(prompt, consistent):
    return Said("policy", "sft", Pair(prompt, "x", "y"), Verdict("tie", consistent=consistent))


def test_position_consistency_counts_whole_prompts():
    one = [said("p", True), said("p", True), said("q", False), said("r", None)]
    found = position_consistency(one, 0)
    assert found.value == pytest.approx(2 / 3)
    # Kish: (2 + 1)² / (4 + 1) = 1.8 prompts, so next to nothing is known.
    assert found.high - found.low > 0.7
    assert position_consistency([said("p", None)], 0) is None
    # Forty verdicts on one prompt are one prompt: as little as one verdict says.
    single = position_consistency([said("p", True)], 0)
    assert position_consistency([said("p", True)] * 40, 0) == single


class People:
    """A panel that answers when it is called for the second time; the longer answer is better."""

    name = "people"

    def __init__(self, given):
        self.given, self.known = given, given.setdefault("known", {})

    def ahead(self, pairs):
        new = [pair for pair in pairs if pair not in self.known and pair.a != pair.b]
        if new:
            self.given.setdefault("asked", []).append(list(pairs))
            self.known |= {pair: _longer(pair) for pair in new}
            raise VerdictsPendingError(len(new), len(pairs), "b", "p", "http://x")

    def __call__(self, pairs):
        return [_longer(pair) for pair in pairs]


def _longer(pair):
    gap = len(pair.a) - len(pair.b)
    winner = "tie" if gap == 0 else "a" if gap > 0 else "b"
    return Verdict(winner, agreed=gap != 0)


class AsksPeople:
    cost = Cost()

    def __init__(self, given):
        self.given = given

    def people(self, config):
        return People(self.given)


def test_people_are_told_of_all_pairs_at_once_and_answers_are_not_sampled_again(
    run, tmp_path, monkeypatch
):
    given = {}
    judge, folder = JudgeConfig(source="people"), tmp_path / "answers"
    with pytest.raises(VerdictsPendingError):
        run(judge, judging=AsksPeople(given), answers=folder)
    (asked,) = given["asked"]
    assert len(asked) == 8 * 2 + 8 + 8
    # One of each comparison in turn: policy over SFT, best of n over SFT, policy over best of n.
    assert [asked[0].prompt] * 3 == [pair.prompt for pair in asked[:3]]
    assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "sft.json"]

    monkeypatch.setattr(evaluation, "answer", None)  # or it would be called
    report = run(judge, judging=AsksPeople(given), answers=folder)
    facts = report.scorecard.judge
    assert (facts.name, facts.canaries, facts.consistency) == ("people", (), None)
    assert 0 <= facts.agreement.low <= facts.agreement.value <= facts.agreement.high <= 1
    assert report.summary()["judge/agreement"] == facts.agreement.value
    assert {c.judge for c in report.scorecard.comparisons} == {"people"}


def test_people_judge_as_anybody_else_would_with_the_same_verdicts(run, tmp_path):
    given = {}
    judge = JudgeConfig(source="people")
    with pytest.raises(VerdictsPendingError):
        run(judge, judging=AsksPeople(given), answers=tmp_path / "kept")
    waited = run(judge, judging=AsksPeople(given), answers=tmp_path / "kept")
    at_once = run(judge, judging=AsksPeople(given))  # sampled again, on the same machine
    assert results(waited) == results(at_once)
    assert waited.scorecard.arms == at_once.scorecard.arms
