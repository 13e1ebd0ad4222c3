import hashlib
import math
import os
import subprocess
import sys
from itertools import pairwise
from random import Random

import pytest
from pydantic import ValidationError

from rlhf_core.data.pairs import with_winners
from rlhf_core.settings.simulation import AnnotatorsConfig, SimulationConfig
from rlhf_core.simulation import (
    Annotator,
    SimulatedTables,
    all_prompts,
    draw_annotators,
    simulate,
    true_reward,
    vocabulary,
    vote,
    write_review,
)
from rlhf_core.simulation.grammar import FEATURES, words_of
from rlhf_core.simulation.truth import rambling, repetition, sentiment, straying

SMALL = SimulationConfig(prompts=40, demonstrations=200, preference_pairs=600)
HOTEL = "Review of the hotel in Rome, visited in winter:"
SIGMAS = 4  # a binomial share leaves this many standard deviations with probability 6e-5


def digest(tables: SimulatedTables) -> str:
    frames = (tables.demonstrations, tables.preferences, tables.prompts)
    text = "".join(frame.to_json(orient="records", lines=True) for frame in frames)
    return hashlib.sha256(text.encode()).hexdigest()


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = Random(seed)
    prompts = rng.choices(all_prompts(), k=count)
    return [(prompt, write_review(prompt, rng)) for prompt in prompts]


def share_of(outcome: str, annotator: Annotator, a: str, b: str, votes: int = 4000) -> float:
    rng = Random(1)
    return sum(annotator.prefers(a, b, rng) == outcome for _ in range(votes)) / votes


def within(share: float, expected: float, votes: int = 4000) -> bool:
    return abs(share - expected) <= SIGMAS * math.sqrt(expected * (1 - expected) / votes)


@pytest.fixture(scope="module")
def tables() -> SimulatedTables:
    return simulate(SimulationConfig(), 0)


