"""`rlhf lineage`: tables of eighty columns, JSON, and an exit status that tells gaps."""

import json
import os

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from tasks.record.record import Record
from tasks.record.run import open_run
from tests.tasks.lineage.lineage_world import Toy, World, votes


@pytest.fixture
def home(settings, tmp_path):
    """A home with one pipeline's versions."""
    with open_run("shop", Toy(), seed=0, settings=settings) as run:
        world = World(Record.open(settings), run, tmp_path / "scratch")
        many = (votes(f"annotator-{n:02d}", 30 - n, licences=("MIT",)) for n in range(30))
        world.data_set = world.data(*many)
        world.made = world.pipeline(world.data_set)
        yield world


@pytest.fixture
def rlhf(home, settings):
    before = dict(os.environ)
    os.environ.update({"RLHF_HOME": str(settings.home), "COLUMNS": "80"})

    def call(*arguments):
        return CliRunner().invoke(app, ["lineage", *arguments])

    yield call
    os.environ.clear()
    os.environ.update(before)


def test_both_ways_fit_into_eighty_columns_and_end_with_0(rlhf):
    found = rlhf("--annotator", "annotator-07")
    assert found.exit_code == 0
    first, *rest = found.stdout.splitlines()
    assert first == (
        "3 versions were trained on the annotator 'annotator-07': 23 rows in 1 data set of 1."
    )
    assert max(map(len, rest)) <= 80
    assert "shop-reward 1" in found.stdout
    other = rlhf("--model", "models:/shop-policy/1")
    assert other.exit_code == 0
    assert max(map(len, other.stdout.splitlines())) <= 80
    assert "465 votes; by 30 annotators" in other.stdout
    assert "annotator-19" in other.stdout
    assert "annotator-20" not in other.stdout
    assert "and 10 more, which --json lists." in other.stdout


def test_json_has_everything(rlhf, home):
    found = json.loads(rlhf("--annotator", "annotator-07", "--json").stdout)
    assert {(seen["ref"], seen["relation"]) for seen in found["seen"]} == {
        (f"models:/shop-{kind}/1", "trained") for kind in ("reward", "policy", "critic")
    }
    assert found["seen"][0]["path"] == [{"role": "votes", "uri": home.data_set.uri}]
    assert (found["rows"], found["unknown"]) == (23, [])
    [policy] = json.loads(rlhf("--model", "models:/shop-policy/1", "--json").stdout)
    assert len(policy["trained"]["annotators"]) == 30
    assert policy["trained"]["licences"] == {"MIT": {"votes": 465}}


def test_a_model_and_a_filter_ask_whether_it_saw_that(rlhf):
    found = rlhf("--model", "models:/shop-critic/1", "--licence", "mit")
    assert found.exit_code == 0
    assert found.stdout.startswith("1 version was trained on the licence 'mit'")
    assert "│ shop-critic 1" in found.stdout
    assert "│ shop-reward 1" not in found.stdout
    other = rlhf("--model", "models:/shop-sft/1", "--licence", "mit")
    assert other.exit_code == 0
    assert other.stdout == (
        "None of these versions saw the licence 'mit': models:/shop-sft/1. Others did.\n"
    )


def test_nothing_found_is_an_answer_and_a_gap_is_none(rlhf, home):
    assert rlhf("--annotator", "nobody").exit_code == 0
    home.file_of(home.data_set, "origins.json").write_text("{")
    found = rlhf("--annotator", "annotator-07")
    assert found.exit_code == 4
    assert found.stdout.startswith("No version is known to have seen the annotator 'annotator-07'")
    assert f"{home.data_set.uri}: origins.json cannot be read" in found.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to look for: --annotator, --source or --licence"),
        (("--project", "shop"), "say what to look for"),
        (("--annotator", ""), "is empty: pass a value"),
        (("--model", "models:/nothing/1"), "there is no models:/nothing/1"),
        (("--model", "models:/shop-policy@champion"), "points to no version"),
        (("--model", "models:/../etc"), "is not a model reference"),
        (("--model", "x" * 300), "no pipeline run has a name of 300 characters"),
        (("--model", "no-such-run"), "no pipeline run matches 'no-such-run'"),
    ],
)
def test_a_mistake_is_one_sentence(rlhf, arguments, said):
    found = rlhf(*arguments)
    assert found.exit_code == 2
    assert found.stdout == ""
    assert said in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert "Traceback" not in found.stderr


def test_hostile_names_do_nothing_to_the_terminal(rlhf):
    found = rlhf("--annotator", "\x1b[2J[red]x[/red]'; DROP TABLE runs; --")
    assert found.exit_code == 0
    assert "\x1b" not in found.stdout
    assert "[red]x[/red]" in found.stdout
