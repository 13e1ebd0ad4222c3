"""The table beside TRL: who is measured with what, in which order, and what is made of it."""

import argparse
import importlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flows.local.allocator import ENVIRONMENT

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("table", "table_page", "rows", "turns", "flops", "work", "pages", "report")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("table")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def page(table):
    return importlib.import_module("table_page")


WHERE = {
    "commit": "abc",
    "cpu": "A CPU",
    "family": "family 1, model 2",
    "features": "avx2",
    "lacking": "amx_bf16",
    "cores": "2",
    "caches": "L1 1K",
    "date": "2026-01-01",
}
PEAK = {"float32": 100.0, "bfloat16": 200.0, "copy_gb_s": 20.0}


def rounds(row, **speeds):
    """A line for each round, of the speeds of each side in it."""
    sides = [
        dict(zip(speeds, values, strict=True)) for values in zip(*speeds.values(), strict=True)
    ]
    return [
        {
            "row": row,
            "round": number,
            "took": 30.0,
            "operations": {"ours": 1e9, "tuned": 1e9, "peer": 1e9},
            "sides": {
                side: {"tokens_per_second": speed, "peak_memory_mb": 100.0, "others": 0.0}
                for side, speed in found.items()
            },
        }
        | WHERE
        for number, found in enumerate(sides)
    ]


def told(row, **changed):
    """What the sides of a row say of themselves."""
    ours = {"program": "ours 1", "work": "ppo", "threads": 2, "torch": "2", "transformers": "5"}
    return {
        "row": row,
        "about": {"ours": ours, "tuned": ours | {"program": "trl 1"} | changed},
    } | WHERE


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


# --- what is made of the lines ---


def test_a_row_by_hand(page):
    entries = [
        {"peak": {"blas": "MKL", "2": PEAK}} | WHERE,
        *rounds("ppo-gpt2-float32", ours=[20, 30, 40], tuned=[10, 12, 20], peer=[10, 10, 10]),
    ]
    # Rounds are compared with themselves: 20/10, 30/12, 40/20 and 20/10, 30/10, 40/10. A billion
    # operations a token: 30 GFLOP/s of 100, and 12.
    assert lines_of(page.render(entries), "| PPO, gpt2") == [
        "| PPO, gpt2 | float32 | 3 | 30.0 (20.0–40.0) | 12.0 (10.0–20.0) | **2.00 (2.00–2.50)** "
        "| 10.0 (10.0–10.0) | 3.00 (2.00–4.00) | 30 % / 12 % | 100 / 100 |"
    ]


def test_the_share_is_of_the_peak_of_the_numbers_that_are_multiplied(page):
    entries = [
        {"peak": {"blas": "MKL", "2": PEAK}} | WHERE,
        {"peak": {"blas": "MKL", "2": PEAK | {"bfloat16": 400.0}}} | WHERE,
        {"peak": {"blas": "MKL", "2": PEAK | {"bfloat16": 999.0}}} | WHERE | {"cpu": "another"},
        *rounds("ppo-gpt2", ours=[100], tuned=[40]),
    ]
    assert "| 25 % / 10 % |" in lines_of(page.render(entries), "| PPO, gpt2")[0]


def test_a_side_that_was_not_measured_is_a_dash(page):
    line = lines_of(page.render(rounds("sft-smol", ours=[1000], tuned=[400])), "| SFT")[0]
    assert line.endswith("| 1 | 1,000 | 400 | **2.50** | – | – | – / – | 100 / 100 |")


def test_rows_stand_in_the_order_of_the_table(page):
    entries = [
        *rounds("ppo-gpt2-float32", ours=[30], tuned=[10]),
        *rounds("ppo-smol-lora", ours=[30], tuned=[10]),
        *rounds("sft-gpt2", ours=[60], tuned=[10]),
    ]
    text = page.render(entries)
    assert text.index("| SFT, gpt2 ") < text.index("LoRA rank 16") < text.index("| PPO, gpt2 ")


def test_lines_of_an_older_commit_do_not_count(page):
    old = [entry | {"commit": "old"} for entry in rounds("ppo-gpt2", ours=[1] * 6, tuned=[9] * 6)]
    new = rounds("ppo-gpt2", ours=[30], tuned=[10])
    assert page.render(old + new) == page.render(new)
    assert "commit abc;" in page.render(new)


