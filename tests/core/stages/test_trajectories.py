"""The numbers of every stage are those that were recorded: an unintended change is seen here.

Meant to change them? `python tests/references/record.py`, and look at the difference.
"""

import json
from pathlib import Path

import pytest
from tiny import CONFIGS, World, trajectory

REFERENCES = Path(__file__).parents[2] / "references"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("trajectories") / "world")


@pytest.mark.parametrize("stage", CONFIGS)
def test_metrics_are_those_that_were_recorded(world, tmp_path, stage):
    recorded = json.loads((REFERENCES / f"{stage}.json").read_text())
    found = trajectory(stage, world, tmp_path / "out")
    assert len(found) == len(recorded)
    for step, (ours, theirs) in enumerate(zip(found, recorded, strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), f"entry {step} of {stage}"


def test_every_recorded_trajectory_is_of_a_stage():
    assert {path.stem for path in REFERENCES.glob("*.json")} == set(CONFIGS)