# --- tables -----------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tables_in_every_process():
    # This process hashes strings by a random seed, the other by a fixed one.
    program = (
        "import hashlib\n"
        "from rlhf_core.simulation import SimulationConfig, simulate\n"
        "t = simulate(SimulationConfig(prompts=40, demonstrations=200, preference_pairs=600), 7)\n"
        "frames = (t.demonstrations, t.preferences, t.prompts)\n"
        "text = ''.join(f.to_json(orient='records', lines=True) for f in frames)\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == digest(simulate(SMALL, 7))


def test_other_seeds_give_other_tables_and_annotators():
    drawn = [simulate(SMALL, seed) for seed in range(5)]
    assert len({tuple(d.prompts.prompt) for d in drawn}) == 5
    assert len({d.annotators[0].reliability for d in drawn}) == 5
    # The first draw of a table is the place of its first prompt.
    for name in ("demonstrations", "preferences"):
        firsts = [getattr(d, name).prompt[0] for d in drawn]
        places = {d.prompts.prompt.tolist().index(p) for d, p in zip(drawn, firsts, strict=True)}
        assert len(places) > 1, name


def test_the_votes_are_those_of_the_annotators_named():
    calm = AnnotatorsConfig(count=3, lowest_reliability=1.0, side_bias=0, noise=0, tie_margin=0)
    drawn = simulate(SMALL.model_copy(update={"annotators": calm}), 7)
    people = {person.name: person for person in drawn.annotators}
    for row in drawn.preferences.itertuples():
        person = people[row.annotator]
        a, b = person.utility(row.response_a), person.utility(row.response_b)
        assert row.vote == ("a" if a > b else "b")


def test_tables_have_the_columns_and_rows_of_the_contract(tables):
    assert list(tables.demonstrations) == ["id", "prompt", "response"]
    assert list(tables.preferences) == [
        *("id", "prompt", "response_a", "response_b", "vote", "shown_first"),
        *("annotator", "gold", "margin", "time", "source"),
    ]
    assert list(tables.prompts) == ["id", "prompt"]
    assert len(tables.demonstrations) == 8000
    assert len(tables.preferences) == 4000
    assert set(tables.preferences.vote) == {"a", "b", "tie"}
    same = {"shown_first": "a", "gold": False, "margin": 0.0, "time": "", "source": "simulated"}
    for name, value in same.items():
        assert tables.preferences[name].tolist() == [value] * 4000
    assert tables.preferences.annotator.nunique() == 12
    for frame in (tables.demonstrations, tables.preferences, tables.prompts):
        assert frame.id.is_unique


def test_prompts_are_distinct_and_all_tables_use_them(tables):
    assert tables.prompts.prompt.nunique() == len(tables.prompts) == 480
    known = set(tables.prompts.prompt)
    assert set(tables.demonstrations.prompt) == known
    assert set(tables.preferences.prompt) <= known


def test_fewer_prompts_are_a_sample_that_every_table_keeps_to():
    small = simulate(SMALL, 3)
    known = set(small.prompts.prompt)
    assert len(known) == 40
    assert known < set(all_prompts())
    assert set(small.demonstrations.prompt) | set(small.preferences.prompt) <= known


def test_more_demonstrations_leave_the_preferences_and_the_first_prompts_alone():
    more = simulate(SMALL.model_copy(update={"demonstrations": 300}), 7)
    assert more.preferences.equals(simulate(SMALL, 7).preferences)
    assert more.prompts.equals(simulate(SMALL, 7).prompts)


FIELDS = [
    *(("prompts", 39), ("demonstrations", 201), ("preference_pairs", 201)),
    *(("count", 5), ("lowest_reliability", 0.1), ("highest_reliability", 0.81)),
    *(("side_bias", 2.0), ("length_bias", 2.0), ("taste_spread", 2.0)),
    *(("care", 1.0), ("noise", 2.0), ("tie_margin", 0.8)),
    *(("flip_share", 0.5), ("spammer_share", 0.3), ("contrary_share", 0.1), ("gold_share", 0.1)),
]


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_every_setting_changes_the_data(name, value):
    if name in SimulationConfig.model_fields:
        changed = SMALL.model_copy(update={name: value})
    else:
        changed = SMALL.model_copy(update={"annotators": AnnotatorsConfig(**{name: value})})
    assert digest(simulate(changed, 7)) != digest(simulate(SMALL, 7))


def test_the_list_of_settings_is_complete():
    fields = SimulationConfig.model_fields.keys() | AnnotatorsConfig.model_fields.keys()
    assert {name for name, _ in FIELDS} == fields - {"annotators"}


def test_flipped_votes_are_the_other_way_round_on_the_same_pairs():
    flipped = SMALL.model_copy(update={"annotators": AnnotatorsConfig(flip_share=0.25)})
    as_cast, recorded = (simulate(config, 7).preferences for config in (SMALL, flipped))
    assert as_cast.drop(columns="vote").equals(recorded.drop(columns="vote"))
    changed = as_cast["vote"] != recorded["vote"]
    assert 0.15 < changed.mean() < 0.35
    assert set(as_cast["vote"][changed]) == {"a", "b"}
    assert (as_cast["vote"][changed].map({"a": "b", "b": "a"}) == recorded["vote"][changed]).all()
    ties = as_cast["vote"] == "tie"
    assert ties.any()
    assert (recorded["vote"][ties] == "tie").all()


def test_spammers_come_first_then_the_contrary_and_the_others_vote_as_before():
    config = AnnotatorsConfig(count=20, spammer_share=0.15, contrary_share=0.05)
    drawn = draw_annotators(config, Random(0))
    assert [a.reliability == 0 for a in drawn] == [True] * 3 + [False] * 17
    assert [a.contrary for a in drawn] == [False] * 3 + [True] + [False] * 16
    assert drawn[4:] == draw_annotators(AnnotatorsConfig(count=20), Random(0))[4:]
    praise, blame = " The room was lovely.", " The room was awful."
    usual, contrary = Annotator("usual"), Annotator("contrary", contrary=True)
    assert usual.prefers(praise, blame, Random(0)) == "a"
    assert contrary.prefers(praise, blame, Random(0)) == "b"
    same = Annotator("same", contrary=True, tie_margin=0.1)
    assert same.prefers(praise, praise, Random(0)) == "tie"


def test_known_answers_are_those_of_the_truth_beside_the_same_votes():
    known = simulate(SMALL.model_copy(update={"gold_share": 0.05}), 7).preferences
    plain = simulate(SMALL, 7).preferences
    assert known[: len(plain)].equals(plain)
    gold = known[len(plain) :]
    assert len(gold) == 30
    assert set(gold["annotator"]) == {"gold"}
    assert gold["gold"].all()
    assert set(gold["shown_first"]) == {""}
    first, second = (true_reward(list(gold["prompt"]), list(gold[f"response_{s}"])) for s in "ab")
    right = ["a" if a > b else "b" if b > a else "tie" for a, b in zip(first, second, strict=True)]
    assert gold["vote"].tolist() == right
    assert {"a", "b"} <= set(right)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (AnnotatorsConfig, {"spammer_share": 0.7, "contrary_share": 0.4}),
        (SimulationConfig, {"prompts": 481}),
        (SimulationConfig, {"demonstrations": 0}),
        (SimulationConfig, {"pairs": 10}),
        (AnnotatorsConfig, {"lowest_reliability": 0.9, "highest_reliability": 0.8}),
        (AnnotatorsConfig, {"noise": -0.1}),
    ],
)
def test_impossible_settings_are_refused(section, values):
    with pytest.raises(ValidationError):
        section(**values)


