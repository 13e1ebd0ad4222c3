"""From a user's files to prepared tables and a report; bad input ends in one sentence."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from pydantic import ValidationError

from rlhf_core.backbone.base_model import FreshModelConfig, ModelConfig
from rlhf_core.data.prepared import COLUMNS, SPLITS, TABLE_KINDS, digest, prompt_key, read_table
from rlhf_core.data.validation import Validation
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.simulation import SimulationConfig
from rlhf_core.stages.prepare import DataConfig, LengthLimits, TableConfig, inspect, prepare_data
from rlhf_core.work import Work

LIMITS = LengthLimits(prompt=64, sft=128, reward=128, response=48)
MODEL = ModelConfig(fresh=FreshModelConfig(vocab_size=300))
SHARED = Path(__file__).parents[4] / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count, first=0):
    """Distinct pairs, each about a prompt of its own."""
    numbers = range(first, first + count)
    return [{"prompt": f"Q{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in numbers]


def files(**tables):
    options = {name: tables.pop(name) for name in list(tables) if name not in TABLE_KINDS}
    sources = {
        name: table if isinstance(table, TableConfig) else TableConfig(path=table)
        for name, table in tables.items()
    }
    return DataConfig(source="files", **sources, **options)


def prepare(config, output, seed=0):
    logger = MemoryLogger()
    sections = {"model": MODEL, "limits": LIMITS}
    work = Work(outputs={"data": output}, sections=sections, seed=seed, logger=logger)
    return prepare_data(config, work), logger


def error(config, kind=DataError):
    with pytest.raises(kind) as caught:
        inspect(config, MODEL, LIMITS, seed=0)
    return str(caught.value)


def both(output, kind):
    return pd.concat([read_table(output, kind, split) for split in SPLITS])


STRICT = (
    "{{ 'It is ' + strftime_now('%Y') }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['content'] }}]{% endfor %}"
)


@pytest.fixture
def strict(tmp_path):
    """A model folder whose template wants turns to alternate, and asks for the date."""
    from rlhf_core.backbone.base_model import load_base
    from rlhf_core.backbone.directory import save_model

    model, tokenizer = load_base(MODEL, ["Q1? yes no"], seed=0)
    tokenizer.chat_template = STRICT
    save_model(model, tokenizer, tmp_path / "strict", kind="policy")
    return ModelConfig(source=str(tmp_path / "strict"))


@pytest.mark.parametrize("style", ["prompt", "dialogue"])
def test_a_row_that_the_template_rejects_is_a_bad_row(tmp_path, strict, style):
    def row(n, *more):
        asked = [*more, {"role": "user", "content": f"Q{n}?"}]
        if style == "prompt":
            return {"prompt": asked, "chosen": "yes", "rejected": f"no {n}"}
        yes, no = ({"role": "assistant", "content": text} for text in ("yes", f"no {n}"))
        return {"chosen": [*asked, yes], "rejected": [*asked, no]}

    rows = [row(n) for n in range(20)]
    rows[6] = row(6, {"role": "user", "content": "Are you there?"})
    path = write(tmp_path / "p.jsonl", rows)
    config = files(preferences=path, eval_fraction=0.3)
    with pytest.raises(DataError) as caught:
        inspect(config, strict, LIMITS, seed=0)
    place = f"{path}, line 7" + (", field 'prompt'" if style == "prompt" else "")
    assert str(caught.value).startswith(f"{place}: the model's chat template rejects the messages")
    assert "roles must alternate; fix the row, or set data.on_bad_row to 'drop'" in str(
        caught.value
    )
    found = inspect(
        files(preferences=path, eval_fraction=0.3, on_bad_row="drop"), strict, LIMITS, seed=0
    )
    table = found.tables["preferences"]
    assert (table.train + table.eval, table.dropped) == (19, {"rejected by the template": 1})
    assert found.bad_rows[0].startswith(f"{place}: the model's chat")


def test_the_day_of_the_data_is_that_of_the_stages(tmp_path, strict, monkeypatch):
    from datetime import date

    from rlhf_core.data.prepared import date_of

    rows = [r | {"prompt": [{"role": "user", "content": r["prompt"]}]} for r in pairs(20)]
    config = files(preferences=write(tmp_path / "p.jsonl", rows), eval_fraction=0.3)
    sections = {"model": strict, "limits": LIMITS}
    work = Work(outputs={"data": tmp_path / "out"}, sections=sections, logger=MemoryLogger())
    report = prepare_data(config, work)
    assert report.validation.template_date == date.today().isoformat()
    path = tmp_path / "out" / "validation.json"
    yesterday = report.validation.model_copy(update={"template_date": "2001-02-03"})
    path.write_text(yesterday.model_dump_json())
    assert date_of(tmp_path / "out") == date(2001, 2, 3)
    path.unlink()
    assert date_of(tmp_path / "out") == date.today()


def test_what_is_cut_off_left_out_and_written_out_is_counted(tmp_path):
    same = {"chosen": "yes " * 20 + "and", "rejected": "yes " * 20 + "but"}
    rows = [row | same if n % 3 == 0 else row for n, row in enumerate(pairs(30))]
    rows[1]["prompt"] = "Q1<|end|>?"
    config = files(preferences=write(tmp_path / "p.jsonl", rows), eval_fraction=0.3)
    limits = LengthLimits(prompt=64, sft=20, reward=20, response=48)
    found = inspect(config, MODEL, limits, seed=0)
    assert found.same_after_cut == 10
    assert found.written_controls == 1
    assert found.template_date == ""
    assert set(found.lost) == {"demonstrations over 20 tokens", "preferences over 20 tokens"}
    # Both answers of ten pairs lose about as many tokens as their ten demonstrations, twice.
    demonstrations, preferences = found.lost.values()
    assert 0 < demonstrations <= preferences / 2
    assert inspect(config, MODEL, LIMITS, seed=0).lost.keys() != found.lost.keys()
    all_same = [row | same for row in pairs(30)]
    config = files(preferences=write(tmp_path / "q.jsonl", all_same), eval_fraction=0.3)
    with pytest.raises(DataError, match=r"preferences for training .* raise reward_model.max_len"):
        inspect(config, MODEL, limits, seed=0)


# --- what is written


def test_simulated_data_are_prepared(tmp_path):
    config = DataConfig(
        simulation=SimulationConfig(prompts=60, demonstrations=300, preference_pairs=200)
    )
    report, logger = prepare(config, tmp_path)
    assert logger.notes[0][:2] == (0, 3)
    assert logger.notes[-1][:2] == (3, 3)
    seen = {}
    for kind in TABLE_KINDS:
        for split in SPLITS:
            table = read_table(tmp_path, kind, split)
            assert list(table.columns) == list(COLUMNS[kind])
            assert len(table) == getattr(report, f"{kind}_{split}") > 0
            for prompt in table["prompt"]:
                assert seen.setdefault(prompt_key(prompt), split) == split
    assert report.prompts_train + report.prompts_eval == 60
    votes = both(tmp_path, "preferences")
    assert report.ties == (votes["vote"] == "tie").sum() > 0
    assert (votes["vote"] == "b").sum() > 50
    assert set(votes["shown_first"]) == {"a"}
    assert report.validation.known_sides == len(votes) == 200
    assert (report.validation.timed, report.validation.gold) == (0, 0)


def test_the_report_is_written_beside_the_tables_and_inspect_agrees(tmp_path):
    config = files(preferences=write(tmp_path / "p.jsonl", pairs(40)), eval_fraction=0.3)
    report, _ = prepare(config, tmp_path / "out")
    text = (tmp_path / "out" / "validation.json").read_text(encoding="utf-8")
    assert Validation.model_validate_json(text) == report.validation
    assert inspect(config, MODEL, LIMITS, seed=0) == report.validation
    assert set(report.summary()) == {
        *(f"{kind}_{split}" for kind in TABLE_KINDS for split in SPLITS),
        *("dropped", "ties", "contradictory_pairs", "shared_prompts", "truncated"),
        *("lost_tokens", "same_after_cut", "known_answers", "machine_votes"),
    }
    assert list(report.tables) == [*("data_rows", "data_lengths", "data_truncated", "data_origins")]
    [figure] = report.figures.values()
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(TABLE_KINDS)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(tmp_path):
    config = files(preferences=write(tmp_path / "p.jsonl", pairs(40)), eval_fraction=0.3)
    digests = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        prepare(config, tmp_path / name, seed)
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_every_example_is_kept_or_counted_as_dropped(tmp_path):
    rows = [
        *pairs(30),
        pairs(1)[0],  # duplicate
        {"prompt": "same", "chosen": "x", "rejected": "x "},
        {"prompt": "", "chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": 3, "rejected": "y"},
        {"prompt": "Q1?", "chosen": "no 1", "rejected": "yes 1"},  # contradicts, and stays
    ]
    path = write(tmp_path / "p.jsonl", rows)
    Path(path).open("a", encoding="utf-8").close()
    report, _ = prepare(files(preferences=path, eval_fraction=0.3, on_bad_row="drop"), tmp_path)
    table = report.validation.tables["preferences"]
    assert table.model_dump() == {
        **{"source": path, "rows": 35, "examples": 35},
        **{"train": report.preferences_train, "eval": report.preferences_eval},
        "eval_prompts": len(set(read_table(tmp_path, "preferences", "eval")["prompt"])),
        "dropped": {"duplicate": 1, "empty text": 1, "identical answers": 1, "wrong type": 1},
    }
    assert table.train + table.eval == 31
    assert report.dropped == 4
    assert report.contradictory_pairs == 1
    assert list(report.validation.bad_rows) == [
        f"{path}, line 33, field 'prompt': is empty",
        f"{path}, line 34, field 'chosen': is a number, not text",
    ]


def test_the_limits_decide_what_counts_as_truncated(tmp_path):
    config = files(preferences=write(tmp_path / "p.jsonl", pairs(40)))
    tight = LengthLimits(prompt=1, sft=1, reward=1, response=1)
    assert inspect(config, MODEL, tight, seed=0).truncated == {
        "prompts over 1 tokens": 40,
        "demonstrations over 1 tokens": 40,
        "responses over 1 tokens": 40,
        "preferences over 1 tokens": 40,
    }
    report, _ = prepare(config, tmp_path)
    assert report.truncated == sum(report.validation.truncated.values()) == 0


def test_chat_messages_are_kept_and_measured_through_the_template(tmp_path):
    question = lambda n: [{"role": "user", "content": f"Q{n}?"}]  # noqa: E731
    rows = [row | {"prompt": question(n)} for n, row in enumerate(pairs(30))]
    report, _ = prepare(
        files(preferences=write(tmp_path / "p.jsonl", rows), eval_fraction=0.3), tmp_path
    )
    prompts = both(tmp_path, "prompts")["prompt"].tolist()
    assert sorted(prompt[0]["content"] for prompt in prompts) == sorted(f"Q{n}?" for n in range(30))
    lengths = report.validation.lengths_table().set_index(["table", "text"])
    # "\n\nHuman: Q1?\n\nAssistant:" against "Q1?"
    assert lengths.loc[("prompts", "prompt"), "p50"] > 5


def test_a_saved_data_set_with_its_own_splits(tmp_path):
    datasets.disable_progress_bars()
    parts = {"train": pairs(5), "test": pairs(3, first=5)}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    table = TableConfig(path=str(tmp_path / "saved"), eval_split="test")
    report, _ = prepare(files(preferences=table), tmp_path / "out")
    assert (report.preferences_train, report.preferences_eval) == (5, 3)
    assert (report.demonstrations_train, report.prompts_eval) == (5, 3)
    assert report.validation.tables["preferences"].source == (
        f"{tmp_path / 'saved'} (train) and {tmp_path / 'saved'} (test)"
    )


def test_all_three_tables_from_files_of_different_formats(tmp_path):
    demonstrations = pd.DataFrame({"q": [f"Q{n}?" for n in range(50)], "a": "yes"})
    demonstrations.to_csv(tmp_path / "d.csv", index=False)
    pd.DataFrame({"prompt": [f"Q{n}?" for n in range(20, 80)]}).to_parquet(tmp_path / "q.parquet")
    config = files(
        demonstrations=TableConfig(
            path=str(tmp_path / "d.csv"), fields={"prompt": "q", "response": "a"}, limit=30
        ),
        preferences=write(tmp_path / "p.jsonl", pairs(40)),
        prompts=str(tmp_path / "q.parquet"),
        eval_fraction=0.3,
    )
    report, _ = prepare(config, tmp_path / "out")
    assert report.demonstrations_train + report.demonstrations_eval == 30
    assert report.preferences_train + report.preferences_eval == 40
    assert report.prompts_train + report.prompts_eval == 60
    assert report.shared_prompts == 0


def test_the_report_counts_what_is_known_of_the_votes(tmp_path):
    answers = {"response_a": "yes", "response_b": "no"}
    rows = [{"prompt": f"Q{n}?", **answers, "vote": "a", "shown_first": ""} for n in range(20)]
    rows[3] |= {"shown_first": "b", "gold": True}
    rows[4] |= {"shown_first": "a", "time": "2026-03-01", "gold": False}
    path = write(tmp_path / "p.jsonl", rows)
    report, _ = prepare(files(preferences=path, eval_fraction=0.3), tmp_path / "out")
    found = report.validation
    assert (found.known_sides, found.timed, found.gold, list(found.unread)) == (2, 1, 1, [])
    rows[5]["gold"] = "b"
    write(tmp_path / "p.jsonl", rows)
    found = inspect(files(preferences=path, eval_fraction=0.3), MODEL, LIMITS, seed=0)
    assert (found.known_sides, found.timed, found.gold) == (2, 1, 0)
    [note] = found.unread
    assert note.startswith(f"{path}, line 6, field 'gold': 'b' is neither true nor false")


def test_tables_do_not_depend_on_the_folder_of_their_file(tmp_path):
    digests = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "p.jsonl", pairs(20))
        prepare(files(preferences=path, eval_fraction=0.3), tmp_path / name / "out")
        digests.append(digest(tmp_path / name / "out"))
        assert set(both(tmp_path / name / "out", "preferences")["source"]) == {"p.jsonl"}
    assert digests[0] == digests[1]


# --- what is refused


def test_prompts_in_training_and_evaluation_are_an_error_unless_waved_through(tmp_path):
    train = write(tmp_path / "train.jsonl", pairs(10))
    held_out = write(tmp_path / "eval.jsonl", pairs(5, first=8))  # Q8? and Q9? in both
    table = TableConfig(path=train, eval_path=held_out)
    assert error(files(preferences=table)) == (
        "2 prompts are in both training and evaluation data, for example 'Q8?', 'Q9?'; remove "
        "them from one of the two, or set data.allow_shared_prompts to true"
    )
    report, _ = prepare(files(preferences=table, allow_shared_prompts=True), tmp_path / "out")
    assert report.shared_prompts == 2
    assert (report.preferences_train, report.preferences_eval) == (10, 5)


def test_prompts_are_shared_across_tables_too(tmp_path):
    long = "Why " + "so " * 30
    train = write(tmp_path / "train.jsonl", [*pairs(3), {**pairs(1)[0], "prompt": long}])
    config = files(
        preferences=TableConfig(path=train, eval_path=write(tmp_path / "eval.jsonl", pairs(2, 5))),
        prompts=TableConfig(
            path=write(tmp_path / "q.jsonl", [{"prompt": "new"}]),
            eval_path=write(
                tmp_path / "e.jsonl", [{"prompt": [{"role": "user", "content": f" {long}"}]}]
            ),
        ),
    )
    assert error(config).startswith(
        f"1 prompt is in both training and evaluation data, for example '{long[:59]}…'; remove"
    )


def test_a_bad_row_stops_everything_before_a_file_is_written(tmp_path):
    rows = pairs(5)
    rows[2]["chosen"] = " "
    path = write(tmp_path / "p.jsonl", rows)
    assert error(files(preferences=path)) == (
        f"{path}, line 3, field 'chosen': is empty; fix the row, or set data.on_bad_row to 'drop' "
        "to leave it out"
    )
    rows[4]["prompt"] = None
    write(tmp_path / "p.jsonl", rows)
    assert error(files(preferences=path)) == (
        f"{path}, line 3, field 'chosen': is empty; fix the row, or set data.on_bad_row to 'drop' "
        "to leave all 2 bad rows of this source out"
    )
    with pytest.raises(DataError):
        prepare(files(preferences=path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_side_without_rows_says_what_to_change(tmp_path):
    path = write(tmp_path / "p.jsonl", pairs(3))
    rest = (
        "change data.eval_fraction ({}) or the seed, or add separate evaluation data "
        "(data.demonstrations.eval_path or eval_split)"
    )
    assert error(files(preferences=path, eval_fraction=0.001)) == (
        "no demonstrations are left for evaluation: of 3 rows (answers chosen in the preferences) "
        "3 with 3 distinct prompts are all on the other side; " + rest.format(0.001)
    )
    assert error(files(preferences=path, eval_fraction=0.999)).startswith(
        "no demonstrations are left for training"
    )


def test_a_table_of_which_nothing_is_left_says_why(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "", "chosen": "", "rejected": ""},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    demonstrations = write(
        tmp_path / "d.jsonl", [{"prompt": f"{n}", "response": "r"} for n in range(9)]
    )
    config = files(
        preferences=path, demonstrations=demonstrations, on_bad_row="drop", eval_fraction=0.5
    )
    assert error(config) == (
        f"no preferences are left for training: of 2 rows ({path}) all were dropped "
        "(identical answers 1, empty text 1); check the fields and the data"
    )


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    assert error(DataConfig(source="files"), ConfigError) == (
        "data.source is 'files' but there are no preferences; set data.preferences.path, "
        "or set data.source to 'simulated'"
    )
    for settings, message in (
        ({"eval_path": "x.csv"}, "evaluation data are set but `path` is empty"),
        ({"path": "d", "eval_split": "train"}, "the evaluation data are the training data"),
        ({"path": "x.csv", "eval_path": "x.csv"}, "the evaluation data are the training data"),
    ):
        with pytest.raises(ValidationError, match=message):
            TableConfig(**settings)
    with pytest.raises(
        ValidationError,
        match=r"prompts\.fields: unknown field 'promt'; the fields are: id, prompt",
    ):
        files(prompts=TableConfig(fields={"promt": "q"}))


# --- what the settings say about the fields


def test_the_input_of_alpaca_reaches_the_prompt_and_no_row_is_lost(tmp_path):
    rows = [{"instruction": f"Q{n % 8}?", "input": f"I{n}", "output": "r"} for n in range(60)]
    demonstrations = write(tmp_path / "d.jsonl", rows)
    preferences = write(tmp_path / "p.jsonl", pairs(40, first=100))
    names = {"prompt": "instruction", "response": "output"}

    def prepared(fields, template, folder):
        table = TableConfig(path=demonstrations, fields=fields)
        config = files(
            demonstrations=table,
            preferences=preferences,
            prompt_template=template,
            eval_fraction=0.4,
        )
        report, _ = prepare(config, tmp_path / folder)
        return report.validation, both(tmp_path / folder, "demonstrations")["prompt"].tolist()

    found, _ = prepared(names, "{prompt}", "without")
    assert found.tables["demonstrations"].dropped == {"duplicate": 52}
    assert "column input (60 of 60 rows filled) holds text that is not read" in found.unread[0]
    for fields, template in (
        (names, "{prompt}\n{input}"),
        (names, "{instruction}\n{input}"),
        (names | {"prompt": "{instruction}\n{input}"}, "{prompt}"),
    ):
        found, prompts = prepared(fields, template, f"{len(template)}")
        assert found.tables["demonstrations"].dropped == {}
        assert sorted(prompts) == sorted(f"Q{n % 8}?\nI{n}" for n in range(60))
        # The pairs have no input, and keep their prompts.
        assert found.tables["preferences"].dropped == {}
        assert [note for note in found.unread if "d.jsonl" in note] == []


def test_a_name_in_the_template_that_no_source_has_is_an_error(tmp_path):
    preferences = write(tmp_path / "p.jsonl", pairs(40))
    config = files(preferences=preferences, prompt_template="{prompt} {inptu}")
    assert error(config, ConfigError) == (
        "data.prompt_template names {inptu}, but no source has such a field; correct the name, or "
        "write {{inptu}} for the text {inptu} itself"
    )
    config = files(preferences=preferences, prompt_template="{prompt} {{inptu}}")
    prepare(config, tmp_path / "out")
    assert set(both(tmp_path / "out", "prompts")["prompt"].str[-8:]) == {" {inptu}"}


def test_preferences_of_which_nothing_is_left_are_named_before_what_is_derived(tmp_path):
    rows = [{"prompt": f"Q{n}?", "response": "r", "score": n} for n in range(9)]
    path = write(tmp_path / "p.jsonl", rows)
    assert error(files(preferences=path)) == (
        f"no preferences are left for training: of 9 rows ({path}) all were dropped (no other "
        "answer to the prompt that is rated otherwise 9); check the fields and the data"
    )


def test_the_settings_of_a_table_reach_its_rows(tmp_path):
    rows = [
        {"q": f"Q{n}?", "left": "yes", "right": "no", "winner": n % 2, "margin": 2}
        | {"context": "words"}
        for n in range(40)
    ]
    fields = {"prompt": "q", "response_a": "left", "response_b": "right", "vote": "winner"}
    table = TableConfig(
        path=write(tmp_path / "p.jsonl", rows),
        fields=fields,
        votes={"a": 1, "b": 0},
        ignore=["context", "margin"],
    )
    report, _ = prepare(files(preferences=table, prompt_style="chat"), tmp_path / "out")
    frame = both(tmp_path / "out", "preferences")
    assert dict(frame["vote"].value_counts()) == {"a": 20, "b": 20}
    assert set(frame["margin"]) == {0.0}
    assert [m["role"] for m in frame["prompt"].iloc[0]] == ["user"]
    assert not report.validation.unread


def test_bad_rows_of_every_kind_are_left_out_by_the_setting(tmp_path):
    call = {"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]}
    bad = [
        {"chosen": [call]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
        {"prompt": '[{"role": "user", "content": '},
        {"annotator": "\ud800"},
        {"margin": -1},
        {"system": 3},
    ]
    good = pairs(40)
    rows = [*good, *(good[0] | row for row in bad)]
    table = TableConfig(path=write(tmp_path / "p.jsonl", rows), fields={"system": "system"})
    stopped = error(files(preferences=table))
    assert stopped.endswith(
        "fix the row, or set data.on_bad_row to 'drop' to leave all 6 bad rows of this source out"
    )
    found = inspect(files(preferences=table, on_bad_row="drop"), MODEL, LIMITS, seed=0)
    assert [note.split(":")[0].removeprefix(table.path) for note in found.bad_rows] == [
        f", line {41 + n}, field '{field}'"
        for n, field in enumerate(["chosen", "prompt", "prompt", "annotator", "margin", "system"])
    ]
    assert found.tables["preferences"].train + found.tables["preferences"].eval == 40


# --- real data


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the repository (../shared/data)")
    return str(path)


def loads(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_the_argument_pairs_keep_every_vote(tmp_path):
    path = shared("argument-pairs-5annotators-dev.jsonl")
    report, _ = prepare(files(preferences=path, eval_fraction=0.2), tmp_path, seed=1)
    table = report.validation.tables["preferences"]
    assert (table.rows, table.examples) == (6447, 32169)  # as its README says
    # Counted apart: 11 pairs of identical texts, and votes that one worker cast twice on a pair.
    votes = [
        (row["prompt"], row["response_a"], row["response_b"], *vote[:2])
        for row in loads(path)
        for vote in row["votes"]
    ]
    sound = [vote for vote in votes if vote[1].strip() != vote[2].strip()]
    kept = {
        (prompt, frozenset((a, b)), worker, {"a": a, "b": b, "tie": None}[vote])
        for prompt, a, b, worker, vote in sound
    }
    assert table.dropped == {
        "identical answers": len(votes) - len(sound),
        "duplicate": len(sound) - len(kept),
    }
    assert table.train + table.eval == len(kept)
    frame = both(tmp_path, "preferences")
    assert set(frame["annotator"].str[0]) == {"w"}
    assert {row["response_a"] for row in loads(path)} >= set(frame["response_a"])
    # Its column `gold` is the better answer as its authors see it: no control question of ours.
    assert not frame["gold"].any()
    other_gold, unread = report.validation.unread
    assert "field 'gold': 'b' is neither true nor false" in other_gold
    assert "the column debate (6447 of 6447 rows filled) holds text that is not read" in unread
    assert report.ties == sum(winner is None for *_, winner in kept)
    assert report.prompts_train + report.prompts_eval == 12  # six debates, two sides


def test_pandalm_with_dolly_demonstrations(tmp_path):
    path = shared("pandalm-pairs-3annotators.jsonl")
    config = files(
        preferences=path,
        demonstrations=shared("dolly-demonstrations-cleaned.jsonl"),
        on_bad_row="drop",
    )
    report, _ = prepare(config, tmp_path)
    tables = report.validation.tables
    assert tables["preferences"].rows == 999
    # A bad row counts once, with all its votes: some of these models answered nothing.
    empty = sum(
        not (row["response_a"].strip() and row["response_b"].strip()) for row in loads(path)
    )
    assert tables["preferences"].dropped["empty text"] == empty > 0
    assert tables["preferences"].examples == 2997 - 3 * empty + empty
    assert tables["demonstrations"].rows == 3859
    assert report.shared_prompts == 0
    assert report.contradictory_pairs > 0


def test_the_majority_label_of_pandalm_by_mapping(tmp_path):
    table = TableConfig(
        path=shared("pandalm-pairs-3annotators.jsonl"), fields={"vote": "majority"}, limit=200
    )
    report, _ = prepare(files(preferences=table, on_bad_row="drop", eval_fraction=0.3), tmp_path)
    summary = report.validation.tables["preferences"]
    assert summary.rows == summary.examples == 200
    winners = {row["id"]: row for row in loads(table.path)[:200]}
    for row in both(tmp_path, "preferences").to_dict("records"):
        source = winners[row["id"]]
        columns = ("response_a", "response_b")
        assert [row[name] for name in columns] == [source[name] for name in columns]
        assert (row["vote"], row["shown_first"]) == (source["majority"], "")
