"""Runs a program beside another one that it needs, and ends both when one of them ends.

    python -P -m flows.local.together URL NEEDED... -- PROGRAM...

The program starts once URL answers with success. SIGTERM and SIGINT go to the program first, which
may take its time to save its work with the help of the other; whoever sent the signal sets the
limit. So a container can hold a worker of Prefect and the Ray node that its stages start from.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from tasks.servers.client import unreachable

LOOK_SECONDS = 0.2  # between two looks at the programs
ENDING = (signal.SIGTERM, signal.SIGINT)


class Together:
    """The two programs, and what was asked of them."""

    def __init__(self, url: str, needed: Sequence[str], program: Sequence[str]) -> None:
        self._url = url
        self._needed = needed
        self._program = program
        self._stop = False

    def run(self) -> int:
        """Run both until one has ended.

        Returns: the exit status of the program, or 1 if the one that it needs has ended before.
        """
        for number in ENDING:
            signal.signal(number, self._asked)
        needed = subprocess.Popen(self._needed, start_new_session=True)
        try:
            if not self._ready(needed):
                return 0 if self._stop else self._lost(needed)
            program = subprocess.Popen(self._program, start_new_session=True)
            while program.poll() is None and needed.poll() is None and not self._stop:
                time.sleep(LOOK_SECONDS)
            lost = program.poll() is None and not self._stop
            code = _end(program)
            return self._lost(needed) if lost else code
        finally:
            _end(needed)

    def _asked(self, *_: object) -> None:
        self._stop = True

    def _ready(self, needed: subprocess.Popen[bytes]) -> bool:
        while not self._stop and needed.poll() is None:
            if not unreachable(self._url):
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def _lost(self, needed: subprocess.Popen[bytes]) -> int:
        words = " ".join(self._needed[:2])
        print(f"rlhf: {words} has ended ({needed.returncode}), so all ends here", file=sys.stderr)
        return 1


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ask a program to end, unless it has, and wait for it.

    Returns: its exit status, as a shell has it.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    return 128 - code if code < 0 else code


def main(url: str, *words: str) -> int:
    """Run `words`, two commands with `--` between them, together."""
    between = words.index("--")
    return Together(url, words[:between], words[between + 1 :]).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
