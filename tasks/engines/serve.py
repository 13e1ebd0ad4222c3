"""A small server that samples as the training itself does, and speaks as vLLM does to our client.

    python -m tasks.engines.serve --model FOLDER --root FOLDER [--host 127.0.0.1] [--port 8000]

FOLDER of the model is one that `tasks.engines.folder` wrote.

It stands in for vLLM where there is none: to try the whole way over HTTP on a laptop, and in the
tests. Prompts are answered one after the other, each by itself, so that a seed gives the same
answer whatever else is asked: it is no faster than the training. Weights are read from folders
under the root alone, and as safetensors, which run no code.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from rlhf_core.backbone.context import context_of
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import sample_with_logprobs, uniforms
from rlhf_core.errors import UserError
from rlhf_core.types import PromptBatch

UNLIMITED = 1_000_000  # tokens: the longest text of a model without a limit


class SamplingParams(BaseModel):
    """How a prompt is continued, of vLLM's names those that are known here."""

    n: Literal[1] = 1
    seed: int = 0
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, ge=1, le=1)
    top_k: Literal[-1, 0, 1] = 0  # all tokens, or the likeliest
    min_p: float = Field(0.0, ge=0, le=0)
    max_tokens: int = Field(16, ge=1)
    logprobs: Literal[0] = 0  # those of the drawn tokens
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    detokenize: bool = False


class Generate(BaseModel):
    """A prompt as token ids."""

    token_ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    sampling_params: SamplingParams


class Weights(BaseModel):
    """A folder with weights."""

    weights_path: Path


class NewVersion(BaseModel):
    """A name for the weights."""

    new_version: str


class Engine:
    """A policy that is asked one prompt after the other, and whose weights change in between.

    Args:
        model: the model directory to begin with; later ones need its architecture and size.
        root: the folder under which weights may lie.
    """

    def __init__(self, model: Path, root: Path, device: str = "cpu") -> None:
        self.model = model
        self.version = "default"
        self._root = root.resolve()
        self._device = device
        self._policy = self._read(model)
        self._one = asyncio.Lock()
        self._going = asyncio.Event()
        self._going.set()

    @property
    def longest(self) -> int:
        """The longest text (tokens)."""
        return context_of(self._policy.model) or UNLIMITED

    async def pause(self) -> None:
        """Begin no answer more, and wait for the one that is under way."""
        self._going.clear()
        async with self._one:
            pass

    def resume(self) -> None:
        """Answer again."""
        self._going.set()

    async def answer(self, asked: Generate) -> dict[str, Any]:
        """A choice in vLLM's words."""
        while True:
            await self._going.wait()
            async with self._one:
                if self._going.is_set():
                    return await asyncio.to_thread(self.draw, asked)

    async def reload(self, folder: Path) -> None:
        """Take over the weights in a folder under the root.

        Raises: UserError when they cannot be read or do not fit; PermissionError elsewhere.
        """
        if not folder.resolve().is_relative_to(self._root):
            raise PermissionError(f"{folder} is not under the root of this server")
        async with self._one:
            new = await asyncio.to_thread(self._read, folder)
            if _shapes(new) != _shapes(self._policy):
                raise UserError(
                    f"{folder} has weights of other shapes than the model that is served; start "
                    "the server with a model of that architecture and size"
                )
            self._policy = new

    def draw(self, asked: Generate) -> dict[str, Any]:
        """Continue one prompt."""
        how, policy = asked.sampling_params, self._policy
        ids = torch.tensor([asked.token_ids], device=self._device)
        steps = min(how.max_tokens, self.longest - ids.shape[1])
        uniform = uniforms(1, steps, torch.Generator().manual_seed(how.seed))
        ends = set(how.stop_token_ids)
        if not how.ignore_eos:
            ends |= {int(policy.model.config.eos_token_id)}
        responses, logprobs = sample_with_logprobs(
            policy,
            PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool)),
            uniform,
            temperature=0.0 if how.top_k == 1 else how.temperature,
            eos_token_id=sorted(ends),
            pad_token_id=int(policy.model.config.pad_token_id),
        )
        tokens = responses.tokens[0].tolist()
        content = [
            {"token_id": token, "logprob": logprob}
            for token, logprob in zip(tokens, logprobs[0].tolist(), strict=True)
        ]
        return {
            "index": 0,
            "token_ids": tokens,
            "logprobs": {"content": content},
            "finish_reason": "stop" if bool(responses.finished[0]) else "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
        }

    def _read(self, folder: Path) -> Policy:
        return Policy.load(folder, self._device)[0]


def _shapes(policy: Policy) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in policy.model.named_parameters()}


def create_app(engine: Engine) -> FastAPI:
    """The calls of vLLM that our client makes."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def no_browser(
        request: Request, go_on: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """A page on the web may make a browser send requests here; they have this header."""
        if "origin" in request.headers:
            return JSONResponse({"error": {"message": "not for browsers"}}, status_code=403)
        return await go_on(request)

    @app.get("/health")
    async def health() -> None:
        """Whether it runs."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and the longest text."""
        name = str(engine.model)
        model = {"id": name, "root": name, "max_model_len": engine.longest}
        return {"object": "list", "data": [model]}

    @app.post("/inference/v1/generate")
    async def generate(asked: Generate) -> dict[str, Any]:
        """Continue a prompt."""
        if len(asked.token_ids) >= engine.longest:
            raise HTTPException(400, f"the prompt is longer than {engine.longest - 1} tokens")
        return {"choices": [await engine.answer(asked)]}

    @app.post("/pause")
    async def pause(mode: Literal["wait"]) -> dict[str, str]:
        """Begin no answer more; those under way are finished."""
        await engine.pause()
        return {"status": "paused"}

    @app.post("/resume")
    async def resume() -> dict[str, str]:
        """Answer again."""
        engine.resume()
        return {"status": "resumed"}

    @app.post("/collective_rpc")
    async def collective_rpc(
        method: Annotated[Literal["reload_weights"], Body()], kwargs: Annotated[Weights, Body()]
    ) -> dict[str, Any]:
        """Take over weights: the one method that may be called from outside."""
        try:
            await engine.reload(kwargs.weights_path)
        except PermissionError as error:
            raise HTTPException(403, str(error)) from None
        except (UserError, LookupError) as error:
            raise HTTPException(500, str(error)) from None
        return {"results": [None]}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, bool]:
        """Nothing is kept from one prompt to the next."""
        return {"success": True}

    @app.post("/update_weight_version")
    async def update_weight_version(asked: NewVersion) -> dict[str, Any]:
        """Name the weights."""
        engine.version = asked.new_version
        return {"success": True, "new_version": asked.new_version}

    @app.get("/weight_info")
    async def weight_info() -> dict[str, str]:
        """The name of the weights."""
        return {"weight_version": engine.version}

    return app


def main() -> None:
    """The command."""
    about = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tasks.engines.serve", description=about)
    parser.add_argument("--model", type=Path, required=True, help="model directory to begin with")
    parser.add_argument(
        "--root", type=Path, required=True, help="folder with all weights, as that of RLHF_HOME"
    )
    parser.add_argument("--host", default="127.0.0.1", help="whoever reaches it may use it")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the training needs some too
    try:
        engine = Engine(given.model, given.root)
    except UserError as error:
        parser.error(str(error))
    uvicorn.run(create_app(engine), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
