"""What others wrote is refused in a sentence: damaged data, configs, models, environments, words.

RLHF_FUZZ=1000 replays as many cases of each surface, RLHF_FUZZ_SEED=2 others. A case that falls is
named, and `replay.py --verbose` shows it.
"""

import os
import sys

import pytest
from replay import replay, serving

COUNTS = {"data": 70, "config": 80, "model": 40, "environment": 30, "command": 40}
SEED = int(os.environ.get("RLHF_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, migrated_database):
    with serving(tmp_path_factory.mktemp("fuzz"), migrated_database) as started:
        yield started


@pytest.mark.timeout(4 * 3600 if "RLHF_FUZZ" in os.environ else 600)
@pytest.mark.parametrize("surface", COUNTS)
def test_nothing_falls(server, surface, tmp_path):
    count = int(os.environ.get("RLHF_FUZZ", COUNTS[surface]))
    outcomes = [
        (name, found.get("fault"), found["said"] or found.get("text"))
        for name, _, found in replay(server, surface, SEED, count, tmp_path)
    ]
    assert [fallen for fallen in outcomes if fallen[1]] == []
    assert len(outcomes) == count
    # Most cases are broken, and some are still right: else the damage would be too great to matter.
    refused = sum(bool(said) for _, _, said in outcomes)
    assert 0.1 * count < refused <= count


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("raise ValueError('a defect')", "a traceback was printed"),
        ("import os; os.abort()", "died of SIGABRT"),
        ("print('\\x1b[31m')", "'\\x1b' was printed to out"),
        ("print('x' * 60_000)", "60 thousand characters in out"),
        ("import time; time.sleep(60)", "ran for more than 1 s"),
        ("raise SystemExit(3)", None),
    ],
)
def test_it_is_noticed_when_one_falls(server, program, fault):
    argv = ["exec", sys.executable, "-c", program]
    assert (
        server.ask({"argv": argv, "seconds": 1 if "sleep" in program else 10}).get("fault") == fault
    )


def test_a_case_is_the_same_whenever_it_is_asked_for(tmp_path):
    from cases import SURFACES, generate

    for surface in SURFACES:
        first = [case for _, case in generate(surface, 5, 3, tmp_path / "a")]
        again = [case for _, case in generate(surface, 5, 3, tmp_path / "a")]
        assert first == again
