"""Rewards made of parts: against Hugging Face's own logits on tokens put together by hand."""

import math
import sys

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import load_saved_tokenizer, save_model
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.backbone.responses import lay_out
from rlhf_core.data.encoding import left_pad, right_pad
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.rewards.functions import load_function
from rlhf_core.rewards.scoring import Reward, load_reward
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
from rlhf_core.settings.rewards import RewardTerm, check_terms
from rlhf_core.types import Responses

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OTHER = "models:/other/3"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "the room?"}]
PROMPTS = ["the room", CHAT, "a film", "the room"]
SAID = [" is good", " is very bad", " is warm and nice", " is"]
FINISHED = [True, True, False, False]

FUNCTIONS = """
import numpy
import torch

calls = []


def length(prompts, responses):
    calls.append((prompts, responses))
    return [len(text) for text in responses]


def words(prompts, responses):
    return numpy.array([len(text.split()) for text in responses], dtype=numpy.float32)


def shout(prompts, responses):
    return (torch.tensor(float("!" in text)) for text in responses)


def short(prompts, responses):
    return [len(text) < 9 for text in responses]


def too_few(prompts, responses):
    return [0.0] * (len(responses) - 1)


def no_list(prompts, responses):
    return 1.0


def third_is(value):
    return lambda prompts, responses: [0.0, 0.0, value, 0.0]


nan = third_is(float("nan"))
text = third_is("2.0")
nothing = third_is(None)
huge = third_is(1e300)
endless = third_is(10**400)
several = third_is(numpy.ones(2))
pair = third_is(torch.ones(2))


def breaks(prompts, responses):
    return [1 / 0 for _ in responses]


number = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """An importable module `toy_rewards`."""
    (tmp_path / "toy_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_rewards", raising=False)
    import toy_rewards

    return toy_rewards


@pytest.fixture
def tokenizer(gpt2):
    """The policy's."""
    return gpt2[1]


def reward_directory(base, directory, *, mean, std, template=None):
    """A reward model on a base model, saved."""
    model, tokenizer = base
    tokenizer.chat_template = template or tokenizer.chat_template
    save_model(model, tokenizer, directory / "body", kind="policy")
    scalar = ScalarModel.from_policy(directory / "body", torch.Generator().manual_seed(2))
    scalar.mean, scalar.std = mean, std
    scalar.save(tokenizer, directory / "reward", kind="reward")
    return directory / "reward"


@pytest.fixture
def own(causal, tmp_path):
    """A reward model on the policy's tokens, of either family."""
    return reward_directory(causal, tmp_path / "own", mean=0.3, std=0.5)


@pytest.fixture
def other(toy_corpus, tmp_path):
    """A reward model with a smaller vocabulary and a template of its own, which reads 40 tokens."""
    fresh = FreshModelConfig(layers=1, width=16, heads=2, context=40, vocab_size=264)
    base = load_base(ModelConfig(fresh=fresh), toy_corpus, 5)
    return reward_directory(base, tmp_path / "other", mean=-1.0, std=2.0, template=TEMPLATE)


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False).input_ids


def spoken(tokenizer, prompts=PROMPTS, said=SAID, finished=FINISHED):
    """What `Reward` is called with, from texts."""
    end = tokenizer.eos_token_id
    tokens = [
        ids_of(text, tokenizer) + [end] * ended for text, ended in zip(said, finished, strict=True)
    ]
    return sampled(tokenizer, prompts, tokens, finished)


def sampled(tokenizer, prompts, tokens, finished):
    """What `Reward` is called with, from tokens."""
    plain = ["\n\nHuman: the room?\n\nAssistant:" if p is CHAT else p for p in prompts]
    batch = left_pad([ids_of(text, tokenizer) for text in plain], tokenizer.pad_token_id, 99)
    ids, mask = right_pad(tokens, tokenizer.pad_token_id)
    responses = Responses(ids, mask, torch.tensor(finished))
    return prompts, lay_out(batch, responses), responses


