"""What `make loop` is made of, without its servers; tests/flows/long has the whole."""

import json

import pytest

from benchmarks.loop import rounds as results
from benchmarks.loop.__main__ import main
from benchmarks.loop.rounds import Round
from benchmarks.loop.sizes import Sizes
from benchmarks.loop.world import make_world
from flows.cli.loading import load_config
from flows.config import PipelineConfig
from flows.retrain import RetrainConfig
from rlhf_core.errors import ConfigError

SMALL = Sizes(people=3, spammers=2, prompts=20, demonstrations=30, first=25)
FIRST = Round(
    number=0, who="12 people", votes=480, state="Completed", seconds=61.2, outcome="promoted",
    candidate="models:/loop-policy/1", sft=(0.0, -0.05, 0.05), policy=(0.4, 0.35, 0.45), kl=3.0,
)  # fmt: skip
REFUSED = Round(
    number=1, who="6 spammers", votes=760, state="Completed", seconds=59.0, outcome="refused",
    candidate="models:/loop-policy/2", champion="models:/loop-policy/1", sft=(0.0, -0.05, 0.05),
    policy=(0.3, 0.25, 0.35), reigning=(0.41, 0.36, 0.46), win_rate=(0.44, 0.4, 0.48), kl=2.5,
    failed=("FAIL: win rate over champion 0.44",),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("show") / "presets", 3, SMALL, ["ppo.iterations=2"])


def test_the_preset_is_read_as_a_deployment_reads_it(world):
    (file,) = world.folder.glob("*.yaml")
    assert file.stem == world.pipeline.project == "loop"  # the name of the deployment
    assert load_config(file, (), PipelineConfig) == world.pipeline
    assert (world.pipeline.seed, world.pipeline.ppo.iterations) == (3, 2)
    tables = world.pipeline.data
    assert tables.preferences.store == world.pipeline.project
    assert (world.folder / tables.demonstrations.path).is_file()
    assert (world.folder / tables.prompts.path).is_file()


def test_the_gate_is_the_default_one(world):
    """A show whose gate is more lenient than that of others would show nothing."""
    assert world.pipeline.promotion == PipelineConfig().promotion
    assert world.pipeline.reward_gate == PipelineConfig().reward_gate


def test_the_loop_can_be_closed_on_it(world):
    ask = {"project": "loop", "prompts": 5, "then": "retrain/loop"}
    closed = RetrainConfig.model_validate({"pipeline": world.pipeline.model_dump(), "ask": ask})
    assert closed.ask.then == "retrain/loop"


def test_pairs_to_begin_with_have_two_answers_and_no_vote(world):
    rows = [json.loads(line) for line in world.pairs.read_text().splitlines()]
    written = (world.folder / "prompts.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in written}
    assert len(rows) == SMALL.first
    for row in rows:
        assert row.keys() == {"id", "prompt", "response_a", "response_b"}
        assert row["response_a"] != row["response_b"]
    assert {row["prompt"] for row in rows} <= prompts


def test_a_seed_is_a_world(world, tmp_path):
    same = make_world(tmp_path / "same" / "presets", 3, SMALL)
    other = make_world(tmp_path / "other" / "presets", 4, SMALL)
    assert same.pairs.read_text() == world.pairs.read_text() != other.pairs.read_text()
    assert same.people == world.people != other.people
    assert [person.reliability for person in world.spammers] == [0.0, 0.0]


def test_a_setting_that_cannot_be_is_named(tmp_path):
    with pytest.raises(ConfigError, match="iteration"):
        make_world(tmp_path / "presets", 0, SMALL, ["ppo.iteration=2"])


def test_rounds_come_back_from_a_file(tmp_path):
    path = tmp_path / "rounds.json"
    results.write([FIRST, REFUSED], path, seed=7)
    assert results.read(path) == ([FIRST, REFUSED], {"seed": 7})


def test_a_picture_has_each_candidate_and_who_reigns():
    figure = results.plot([("seed 0", [FIRST, REFUSED])])
    (axes,) = figure.axes
    (reigns,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert list(reigns.get_ydata()) == [0.0, 0.4, 0.4]  # the refused one does not reign
    points = [float(bar.lines[0].get_ydata()[0]) for bar in axes.containers]
    assert points == [0.0, 0.4, 0.3]
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == ["SFT", "first policy\n480", "round 1\n760"]


def test_a_run_that_failed_is_in_the_table_and_not_in_the_picture():
    failed = Round(
        number=1, who="12 people", votes=0, state="Crashed", seconds=3, outcome="Crashed"
    )
    assert [len(axes.containers) for axes in results.plot([("", [FIRST, failed])]).axes] == [2]
    assert results.table([FIRST, failed]).row_count == 2


def test_drawing_again(tmp_path, capsys):
    results.write([FIRST, REFUSED], tmp_path / "a.json", seed=0)
    picture = tmp_path / "loop.png"
    assert main(["--draw", str(tmp_path / "a.json"), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = capsys.readouterr().out.splitlines()
    assert rows[2:] == [
        "| seed 0 | SFT | 0 | | 0.00 [-0.05, 0.05] | | |",
        "| seed 0 | first policy | 480 | 12 people | 0.40 [0.35, 0.45] | – | promoted |",
        "| seed 0 | round 1 | 760 | 6 spammers | 0.30 [0.25, 0.35] | 0.44 [0.40, 0.48] | refused |",
    ]
    (tmp_path / "b.json").write_text('{"rounds": [{"number": 1}]}')
    assert main(["--draw", str(tmp_path / "b.json"), "--output", str(picture)]) == 2
    assert "b.json is no file of a show" in " ".join(capsys.readouterr().err.split())


def test_a_home_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--home", str(tmp_path)]) == 2
    assert "is not empty: name another folder" in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("words", [["--each", "0"], ["--rounds", "x"], ["--seeds", "1"]])
def test_a_wrong_option_is_named(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert words[0].strip("-") in capsys.readouterr().err


def test_a_picture_that_cannot_be_is_refused_before_anything_is_started(capsys):
    with pytest.raises(SystemExit):
        main(["--output", "numbers.json"])
    assert "numbers.json is no picture: it ends with .png, .svg, .pdf" in capsys.readouterr().err
