"""Speaks to vLLM servers over HTTP: token ids in and out, weights by folder, a version for both.

A server is started with VLLM_SERVER_DEV_MODE=1, --enable-scale-out and --logprobs-mode
processed_logprobs (docs/engines.md). Its calls, as of vLLM 0.32:

    POST /inference/v1/generate    token ids in, token ids and log-probabilities out
    POST /pause, /resume           around new weights
    POST /collective_rpc           reload_weights from a folder
    POST /reset_prefix_cache       which the old weights filled
    POST /update_weight_version    a name for the weights, which every answer repeats
    GET  /weight_info, /v1/models  that name; the longest text
"""

import json
import ssl
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import httpx

from rlhf_core.backbone.pretrained import is_tied
from rlhf_core.engines.client import Answer, Question, Rules
from rlhf_core.errors import EngineError
from tasks.judges.parallel import in_parallel

CONNECT_SECONDS = 10.0
REPLY_SECONDS = 600.0  # for an answer: a server may have a long queue
LOAD_SECONDS = 1800.0  # for weights, which may come from a slow disk
PAUSES = (0.5, 2.0, 8.0)  # seconds before another try, when a connection failed
BUSY = (429, 503)  # statuses that a later try may not meet
AT_ONCE = 128  # requests that a server has at a time
GENERATE = "/inference/v1/generate"
_QUOTED = 300  # characters of a reply in a message

T = TypeVar("T")
_Ask: TypeAlias = Callable[[tuple[str, Question], threading.Event], Answer]


class VllmClient:
    """Shares prompts out to servers that all have the same weights."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)

    def check(self, context: int) -> None:
        """Raise EngineError unless all servers can do what is needed, with texts of `context`
        tokens."""
        with _http() as http:
            for address in self._addresses:
                _Server(http, address).check(context)

    def load(self, folder: Path, version: str) -> None:
        """Have all servers take over the weights in a model directory, under the name `version`.

        Raises: EngineError when one of them does not.
        """

        def load(address: str, stop: threading.Event) -> None:
            with _http() as http:
                _Server(http, address).load(folder, version)

        @contextmanager
        def worker() -> Iterator[Callable[[str, threading.Event], None]]:
            yield load

        with closing(in_parallel(worker, self._addresses, len(self._addresses))) as loaded:
            for _ in loaded:
                pass

    def answers(self, questions: Sequence[Question], rules: Rules) -> Generator[tuple[int, Answer]]:
        """The number of each question and its answer, as they come.

        Raises: EngineError when one is not answered.
        """
        # Neighbours go to one server: they may share a prompt, which it then reads once.
        servers = len(self._addresses)
        share = -(-len(questions) // servers)
        asked = [(self._addresses[i // share], question) for i, question in enumerate(questions)]

        @contextmanager
        def worker() -> Iterator[_Ask]:
            # Each thread has its own: some may wait for a reply when all are told to stop.
            with _http() as http:
                yield partial(_ask, http, rules)

        with closing(in_parallel(worker, asked, AT_ONCE * servers)) as answers:
            yield from answers


def _ask(
    http: httpx.Client, rules: Rules, asked: tuple[str, Question], stop: threading.Event
) -> Answer:
    address, question = asked
    return _Server(http, address, stop).answer(question, rules)


@contextmanager
def _http() -> Iterator[httpx.Client]:
    timeout = httpx.Timeout(REPLY_SECONDS, connect=CONNECT_SECONDS)
    with httpx.Client(timeout=timeout, verify=_trusted()) as http:
        yield http


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates to trust, read once: it takes a hundred times as long as a connection."""
    return httpx.create_ssl_context()