def by_hand(directory, rows, mean, std):
    """Scores of token rows, one by one, with Hugging Face's own classification head."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        raw = [model(torch.tensor([row])).logits.item() for row in rows]
    return (torch.tensor(raw) - mean) / std


def terms(*sources):
    return [RewardTerm(source=source) for source in sources]


def loaded(sources, tokenizer, *, max_length=40, **directories):
    given = {"reward_model": directories.get("own"), OTHER: directories.get("other")}
    given = {source: path for source, path in given.items() if path}
    return load_reward(terms(*sources), given, tokenizer, "cpu", max_length=max_length)


# --- models ---


def test_model_with_the_policys_tokens_reads_the_tokens_that_were_sampled(own, tokenizer):
    # " good" letter by letter: a tokenizer would write it as one token, a policy need not.
    letters = [i for letter in " good" for i in ids_of(letter, tokenizer)]
    assert letters != ids_of(" good", tokenizer)
    tokens = [letters, [*letters, tokenizer.eos_token_id]]
    call = sampled(tokenizer, ["the room", "a film"], tokens, [False, True])
    rows = [
        ids_of(text, tokenizer) + said
        for text, said in zip(("the room", "a film"), tokens, strict=True)
    ]
    scores = loaded(["reward_model"], tokenizer, own=own)(*call)
    assert_close(scores.total, by_hand(own, rows, 0.3, 0.5), **CLOSE)


def test_to_another_tokenizer_texts_go_as_texts(other, tokenizer):
    theirs = load_saved_tokenizer(other)
    eos = theirs.eos_token_id
    assert ids_of(SAID[0], theirs) != ids_of(SAID[0], tokenizer)
    rows = [
        [*ids_of("the room", theirs), *ids_of(" is good", theirs), eos],
        # Its own template, without the space that the policy's plain one writes.
        [*ids_of("[user]the room?[assistant]", theirs), *ids_of("is very bad", theirs), eos],
        [*ids_of("a film", theirs), *ids_of(" is warm and nice", theirs)],  # never ended
        [*ids_of("the room", theirs), *ids_of(" is", theirs)],
    ]
    assert max(map(len, rows)) <= 40
    scores = loaded([OTHER], tokenizer, other=other)(*spoken(tokenizer))
    assert_close(scores.total, by_hand(other, rows, -1.0, 2.0), **CLOSE)
    assert set(scores.parts) == {"other-3"}


def test_policy_with_a_template_of_its_own_keeps_the_spaces_that_it_wrote(other, tokenizer):
    tokenizer.chat_template = TEMPLATE + " "  # any but the plain one
    theirs = load_saved_tokenizer(other)
    row = [*ids_of("[user]the room?[assistant]", theirs), *ids_of(" is", theirs)]
    call = spoken(tokenizer, [CHAT], [" is"], [False])
    score = loaded([OTHER], tokenizer, other=other)(*call).total
    assert_close(score, by_hand(other, [row], -1.0, 2.0), **CLOSE)


def test_text_that_another_model_cannot_read_whole_is_cut(other, tokenizer):
    # Of 40 places the prompt's 8 leave 32: the response loses its end, and its end of sequence.
    # A prompt of 60 is cut at its beginning and leaves the response half, of which it needs few.
    theirs = load_saved_tokenizer(other)
    q, z, eos = ids_of("q", theirs), ids_of("z", theirs), theirs.eos_token_id
    prompts, said = ["q" * 8, "q" * 8, "q" * 60, "q" * 60], ["z" * 50, "z" * 50, "zz", "zz"]
    rows = [q * 8 + z * 32, q * 8 + z * 32, q * 37 + z * 2 + [eos], q * 37 + z * 2]
    call = spoken(tokenizer, prompts, said, [True, False, True, False])
    scores = loaded([OTHER], tokenizer, other=other)(*call)
    assert_close(scores.total, by_hand(other, rows, -1.0, 2.0), **CLOSE)


def test_nothing_said_is_scored_as_an_end(other, tokenizer):
    # A policy may sample its pad token, which is no text; and the prompt may be empty.
    theirs = load_saved_tokenizer(other)
    _, *said = sampled(tokenizer, ["q"], [[tokenizer.pad_token_id]], [False])
    scores = loaded([OTHER], tokenizer, other=other)([""], *said)
    assert_close(scores.total, by_hand(other, [[theirs.eos_token_id]], -1.0, 2.0), **CLOSE)


def test_score_of_a_text_does_not_depend_on_its_neighbours(own, other, tokenizer):
    reward = loaded(["reward_model", OTHER], tokenizer, own=own, other=other)
    batch = reward(*spoken(tokenizer))
    for i in range(len(SAID)):
        alone = reward(*spoken(tokenizer, PROMPTS[i : i + 1], SAID[i : i + 1], FINISHED[i : i + 1]))
        for name, values in batch.parts.items():
            assert_close(alone.parts[name], values[i : i + 1], **CLOSE)
    assert len(set(batch.total.tolist())) == len(SAID)


def test_scores_carry_no_gradient(own, tokenizer):
    assert not loaded(["reward_model"], tokenizer, own=own)(*spoken(tokenizer)).total.requires_grad


# --- sums ---


def test_weighted_sum_by_hand(own, other, tokenizer, functions):
    given = {"reward_model": own, OTHER: other}
    parts = [
        RewardTerm(),
        RewardTerm(source=OTHER, weight=0.5),
        RewardTerm(source="toy_rewards:length", weight=-0.25),
    ]
    reward = load_reward(parts, given, tokenizer, "cpu", max_length=40)
    scores = reward(*spoken(tokenizer))
    assert list(scores.parts) == ["reward_model", "other-3", "length"]
    a, b, c = (values.tolist() for values in scores.parts.values())
    assert c == [8, 12, 17, 3]
    total = [x + 0.5 * y - 0.25 * z for x, y, z in zip(a, b, c, strict=True)]
    assert scores.total.tolist() == pytest.approx(total, rel=1e-6)
    # Each part is what it is alone.
    alone = loaded(["reward_model"], tokenizer, own=own)(*spoken(tokenizer))
    assert torch.equal(alone.parts["reward_model"], scores.parts["reward_model"])
    assert torch.equal(alone.total, alone.parts["reward_model"])


def test_function_is_asked_once_with_texts(tokenizer, functions):
    scores = loaded(["toy_rewards:length"], tokenizer)(*spoken(tokenizer))
    rendered = ["the room", "\n\nHuman: the room?\n\nAssistant:", "a film", "the room"]
    assert functions.calls == [(rendered, SAID)]
    assert scores.total.tolist() == [8, 12, 17, 3]


def test_messages_reach_a_function_through_the_policys_template(tokenizer, functions):
    tokenizer.chat_template = TEMPLATE
    loaded(["toy_rewards:length"], tokenizer)(*spoken(tokenizer))
    assert functions.calls[0][0][1] == "[user]the room?[assistant]"


@pytest.mark.parametrize(
    ("name", "said"),
    [("words", [2, 3, 4, 1]), ("shout", [0, 0, 0, 0]), ("short", [1, 0, 0, 1])],
)
def test_arrays_tensors_and_truth_values_are_numbers(tokenizer, functions, name, said):
    scores = loaded([f"toy_rewards:{name}"], tokenizer)(*spoken(tokenizer))
    assert scores.parts[name].tolist() == said
    assert scores.total.dtype == torch.float32


# --- functions that do not answer ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", "nan"),
        ("text", "'2.0'"),
        ("nothing", "None"),
        ("huge", "1e+300"),  # infinite in float32
        ("endless", "1000"),
        ("several", "array"),
        ("pair", "tensor"),
    ],
)
def test_value_that_is_no_finite_number(tokenizer, functions, name, said):
    reward = loaded([f"toy_rewards:{name}"], tokenizer)
    with pytest.raises(ConfigError) as raised:
        reward(*spoken(tokenizer))
    sentence = str(raised.value)
    assert sentence.startswith(
        f"the reward 'toy_rewards:{name}' must return one finite number for each of the 4 "
        f"responses; it returned {said}"
    )
    assert sentence.endswith(" for number 2: ' is warm and nice'")


def test_wrong_number_of_values(tokenizer, functions):
    reward = loaded(["toy_rewards:too_few"], tokenizer)
    with pytest.raises(ConfigError, match=r"too_few' .* each of the 4 responses; it returned 3$"):
        reward(*spoken(tokenizer))


@pytest.mark.parametrize(
    ("name", "cause", "said"),
    [
        ("breaks", ZeroDivisionError, "ZeroDivisionError: division by zero"),
        ("no_list", TypeError, "TypeError: 'float' object is not iterable"),
    ],
)
def test_function_that_fails_is_named_and_its_error_kept(tokenizer, functions, name, cause, said):
    reward = loaded([f"toy_rewards:{name}"], tokenizer)
    with pytest.raises(ConfigError) as raised:
        reward(*spoken(tokenizer))
    assert f"the reward 'toy_rewards:{name}' failed on 4 texts ({said})" in str(raised.value)
    assert isinstance(raised.value.__cause__, cause)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("toy_rewards:missing", "cannot be imported"),
        ("toy_rewards", "cannot be imported"),
        (":f", "cannot be imported"),
        ("toy_rewards:number", "is a int, not a function"),
    ],
)
def test_function_that_cannot_be_imported(functions, path, said):
    with pytest.raises(ConfigError, match=rf"^evaluation\.true_reward '{path}' {said}"):
        load_function(path, setting="evaluation.true_reward")


def test_function_of_a_term_that_cannot_be_imported(tokenizer):
    with pytest.raises(ConfigError, match=r"^the reward 'no_such_module:f' cannot be imported"):
        loaded(["no_such_module:f"], tokenizer)


# --- terms ---


@pytest.mark.parametrize(
    ("source", "name", "is_model"),
    [
        ("reward_model", "reward_model", True),
        ("models:/demo-reward/12", "demo-reward-12", True),
        ("models:/demo.reward@best_yet", "demo.reward-best_yet", True),
        ("package.module:politeness", "politeness", False),
    ],
)
def test_names_of_metrics(source, name, is_model):
    term = RewardTerm(source=source)
    assert (term.name, term.is_model) == (name, is_model)


@pytest.mark.parametrize(
    "source",
    [
        *("", "reward", "reward_model ", "models:/demo", "models:/demo/0", "models:/../x/1"),
        *("models:/demo/1/x", "module", "module:", ":f", "module:f.g", "a b:c", "module:größe"),
    ],
)
def test_source_that_names_no_reward(source):
    with pytest.raises(ValidationError, match=f"'{source}' is not a reward; write reward_model"):
        RewardTerm(source=source)


def test_weights(tokenizer):
    assert RewardTerm(weight=-2).weight == -2
    with pytest.raises(ValidationError, match="weight 0 changes nothing; leave it out"):
        RewardTerm(weight=0)
    for weight in (math.inf, math.nan):
        with pytest.raises(ValidationError, match="finite"):
            RewardTerm(weight=weight)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "at least one part"),
        (["a:f", "reward_model", "a:f"], "^a:f is listed 2 times; merge them and add the weights"),
        (["a:f", "b:f", "a:g"], "^a:f and b:f would both be logged as 'f'; rename one of them"),
        (["reward_model", "a:reward_model"], "would both be logged as 'reward_model'"),
        (["models:/m/1", "models:/m@1"], "would both be logged as 'm-1'"),
    ],
)
def test_parts_that_cannot_be_told_apart(sources, said):
    with pytest.raises(ValueError, match=said):
        check_terms(terms(*sources))


def test_parts_with_names_of_their_own():
    check_terms(terms("reward_model", "models:/m/1", "models:/m/2", "a:f", "a:g"))


# --- loading ---


def test_term_without_a_directory(own, tokenizer):
    with pytest.raises(ConfigError, match=rf"'{OTHER}' has no model directory \(got: reward_mod"):
        loaded(["reward_model", OTHER], tokenizer, own=own)
    with pytest.raises(ConfigError, match=r"'reward_model' .* \(got: none\)"):
        loaded(["reward_model"], tokenizer)


def test_model_of_another_kind(own, tokenizer):
    with pytest.raises(ModelError, match="kind 'policy', but reward is needed"):
        loaded(["reward_model"], tokenizer, own=own.parent / "body")


def test_ready_model_needs_no_directory(own, other, tokenizer):
    ready = {"reward_model": ScalarModel.load(own)}
    both = terms("reward_model", OTHER)
    given = {OTHER: other}
    reward = load_reward(both, given, tokenizer, "cpu", max_length=40, loaded=ready)
    expected = loaded(["reward_model", OTHER], tokenizer, own=own, other=other)
    call = spoken(tokenizer)
    assert torch.equal(reward(*call).total, expected(*call).total)


def test_model_on_the_policys_tokens_has_to_read_what_the_policy_writes(own, other, tokenizer):
    with pytest.raises(ConfigError, match="texts of 41 tokens, but the model reads at most 40"):
        loaded(["reward_model"], tokenizer, own=own, max_length=41)
    loaded([OTHER], tokenizer, other=other, max_length=41)  # whose texts are cut


def test_precision(own, tokenizer):
    reward = load_reward(
        terms("reward_model"), {"reward_model": own}, tokenizer, "cpu", "bfloat16", max_length=40
    )
    exact = loaded(["reward_model"], tokenizer, own=own)
    call = spoken(tokenizer)
    rough = reward(*call).total
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact(*call).total)
    assert_close(rough, exact(*call).total, rtol=0, atol=0.1)


def test_same_parts_given_by_hand(own, tokenizer):
    models = {"reward_model": ScalarModel.load(own)}
    reward = Reward(
        terms("reward_model"), models, {"reward_model": tokenizer}, tokenizer, max_length=40
    )
    call = spoken(tokenizer)
    assert torch.equal(reward(*call).total, models["reward_model"].scores(call[1].packed))
