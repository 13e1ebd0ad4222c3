"""A chat template is somebody's program: it ends, and in time, or it is refused."""

import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_core.data import templates
from rlhf_core.data.encoding import render_prompt
from rlhf_core.errors import DataError

MESSAGES = [{"role": "user", "content": "Why?"}]


def tokenizer(template):
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])), eos_token="</s>"
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
        ("{{ 10 ** (10 ** 9) }}", "it takes more than"),
        ("{{ 'a' * 100000000000 }}", "it takes more than 512 MiB of memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template, reason):
    begin = time.process_time()
    with pytest.raises(DataError, match="the model's chat template rejects") as caught:
        render_prompt(MESSAGES, tokenizer(template))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 2  # it is the other process that computes


def test_a_template_that_fails_later_is_stopped_here(monkeypatch):
    """The messages that were tried were harmless; these are not."""
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    made = tokenizer("{% if messages|length > 1 %}" + loops + "{% endif %}ok")
    assert render_prompt(MESSAGES, made) == "ok"
    with pytest.raises(DataError, match="it takes more than"):
        render_prompt(MESSAGES * 2, made)
    assert render_prompt(MESSAGES, made) == "ok"


def test_others_render_as_transformers_does():
    made = tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{{ strftime_now('') }}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    theirs = made.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_prompt(MESSAGES, made) == theirs == "user: Why?</s>\nassistant:"
