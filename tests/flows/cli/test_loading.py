"""What the YAML loader accepts, and the sentence for each mistake: file, line, way out."""

import os
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from flows.cli.loading import describe, load_config, parse_override
from rlhf_core.config import Section
from rlhf_core.errors import ConfigError


class Optimiser(Section):
    learning_rate: float = Field(1e-3, gt=0, description="Step size (1).")
    steps: int = Field(10, ge=1, description="Updates.")


class Policy(Section):
    kl_coef: float = Field(0.05, ge=0, description="Weight of the KL term (1/nat).")
    kind: Literal["full", "head"] = Field("full", description="What is trained.")
    reuse: str = Field("", description="A version to use instead of training.")
    optimiser: Optimiser = Field(Optimiser(), description="The optimiser.")


class Pipeline(Section):
    project: str = Field("demo", description="Name.")
    seed: int = Field(0, description="Seed.")
    names: list[str] = Field([], description="Names.")
    ppo: Policy = Field(Policy(), description="The policy.")
    other: Policy = Field(Policy(), description="A second one.")

    @model_validator(mode="after")
    def _differ(self) -> "Pipeline":
        if self.project == "forbidden":
            raise ValueError("project must not be 'forbidden': choose another name.")
        if self.seed == 13:
            raise ConfigError("seed is 13: choose a luckier one.")
        return self


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def load(path: Path, *overrides: str) -> Pipeline:
    return load_config(path, overrides, Pipeline)


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    return str(caught.value).replace(str(path), "run.yaml")


def test_values_and_defaults(write):
    config = load(write("project: mine\nppo:\n  kl_coef: 0.2\n  optimiser:\n    steps: 3\n"))
    assert config == Pipeline(project="mine", ppo=Policy(kl_coef=0.2, optimiser=Optimiser(steps=3)))


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1.E-5", ".00001", "0.00001"])
def test_every_spelling_of_a_small_number_is_that_number(write, text):
    # YAML 1.1 reads `1e-5` as text, because it has no point: the schema makes it a number again.
    path = write(f"ppo:\n  optimiser:\n    learning_rate: {text}\n")
    assert load(path).ppo.optimiser.learning_rate == 1e-5
    assert load(write("project: p"), f"ppo.kl_coef={text}").ppo.kl_coef == 1e-5


def test_overrides_win_in_order_and_reach_any_depth(write):
    path = write("project: p\nppo:\n  kl_coef: 0.2\n")
    config = load(
        path,
        "ppo.kl_coef=0.3",
        "ppo.optimiser.steps=7",
        "seed=4",
        "ppo.kl_coef=0.4",
        "names=[a, b]",
        "ppo.reuse=models:/demo-sft/3",
    )
    assert (config.ppo.kl_coef, config.ppo.optimiser.steps, config.seed) == (0.4, 7, 4)
    assert config.names == ["a", "b"]
    assert config.ppo.reuse == "models:/demo-sft/3"


def test_an_override_of_nothing_is_the_empty_text(write):
    assert load(write("ppo:\n  reuse: models:/a/1\n"), "ppo.reuse=").ppo.reuse == ""


def test_an_override_into_a_section_without_content(write):
    assert load(write("project: p\nppo:\n"), "ppo.kl_coef=1").ppo.kl_coef == 1


def test_an_override_does_not_leak_through_a_yaml_alias(write):
    path = write("ppo: &shared\n  kl_coef: 0.2\nother: *shared\n")
    config = load(path, "ppo.kl_coef=0.9")
    assert (config.ppo.kl_coef, config.other.kl_coef) == (0.9, 0.2)


