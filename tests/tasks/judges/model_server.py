"""A small OpenAI-compatible server, whose model follows a rule and whose trouble is scripted."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-the-key-of-the-judge"
SHOWN = re.compile(
    r"\[Request\]\n(?P<prompt>.*)\n\n\[Answer A\]\n(?P<a>.*)\n\n\[Answer B\]\n(?P<b>.*)\n\n"
    r"Give one",
    re.DOTALL,
)


class Server:
    """What the handler does and has seen.

    model: (prompt, a, b) -> the text of the reply.
    trouble: called with the number of the request, from 0, and the question; returns None, or a
        status with a body and headers, or a number of seconds to wait.
    """

    def __init__(self, model, trouble=lambda number, question: None):
        self.model, self.trouble = model, trouble
        self.questions, self.requests, self.most_at_once, self.times = [], [], 0, []
        self._now = 0
        self.lock = threading.Lock()

    def count(self, change):
        with self.lock:
            self._now += change
            self.most_at_once = max(self.most_at_once, self._now)


def longer(prompt, a, b):
    """A model that reads: the longer answer is better."""
    word = "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"{len(a)} against {len(b)} characters.\n{word}"


def completion(text, **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    choice |= {"finish_reason": "stop"} | more
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server.told
        server.count(+1)
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = json.loads(body)
            question = request["messages"][0]["content"]
            with server.lock:
                number = len(server.requests)
                server.requests.append(request)
                server.questions.append(question)
                server.times.append(time.monotonic())
            trouble = server.trouble(number, question)
            if isinstance(trouble, int | float):
                time.sleep(trouble)
                trouble = None
            if self.headers["Authorization"] != f"Bearer {KEY}":
                said = self.headers["Authorization"].removeprefix("Bearer ")
                error = {
                    "message": f"Incorrect API key provided: {said}",
                    "code": "invalid_api_key",
                }
                return self.say(401, {"error": error})
            if self.path != "/v1/chat/completions" or request["model"] != "m":
                name = request["model"]
                return self.say(404, {"error": {"message": f"The model `{name}` does not exist"}})
            if trouble is not None:
                return self.say(*trouble)
            shown = SHOWN.search(question)
            reply = completion(server.model(shown["prompt"], shown["a"], shown["b"]))
            usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
            return self.say(200, reply | {"usage": usage})
        finally:
            server.count(-1)

    def say(self, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(model=longer, trouble=lambda number, question: None):
    """The server while the block runs; `address` has /v1."""
    told = Server(model, trouble)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads, http.told = True, told
    http.handle_error = lambda *_: None  # a client that is stopped hangs up
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    told.address = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield told
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
