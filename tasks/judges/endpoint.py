"""A model behind an OpenAI-compatible endpoint as a judge."""

import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import openai

from rlhf_core.errors import ConfigError, UserError
from rlhf_core.judges.judge import Pair, Verdict
from rlhf_core.metrics import StageLogger
from rlhf_core.settings.judge import EndpointConfig
from tasks.judges.meter import Meter
from tasks.judges.parallel import in_parallel
from tasks.judges.wording import question, read_reply

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries; the pause doubles
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait
IN_A_ROW = 30  # questions without a verdict, after which more will not help
PASSING = (408, 409, 425, 429)  # statuses that a later try may not meet, beside 5xx
HOPELESS = {
    401: "does not accept the key; set RLHF_JUDGE_KEY to a valid one",
    403: "does not allow this; check what the key in RLHF_JUDGE_KEY may do",
    404: "knows no model {model}, or the address is wrong; check judge.endpoint.model and "
    "RLHF_JUDGE_URL, which usually ends in /v1",
}
_NEWER = "max_completion_tokens"  # of OpenAI's own models; other servers know max_tokens alone
_QUOTED = 200  # characters of a reply in a message
_TRIAL = Pair("What is 2 + 2?", "It is 4.", "It is 5.")


@dataclass(frozen=True)
class _Trouble:
    """Why a request gave no verdict."""

    says: str
    again: bool = True  # whether a later try may do better
    wait: float | None = None  # seconds that the server asks to wait
    fatal: bool = False  # whether no question can be answered