def test_an_override_keeps_what_follows_the_first_equals_sign():
    assert parse_override("a.b=x=y").value == "x=y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml is empty: write settings as lines of the form key: value."),
        (
            "# only a comment\n",
            "run.yaml is empty: write settings as lines of the form key: value.",
        ),
        ("- a\n- b\n", "run.yaml: the file must consist of lines of the form key: value."),
        ("just words", "run.yaml: the file must consist of lines of the form key: value."),
        (
            "project: p\nppo:\n  kl_coeff: 1\n",
            "run.yaml:3: there is no setting 'ppo.kl_coeff'. Did you mean 'ppo.kl_coef'?",
        ),
        (
            "project: p\nsteps: 3\n",
            "run.yaml:2: there is no setting 'steps'. Did you mean 'ppo.optimiser.steps'?",
        ),
        (
            "zzz: 3\n",
            "run.yaml:1: there is no setting 'zzz'. Settings in this section: project, seed, "
            "names, ppo, other.",
        ),
        (
            "ppo:\n  kl_coef: often\n",
            "run.yaml:2: ppo.kl_coef must be a valid number, unable to parse string as a number;"
            " it is 'often'.",
        ),
        (
            "ppo:\n  kl_coef: -1\n",
            "run.yaml:2: ppo.kl_coef must be greater than or equal to 0; it is -1.",
        ),
        (
            "ppo:\n  kind: tail\n",
            "run.yaml:2: ppo.kind must be 'full' or 'head'; it is 'tail'.",
        ),
        (
            "seed: 1\nppo: 3\n",
            "run.yaml:2: ppo must be a section: put its settings below it, indented.",
        ),
        (
            "names:\n  - a\n  - [b]\n",
            "run.yaml:3: names.1 must be a valid string; it is ['b'].",
        ),
        (
            "ppo:\n  kl_coef: 1\n\n  kl_coef: 2\n",
            "run.yaml:4: 'kl_coef' is a duplicate of line 2: keep one of them.",
        ),
        ("seed: 13\n", "run.yaml: seed is 13: choose a luckier one."),
        ("project: forbidden\n", "run.yaml: project must not be 'forbidden': choose another name."),
    ],
)
def test_a_mistake_in_the_file(write, text, expected):
    assert complaint(write(text)) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("project: p\nppo:\n  kl_coef: [1\n", 4),
        ("project: p\n\tseed: 1\n", 2),
        ("project: 'p\n", 2),
        ("project: p: q\n", 1),
        ("project: *nowhere\n", 1),
    ],
)
def test_what_is_not_yaml_names_the_line(write, text, line):
    assert f"run.yaml:{line}: this is not valid YAML" in complaint(write(text))


def test_control_characters_and_tags_are_refused_in_a_sentence(write):
    assert "not valid YAML" in complaint(write("project: \x07\n"))
    assert "in line 1" in complaint(write("project: !!python/object/apply:os.getcwd []\n"))


@pytest.mark.parametrize("text", ["2026-13-01", "2026-02-30 10:00:00"])
def test_a_date_that_there_is_not_is_refused_in_a_sentence(write, text):
    assert "not valid YAML" in complaint(write(f"project: {text}\n"))
    assert "is not a YAML value" in complaint(write("project: p\n"), f"project={text}")


def test_a_merged_section_may_say_a_key_again(write):
    # `d` merges `c` before `c` itself is built, which is deeper in the file.
    text = (
        "ppo:\n  optimiser: &c\n    <<: &x {steps: 1, learning_rate: 0.5}\n    steps: 2\n"
        "other:\n  optimiser:\n    <<: *c\n    learning_rate: 0.25\n"
    )
    config = load(write(text))
    assert config.ppo.optimiser == Optimiser(steps=2, learning_rate=0.5)
    assert config.other.optimiser == Optimiser(steps=2, learning_rate=0.25)
    with pytest.raises(ConfigError, match="'steps' is a duplicate of line"):
        load(write(text.replace("    steps: 2\n", "    steps: 2\n    steps: 3\n")))


@pytest.mark.parametrize(
    ("text", "value"), [("010", 8), ("1_000", 1000), ("0x1f", 31), ("1:30", 90), ("08", 8)]
)
def test_whole_numbers_mean_what_they_mean_in_yaml_1_1(write, text, value):
    assert load(write(f"ppo:\n  optimiser:\n    steps: {text}\n")).ppo.optimiser.steps == value


@pytest.mark.parametrize("text", ["yes", "on", "no", "off", "y", "n", "1e5", "'010'"])
def test_a_text_that_may_be_read_otherwise_is_kept_or_refused(write, text):
    path = write(f"project: {text}\n")
    if text in ("yes", "on", "no", "off"):
        assert "run.yaml:1: project must be a valid string" in complaint(path)
    else:
        assert load(path).project == text.strip("'")