def test_other_work_on_the_machine_is_marked(page):
    quiet = rounds("ppo-gpt2", ours=[30, 30], tuned=[10, 10])
    assert "†" not in page.render(quiet)
    quiet[1]["sides"]["tuned"]["others"] = 0.51
    text = page.render(quiet)
    assert "| PPO, gpt2 † |" in text
    assert lines_of(text, "†") == [
        "† Other work used more than 0.5 cores in some rounds: ppo-gpt2 (1 of 2)."
    ]
    quiet[1]["sides"]["tuned"]["others"] = None  # a system that does not tell
    assert "†" not in page.render(quiet)


def test_a_side_that_is_faster_in_float32_is_named(page):
    entries = [
        *rounds("ppo-gpt2", ours=[30], tuned=[10]),
        *rounds("ppo-gpt2-float32", ours=[20], tuned=[15]),
    ]
    assert lines_of(page.render(entries), "* PPO") == [
        "* PPO, gpt2: TRL was faster in float32 (15.0 tokens a second, and 10.0 in its row above)."
    ]


def test_what_is_not_the_default_of_the_peer_is_listed(page):
    changed = {"bf16": False, "gradient_checkpointing": False, "max_steps": 5}
    entries = [
        told("sft-gpt2", work="sft", changed=changed | {"bf16": True}),
        *rounds("sft-gpt2", ours=[30], tuned=[10]),
        told("sft-gpt2-float32", work="sft", changed=changed),
        *rounds("sft-gpt2-float32", ours=[30], tuned=[10]),
    ]
    said = lines_of(page.render(entries), "* sft")
    assert said == ["* sft: `bf16` False or True, `gradient_checkpointing` False."]


def test_the_machine_is_described(page):
    peak = {"peak": {"blas": "MKL", "1": PEAK, "2": PEAK}} | WHERE
    text = page.render([peak, told("ppo-gpt2"), *rounds("ppo-gpt2", ours=[30] * 4, tuned=[10] * 4)])
    for said in (
        "A CPU (family 1, model 2) with avx2, without amx_bf16; 2 cores, caches L1 1K",
        "threads: 2; MKL; torch 2, transformers 5",
        "1 thread: 100 GFLOP/s in float32, 200 in bfloat16, copies at 20 GB/s; 2 threads: 100",
        "took 2 minutes",
    ):
        assert said in text


def test_a_section_takes_the_place_of_the_one_before(table, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.put_between("new", page, table.BEGIN, table.END)
    assert page.read_text() == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(SystemExit, match="has no place for the table"):
        table.put_between("new", page, table.BEGIN, table.END)


def test_the_page_has_what_was_measured(table, page):
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(table.BEGIN)
    section, end, after = rest.partition(table.END)
    assert before
    assert end
    assert after
    entries = page.read(BENCHMARKS / "table.jsonl")
    assert section.strip() == page.render(entries), "run benchmarks/table.py --write"


# --- the operations that a row needs ---

LLAMA = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
}
TOKENS = 11


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4))


def llama():
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def counted(model, *, backward=False):
    """What torch counts for one text, less the later half of the attention, which it computes."""
    model.set_attn_implementation("eager")
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    config = model.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // 4)
    upper = config.num_hidden_layers * 2 * width * TOKENS * (TOKENS - 1)
    return counter.get_total_flops() - upper * (3 if backward else 1)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_operations_are_those_that_torch_counts(table, make):
    model = make().eval()
    sizes = sys.modules["flops"].Sizes.of(model.config.to_dict())
    forward = sizes.trunk(TOKENS) + sizes.head(TOKENS)
    assert counted(model) == forward
    assert counted(model, backward=True) == 3 * forward
    assert sys.modules["flops"].of_sft(sizes, [(TOKENS, TOKENS)]) == 3 * forward


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_operations_with_adapters_are_those_that_torch_counts(table):
    model = llama().eval()
    model.requires_grad_(False)
    sizes = sys.modules["flops"].Sizes.of(model.config.to_dict())
    upper, rank = 2, 3
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = list(range(sizes.blocks - upper, sizes.blocks))
    lora = peft.LoraConfig(r=rank, target_modules=every, layers_to_transform=layers)
    adapted = peft.get_peft_model(model, lora)
    adapters = sizes.adapters(TOKENS, rank, upper)
    plain = sizes.trunk(TOKENS) + sizes.head(TOKENS)
    assert counted(adapted.base_model.model) == plain + adapters
    # Nothing needs the gradient of what goes into the first adapted block: its three projections
    # and their adapters.
    keys = 2 * LLAMA["head_dim"]
    not_needed = 2 * TOKENS * (32 * (24 + 2 * keys) + 3 * 32 * rank)
    # And half of the attention in its first block goes on: the causal half that is subtracted.
    below = sizes.trunk(TOKENS, sizes.blocks - upper)
    wanted = below + sizes.frozen(TOKENS, upper) + 2 * sizes.head(TOKENS) + 3 * adapters
    lower_half = 2 * (sizes.blocks - upper) * 2 * 24 * TOKENS * (TOKENS - 1)
    found = counted(adapted.base_model.model, backward=True) + lower_half
    assert found == wanted - not_needed


