"""Encoded texts in files: the same tokens, made once, complete or absent."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_core.data.encoding import (
    encode_all_answers,
    encode_all_prompts,
    encode_all_responses,
    encode_answers,
    encode_prompt,
    encode_response,
)
from rlhf_core.data.mapped.folder import made_once
from rlhf_core.data.mapped.rows import Field, PreparedRows
from rlhf_core.data.mapped.texts import Texts, TextWriter
from rlhf_core.data.mapped.training import Place, distinct_prompts, examples_of, pairs_of
from rlhf_core.data.pairs import encode_pairs, in_half, prompt_numbers, select_votes, with_winners
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.errors import DataError
from rlhf_core.training.annotators import VoteFacts

TEXT = st.sampled_from(["", "the room", " is good", "<|end|>", "a <|pad|> b", "é\u2028x", "x" * 40])
CHAT = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}),
    min_size=1,
    max_size=3,
).map(lambda messages: [*messages, {"role": "user", "content": "and?"}])
ROWS = st.lists(st.tuples(TEXT | CHAT, st.lists(TEXT, min_size=1, max_size=3)), max_size=6)
FACTS = np.dtype([("n", "i4")])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ROWS, st.integers(2, 40))
def test_many_texts_are_encoded_as_one_after_the_other(gpt2, rows, length):
    tokenizer = gpt2[1]
    expected = [encode_answers(prompt, said, tokenizer, length) for prompt, said in rows]
    assert encode_all_answers(rows, tokenizer, length) == expected
    prompts = [prompt for prompt, _ in rows]
    found = encode_all_prompts(prompts, tokenizer, length)
    assert found == [encode_prompt(prompt, tokenizer, length) for prompt in prompts]
    answers = [(text, not isinstance(prompt, str)) for prompt, said in rows for text in said]
    found = encode_all_responses(answers, tokenizer)
    assert found == [encode_response(text, tokenizer, chat=chat) for text, chat in answers]


def test_all_cores_are_used_for_the_call_only(gpt2, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    encode_all_prompts(["the room"], gpt2[1])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.fixture
def place(prepared, gpt2, tmp_path):
    return Place(prepared, gpt2[1], tmp_path / "tokens")


@pytest.mark.parametrize("which", ["all", "first_half", "second_half"])
@pytest.mark.parametrize("length", [7, 24])
def test_pairs_are_those_of_the_table(place, which, length):
    table = select_votes(read_table(place.data, "preferences", "train"), which)
    expected = encode_pairs(table, place.tokenizer, length)
    for _ in range(2):  # the second time they are there
        found = pairs_of(place, "train", length, "x.max_length", which=which)
        assert list(found) == expected.pairs
        assert found[1:4] == expected.pairs[1:4]
        assert found.same == expected.same
        assert found.truncated == sum(pair.truncated for pair in expected.pairs)
        assert found.ties.tolist() == [pair.tie for pair in expected.pairs]
        gaps = [len(pair.chosen) - len(pair.rejected) for pair in expected.pairs]
        assert found.gaps.tolist() == gaps
        assert found.prompts.equal(prompt_numbers(expected.table))
        ours, theirs = VoteFacts.of(found.votes(), "p1"), VoteFacts.of(expected.table, "p1")
        assert ours.names == theirs.names
        assert all(map(lambda a, b: a.equal(b), _tensors(ours), _tensors(theirs)))
        shown = with_winners(expected.table)[["prompt", "chosen", "rejected"]]
        assert found.shown(5).to_dict("records") == shown.head(5).to_dict("records")


def _tensors(facts):
    return facts.annotator, facts.side, facts.length_gap, facts.tie


def test_rows_are_those_of_the_table(prepared):
    for kind in ("demonstrations", "preferences", "prompts"):
        rows, table = PreparedRows(prepared, kind, "train"), read_table(prepared, kind, "train")
        records = table.to_dict("records")
        assert list(rows) == records
        assert rows[-1] == records[-1]
        assert rows[3:9:2] == records[3:9:2]
        assert list(Field(rows, "prompt")) == list(table["prompt"])
        assert Field(rows, "prompt")[2] == table["prompt"][2]
        with pytest.raises(IndexError):
            rows[len(rows)]


def test_a_table_without_a_last_end_of_line_has_its_last_row(prepared, tmp_path):
    path = tmp_path / "prompts.eval.jsonl"
    path.write_bytes((prepared / path.name).read_bytes().rstrip(b"\n"))
    assert list(PreparedRows(tmp_path, "prompts", "eval")) == list(
        PreparedRows(prepared, "prompts", "eval")
    )


def test_other_data_length_or_template_are_other_texts(place, tmp_path):
    def number():
        return len([path for path in place.folder.iterdir() if path.is_dir()])

    examples_of(place, "train", 12, with_prompt=False)
    examples_of(place, "train", 12, with_prompt=False)
    assert number() == 1
    examples_of(place, "train", 13, with_prompt=False)
    examples_of(place, "train", 12, with_prompt=True)
    assert number() == 3
    data = tmp_path / "data"
    data.mkdir()
    table = read_table(place.data, "demonstrations", "train")
    write_table(table.iloc[1:], data, "demonstrations", "train")
    other = Place(data, place.tokenizer, place.folder)
    assert len(examples_of(other, "train", 12, with_prompt=False)) == len(table) - 1
    template, place.tokenizer.chat_template = place.tokenizer.chat_template, "{{ 'x' }}"
    try:
        examples_of(place, "train", 12, with_prompt=False)
    finally:
        place.tokenizer.chat_template = template
    assert number() == 5


def test_without_a_folder_nothing_is_left(prepared, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = Place(prepared, gpt2[1])
    found = examples_of(place, "train", 12, with_prompt=False)
    assert not list(tmp_path.iterdir())
    assert found[0].ids
    assert len(list(found)) == len(found)


def test_distinct_prompts_come_in_the_order_of_their_first(gpt2):
    asked = ["b c", "a", "b c", "d", "a"]
    found = distinct_prompts(iter(asked), gpt2[1], 20, None)
    assert list(found) == [encode_prompt(text, gpt2[1]) for text in ("b c", "a", "d")]


# --- files ---


def _write(folder, texts):
    with TextWriter(folder, FACTS) as writer:
        writer.write(texts, [(len(text),) for text in texts])


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_texts_come_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    with TextWriter(folder, FACTS) as writer:
        writer.write(texts[:2], [(len(text),) for text in texts[:2]])
        writer.write(texts[2:], [(len(text),) for text in texts[2:]])
    found = Texts(folder, FACTS)
    assert list(found) == texts
    assert found.facts["n"].tolist() == found.lengths().tolist() == [len(text) for text in texts]
    with pytest.raises(IndexError):
        found[len(texts)]


def _slowly(folder, started):
    def make(path):
        (path / "half").write_text("x")
        started.touch()
        time.sleep(0.6)
        (path / "whole").write_text(str(os.getpid()))

    made_once(folder, make)


def _process(*arguments):
    found = multiprocessing.get_context("fork").Process(target=_slowly, args=arguments)
    found.start()
    return found


def _wait_for(path: Path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_writes_and_the_others_wait(tmp_path):
    folder = tmp_path / "tokens" / "texts"
    others = [_process(folder, tmp_path / "started") for _ in range(4)]
    for each in others:
        each.join(60)
    assert [each.exitcode for each in others] == [0] * 4
    assert (folder / "whole").read_text() in [str(each.pid) for each in others]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["texts"]


def test_whoever_is_killed_while_writing_leaves_no_half(tmp_path):
    folder = tmp_path / "texts"
    writer = _process(folder, tmp_path / "started")
    _wait_for(tmp_path / "started")
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    assert not folder.exists()
    assert len(list(tmp_path.glob("texts.part-*"))) == 1
    made_once(folder, lambda path: (path / "whole").write_text("y"))
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(tmp_path.glob("texts.part-*"))


def test_a_full_disk_leaves_nothing(place, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TextWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        examples_of(place, "train", 12, with_prompt=False)
    assert not [path for path in place.folder.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert len(examples_of(place, "train", 12, with_prompt=False))


def test_a_half_without_votes_is_said(gpt2, tmp_path):
    row = {"id": "1", "prompt": "p", "response_a": "a", "response_b": "b", "vote": "a", "time": ""}
    row |= {"shown_first": "", "annotator": "", "gold": False, "margin": 0, "source": ""}
    (tmp_path / "preferences.train.jsonl").write_text(json.dumps(row) + "\n")
    place = Place(tmp_path, gpt2[1], tmp_path / "tokens")
    half = "second_half" if in_half("p", "first_half") else "first_half"
    with pytest.raises(DataError, match=f"none of the 1 votes is on a prompt of the {half[:5]}"):
        pairs_of(place, "train", 9, "x", which=half)
    row |= {"response_b": "a"}
    (tmp_path / "preferences.train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"the same tokens once they are cut to 9 tokens.*raise x"):
        pairs_of(place, "train", 9, "x")
