"""Data prepared in shards: the same tables, whatever their number."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_core.data.prepared import digest
from rlhf_core.data.shards import spill
from rlhf_core.data.shards.spill import shard_of, shards_for
from rlhf_core.errors import DataError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import ModelConfig
from rlhf_core.stages import prepare
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.work import Work

LIMITS = LengthLimits(prompt=8, sft=12, reward=12, response=6)
WORDS = st.sampled_from(["a room", " a  room", "good", "bad", "it is\ngood", "<|end|> bad", "é"])
CHAT = st.lists(WORDS, min_size=1, max_size=2).map(
    lambda said: [{"role": "user", "content": text} for text in said]
)
VOTE = st.fixed_dictionaries(
    {"prompt": WORDS | CHAT, "response_a": WORDS, "response_b": WORDS},
    optional={
        "vote": st.sampled_from(["a", "b", "tie"]),
        "annotator": st.sampled_from(["", "ann", "bob", "judge:m"]),
        "source": st.sampled_from(["web", "book"]),
    },
).map(lambda row: {"vote": "a", "annotator": "", "source": "web", **row})
SHOWN = st.fixed_dictionaries({"prompt": WORDS | CHAT, "response": WORDS})


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(monkeypatch, tmp_path, shards, config):
    """The files that are written with a number of shards, and the report; or what is wrong."""
    monkeypatch.setattr(prepare, "shards_for", lambda size: shards)
    output = tmp_path / f"data-{shards}"
    sections = {"model": ModelConfig(), "limits": LIMITS}
    work = Work(outputs={"data": output}, sections=sections, logger=MemoryLogger())
    try:
        report = prepare_data(config, work)
    except DataError as error:
        assert not output.exists()
        return str(error)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    validation = report.validation.model_dump()
    assert validation.pop("shards") == shards
    assert json.loads(written.pop("validation.json")) == json.loads(
        report.validation.model_dump_json()
    )
    tables = {name: table.to_dict("records") for name, table in report.tables.items()}
    return written, validation, tables


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(VOTE, min_size=6, max_size=24),
    st.none() | st.lists(VOTE, min_size=1, max_size=6),
    st.none() | st.lists(SHOWN, min_size=1, max_size=8),
    st.none() | st.lists(st.fixed_dictionaries({"prompt": WORDS | CHAT}), min_size=1, max_size=8),
    st.integers(2, 7),
)
def test_nothing_depends_on_the_number_of_shards(
    monkeypatch, tmp_path_factory, votes, held_out, shown, asked, shards
):
    folder = tmp_path_factory.mktemp("rows")
    preferences = {"path": lines(folder / "votes.jsonl", votes)}
    if held_out:
        preferences["eval_path"] = lines(folder / "eval.jsonl", held_out)
    tables = {"preferences": preferences}
    if shown:
        tables["demonstrations"] = {"path": lines(folder / "shown.jsonl", shown)}
    if asked:
        tables["prompts"] = {"path": lines(folder / "asked.jsonl", asked)}
    config = DataConfig(
        source="files", eval_fraction=0.5, allow_shared_prompts=len(votes) % 2 == 0, **tables
    )
    one, several = (prepared(monkeypatch, folder, n, config) for n in (1, shards))
    assert one == several


def test_bad_rows_are_named_as_in_one_piece(monkeypatch, tmp_path):
    rows = [{"prompt": f"Q{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(40)]
    rows[7]["chosen"], rows[30]["rejected"] = 5, ""
    path = lines(tmp_path / "votes.jsonl", rows)
    config = DataConfig(source="files", eval_fraction=0.5, preferences={"path": path})
    one, several = (prepared(monkeypatch, tmp_path, n, config) for n in (1, 5))
    assert f"{path}, line 8, field 'chosen'" in one
    assert one == several
    dropping = config.model_copy(update={"on_bad_row": "drop"})
    one, several = (prepared(monkeypatch, tmp_path, n, dropping) for n in (1, 5))
    assert one == several
    assert len(one[1]["bad_rows"]) >= 1


def test_what_a_killed_process_left_is_removed(monkeypatch, tmp_path):
    left = tmp_path / ".data-3.preparing-abcdefgh"
    left.mkdir()
    (left / "rows.0.pickle").write_bytes(b"half")
    rows = [{"prompt": f"Q{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(40)]
    preferences = {"path": lines(tmp_path / "votes.jsonl", rows)}
    config = DataConfig(source="files", eval_fraction=0.5, preferences=preferences)
    assert prepared(monkeypatch, tmp_path, 3, config)[1]["tables"]["preferences"]["rows"] == 40


def test_prompts_that_ask_the_same_are_in_one_shard():
    chat = [{"role": "user", "content": "Why  so?"}]
    assert shard_of("Why so?", 97) == shard_of(chat, 97) == shard_of(" Why\nso? ", 97)
    counts = [0] * 8
    for n in range(4000):
        counts[shard_of(f"Q{n}?", 8)] += 1
    assert min(counts) > 400


@pytest.mark.parametrize(
    ("size", "shards"), [(0, 1), (1, 1), (2**26, 1), (2**26 + 1, 2), (20 * 10**9, 299)]
)
def test_shards_grow_with_the_data(size, shards):
    assert shards_for(size) == shards


def test_size_is_that_of_the_text(tmp_path):
    rows = [{"prompt": f"Q{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(300)]
    plain = lines(tmp_path / "votes.jsonl", rows)
    packed = tmp_path / "votes.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "votes.jsonl").read_bytes()))
    length = (tmp_path / "votes.jsonl").stat().st_size
    assert prepare.size_of(plain) == length
    assert prepare.size_of(str(packed)) == 5 * packed.stat().st_size
    assert prepare.size_of("owner/name") == 0
    assert prepare.size_of(plain, 1) == min(length, 16 * 1024)
    assert prepare.size_of(plain, 10_000) == length


def test_digest_of_one_shard_is_that_of_earlier_versions(tmp_path):
    """Written by the version before shards, from these rows."""
    rows = [
        {
            "prompt": f"Question {n % 17}?",
            "response_a": f"Yes, {n}.",
            "response_b": f"No, {n % 3}.",
            "vote": ("a", "b", "tie")[n % 3],
            "annotator": f"p{n % 4}",
        }
        for n in range(60)
    ]
    path = lines(tmp_path / "votes.jsonl", rows)
    config = DataConfig(source="files", eval_fraction=0.3, preferences={"path": path})
    sections = {"model": ModelConfig(), "limits": LIMITS}
    output = tmp_path / "data"
    prepare_data(config, Work(outputs={"data": output}, sections=sections, logger=MemoryLogger()))
    assert digest(output) == "a93eabb6f7d8fe62"
    assert spill.SHARD > 1_000_000
