"""The server that stands in for vLLM, in a process of its own, and one that lies.

    python -m engine_server --model FOLDER --root FOLDER --port N

The second is told by the file LIE in its root what to do wrong.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from rlhf_core.engines.client import EnginePlace
from tasks.engines import serve

FACTORY = "tasks.engines.vllm:VllmClient"


@contextmanager
def serving(model, root, *, lies=False, port=None):
    """The address of a server, which ends with the block, and its process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = port or found.getsockname()[1]
    module = "engine_server" if lies else "tasks.engines.serve"
    command = [sys.executable, "-P", "-m", module, "--model", str(model), "--root", str(root)]
    here = [str(Path(__file__).parent), str(Path(serve.__file__).parents[2])]
    path = os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600
        while True:
            assert process.poll() is None, "the server has ended"
            try:
                httpx.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < until
                time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()


def place(folder, *addresses):
    """What a stage is told about servers."""
    return EnginePlace(factory=FACTORY, addresses=addresses, folder=folder / "weights")


class Liar(serve.Engine):
    """A server that does what the file LIE says, once it has been given weights."""

    loads, lie = 0, ""

    async def reload(self, folder):
        found = (self._root / "LIE").read_text()
        if found != self.lie:
            self.lie, self.loads = found, 0
        self.loads += 1
        if self.lie == "stale" and self.loads > 1:
            return
        old = self._policy.model.get_output_embeddings().weight
        await super().reload(folder)
        if self.lie == "stale head" and self.loads > 1:
            self._policy.model.get_output_embeddings().weight = old

    def draw(self, asked):
        if self.lie == "restarted" and self.loads > 1:
            self.version = "default"
        found = super().draw(asked)
        content = found["logprobs"]["content"]
        if asked.sampling_params.top_k == 1:  # the trial of the client
            if (self._root / "LIE").read_text() == "raw":
                content[0]["logprob"] = -2.5
            return found
        with (self._root / "ASKED").open("a") as file:
            file.write(".")
        match self.lie:
            case "dies":
                os._exit(1)
            case "short":
                del found["token_ids"][1:], content[1:]
                found["token_ids"][0] = 7
                found["weight_versions"][0]["end"] = 1
            case "many":
                found["token_ids"] += [7] * 20
                content += [{"token_id": 7, "logprob": -1.0}] * 20
                found["weight_versions"][0]["end"] += 20
            case "outside":
                found["token_ids"][0] = 100_000
            case "float":
                found["token_ids"][0] = 7.0
            case "fewer":
                content.pop()
            case "absent":
                found["logprobs"] = None
            case "nan":
                content[0]["logprob"] = -9999.0
            case "positive":
                content[0]["logprob"] = 0.5
            case "unversioned":
                found["weight_versions"] = None
            case "between":  # new weights came while it was drawn
                found["weight_versions"][0]["start"] = 1
                found["weight_versions"].insert(0, {"version": "older", "start": 0, "end": 1})
            case "error":
                raise RuntimeError("out of memory")
        return found


if __name__ == "__main__":
    serve.Engine = Liar
    serve.main()
