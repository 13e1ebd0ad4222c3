"""Roll-outs that a server samples: the server that stands in for vLLM, over HTTP, in a process of
its own."""

import hashlib
import json
import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import tiny
import torch
import uvicorn
from engine_server import place, serving

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import save_model
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import PolicySampler, uniforms
from rlhf_core.engines.remote import seeds
from rlhf_core.errors import CheckpointError, ConfigError, EngineError, NumericsError
from rlhf_core.launch import Job, launch
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy import experience, loop
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.training.recovery import Recovery
from tasks.engines import serve, vllm
from tasks.engines.folder import write_folder
from tasks.settings import read_settings

torch.set_num_threads(1)
WIDER = tiny.change(tiny.MODEL.fresh, width=32)
VLLM = SamplingConfig(**{**dict(tiny.SAMPLING), "engine": "vllm"})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = tiny.World.build(tmp_path_factory.mktemp("world") / "world")
    model, tokenizer = load_base(tiny.change(tiny.MODEL, fresh=WIDER), ["a room"], 0)
    save_model(model, tokenizer, made.sft.parent / "other", kind="policy")
    return made


@pytest.fixture(scope="module")
def untied(world):
    """What a server is started with."""
    folder = world.sft.parent / "untied"
    write_folder(str(world.sft), folder, read_settings())
    return folder


@pytest.fixture(scope="module")
def server(untied, tmp_path_factory):
    """An honest server, whose root is the folder of all tests."""
    with serving(untied, tmp_path_factory.getbasetemp()) as (address, _):
        yield address


@pytest.fixture
def engine(server, tmp_path):
    return place(tmp_path, server)


