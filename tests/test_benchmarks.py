"""The table beside TRL: who is measured with what, in which order, and what is made of it."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from flows.local.allocator import ENVIRONMENT

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("table")
    for name in ("table", "work", "pages"):
        sys.modules.pop(name, None)


def entry(row, side, number, speed, *, memory=100.0, commit="abc", **more):
    result = {"work": "ppo", "program": side, "tokens_per_second": speed} | more
    result |= {"peak_memory_mb": memory, "threads": 2, "torch": "2", "transformers": "5"}
    where = {"cpu": "A CPU", "features": "avx2", "cores": "2", "date": "2026-01-01"}
    return {"row": row, "side": side, "round": number, "commit": commit, "result": result} | where


def rounds(row, ours, peer, tuned):
    sides = {"ours": ours, "peer": peer, "tuned": tuned}
    return [
        entry(row, side, number, speed)
        for side, speeds in sides.items()
        for number, speed in enumerate(speeds)
    ]


# --- what is made of the lines ---


def test_a_row_by_hand(table):
    entries = rounds("ppo-gpt2", [100.0, 120.0, 150.0], [50.0, 40.0, 60.0], [80.0, 80.0, 100.0])
    # Rounds are compared with themselves: 100/50, 120/40, 150/60 and 100/80, 120/80, 150/100.
    assert table.render(entries).splitlines()[2] == (
        "| PPO, gpt2 | 3 | 120.0 (100.0–150.0) | 50.0 (40.0–60.0) | 2.50 (2.00–3.00) "
        "| 80.0 (80.0–100.0) | **1.50 (1.25–1.50)** | 100 / 100 / 100 |"
    )


def test_a_row_that_was_measured_in_part_says_so(table):
    entries = [entry("sft-smol", "ours", 0, 1000.0), entry("sft-smol", "peer", 0, 400.0)]
    line = table.render(entries).splitlines()[2]
    assert line == "| SFT, smol | 1 | 1,000 | 400 | 2.50 | – | **–** | 100 / 100 / – |"


def test_rows_stand_in_the_order_of_the_table_and_are_summed_up_by_group(table):
    entries = [
        *rounds("ppo-smol-lora", [30.0], [10.0], [15.0]),
        *rounds("sft-gpt2", [60.0], [10.0], [20.0]),
        *rounds("ppo-gpt2", [30.0], [10.0], [20.0]),
    ]
    text = table.render(entries)
    assert text.index("| PPO, gpt2 ") < text.index("| SFT, gpt2 ") < text.index("LoRA rank 16")
    assert "* gpt2, float32: 1.50 to 3.00 times as fast, and 3.00 to 6.00 times." in text
    assert "* LoRA: 2.00 times as fast, and 3.00 times." in text


def test_lines_of_an_older_commit_do_not_count(table):
    old = [entry("ppo-gpt2", side, 0, 1.0, commit="old") for side in table.SIDES]
    new = rounds("ppo-gpt2", [30.0], [10.0], [15.0])
    assert table.render(old + new) == table.render(new)
    assert "commit abc;" in table.render(new)


def test_what_is_not_the_default_of_the_peer_is_listed(table):
    changed = {"bf16": False, "gradient_checkpointing": False, "max_steps": 5}
    entries = [
        *rounds("ppo-gpt2", [30.0], [10.0], [15.0]),
        entry("sft-gpt2", "peer", 0, 1.0, work="sft", changed=changed),
        entry("sft-gpt2-bf16", "peer", 0, 1.0, work="sft", changed=changed | {"bf16": True}),
    ]
    said = [line for line in table.render(entries).splitlines() if line.startswith("* sft")]
    assert said == ["* sft: `bf16` False or True, `gradient_checkpointing` False."]


def test_a_section_takes_the_place_of_the_one_before(table, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.put_between("new", page, table.BEGIN, table.END)
    assert page.read_text() == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(SystemExit, match="has no place for the table"):
        table.put_between("new", page, table.BEGIN, table.END)


def test_the_page_has_what_was_measured(table):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(table.BEGIN)
    section, end, after = rest.partition(table.END)
    assert before
    assert end
    assert after
    if entries := table.read(BENCHMARKS / "table.jsonl"):
        assert section.strip() == table.render(entries), "run benchmarks/table.py --write"


# --- measuring ---


def test_both_sides_of_a_row_get_the_same_work(table, tmp_path):
    work = importlib.import_module("work")
    for row in table.ROWS.values():
        found = []
        for side in table.SIDES:
            words = table.command(row, side, tmp_path, "--threads 2")
            script = words.index(str(BENCHMARKS / f"peer_{row.work}.py")) if side != "ours" else 2
            parser = argparse.ArgumentParser()
            work.add_arguments(parser, row.work)
            found.append(parser.parse_args(words[script + 1 :]))
        assert found[0] == found[1] == found[2]
        assert found[0].model == tmp_path / row.model


def test_only_the_plain_peer_runs_without_our_allocator_settings(table, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    for side in table.SIDES:
        found = table.environment(side)
        tuned = {name: found[name] for name in ENVIRONMENT if name in found}
        assert tuned == ({} if side == "peer" else ENVIRONMENT)
        assert ("PYTHONPATH" in found) == (side == "ours")


@pytest.fixture
def asked(table, monkeypatch, tmp_path):
    """Programs that print a line at once stand where the sides are; who was asked, in order."""
    order = []

    def command(row, side, models, options):
        order.append((row.title, side))
        if (tmp_path / "fails").exists() and side == "peer":
            return [sys.executable, "-c", "raise SystemExit('out of memory')"]
        line = entry("", side, 0, 12.5)["result"]
        return [sys.executable, "-c", f"print('first'); print({json.dumps(json.dumps(line))})"]

    monkeypatch.setattr(table, "command", command)
    return order


def test_sides_take_turns_and_each_line_is_kept_as_it_comes(table, asked, tmp_path):
    output = tmp_path / "table.jsonl"
    assert table.run(["sft-gpt2", "ppo-smol"], None, tmp_path, output, {})
    assert [side for title, side in asked if title == "SFT, gpt2"] == [
        *("ours", "peer", "tuned"),
        *("peer", "tuned", "ours"),
        *("tuned", "ours", "peer"),
    ]
    lines = table.read(output)
    assert [line["side"] for line in lines] == [side for _, side in asked]
    assert lines[0]["result"]["tokens_per_second"] == 12.5
    assert lines[0]["commit"] == table.commit()
    asked.clear()
    assert table.run(["sft-gpt2"], 4, tmp_path, output, {})
    assert len(asked) == 3  # the fourth round alone


def test_nothing_begins_when_the_time_is_up(table, asked, tmp_path, capsys):
    output = tmp_path / "table.jsonl"
    assert table.run(["ppo-smol"], 1, tmp_path, output, {}, minutes=0)
    assert asked == []
    assert "the time is up before ppo-smol, round 1: ours" in capsys.readouterr().err


def test_a_side_that_fails_is_said_and_measured_the_next_time(table, asked, tmp_path, capsys):
    (tmp_path / "fails").touch()
    output = tmp_path / "table.jsonl"
    assert not table.run(["ppo-smol"], 1, tmp_path, output, {})
    assert "out of memory" in capsys.readouterr().err
    assert [line["side"] for line in table.read(output)] == ["ours", "tuned"]
    (tmp_path / "fails").unlink()
    asked.clear()
    assert table.run(["ppo-smol"], 1, tmp_path, output, {})
    assert [side for _, side in asked] == ["peer"]


# --- reward models on votes that people cast ---


@pytest.fixture
def votes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("reward_models")
    for name in ("reward_models", "table"):
        sys.modules.pop(name, None)


def labelled(votes, clusters, size, good="a fine point"):
    return [
        votes.Pair(c, f"prompt {c}", f"{good} {c} {n}", f"a bad one {c} {n} long")
        for c in range(clusters)
        for n in range(size + c)
    ]


def line_of(counts, *, way="longer", fold=0, folds=2, train=500, **more):
    tested = sum(sum(numbers) for numbers in counts.values())
    where = {"cpu": "A CPU", "features": "avx2", "threads": 1, "torch": "2", "date": "2026-01-01"}
    key = {"set": "arguments", "way": way, "folds": folds, "fold": fold, "train_pairs": train}
    return key | {"test_pairs": tested, "counts": counts} | where | more


def test_whole_clusters_are_held_out_once(votes):
    pairs = labelled(votes, clusters=7, size=5)
    folds = votes.split(pairs, 3, 0, 0, seed=0)
    assert sorted(pair for fold in folds for pair in fold.test) == sorted(pairs)
    for fold in folds:
        assert sorted([*fold.train, *fold.test]) == sorted(pairs)
        assert not {p.cluster for p in fold.train} & {p.cluster for p in fold.test}
    assert votes.split(pairs, 3, 0, 0, seed=1) != folds
    with pytest.raises(SystemExit, match="between 2 and 7"):
        votes.split(pairs, 8, 0, 0, seed=0)


def test_fewer_pairs_are_drawn_evenly(votes):
    [fold, *_] = votes.split(labelled(votes, clusters=4, size=10), 2, 10, 6, seed=0)
    for part, number in ((fold.train, 5), (fold.test, 3)):
        clusters = [pair.cluster for pair in part]
        assert [clusters.count(c) for c in set(clusters)] == [number, number]


def test_a_bag_of_words_learns_words_and_length(votes):
    [fold, _] = votes.split(labelled(votes, clusters=6, size=5), 2, 0, 0, seed=0)
    assert (votes.words(fold, None) > 0).all()
    assert (votes.longer(fold, None) < 0).all()
    # The same words on both sides: only the length tells, and here the shorter wins.
    same = [votes.Pair(c, "p", "some words", "some words " * 3) for c in range(6) for _ in range(5)]
    [fold, _] = votes.split(same, 2, 0, 0, seed=0)
    assert (votes.words_and_length(fold, None) > 0).all()


def test_accuracy_by_hand(votes):
    lines = [line_of({"0": [3, 1, 0]}), line_of({"1": [1, 0, 3]}, fold=1)]
    assert votes.accuracy(lines).value == pytest.approx((3.5 + 1) / 8)
    assert votes.accuracy(lines).low <= 1 / 4
    leads, pairs = [2.0, 0.0, -1.0], labelled(votes, 1, 3)
    assert votes.counts(torch.tensor(leads), pairs) == {"0": [1, 1, 1]}


def test_a_row_stands_beside_the_rule_on_the_same_pairs(votes):
    lines = [
        line_of({"0": [9, 0, 1]}),
        line_of({"1": [2, 0, 8]}, fold=1),
        line_of({"0": [7, 0, 3]}, way="LoRA", precision="bfloat16"),
    ]
    rows = [line.split(" | ") for line in votes.render(lines).splitlines()]
    assert rows[2][1:3] == ["prefer the longer", "0.550"]
    assert rows[3][2] == "0.700"
    assert rows[3][5:] == [
        "0.900",
        "10 pairs, 1 debate sides, 1 of 2 folds",
        "500 pairs, bfloat16 |",
    ]


def test_without_the_data_it_says_what_to_do(votes, tmp_path):
    with pytest.raises(SystemExit, match=r"argument-pairs.*not there.*--data"):
        votes.read_set("arguments", tmp_path)


@pytest.mark.skipif(
    not (BENCHMARKS.parents[1] / "shared" / "data").is_dir(), reason="needs the labelled data"
)
def test_the_rule_has_its_published_accuracy(votes):
    for name, published in votes.REFERENCE.items():
        pairs = votes.read_set(name, BENCHMARKS.parents[1] / "shared" / "data")
        [fold] = [votes.Fold([], pairs)]
        leads = votes.longer(fold, None)
        share = ((leads.sign() + 1) / 2).mean().item()
        assert share == pytest.approx(published["longer"], abs=5e-4)


def test_what_was_measured_is_in_the_page(votes):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    section = page.partition(votes.BEGIN)[2].partition(votes.END)[0]
    lines = votes.read(BENCHMARKS / "reward_models.jsonl")
    assert lines
    assert section.strip() == votes.render(lines), "run benchmarks/reward_models.py --write"