def test_operations_of_an_iteration_of_ppo_by_hand(table):
    """Those that the study of this project worked out for GPT-2 4 x 256, in GFLOP."""
    flops = sys.modules["flops"]
    config = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "vocab_size": 50_257}
    arguments = argparse.Namespace(
        batch=16, prompt_length=32, response_length=32, epochs=4, lora_rank=0
    )
    total = flops.of_ppo(flops.Sizes.of(config), arguments, "ours") / 1e9
    assert total == pytest.approx(19.75 + 19.75 + 6.58 + 6.58 + 4 * 3 * (19.75 + 6.58), rel=1e-3)


# --- measuring ---


def test_both_sides_of_a_row_get_the_same_work(table, tmp_path):
    work = importlib.import_module("work")
    for row in table.ROWS.values():
        found = []
        for side in row.sides:
            words = table.command(row, side, tmp_path, "--threads 2")
            script = words.index(str(BENCHMARKS / f"peer_{row.work}.py")) if side != "ours" else 2
            parser = argparse.ArgumentParser()
            work.add_arguments(parser, row.work)
            arguments = vars(parser.parse_args(words[script + 1 :]))
            own = (
                "dtype",
                "attention",
                "frozen",
                "no_cache",
                "grouped",
                "padding_free",
                "products",
            )
            found.append({k: v for k, v in arguments.items() if k not in own})
        assert all(arguments == found[0] for arguments in found)
        assert found[0]["model"] == tmp_path / row.model


def test_every_work_is_compared_at_its_best_and_in_float32(table):
    best = [name for name in table.ROWS if not name.endswith("-float32")]
    assert list(table.ROWS)[: len(best)] == best  # the headline first
    for name in best:
        assert table.ROWS[name].precision == "bfloat16"
        wide = table.ROWS[f"{name}-float32"]
        assert (wide.precision, wide.peer_precision) == ("float32", "float32")
        assert {"ours", "tuned"} <= set(wide.sides) & set(table.ROWS[name].sides)


