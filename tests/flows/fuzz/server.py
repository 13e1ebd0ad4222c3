"""Runs `rlhf` many times: everything is imported once, and each command line in a fork of its own.

It reads a case per line of standard input, as JSON, and answers with its outcome in a line. A case
has `argv`, and may have `env`, `stdin` and `seconds`. So a crash, an endless loop or lack of memory
is an outcome like any other.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10.0, 2 * 2**30
LONGEST_OUTPUT = 50_000
NO_STATUS = 97
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")


IMPORTED = (
    *("datasets", "mlflow", "transformers.models.gpt2.modeling_gpt2", "flows.config"),
    *("flows.cli.loading", "flows.cli.logs", "rlhf_core.plan", "rlhf_core.stages.prepare"),
    *("tasks.record.record", "tasks.record.terminal", "tasks.serving.generation", "tasks.backup"),
    *("tasks.history.comparison", "tasks.steps.promotion", "tasks.serving.export"),
)


def warm_up() -> None:
    """Import what the commands import, and what is imported when one runs for the first time."""
    for module in IMPORTED:
        importlib.import_module(module)
    from flows.__main__ import main

    environment, argv = dict(os.environ), sys.argv
    for words in (["config", "no.yaml"], ["config", "-h"], ["nosuch"], ["validate", "--nosuch"]):
        sys.argv = ["rlhf", *words]
        with (
            contextlib.suppress(SystemExit),
            open(os.devnull, "w") as nowhere,  # noqa: PTH123
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            main()
    sys.argv = argv
    os.environ.clear()
    os.environ.update(environment)


def run(case: dict[str, Any], output: Path) -> None:
    """Run a command line in this process, and write what went wrong, if anything did."""
    sys.argv = ["rlhf", *case["argv"]]
    os.environ.update(case.get("env", {}))
    for name in case.get("unset", ()):
        os.environ.pop(name, None)
    from flows.__main__ import main

    try:
        main()
    except SystemExit as error:
        output.write_text(json.dumps({"status": error.code or 0}))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(place.filename).name}:{place.name}"
        output.write_text(json.dumps({"defect": kind, "text": traceback.format_exc()[-3_000:]}))


def child(case: dict[str, Any], folder: Path) -> None:
    """The fork: its files, its streams, its limits, its end."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    (folder / "in").write_text(case.get("stdin", ""))
    os.dup2(os.open(folder / "in", os.O_RDONLY), 0)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")
    from flows.cli import printing

    for console in (printing.out, printing.err):
        console.file = sys.stderr if console.stderr else sys.stdout
    try:
        run(case, folder / "end")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0 if (folder / "end").exists() else NO_STATUS)


def memory(pid: int) -> int:
    """Peak resident memory of a process and its children (bytes)."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        total = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for other in (task / "children").read_text().split():
                total += memory(int(other))
    except (OSError, TypeError, ValueError):
        pass
    return total


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in a fork, and say how it ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin, seconds = time.monotonic(), case.get("seconds", SECONDS)
        pid = os.fork()
        if pid == 0:
            child(case, folder)
        base, peak, killed = memory(os.getpid()), 0, ""
        descriptor = os.pidfd_open(pid)
        while not select.select([descriptor], [], [], 0.02)[0]:
            peak = max(peak, memory(pid) - base)
            if time.monotonic() - begin > seconds:
                killed = f"ran for more than {seconds:.0f} s"
            elif peak > BYTES:
                killed = f"took more than {BYTES // 2**30} GB"
            if killed:
                os.killpg(pid, signal.SIGKILL)
                break
        _, status, used = os.wait4(pid, 0)
        os.close(descriptor)
        peak = max(peak, used.ru_maxrss * 1024 - base)
        taken = round(time.monotonic() - begin, 2)
        said = {n: _text(folder / n) for n in ("out", "err")}
        found: dict[str, Any] = {
            "seconds": taken,
            "mb": peak >> 20,
            "said": said["err"][-600:],
        }
        end = json.loads(_text(folder / "end") or "{}")
        if killed:
            return {**found, "fault": killed}
        if os.WIFSIGNALED(status):
            return {**found, "fault": f"died of {signal.Signals(os.WTERMSIG(status)).name}"}
        if "defect" in end:
            return {**found, "fault": end["defect"], "text": end["text"]}
        code = end.get("status", os.waitstatus_to_exitcode(status))  # of another program: exec
        if code == NO_STATUS:
            return {**found, "fault": "left without a status"}
        if peak > BYTES:
            return {**found, "fault": f"took more than {BYTES // 2**30} GB"}
        for stream, text in said.items():
            if "Traceback (most recent call last)" in text:
                return {**found, "fault": "a traceback was printed", "text": text[-3_000:]}
            if strange := CONTROL.search(text):
                return {**found, "fault": f"{strange[0]!r} was printed to {stream}"}
            if len(text) > LONGEST_OUTPUT:
                return {
                    **found,
                    "fault": f"{len(text) // 10_000 * 10} thousand characters in {stream}",
                }
        if end.get("status") and not said["err"].strip():
            return {**found, "fault": f"exit status {code} without a word"}
        return {**found, "status": code}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def main() -> None:
    """Answer cases until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warm_up()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all that was imported
    print("ready", file=answers, flush=True)
    for text in sys.stdin:
        print(json.dumps(outcome(json.loads(text))), file=answers, flush=True)


if __name__ == "__main__":
    main()
