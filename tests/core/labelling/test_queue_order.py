"""The order of a queue: who belongs where, and when."""

import subprocess
import sys
from collections import Counter

import torch

from rlhf_core.labelling.arms import Shares
from rlhf_core.labelling.order import Waiting, order_queue
from rlhf_core.labelling.probe import no_votes


def waiting(n=300, groups=None, **known):
    groups = list(range(n)) if groups is None else groups
    of = max(groups) + 1
    return Waiting(
        keys=[f"pair {i}" for i in range(n)],
        groups=groups,
        names=[f"prompt {g}" for g in range(of)],
        asked=known.get("asked", [0] * of),
        held_out=frozenset(known.get("held_out", ())),
        trained_on=frozenset(known.get("trained_on", ())),
    )


def features(n=300):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).double()
    return lambda some: x[some]


def order(queue, n=300, **how):
    return order_queue(queue, features(n), no_votes(3), salt="demo", shares=Shares(), **how)


def test_everything_is_placed_once_and_the_beginning_has_all_arms_in_their_shares():
    placed = order(waiting())
    assert sorted(p.pair for p in placed) == list(range(300))
    assert Counter(p.arm for p in placed[:100]) == {"design": 70, "random": 20, "hold_out": 10}


def test_the_design_takes_the_widest_pairs_first_and_the_others_as_they_fall():
    x = features()(list(range(300))).norm(dim=1)
    placed = order(waiting())[:100]
    size = {
        arm: x[[p.pair for p in placed if p.arm == arm]].mean().item()
        for arm in ("design", "random", "hold_out")
    }
    assert size["design"] > x.mean() * 1.2
    assert abs(size["random"] - x.mean()) < 0.5


def test_new_pairs_do_not_move_old_ones_to_another_arm():
    first = {p.pair: p.arm for p in order(waiting(200), 200)}
    then = {p.pair: p.arm for p in order(waiting(300))}
    assert all(then[pair] == arm for pair, arm in first.items())


def test_behind_the_horizon_the_design_is_random_and_says_so():
    placed = order(waiting(), horizon=30)
    by_arm = Counter(p.arm for p in placed)
    assert by_arm["design"] == 30
    assert Counter(p.arm for p in order(waiting()))["hold_out"] == by_arm["hold_out"]
    first = {p.pair for p in order(waiting()) if p.arm == "design"}
    assert [p.pair for p in placed if p.arm == "design"] == [
        p.pair for p in order(waiting()) if p.arm == "design"
    ][:30]
    assert first >= {p.pair for p in placed if p.arm == "design"}


def test_when_it_falls_back_all_is_random_but_the_hold_out():
    placed = order(waiting(), by_design=False)
    assert Counter(p.arm for p in placed)["design"] == 0
    held = {p.pair for p in order(waiting()) if p.arm == "hold_out"}
    assert {p.pair for p in placed if p.arm == "hold_out"} == held
    x = features()(list(range(300))).norm(dim=1)
    assert abs(x[[p.pair for p in placed[:100]]].mean() - x.mean()) < 0.25


def test_nearly_equal_prompts_are_in_one_arm_and_take_turns():
    groups = [i // 3 for i in range(300)]
    placed = order(waiting(groups=groups))
    arms = {}
    for p in placed:
        arms.setdefault(groups[p.pair], set()).add(p.arm)
    assert all(len(found) == 1 for found in arms.values())
    for arm in ("design", "hold_out"):
        seen = Counter()
        for p in placed:
            if p.arm == arm:
                seen[groups[p.pair]] += 1
                most, of_arm = max(seen.values()), {g for g, a in arms.items() if a == {arm}}
                assert most - min(seen[g] for g in of_arm) <= 1


def test_a_prompt_that_was_asked_about_waits():
    groups = [i // 3 for i in range(300)]
    first = next(p for p in order(waiting(groups=groups)) if p.arm == "design")
    asked = [0] * 100
    asked[groups[first.pair]] = 1
    placed = [p.pair for p in order(waiting(groups=groups, asked=asked)) if p.arm == "design"]
    fresh = len({groups[pair] for pair in placed}) - 1
    assert groups[first.pair] not in {groups[pair] for pair in placed[:fresh]}


def test_what_is_held_out_stays_so_and_what_was_trained_on_is_not():
    free = order(waiting())
    held = {p.pair for p in free if p.arm == "hold_out"}
    known = order(waiting(trained_on=range(300)))
    assert "hold_out" not in {p.arm for p in known}
    others = set(range(300)) - held
    again = {p.pair: p.arm for p in order(waiting(held_out=others))}
    assert {again[pair] for pair in others} == {"hold_out"}


def test_another_process_finds_the_same_order():
    code = (
        "import sys; sys.path.insert(0, 'tests/core/labelling'); from test_queue_order import *; "
        "print([(p.pair, p.arm) for p in order(waiting())])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == str([(p.pair, p.arm) for p in order(waiting())])
