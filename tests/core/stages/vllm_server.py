"""A real vLLM server, from a Python environment of its own."""

import os
import subprocess
import time
from contextlib import contextmanager

import httpx

PYTHON = os.environ.get("RLHF_TEST_VLLM_PYTHON", "")
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"),
    *("--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
)


@contextmanager
def vllm_serving(model, port, *flags, log):
    """The address of a server on this machine's CPUs, which ends with the block."""
    module = "vllm.entrypoints.openai.api_server"
    command = [PYTHON, "-m", module, "--model", str(model), "--host", "127.0.0.1"]
    own = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    kept = {name: v for name, v in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), *FLAGS, *flags],
            env={**kept, **own},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                httpx.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < until
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