def test_only_the_plain_peer_runs_without_our_allocator_settings(table, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    for side in ("ours", "tuned", "peer"):
        found = table.environment(side)
        tuned = {name: found[name] for name in ENVIRONMENT if name in found}
        assert tuned == ({} if side == "peer" else ENVIRONMENT)
        assert ("PYTHONPATH" in found) == (side == "ours")


PROGRAM = """
import json, sys
print("a progress bar")
print(json.dumps({"program": "p", "work": "ppo", "threads": 2}), flush=True)
for number in range(%d):
    sys.stdin.readline()
    with open(%r, "a") as file:
        file.write(%r)
    seconds = {"generate": 1.0, "update": 3.0, "cpu": 0.5}
    print(json.dumps({"tokens": 8, "seconds": seconds, "peak_memory_mb": 7.0}), flush=True)
raise SystemExit("out of memory")
"""


@pytest.fixture
def asked(table, monkeypatch, tmp_path):
    """Programs that answer at once stand where the sides are; the order of turns is in a file."""
    order = tmp_path / "order"
    order.touch()

    def command(row, side, models, options):
        (tmp_path / "options").write_text(options)
        fails = (tmp_path / "fails").exists() and side == "tuned"
        return [sys.executable, "-c", PROGRAM % (2 if fails else 99, str(order), side[0])]

    monkeypatch.setattr(table, "command", command)
    monkeypatch.setattr(table, "per_token", lambda *_: 1.0)
    monkeypatch.setattr(table.Measuring, "_operations", lambda *_: 1.0)
    monkeypatch.setattr(table, "measure_peak", lambda _: {"blas": "MKL", "2": PEAK})
    return order


def test_sides_take_turns_and_each_round_is_kept_as_it_comes(
    table, page, asked, tmp_path, monkeypatch
):
    output, row = tmp_path / "table.jsonl", table.ROWS["ppo-gpt2-float32"]
    monkeypatch.setitem(table.ROWS, "ppo-gpt2-float32", replace(row, iterations=2))
    assert table.Measuring(tmp_path, output, {}, rounds=3).run(["ppo-gpt2-float32"])
    # Warmed up one after the other; then turns of two iterations, who begins is rotated.
    assert asked.read_text() == "otp" + "oottpp" + "ttppoo" + "ppoott"
    assert "--warmup 1 --iterations 6" in (tmp_path / "options").read_text()
    lines = page.newest(page.read(output), "ppo-gpt2-float32")
    assert [line["round"] for line in lines] == [0, 1, 2]
    turn = lines[0]["sides"]["tuned"]
    assert turn["tokens_per_second"] == 2 * 8 / (2 * 4.0)
    assert turn["seconds"] == {"generate": 2.0, "update": 6.0, "all": 8.0}
    assert lines[0]["commit"] == table.commit()
    asked.write_text("")
    assert table.Measuring(tmp_path, output, {}, rounds=4).run(["ppo-gpt2-float32"])
    assert asked.read_text() == "otp" + "oottpp"  # the fourth round alone
    asked.write_text("")
    assert table.Measuring(tmp_path, output, {}, rounds=4).run(["ppo-gpt2-float32"])
    assert asked.read_text() == ""
    assert "| PPO, gpt2 | float32 | 4 |" in page.render(page.read(output))


def test_nothing_begins_when_the_time_is_up(table, asked, tmp_path, capsys):
    output = tmp_path / "table.jsonl"
    assert table.Measuring(tmp_path, output, {}, minutes=0).run(["ppo-smol"])
    assert asked.read_text() == ""
    assert "the time is up before ppo-smol" in capsys.readouterr().err


def test_a_side_that_fails_is_said_and_its_round_measured_the_next_time(
    table, page, asked, tmp_path, capsys
):
    (tmp_path / "fails").touch()
    output = tmp_path / "table.jsonl"
    names = ["ppo-smol", "sft-smol"]
    assert not table.Measuring(tmp_path, output, {}, rounds=2).run(names)
    assert "out of memory" in capsys.readouterr().err
    for name in names:  # the second is measured though the first failed
        assert [line["round"] for line in page.newest(page.read(output), name)] == [0]
    (tmp_path / "fails").unlink()
    assert table.Measuring(tmp_path, output, {}, rounds=2).run(names)
    assert [line["round"] for line in page.newest(page.read(output), "ppo-smol")] == [0, 1]


def test_no_program_outlives_the_measuring(table):
    turns = importlib.import_module("turns")
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with turns.Program(words, os.environ) as program:
        assert program._process.poll() is None
    assert program._process.poll() is not None


def test_the_work_of_others_is_what_is_not_our_own(table, monkeypatch):
    turns = importlib.import_module("turns")
    busy = iter([100.0, 104.0, 200.0, 201.0])
    clock = iter([0.0, 2.0, 0.0, 2.0])
    monkeypatch.setattr(turns, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    others = turns.Others()
    others.begin()
    assert others.cores(3.0) == 0.5  # 4 seconds of processors in 2, 3 of them ours
    others.begin()
    assert others.cores(3.0) == 0.0  # rounded by the clock of the kernel


def test_the_peak_is_measured_by_a_program(table):
    found = table.measure_peak("--threads 1 --sizes 32 64 --megabytes 1")
    assert found["blas"]
    assert {"float32", "bfloat16", "copy_gb_s"} <= found["1"].keys()
    assert all(found["1"][key] > 0 for key in ("float32", "bfloat16", "copy_gb_s"))
    assert found["1"]["float32"] == max(found["1"]["by_size"]["float32"].values())


# --- on a GPU, and what a try of it shows ---


def gpu(*options):
    """What gpu.py prints, where the folder of a script is on its path as a user has it."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--try", "--sides", "ours", *options],
        capture_output=True,
        text=True,
        env=plain | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_our_side_of_the_gpu_script_runs_and_repeats_itself():
    _, ours, deterministic = gpu()
    assert ours.startswith("tiny, ours: ")
    assert all(f"{phase} " in ours for phase in ("generate", "score", "update"))
    same = "tiny, deterministic mode: two runs gave the same weights to the bit"
    assert deterministic.startswith(same)


def test_the_gpu_script_ends_in_time_and_says_so():
    assert gpu("--seconds", "1")[-1] == "1 seconds are over: the rest was not run"


# --- reward models on votes that people cast ---


@pytest.fixture
def votes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("reward_models")
    for name in ("reward_models", *MODULES):
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