# --- grammar ----------------------------------------------------------------------------------


def test_the_vocabulary_is_small_and_no_text_leaves_it(tables):
    assert 110 <= len(vocabulary()) <= 150
    written = {
        word
        for text in (*tables.demonstrations.prompt, *tables.demonstrations.response)
        for word in words_of(text)
    }
    assert written == vocabulary()


def test_reviews_have_a_bounded_length_and_whole_sentences():
    texts = [text for _, text in reviews(3000)]
    # The shortest: two clauses of four words. The longest: five clauses of five words, four of
    # them joined by one word more, and a closing sentence of five words: 34.
    lengths = [len(words_of(text)) for text in texts]
    assert min(lengths) == 8
    assert 28 <= max(lengths) <= 34
    assert all(text.startswith(" ") and text.endswith(".") and "  " not in text for text in texts)
    assert all(s[0].isupper() for text in texts for s in text.strip(" .").split(". "))


def test_most_reviews_are_written_once():
    texts = [text for _, text in reviews(3000)]
    assert len(set(texts)) > 0.97 * len(texts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demonstrations_leave_room_for_improvement(seed):
    rows = simulate(SimulationConfig(preference_pairs=1), seed).demonstrations
    truth = true_reward(rows.prompt.tolist(), rows.response.tolist())
    mean = sum(truth) / len(truth)
    spread = math.sqrt(sum((r - mean) ** 2 for r in truth) / len(truth))
    assert abs(mean) < 0.05
    assert spread > 0.6
    assert max(truth) > 0.95


def test_reviews_speak_of_the_thing_asked_for_with_few_exceptions():
    strays = [straying(prompt, text) for prompt, text in reviews(3000)]
    # A clause strays with probability 0.04; a review has 2.9 clauses in the mean.
    assert sum(strays) / len(strays) == pytest.approx(0.04, abs=0.008)


# --- truth ------------------------------------------------------------------------------------

# VADER's published formula: compound = s / sqrt(s² + 15), rounded to four decimals. Valences in its
# lexicon: lovely 2.8, superb 3.1, bad -2.5, recommend 1.5; "very" adds 0.293 away from zero.
WORKED = [
    # 2.8 / sqrt(7.84 + 15) = 2.8 / 4.77912
    (" The room was lovely.", 0.5859),
    # 5.9 / sqrt(34.81 + 15) = 5.9 / 7.05762
    (" The room was lovely and the bed was superb.", 0.8360),
    # -2.793 / sqrt(7.80085 + 15) = -2.793 / 4.77502
    (" The room was very bad.", -0.5849),
    # 1.5 / sqrt(2.25 + 15) = 1.5 / 4.15331
    (" I recommend it to everyone.", 0.3612),
    (" The room was plain.", 0.0),
    # Content words room superb bed superb view superb: 2 of 6 repeat, 1/3 - 0.1 = 0.23333.
    # 9.3 / sqrt(86.49 + 15) = 9.3 / 10.07422 = 0.92315, rounded 0.9231; 0.9231 - 0.23333.
    (" The room was superb. The bed was superb. The view was superb.", 0.68977),
    # room plain bed plain view small: 1 of 6 repeats, 1/6 - 0.1 = 0.06667.
    (" The room was plain. The bed was plain. The view was small.", -0.06667),
    # Ten content words of which one repeats: exactly the tenth that is free.
    (" The room was plain, bed small, view basic, staff average, pool plain.", 0.0),
    # 30 words, 6 too many: 0.03 x 6 = 0.18.
    (" " + "the " * 29 + "all.", -0.18),
    # 24 words are not too many.
    (" " + "the " * 23 + "all.", 0.0),
    # One feature of two is a phone's: 0.5 x 1/2 off 0.5859.
    (" The battery was lovely and the room was plain.", 0.3359),
    # Unfinished: 0.25 off 0.5859.
    (" The room was lovely", 0.3359),
    (" The room was lovely. \n", 0.5859),
    (" The room was lovely!", 0.6239),
    ("", -0.25),
    # The penalty is at most 1, the sentiment of 100 x -2.5 at its bound -0.9999:
    # -250 / sqrt(62500 + 15) = -0.99988.
    ("bad " * 100, -1.9999),
]


@pytest.mark.parametrize(("text", "expected"), WORKED)
def test_true_reward_by_hand(text, expected):
    assert true_reward([HOTEL], [text]) == [pytest.approx(expected, abs=1e-5)]


def test_the_exclamation_mark_counts_as_vader_says():
    # One mark adds 0.292 to s: 3.092 / sqrt(9.56046 + 15) = 3.092 / 4.95585.
    assert sentiment("The room was lovely!") == pytest.approx(0.6239, abs=1e-5)


def test_a_prompt_of_no_known_kind_forgives_straying():
    text = " The battery was lovely and the room was plain."
    assert true_reward(["Tell me something."], [text]) == [pytest.approx(0.5859)]


def test_each_response_is_judged_by_its_own_prompt():
    prompts = [f"Review of the {kind} in Rome:" for kind in FEATURES]
    truth = true_reward(prompts, [" The battery was plain."] * 3)
    assert truth == [-0.5, -0.5, 0.0]
    with pytest.raises(ValueError, match="shorter"):
        true_reward(prompts, ["one"])


def test_true_reward_keeps_its_range_on_any_text():
    rng = Random(0)
    words = [*sorted(vocabulary()), ".", "!", "?", ",", "\n", "é", "7", ""]
    texts = [" ".join(rng.choices(words, k=rng.randrange(80))) for _ in range(500)]
    truth = true_reward([HOTEL] * 500, texts)
    assert all(-2 <= reward <= 1 for reward in truth)
    assert truth == true_reward([HOTEL] * 500, texts)


def test_a_row_of_superlatives_gains_less_than_it_loses():
    good = " The room was superb. The bed was lovely. The view was great. I loved it."
    row = " ".join(f"The {f} was superb." for f in FEATURES["hotel"])
    assert sentiment(row) > sentiment(good)
    assert true_reward([HOTEL] * 2, [row, good])[0] < true_reward([HOTEL] * 2, [row, good])[1] - 0.2
    assert repetition(good) == rambling(good) == straying(HOTEL, good) == 0


# --- annotators -------------------------------------------------------------------------------


def test_utility_by_hand():
    text = " The room was lovely. The bed was bad."
    # taste room 2, bed 1: v = 2 x 2.8 - 2.5 = 3.1; 3.1 / sqrt(9.61 + 15) = 0.62489.
    # 8 words at 0.1 per ten words: 0.08. Valences come back from four decimals: 1e-3 is enough.
    person = Annotator("a", length_bias=0.1, taste={"room": 2.0})
    assert person.utility(text) == pytest.approx(0.62489 + 0.08, abs=1e-3)
    # Three times "superb" (0.92315) costs half of 0.23333.
    careful = Annotator("b", care=0.5)
    thrice = " The room was superb. The bed was superb. The view was superb."
    assert careful.utility(thrice) == pytest.approx(0.92315 - 0.11667, abs=1e-3)


def test_without_taste_the_perceived_sentiment_is_vaders():
    # Equal, but where an intensifier stands three words before a closing's sentiment word: VADER
    # lets it reach across the full stop (very dull. I regret it.) and adds 0.9 x 0.293 = 0.264 to
    # the sum. The slope of s / sqrt(s² + 15) is at most 1 / sqrt(15): no more than 0.068.
    judge = Annotator("judge")
    for _, text in reviews(500):
        tolerance = 0.069 if "very" in text or "really" in text else 1e-3
        assert judge.utility(text) == pytest.approx(sentiment(text), abs=tolerance)


def test_utility_of_any_text_is_finite():
    judge = Annotator("judge", length_bias=0.1, care=1.0)
    assert math.isfinite(judge.utility(""))
    assert math.isfinite(judge.utility("superb " * 500))


def test_a_perfect_annotator_always_prefers_the_better_sentiment():
    judge, rng = Annotator("judge"), Random(0)
    texts = [text for _, text in reviews(800) if "very" not in text and "really" not in text]
    compared = 0
    for a, b in pairwise(texts):
        if abs(sentiment(a) - sentiment(b)) > 1e-3:
            compared += 1
            assert judge.prefers(a, b, rng) == ("a" if sentiment(a) > sentiment(b) else "b")
    assert compared > 300
    assert judge.prefers(texts[0], texts[0], rng) == "tie"


LOVELY, AWFUL = " The room was lovely.", " The room was awful."


def test_an_unreliable_annotator_tosses_a_coin():
    careless = Annotator("careless", reliability=0.0, side_bias=5.0, tie_margin=10.0)
    assert within(share_of("a", careless, AWFUL, LOVELY), 0.5)
    assert share_of("tie", careless, AWFUL, LOVELY) == 0


def test_reliability_is_the_share_of_votes_given_with_attention():
    # 0.6 by merit and half of the remaining 0.4.
    assert within(share_of("a", Annotator("half", reliability=0.6), LOVELY, AWFUL), 0.8)


def test_votes_follow_bradley_terry():
    # Equal texts, side bias = noise x ln 3: the first wins with σ(ln 3) = 3/4.
    biased = Annotator("biased", side_bias=0.2 * math.log(3), noise=0.2)
    assert within(share_of("a", biased, LOVELY, LOVELY), 0.75)
    # Sentiments 0.5859 and 0.0, noise 0.5859 / ln 4: the better wins with 4/5 from either side.
    noisy = Annotator("noisy", noise=0.5859 / math.log(4))
    assert within(share_of("a", noisy, LOVELY, " The room was plain."), 0.8)
    assert within(share_of("b", noisy, " The room was plain.", LOVELY), 0.8)


def test_ties_follow_rao_and_kupper():
    # Equal texts: P(|noise x z| <= margin) = 2 σ(margin / noise) - 1 = 2 x 3/4 - 1.
    unsure = Annotator("unsure", noise=0.2, tie_margin=0.2 * math.log(3))
    assert within(share_of("tie", unsure, LOVELY, LOVELY), 0.5)


def test_side_bias_favours_one_side():
    first, second = Annotator("first", side_bias=0.1), Annotator("second", side_bias=-0.1)
    assert share_of("a", first, LOVELY, LOVELY) == share_of("b", second, LOVELY, LOVELY) == 1


def test_length_bias_favours_the_longer():
    long, short = " The room was plain. The bed was small. That is all.", " The room was plain."
    fond, rng = Annotator("fond", length_bias=0.1), Random(0)
    assert fond.prefers(long, short, rng) == "a"
    assert fond.prefers(short, long, rng) == "b"
    assert Annotator("fair").prefers(long, short, rng) == "tie"


def test_taste_decides_between_two_good_features():
    room, bed = (
        " The room was lovely. The bed was awful.",
        " The bed was lovely. The room was awful.",
    )
    rng = Random(0)
    assert Annotator("r", taste={"room": 2.0}).prefers(room, bed, rng) == "a"
    assert Annotator("b", taste={"bed": 2.0}).prefers(room, bed, rng) == "b"


def test_a_vote_shows_the_pair_in_random_order():
    # One who always takes the first text chooses each of the two half the time.
    rng, first = Random(0), Annotator("first", side_bias=5.0)
    votes = [vote(first, (LOVELY, AWFUL), rng) for _ in range(4000)]
    assert within(sum(v.response_a == LOVELY for v in votes) / 4000, 0.5)
    assert all({v.response_a, v.response_b} == {LOVELY, AWFUL} for v in votes)
    assert {v.vote for v in votes} == {"a"}
    indifferent = Annotator("indifferent", tie_margin=9.0)
    ties = [vote(indifferent, (LOVELY, AWFUL), rng) for _ in range(4000)]
    assert {v.vote for v in ties} == {"tie"}
    assert within(sum(v.response_a == LOVELY for v in ties) / 4000, 0.5)


def test_a_vote_names_the_side_of_the_better_text():
    rng = Random(0)
    votes = {vote(Annotator("judge"), (AWFUL, LOVELY), rng) for _ in range(50)}
    assert votes == {(LOVELY, AWFUL, "a"), (AWFUL, LOVELY, "b")}


def test_a_liking_for_the_text_shown_first_is_in_the_votes():
    fond = AnnotatorsConfig(count=6, lowest_reliability=1.0, side_bias=1.0)
    drawn = simulate(SMALL.model_copy(update={"annotators": fond}), 3)
    decided = drawn.preferences[drawn.preferences.vote != "tie"]
    first = (decided.vote == decided.shown_first).groupby(decided.annotator).mean()
    liking = {person.name: person.side_bias for person in drawn.annotators}
    assert max(liking.values()) > 0.4 > -0.4 > min(liking.values())
    # About 100 votes each: without a liking, four standard deviations of the share are 0.2.
    assert first[max(liking, key=liking.get)] > 0.7
    assert first[min(liking, key=liking.get)] < 0.3


def test_annotators_differ_within_the_bounds_of_the_config():
    config = AnnotatorsConfig(count=500)
    people = draw_annotators(config, Random(0))
    assert len({person.name for person in people}) == 500
    assert all(0.8 <= person.reliability <= 1.0 for person in people)
    assert all(abs(person.side_bias) <= 0.1 for person in people)
    assert all(0 <= person.length_bias <= 0.2 for person in people)
    # Uniform on [0, 0.2]: standard error of the mean of 500 is 0.2 / sqrt(12 x 500) = 0.0026.
    assert sum(p.length_bias for p in people) / 500 == pytest.approx(0.1, abs=SIGMAS * 0.0026)
    # The log weights are N(0, 0.3²), 9000 of them: standard error of their deviation 0.0022.
    logs = [math.log(weight) for person in people for weight in person.taste.values()]
    assert len(logs) == 500 * 18
    spread = math.sqrt(sum(x * x for x in logs) / len(logs))
    assert spread == pytest.approx(0.3, abs=SIGMAS * 0.0023)
    assert people == draw_annotators(config, Random(0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_votes_agree_with_the_truth_at_a_useful_but_imperfect_rate(seed):
    # 0.82 to 0.85 on seeds 0 to 9: good enough to learn from, noisy enough to be lifelike.
    pairs = simulate(SimulationConfig(demonstrations=1), seed).preferences
    decided = with_winners(pairs[pairs.vote != "tie"])
    better = true_reward(decided.prompt.tolist(), decided.chosen.tolist())
    worse = true_reward(decided.prompt.tolist(), decided.rejected.tolist())
    agreement = sum(b > w for b, w in zip(better, worse, strict=True)) / len(decided)
    assert 0.8 < agreement < 0.88
    assert 0.02 < (pairs.vote == "tie").mean() < 0.07


def test_annotators_overlook_what_the_truth_punishes():
    # The gap that a policy can exploit: longer, repetitive, stray praise against a modest text.
    people = draw_annotators(AnnotatorsConfig(), Random(0))
    modest = " The room was lovely. The bed was plain. The view was great."
    gushing = " ".join(f"The {f} was superb." for f in (*FEATURES["phone"], *FEATURES["hotel"]))
    assert all(person.utility(gushing) > person.utility(modest) for person in people)
    truth = true_reward([HOTEL] * 2, [gushing, modest])
    assert truth[0] < truth[1] - 0.5
