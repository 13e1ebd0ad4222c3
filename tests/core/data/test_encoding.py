"""From text to tokens: concatenation, special tokens, truncation, padding."""

from string import ascii_lowercase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf_core.data.encoding import (
    PLAIN_CHAT_TEMPLATE,
    decode_responses,
    encode_pair,
    encode_prompt,
    encode_prompts,
    encode_response,
    left_pad,
    render_prompt,
    right_pad,
    same_tokens,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the room?"},
]


def one_token_a_letter():
    """A tokenizer by which truncation can be followed by eye."""
    backend = Tokenizer(WordLevel({letter: i for i, letter in enumerate("$" + ascii_lowercase)}))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="$")


LETTERS = one_token_a_letter()


def letters(prompt, response, length):
    ids, in_prompt, cut = encode_pair(prompt, response, LETTERS, length)
    text = "".join(LETTERS.convert_ids_to_tokens(ids))
    return text[:in_prompt], text[in_prompt:], cut


@pytest.fixture
def tokenizer(gpt2):
    return gpt2[1]


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that puts a begin-of-sequence token before every text, as Llama's does."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


# --- prompts ---


def test_prompt_and_response_are_tokenised_apart_and_put_side_by_side(tokenizer):
    ids, in_prompt, cut = encode_pair("the room", " is good", tokenizer, 40)
    assert ids[:in_prompt] == encode_prompt("the room", tokenizer)
    assert ids[in_prompt:] == encode_response(" is good", tokenizer)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "the room is good"
    assert not cut


def test_no_merge_reaches_across_the_seam(tokenizer):
    # " good" is one token, but the policy is asked " go" and has to answer "od".
    assert len(tokenizer(" good", add_special_tokens=False).input_ids) == 1
    ids, in_prompt, _ = encode_pair(" go", "od", tokenizer, 40)
    assert tokenizer.decode(ids[:in_prompt]) == " go"
    assert tokenizer.decode(ids[in_prompt:-1]) == "od"


def test_begin_of_sequence_stands_once_at_the_start_of_a_text(with_bos):
    bos = with_bos.bos_token_id
    assert encode_prompt("the room", with_bos).count(bos) == 1
    assert bos not in encode_response(" is good", with_bos)
    ids, in_prompt, _ = encode_pair("the room", " is good", with_bos, 40)
    assert (ids[0], ids.count(bos)) == (bos, 1)
    assert with_bos.decode(ids[1:in_prompt]) == "the room"


def test_begin_of_sequence_written_by_the_template_is_not_doubled(with_bos):
    with_bos.chat_template = "<|begin|>{{ messages[0]['content'] }}"
    ids = encode_prompt([{"role": "user", "content": "the room"}], with_bos)
    assert ids.count(with_bos.bos_token_id) == 1


def test_tokenizer_that_knows_a_begin_of_sequence_but_does_not_use_it_gets_none(tokenizer):
    # As GPT-2's, whose bos_token is <|endoftext|> and whose texts start without it.
    tokenizer.bos_token = tokenizer.eos_token
    assert tokenizer.bos_token_id not in encode_prompt("the room", tokenizer)


def test_text_stays_as_it_is(tokenizer):
    assert render_prompt("the {{ room }}", tokenizer) == "the {{ room }}"


@pytest.mark.parametrize("template", [PLAIN_CHAT_TEMPLATE, None])
def test_messages_become_a_plain_dialogue_without_a_template(tokenizer, template):
    tokenizer.chat_template = template
    chat = [*CHAT, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "Why?"}]
    said = "Be brief.\n\nHuman: the room?\n\nAssistant: fine\n\nHuman: Why?\n\nAssistant:"
    assert render_prompt(chat, tokenizer) == said


def test_messages_go_through_the_template_of_the_tokenizer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    said = "[system]Be brief.[user]the room?[assistant]"
    assert render_prompt(CHAT, tokenizer) == said
    assert tokenizer.decode(encode_prompt(CHAT, tokenizer)) == said


# --- truncation: room for 8 ---


def test_text_that_fits_exactly_is_whole():
    assert letters("abc", "wxyz", 8) == ("abc", "wxyz$", False)


def test_long_response_loses_its_end_and_its_end_of_sequence():
    # The prompt's 3 leave room for 5.
    assert letters("abc", "stuvwxyz", 8) == ("abc", "stuvw", True)


def test_long_prompt_loses_its_start_and_leaves_half_of_the_room():
    assert letters("abcdefghij", "stuvwxyz", 8) == ("ghij", "stuv", True)


def test_short_response_to_a_long_prompt_stays_whole():
    assert letters("abcdefghij", "yz", 8) == ("fghij", "yz$", True)


def test_prompt_of_more_than_half_of_the_room_gives_way():
    # 6 + 9: the response is owed 4, so the prompt keeps 4.
    assert letters("abcdef", "stuvwxyz", 8) == ("cdef", "stuv", True)


@given(st.text("abc", max_size=30), st.text("xyz", max_size=30), st.integers(2, 40))
def test_truncated_text_is_the_end_of_the_prompt_and_the_start_of_the_response(
    prompt, response, length
):
    head, tail, cut = letters(prompt, response, length)
    assert prompt.endswith(head)
    assert (response + "$").startswith(tail)
    assert tail  # something is left to learn
    assert len(head) + len(tail) == min(length, len(prompt) + len(response) + 1)
    assert cut == (len(prompt) + len(response) + 1 > length)


# --- padding ---


def test_left_pad():
    batch = left_pad([[5, 6, 7], [8]], 1, 9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]


def test_left_pad_keeps_the_end_of_a_long_prompt():
    batch = left_pad([[5, 6, 7, 8], [9]], 1, 2)
    assert batch.input_ids.tolist() == [[7, 8], [1, 9]]
    assert batch.mask.tolist() == [[True, True], [False, True]]


def test_right_pad():
    ids, mask = right_pad([[5, 6, 7], [8]], 1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_prompts_as_a_batch(tokenizer):
    batch = encode_prompts(tokenizer, ["the room", "a film or a book"], 40)
    assert batch.input_ids.dtype == torch.int64
    said = [tokenizer.decode(r[m]) for r, m in zip(batch.input_ids, batch.mask, strict=True)]
    assert said == ["the room", "a film or a book"]


def test_pad_ids_within_a_text_are_kept_by_the_mask(tokenizer):
    # The mask says what counts, so a pad id that a policy really sampled is no padding.
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    (a,), (b,) = encode_prompt("q", tokenizer), encode_prompt("z", tokenizer)
    tokens = torch.tensor([[a, pad, b, eos], [a, eos, b, pad]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert decode_responses(tokens, mask, tokenizer) == ["qz", "q"]


# --- when two tokenizers are the same ---


def test_a_tokenizer_has_the_same_tokens_as_its_copy_on_disk(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert same_tokens(tokenizer, type(tokenizer).from_pretrained(tmp_path))


@pytest.mark.parametrize("change", ["vocabulary", "end of sequence"])
def test_another_vocabulary_or_end_of_sequence_is_another_tokenizer(tokenizer, tmp_path, change):
    tokenizer.save_pretrained(tmp_path)
    other = type(tokenizer).from_pretrained(tmp_path)
    if change == "vocabulary":
        other.add_tokens(["<|new|>"])
    else:
        other.eos_token = "!"
    assert not same_tokens(tokenizer, other)
