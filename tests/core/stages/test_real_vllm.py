"""PPO whose roll-outs a real vLLM samples, beside PPO that samples itself."""

import socket
import statistics
from dataclasses import replace

import pytest
import tiny
import torch
from engine_server import place
from vllm_server import PYTHON, vllm_serving

from rlhf_core.errors import EngineError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.model import SamplingConfig
from tasks.engines.folder import write_folder
from tasks.settings import read_settings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="set RLHF_TEST_VLLM_PYTHON to the Python of a vLLM"),
    pytest.mark.timeout(1800),
]
torch.set_num_threads(1)
# vLLM's attention on CPUs has heads of at least 32.
MODEL = tiny.change(tiny.MODEL, fresh=tiny.change(tiny.MODEL.fresh, width=64, context=64))
VLLM = SamplingConfig(**{**dict(tiny.SAMPLING), "engine": "vllm"})
PPO = tiny.change(
    tiny.CONFIGS["ppo"], iterations=12, rollout_size=32, batch_size=16, learning_rate=1e-3
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = tiny.World.build(tmp_path_factory.mktemp("world") / "world")
    folder = made.data.parent / "wider"
    reward = folder / "reward"
    made = replace(made, sft=folder / "sft", reward=reward, reward_adapter=reward)
    longer = {"epochs": 12, "learning_rate": 1e-2}
    tiny.run(tiny.change(tiny.CONFIGS["sft"], **longer), made, made.sft, model=MODEL)
    tiny.run(tiny.change(tiny.CONFIGS["reward_model"], **longer), made, made.reward, model=MODEL)
    return made


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def address(world):
    folder = world.sft.parent / "server"
    write_folder(str(world.sft), folder, read_settings())
    with vllm_serving(folder, free_port(), log=world.sft.parent / "vllm.log") as found:
        yield found


def mean_of_last(log, name, number=3):
    return statistics.mean(log.series(name)[-number:])


@pytest.mark.parametrize("name", ["ppo", "ppo_lora"])
def test_a_run_with_vllm_reaches_what_the_built_in_one_does(name, world, address, tmp_path):
    lora = {"lora_rank": 8, "learning_rate": 1e-2}
    config = tiny.change(PPO, **lora) if name == "ppo_lora" else PPO
    ours, theirs = MemoryLogger(), MemoryLogger()
    tiny.run(config, world, tmp_path / "ours", logger=ours)
    engine = place(tmp_path, address)
    tiny.run(config, world, tmp_path / "out", sampling=VLLM, engine=engine, logger=theirs)
    start, here, there = (
        ours.series("objective/score")[0],
        mean_of_last(ours, "objective/score"),
        mean_of_last(theirs, "objective/score"),
    )
    print(f"{name}: score {start:.2f} -> {here:.2f} built-in, {there:.2f} vLLM")
    print({n: theirs.series(n) for n in theirs.history[0][1] if n.startswith("engine/")})
    assert here > start + 0.5  # it learns something
    assert there == pytest.approx(here, abs=0.5)
    # Both compute in float32 from the same weights: the same probabilities to rounding.
    assert max(theirs.series("engine/max_gap")) < 1e-3
    assert max(abs(kl) for kl in theirs.series("engine/kl")) < 1e-4


def test_a_server_without_what_is_needed_is_told_so(world, tmp_path):
    log = tmp_path / "vllm.log"
    raw = ("--logprobs-mode", "raw_logprobs")
    with vllm_serving(world.sft.parent / "server", free_port(), *raw, log=log) as address:
        with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
            place(tmp_path, address).client().check(14)
        with pytest.raises(EngineError, match="reads texts of at most 64 tokens"):
            place(tmp_path, address).client().check(65)