@pytest.fixture(scope="module")
def liar(world, untied, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    (root / "LIE").write_text("")
    with serving(untied, root, lies=True) as (address, _):
        yield address, root / "LIE"


def run_vllm(world, tmp_path, *addresses, config=tiny.CONFIGS["ppo"], sampling=VLLM, **settings):
    engine = place(tmp_path, *addresses)
    tiny.run(config, world, tmp_path / "out", sampling=sampling, engine=engine, **settings)


def seeded(actors):
    """The built-in sampler with the numbers that a server makes of its seeds."""
    own = PolicySampler(actors.policy, VLLM.temperature)

    def sampler(prompts, draws, *, between):
        rows = [
            uniforms(1, draws.shape[1], torch.Generator().manual_seed(seed))
            for seed in seeds(draws)
        ]
        return own(prompts, torch.cat(rows), between=between)

    return sampler


@pytest.fixture
def builtin(monkeypatch):
    """A run in one process with the same draws as those of the server."""

    def run(*arguments, **settings):
        with monkeypatch.context() as patch:
            of = loop.engine_of
            patch.setattr(loop, "engine_of", lambda s, w, a, _: of(s, w, a, seeded(a)))
            return tiny.run(*arguments, **settings)

    return run


def weights(folder):
    model = Policy.load(folder, "cpu")[0].model
    return torch.cat([w.detach().flatten() for w in model.state_dict().values()])


@pytest.mark.parametrize("name", ["ppo", "ppo_lora", "rloo", "grpo"])
def test_a_run_whose_rollouts_a_server_samples_is_the_run_of_one_process(
    name, world, engine, builtin, tmp_path
):
    config = tiny.CONFIGS[name]
    ours, theirs = MemoryLogger(), MemoryLogger()
    builtin(config, world, tmp_path / "ours", logger=ours)
    tiny.run(config, world, tmp_path / "theirs", sampling=VLLM, engine=engine, logger=theirs)
    of = "policy" if name.startswith("ppo") else ""
    one, other = (weights(tmp_path / run / of) for run in ("ours", "theirs"))
    moved = (one - weights(world.sft)).norm()
    assert moved > 0.01
    # The weights of importance are 1 to rounding, and AdamW's first steps make the most of it.
    assert (one - other).norm() < 0.01 * moved
    for (_, here), (_, there) in zip(ours.history, theirs.history, strict=True):
        assert {n for n in there if n not in here} == {
            "engine/kl",
            "engine/max_gap",
            "engine/truncated",
            "engine/seconds",
            "engine/sync_seconds",
        }
        assert {n: there[n] for n in here} == pytest.approx(here, rel=1e-3, abs=1e-5)
        # The same weights, so the same probabilities up to rounding, and weights of 1.
        assert there["engine/max_gap"] < 1e-4
        assert there["engine/truncated"] < 1
        assert there["engine/seconds"] > 0
        assert there["engine/sync_seconds"] > 0
    assert len(list(engine.folder.iterdir())) == 1


def test_without_importance_weights_both_runs_are_the_same_to_the_bit(
    world, engine, builtin, tmp_path, monkeypatch
):
    builtin(tiny.CONFIGS["ppo"], world, tmp_path / "ours")
    seen = []

    def dropped(rollout, config):
        seen.append(rollout)
        return replace(rollout, sampled=None)

    monkeypatch.setattr(experience, "with_importance", dropped)
    tiny.run(tiny.CONFIGS["ppo"], world, tmp_path / "theirs", sampling=VLLM, engine=engine)
    assert tiny.digest(tmp_path / "theirs") == tiny.digest(tmp_path / "ours")
    assert len(seen) == tiny.CONFIGS["ppo"].iterations
    for rollout in seen:
        mask = rollout.responses.mask
        assert torch.equal(rollout.sampled != 0, mask)
        assert torch.allclose(rollout.sampled[mask], rollout.logprobs[mask], atol=1e-4)


def test_rows_are_spread_over_servers_that_all_have_the_new_weights(world, server, liar, tmp_path):
    second, told = liar
    told.write_text("")
    two, found, config = place(tmp_path, server, second), MemoryLogger(), tiny.CONFIGS["ppo"]
    tiny.run(config, world, tmp_path / "a", sampling=VLLM, engine=two, logger=found)
    versions = {httpx.get(f"{a}/weight_info").json()["weight_version"] for a in two.addresses}
    assert versions == {folder.name for folder in two.folder.iterdir()}
    assert len(versions) == 1
    one, engine = MemoryLogger(), place(tmp_path / "one", server)
    tiny.run(config, world, tmp_path / "b", sampling=VLLM, engine=engine, logger=one)
    assert without_seconds(found.history) == without_seconds(one.history)
    assert told.with_name("ASKED").stat().st_size == 3 * 4  # half of 8 rows in 3 iterations


def without_seconds(history):
    return [{n: v for n, v in values.items() if "seconds" not in n} for _, values in history]


@pytest.mark.parametrize("lie", ["stale", "stale head"])
def test_a_server_that_keeps_old_weights_is_caught_by_the_gap(lie, world, liar, tmp_path):
    config = tiny.change(tiny.CONFIGS["ppo"], learning_rate=0.1, update_kl_limit=0, iterations=5)
    address, told = liar
    told.write_text(lie)
    says = "nats a token away .* beyond sampling.max_engine_kl 0.1: it computes another distribut"
    with pytest.raises(NumericsError, match=says):
        run_vllm(world, tmp_path, address, config=config)


def test_what_a_server_cannot_do_is_said_before_anything_is_sampled(
    world, server, tmp_path, monkeypatch, tmp_path_factory
):
    monkeypatch.setattr(vllm, "PAUSES", (0.01,))
    with pytest.raises(ConfigError, match="was given no servers; set RLHF_VLLM_URLS where it runs"):
        tiny.run(tiny.CONFIGS["ppo"], world, tmp_path / "out", sampling=VLLM)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1 cannot be reached"):
        run_vllm(world, tmp_path, "http://127.0.0.1:1")
    client = place(tmp_path, server).client()
    client.check(32)
    with pytest.raises(EngineError, match=r"reads texts of at most 32 tokens, and .* asks for 33"):
        client.check(33)
    outside = tmp_path_factory.getbasetemp().parent
    with pytest.raises(EngineError, match=r"could not load .* \(403 .*is not under the root"):
        client.load(outside, "1")
    with pytest.raises(EngineError, match=r"could not load .* \(500 .*weights of other shapes"):
        client.load(world.sft.parent / "other", "1")
    client.check(32)  # and it answers again


def test_a_server_whose_head_is_tied_is_refused(world, tmp_path):
    app = serve.create_app(serve.Engine(world.sft, tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=here.run, kwargs={"sockets": [listening]})
        thread.start()
        says = r"whose head shares .* python -m tasks\.engines\.folder, and start"
        with pytest.raises(EngineError, match=says):
            run_vllm(world, tmp_path, f"http://127.0.0.1:{listening.getsockname()[1]}")
        here.should_exit = True
        thread.join()


def test_a_run_that_is_stopped_in_an_iteration_finishes_it_with_what_was_sampled(
    world, server, tmp_path
):
    config, engine = tiny.CONFIGS["ppo"], place(tmp_path, server)
    whole, parts = MemoryLogger(), MemoryLogger()
    tiny.run(config, world, tmp_path / "whole", sampling=VLLM, engine=engine, logger=whole)

    class Stops(MemoryLogger):
        def phase(self, what, done=0, total=0):
            if what.startswith("updating, batch 2") and len(self.history) == 1:
                raise KeyError  # in the second iteration, after its first update

    recovery = Recovery(tmp_path / "checkpoints", every_seconds=0)
    resumed = {"sampling": VLLM, "recovery": recovery}
    with pytest.raises(KeyError):
        tiny.run(config, world, tmp_path / "out", engine=engine, logger=Stops(), **resumed)
    state = tiny.newest(recovery.directory)["positions"]["iteration"]
    kept = state["rollout"]
    assert torch.allclose(kept.sampled, kept.logprobs, atol=1e-4)
    assert kept.importance.shape == kept.logprobs.shape
    assert state["spent"].keys() == {"engine/seconds", "engine/sync_seconds"}
    tiny.run(config, world, tmp_path / "out", engine=engine, logger=parts, **resumed)
    assert without_seconds(parts.history) == without_seconds(whole.history)
    assert parts.history[1][1]["engine/seconds"] == state["spent"]["engine/seconds"]
    assert tiny.digest(tmp_path / "out") == tiny.digest(tmp_path / "whole")


def test_a_checkpoint_of_a_run_without_engines_goes_on(world, server, tmp_path):
    config, recovery = tiny.CONFIGS["ppo"], Recovery(tmp_path / "checkpoints", every_seconds=0)

    class Stops(MemoryLogger):
        def phase(self, what, done=0, total=0):
            if what.startswith("updating, batch 2"):
                raise KeyError

    with pytest.raises(KeyError):
        tiny.run(config, world, tmp_path / "out", recovery=recovery, logger=Stops())
    newest = max(recovery.directory.iterdir())
    manifest = json.loads((newest / "manifest.json").read_bytes())
    # As an earlier version wrote it.
    assert not [name for name in manifest["identity"] if "engine" in name or "importance" in name]
    state = tiny.newest(recovery.directory)
    del state["positions"]["iteration"]["spent"]
    rollout = state["positions"]["iteration"]["rollout"]
    for name in ("sampled", "importance"):
        object.__delattr__(rollout, name)
    torch.save(state, newest / "state.pt")
    content = (newest / "state.pt").read_bytes()
    manifest |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    tiny.run(config, world, tmp_path / "out", recovery=recovery)
    tiny.run(config, world, tmp_path / "whole")
    assert tiny.digest(tmp_path / "out") == tiny.digest(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"sampling\.engine was missing and is now vllm"):
        run_vllm(world, tmp_path, server, recovery=recovery)


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
def test_the_update_weighs_every_token(name, world, tmp_path, monkeypatch):
    config = tiny.CONFIGS[name]
    if name == "grpo":
        config = tiny.change(config, kl_coef=0)  # the KL in its loss has no weights

    def run(to, weight):
        def weighted(rollout, _):
            return replace(rollout, importance=torch.full_like(rollout.logprobs, weight))

        with monkeypatch.context() as patch:
            patch.setattr(experience, "with_importance", weighted)
            tiny.run(config, world, tmp_path / to)
        return weights(tmp_path / to / ("policy" if name == "ppo" else ""))

    tiny.run(config, world, tmp_path / "plain")
    plain = weights(tmp_path / "plain" / ("policy" if name == "ppo" else ""))
    assert run("one", 1.0).equal(plain)
    assert run("zero", 0.0).equal(weights(world.sft))
    assert not plain.equal(weights(world.sft))


def test_what_is_logged_is_what_the_page_of_metrics_defines(world, server, tmp_path):
    log = MemoryLogger()
    run_vllm(
        world, tmp_path, server, config=tiny.change(tiny.CONFIGS["ppo"], iterations=1), logger=log
    )
    page = (Path(tiny.__file__).parents[3] / "docs" / "metrics.md").read_text()
    defined = set(re.findall(r"^\| `(engine/\w+)` \|", page, re.M))
    assert defined == {name for name in log.history[0][1] if name.startswith("engine/")}


@pytest.mark.faults
def test_two_ranks_ask_for_their_own_rows_and_one_sends_the_weights(world, server, tmp_path):
    config = tiny.CONFIGS["rloo"]
    alone, both = MemoryLogger(), MemoryLogger()
    tiny.run(
        config, world, tmp_path / "a", sampling=VLLM, engine=place(tmp_path, server), logger=alone
    )
    work = tiny.work_of(
        "rloo", world, tmp_path / "b", sampling=VLLM, engine=place(tmp_path / "two", server)
    )
    launch(Job.of("rloo", config, work, processes=2, strategy="ddp"), both)
    for (_, one), (_, two) in zip(alone.history, both.history, strict=True):
        names = [name for name in one if "seconds" not in name]
        assert {n: two[n] for n in names} == pytest.approx(
            {n: one[n] for n in names}, rel=1e-3, abs=1e-4
        )
        assert two["engine/seconds"] > 0
    assert len(list((tmp_path / "two" / "weights").iterdir())) == 1


def test_seeds_are_one_for_each_row_and_keep_the_order_of_the_draws():
    draws = torch.tensor([[0.5, 0.25, 0.9], [0.0, 0.0, 0.0], [1 - 2**-24, 1 - 2**-24, 0.0]])
    assert seeds(draws) == [2**23 + 2**22 * 2**24, 0, 2**48 - 1]
    assert seeds(draws[:, :1]) == [2**23, 0, 2**24 - 1]
    many = uniforms(4096, 2, torch.Generator().manual_seed(0))
    assert len(set(seeds(many))) == 4096


LIES = {
    "short": "it stops after 1 tokens without one that ends it",
    "many": r"it has \d+ tokens, and 1 to 8 were asked for",
    "outside": r"token 100000 is not in the vocabulary of 290",
    "float": "gave a reply that cannot be read .TypeError: 7.0 is no token id",
    "fewer": r"it has (\d) tokens and \d log-probabilities",
    "absent": "gave a reply that cannot be read .TypeError",
    "nan": "-9999.0 is not the log-probability of a token that was drawn",
    "positive": "0.5 is not the log-probability of a token that was drawn",
    "unversioned": "gave a reply that cannot be read .TypeError",
    "error": r"refused /inference/v1/generate \(500 Internal Server Error\); look into its log",
    "raw": "with --logprobs-mode processed_logprobs",
    "restarted": r"drew with the weights 'default', and not with those that it was given",
    "between": r"drew with the weights 'older and [0-9a-f]{16}', and not with",
    "dies": r"cannot be reached \(.*\); start it, or correct RLHF_VLLM_URLS, then repeat",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_stops_the_run_and_is_named(lie, world, liar, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "PAUSES", (0.01,))
    address, told = liar
    told.write_text(lie)
    with pytest.raises(EngineError, match=LIES[lie]) as caught:
        run_vllm(world, tmp_path, address)
    assert f"the server at {address} " in str(caught.value)