class EndpointJudge:
    """Asks a model which of two answers is better, in the order in which they are shown.

    A request that fails for now (rate limit, time-out, 5xx, no connection) or whose reply has no
    verdict is repeated up to `retries` times, with pauses that double, or as long as the server
    asks for. Then the question is unanswered, and its reason says why.

    Args:
        address: of the endpoint, with /v1.
        key: sent to that address and nowhere else: redirects are not followed.
        meter: counts requests, tokens and seconds.
        pause: of the first repetition (s).
    """

    def __init__(
        self,
        config: EndpointConfig,
        address: str,
        key: str,
        *,
        logger: StageLogger,
        meter: Meter,
        pause: float = FIRST_PAUSE,
    ) -> None:
        self.name = config.model
        self._config = config
        self._address = address
        self._logger = logger
        self._meter = meter
        self._pause = pause
        self._not_before = 0.0  # no request earlier: one that was told to wait speaks for all
        self._length = "max_tokens"
        self._key = key

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair.

        Raises: as `stream` does.
        """
        found = dict(self.stream(pairs))
        return [found[number] for number in range(len(pairs))]

    def stream(self, pairs: Sequence[Pair]) -> Generator[tuple[int, Verdict]]:
        """The number of each pair and its verdict, as they come.

        Raises: ConfigError when the endpoint refuses the key or the model; UserError when many
            questions in a row are not answered.
        """
        in_a_row, reasons = 0, Counter[str]()
        what = f"asking {self.name}"
        self._logger.phase(what, 0, len(pairs))
        with closing(in_parallel(self._worker, pairs, self._config.parallel)) as asked:
            for done, (number, verdict) in enumerate(asked, start=1):
                self._logger.phase(what, done, len(pairs))
                in_a_row = in_a_row + 1 if verdict.winner is None else 0
                if verdict.winner is None:
                    reasons[verdict.reason] += 1
                if in_a_row >= IN_A_ROW:
                    raise UserError(
                        f"the judge {self.name} at {self._address} gave no verdict on {in_a_row} "
                        f"questions in a row ({verdict.reason}); check the endpoint and "
                        "judge.endpoint, then repeat the command: verdicts so far are kept"
                    )
                yield number, verdict
        if reasons:
            (common, _), *_ = reasons.most_common(1)
            log.warning(
                "the judge %s left %d of %d questions unanswered (most often: %s)",
                *(self.name, sum(reasons.values()), len(pairs), common),
            )

    def try_out(self) -> None:
        """Ask one easy question, to find a wrong key, model or setting before hours of training.

        Raises: ConfigError when it is not answered at all. A reply without a verdict is a warning,
            since another may have one.
        """
        with self._connect() as client:
            trouble = self._insist(client, _TRIAL, threading.Event(), repeat_malformed=False)
        if isinstance(trouble, _Malformed):
            log.warning("the judge %s replied to an easy question, but %s", self.name, trouble.says)
        elif isinstance(trouble, _Trouble):
            raise ConfigError(
                f"the judge {self.name} at {self._address} does not answer ({trouble.says}); check "
                "the endpoint, RLHF_JUDGE_URL and judge.endpoint"
            )

    def _connect(self) -> openai.OpenAI:
        """A client, for one thread."""
        return openai.OpenAI(
            base_url=self._address,
            api_key=self._key or "none",  # a server that asks for no key reads none
            max_retries=0,
            timeout=self._config.timeout_seconds,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    @contextmanager
    def _worker(self) -> Iterator[Callable[[Pair, threading.Event], Verdict]]:
        """What a thread asks with."""
        with self._connect() as client:
            yield partial(self._ask, client)

    def _ask(self, client: openai.OpenAI, pair: Pair, stop: threading.Event) -> Verdict:
        found = self._insist(client, pair, stop)
        return found if isinstance(found, Verdict) else Verdict(None, found.says)

    def _insist(
        self,
        client: openai.OpenAI,
        pair: Pair,
        stop: threading.Event,
        *,
        repeat_malformed: bool = True,
    ) -> "Verdict | _Trouble":
        """Ask until there is a verdict, or as often as is allowed.

        Raises: ConfigError when no question can be answered.
        """
        for attempt in range(self._config.retries + 1):
            stop.wait(max(0.0, self._not_before - time.monotonic()))
            found = self._request(client, pair)
            if isinstance(found, Verdict) or stop.is_set():
                return found
            if found.fatal:
                raise ConfigError(f"the judge {self.name} at {self._address} {found.says}")
            if not found.again or (isinstance(found, _Malformed) and not repeat_malformed):
                return found
            if found.wait is not None:
                self._not_before = max(self._not_before, time.monotonic() + found.wait)
            elif attempt < self._config.retries:
                pause = min(self._pause * 2**attempt, LONGEST_PAUSE)
                stop.wait(pause * random.uniform(0.75, 1.0))
        return found

    def _request(self, client: openai.OpenAI, pair: Pair) -> "Verdict | _Trouble":
        """One request: its verdict, or what went wrong."""
        config, began = self._config, time.monotonic()
        limit = self._length
        options: dict[str, Any] = {limit: config.max_tokens}
        try:
            response = client.chat.completions.with_raw_response.create(
                model=config.model,
                messages=[{"role": "user", "content": question(config.template, pair)}],
                temperature=config.temperature,
                **options,
            )
            reply = json.loads(response.text)
        except openai.APIStatusError as error:
            if limit == _NEWER or error.status_code != 400 or _NEWER not in str(error.body):
                return self._refused(error)
            self._length = _NEWER
        except openai.APITimeoutError:
            return _Trouble(f"no reply within {config.timeout_seconds:g} s")
        except (openai.OpenAIError, ValueError) as error:
            return _Trouble(_first_line(error) + _cause(error))
        else:
            return self._read(reply)
        finally:
            self._meter.add(requests=1, seconds=time.monotonic() - began)
        return self._request(client, pair)

    def _refused(self, error: openai.APIStatusError) -> _Trouble:
        """What an answer with an error status means."""
        status, said = error.status_code, _first_line(error)
        if status in HOPELESS:
            return _Trouble(f"{HOPELESS[status].format(model=self.name)} ({said})", fatal=True)
        if error.code == "insufficient_quota":
            return _Trouble(f"has no quota left for this key ({said})", fatal=True)
        if 300 <= status < 400:
            to = error.response.headers.get("location", "another address")
            return _Trouble(f"redirects to {to}; set RLHF_JUDGE_URL to where it leads", fatal=True)
        if status not in PASSING and status < 500:
            return _Trouble(said, again=False)
        wait = _retry_after(error.response.headers.get("retry-after", ""))
        if wait is not None and wait > LONGEST_WAIT:
            return _Trouble(f"{said}; it asks to wait {wait:.0f} s", again=False)
        return _Trouble(said, wait=wait)

    def _read(self, reply: Any) -> "Verdict | _Trouble":
        """The verdict of a reply."""
        try:
            choice = reply["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason")
        except (LookupError, TypeError, AttributeError):
            return _Malformed(f"the reply is no chat completion: {str(reply)[:_QUOTED]!r}")
        with suppress(LookupError, TypeError, ValueError, OverflowError):
            self._meter.add(tokens=max(0, int(reply["usage"]["total_tokens"])))
        if ended == "length":
            return _Malformed(
                f"the reply was cut off at judge.endpoint.max_tokens {self._config.max_tokens}"
            )
        verdict = read_reply(text) if isinstance(text, str) else None
        if verdict is None:
            shown = text if isinstance(text, str) else json.dumps(text)
            return _Malformed(
                f"the last line of the reply is not A, B or TIE: {shown[-_QUOTED:]!r}"
            )
        return verdict


class _Malformed(_Trouble):
    """A reply without a verdict."""


def _retry_after(header: str) -> float | None:
    """The seconds in a header Retry-After, which has a number or a date; None if it has neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None  # not NaN


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


def _cause(error: BaseException) -> str:
    """What is below a failed connection, of which the library says no more than that it failed."""
    below = error.__cause__
    return f" {_first_line(below)}" if below is not None else ""