class _Server:
    """One server.

    Args:
        stop: set when nobody waits for the reply any more.
    """

    def __init__(
        self, http: httpx.Client, address: str, stop: threading.Event | None = None
    ) -> None:
        self._http = http
        self._address = address
        self._stop = stop or threading.Event()

    def check(self, context: int) -> None:
        """Raise EngineError unless it can do what is needed."""
        models = self._call("GET", "/v1/models")
        longest = self._read(models, lambda read: read["data"][0].get("max_model_len") or context)
        if longest < context:
            self._fail(
                f"reads texts of at most {longest} tokens, and sampling.max_prompt_length + "
                f"max_new_tokens asks for {context}; start it with --max-model-len {context} or "
                "more, or lower the settings"
            )
        root = self._read(models, lambda read: Path(str(read["data"][0].get("root", ""))))
        if (root / "config.json").is_file() and is_tied(root):
            self._fail(
                f"was started with {root}, whose head shares the weights of the embeddings; such a "
                "head is not renewed with them. Write a folder without that by python -m "
                "tasks.engines.folder, and start the server with it"
            )
        reply = self._request("GET", "/weight_info")
        if reply.status_code == 404:
            self._fail("takes no weights; start it with VLLM_SERVER_DEV_MODE=1 in its environment")
        self._checked(reply)
        # One that was left paused, by a run that was killed meanwhile, would answer nobody.
        self._call("POST", "/resume")
        likeliest = {"top_k": 1, "max_tokens": 1, "logprobs": 0, "seed": 0, "detokenize": False}
        reply = self._request("POST", GENERATE, {"token_ids": [0], "sampling_params": likeliest})
        if reply.status_code in (403, 404):
            self._fail("does not take token ids; start it with --enable-scale-out")
        logprob = self._read(
            self._checked(reply), lambda read: _logprobs(read["choices"][0]["logprobs"])[0]
        )
        # Of all tokens but one nothing is left, so its probability is 1 unless it is the raw one.
        if abs(logprob) > 1e-3:
            self._fail(
                "tells log-probabilities of another distribution than it draws from; start it "
                "with --logprobs-mode processed_logprobs"
            )

    def load(self, folder: Path, version: str) -> None:
        """Have it take over weights."""
        wait = httpx.Timeout(LOAD_SECONDS, connect=CONNECT_SECONDS)
        self._call("POST", "/pause?mode=wait", timeout=wait)
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            reply = self._request("POST", "/collective_rpc", reload, timeout=wait)
            if not reply.is_success:
                self._fail(
                    f"could not load the weights in {folder} ({_said(reply)}); it has to see that "
                    "folder under the same path, and to serve a model of the same architecture "
                    "and size (docs/engines.md)"
                )
            reset = self._call("POST", "/reset_prefix_cache")
            if reset and reset.get("success") is False:
                self._fail("could not forget what the old weights had read; start it again")
            self._call("POST", "/update_weight_version", {"new_version": version})
        except BaseException:
            with suppress(EngineError):
                self._call("POST", "/resume")
            raise
        self._call("POST", "/resume")
        found = self._call("GET", "/weight_info").get("weight_version")
        if found != version:
            self._fail(
                f"was given the weights {version} and says that it has {found}; give each run "
                "servers of its own"
            )

    def answer(self, question: Question, rules: Rules) -> Answer:
        """Have it continue a prompt."""
        body = {
            "token_ids": question.prompt,
            "sampling_params": {
                "n": 1,
                "seed": question.seed,
                "temperature": rules.temperature,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "max_tokens": rules.max_tokens,
                "logprobs": 0,
                # What ends a response here, whatever the server was started with.
                "ignore_eos": True,
                "stop_token_ids": list(rules.ends),
                "detokenize": False,
            },
        }
        return self._read(self._call("POST", GENERATE, body), self._answer)

    def _answer(self, reply: Any) -> Answer:
        (choice,) = reply["choices"]
        tokens = [_whole(token) for token in choice["token_ids"]]
        spans = [(s["version"], s["start"], s["end"]) for s in choice["weight_versions"]]
        whole = len(spans) == 1 and spans[0][1:] == (0, len(tokens))
        return Answer(
            tokens=tokens,
            logprobs=_logprobs(choice["logprobs"]),
            version=str(spans[0][0]) if whole else " and ".join(str(s[0]) for s in spans),
            source=self._address,
        )

    def _call(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """The JSON object that a successful request is answered with; {} for none."""
        return self._checked(self._request(method, path, body, **options))

    def _checked(self, reply: httpx.Response) -> dict[str, Any]:
        if not reply.is_success:
            self._fail(f"refused {reply.request.url.path} ({_said(reply)}); look into its log")
        if not reply.content:
            return {}
        return self._read(reply.text, lambda text: dict(json.loads(text)))

    def _request(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """One request, repeated when the connection failed or the server is too busy.

        All of them may be repeated: the same weights can be loaded twice, and a seed draws the
        same again.
        """
        given = {} if body is None else {"json": body}
        for pause in (*PAUSES, None):
            try:
                reply = self._http.request(method, self._address + path, **given, **options)
                if reply.status_code not in BUSY or pause is None:
                    return reply
            except httpx.TimeoutException as error:
                if pause is None or not isinstance(error, httpx.ConnectTimeout):
                    self._fail(
                        f"did not answer {path} in time ({type(error).__name__}); look into its "
                        "log, and give it fewer prompts (rollout_size) or more servers"
                    )
            except httpx.HTTPError as error:
                if pause is None or self._stop.is_set():
                    self._fail(
                        f"cannot be reached ({_cause(error)}); start it, or correct "
                        "RLHF_VLLM_URLS, then repeat the command to go on"
                    )
            self._stop.wait(pause)
        raise AssertionError

    def _read(self, reply: Any, take: Callable[[Any], T]) -> T:
        """What `take` finds in a reply, in which anything may be missing."""
        try:
            return take(reply)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            shown = reply if isinstance(reply, str) else json.dumps(reply)
            self._fail(
                f"gave a reply that cannot be read ({type(error).__name__}: {error}): "
                f"{shown[:_QUOTED]!r}; check that it is vLLM of a tested version (docs/engines.md)"
            )

    def _fail(self, says: str) -> NoReturn:
        raise EngineError(f"the server at {self._address} {says}")


def _logprobs(found: Any) -> list[float]:
    return [float(each["logprob"]) for each in found["content"]]


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no token id")
    return value


def _said(reply: httpx.Response) -> str:
    """Status and text of a refusal, in a line."""
    text = " ".join(reply.text.split())
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(reply.content)["error"]["message"])
    return f"{reply.status_code} {text[:_QUOTED]}".strip()


def _cause(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__