def test_a_mapping_that_contains_itself_is_refused(write):
    assert "run.yaml:2: " in complaint(write("ppo: &loop\n  optimiser: *loop\n"))


def test_all_mistakes_are_told_at_once(write):
    text = complaint(write("sed: 1\nppo:\n  kl_coef: -1\n"), "ppo.kind=tail")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.klcoef=1", "there is no setting 'ppo.klcoef'. Did you mean 'ppo.kl_coef'?"),
        ("ppo.kl_coef=-1", "ppo.kl_coef must be greater than or equal to 0; it is -1."),
        ("ppo.kl_coef.x=1", "'kl_coef' is a value, not a section."),
        ("ppo.kl_coef", "write it as section.key=value, as in ppo.kl_coef=0.1."),
        ("=1", "write it as section.key=value, as in ppo.kl_coef=0.1."),
        (
            "names=[a",
            "'[a' is not a YAML value; put quotes around text with special characters.",
        ),
        ("ppo=3", "ppo must be a section: put its settings below it, indented."),
    ],
)
def test_a_mistake_in_an_override_names_the_override(write, override, expected):
    assert complaint(write("ppo:\n  kl_coef: 1\n"), override) == f"--set {override}: {expected}"


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path):
    (tmp_path / "demo.yaml").write_text("project: p")
    with pytest.raises(ConfigError, match=r"dmo\.yaml: no such file\. Did you mean"):
        load(tmp_path / "dmo.yaml")
    with pytest.raises(ConfigError, match=r"nowhere.*no such file\. Check the path\."):
        load(tmp_path / "nowhere" / "a.yaml")


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a folder: pass a YAML file in it"):
        load(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(tmp_path / "a.yaml")


def test_the_description_is_the_leading_comment(write):
    path = write("# The demo.\n#\n# Runs on a CPU.\n\nproject: p # not this\n# nor this\n")
    assert describe(path) == "The demo.\n\nRuns on a CPU."
    assert describe(write("project: p\n")) == ""


BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 24)
)
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize("value", ["!!int abc", '!!int ""', "!!float x", "!!bool maybe"])
@pytest.mark.parametrize("before", ["", "\n\n"])
def test_a_value_that_does_not_fit_its_tag_is_named_with_its_line(write, value, before):
    said = complaint(write(f"{before}seed: {value}\n"))
    assert said.startswith(f"run.yaml:{1 + len(before)}: this is not valid YAML ('")
    assert f"is not a valid {value.split()[0].removeprefix('!!')}: " in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("project: !!timestamp x", "run.yaml:1: this is not valid YAML ('x' is not a valid time"),
        ('project: "\\ud800"', "has half of a surrogate pair, which is not a character"),
        (BOMB, "expands to more than 20,000 values"),
        (LAUGHS, "expands to more than 20,000 values"),
        ("ppo: &a {b: *a}", "nested more than 50 deep, or within itself"),
        ("names: " + "[" * 60 + "]" * 60, "nested more than 50 deep, or within itself"),
        ("names: " + "[" * 5_000, "the YAML is nested too deeply"),
        ("a: 1\n" + "# comment\n" * 30_000, "has more than 256 KiB, which is too much to read"),
    ],
)
def test_yaml_that_means_too_much_is_refused(write, text, said):
    assert said in complaint(write(text))


def test_an_override_is_as_strict_as_a_file(write):
    for value in ("!!int abc", "&a [*a]", "[" * 5_000):
        said = complaint(write("seed: 1"), f"names={value}")
        assert "is not a YAML value" in said
        assert len(said) < 3_000


def test_only_a_regular_file_is_a_config(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert complaint(Path("/dev/zero")).endswith("is a device, not a file: pass a YAML file.")
    assert complaint(tmp_path / "pipe.yaml").endswith("is a pipe, not a file: pass a YAML file.")
    assert "File name too long" in complaint(tmp_path / ("a" * 300))


def test_of_many_errors_the_first_are_told(write):
    said = complaint(write("".join(f"a{n}: {n}\n" for n in range(200))))
    assert said.count("\n") == 50
    assert said.endswith("… and 150 more errors")
