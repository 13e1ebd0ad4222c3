"""PPO of random models of 135M, 360M and 1.5B in bfloat16 on a GPU, beside the peer; the
deterministic mode. Ends within nine minutes and prints what there is.

    python benchmarks/gpu.py                        # on a machine with a GPU
    python benchmarks/gpu.py --try                  # tiny, anywhere, to see that it runs

First, for each size, the sides take turns: ours in bfloat16 (float32 masters); the peer with all of
its models in bfloat16, weights and optimizer state too; and the peer under autocast over float32
weights. 64 samples of 128 + 128 tokens, 4 epochs of 4 minibatches. After the smallest size, ours
runs twice in torch's deterministic mode, and the weights of both runs are compared to the bit. A
side that fails, for want of memory for example, is printed as such and the others go on.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from flops import per_token
from turns import Program, ProgramError, order
from work import add_arguments

HERE = Path(__file__).parent
ROOT = HERE.parent
SECONDS = 540
SIZES = ("135m", "360m", "1.5b")
WORK = "--batch 64 --prompt-length 128 --response-length 128 --epochs 4 --minibatches 4"
TINY = "--batch 4 --prompt-length 8 --response-length 8 --epochs 1 --minibatches 2 --threads 1"
SIDES = {  # side: options
    "ours": "--dtype bfloat16",
    "peer, bfloat16 throughout": "--dtype bfloat16",
    "peer, autocast": "--dtype autocast",
}
PEAK = """
import sys; sys.path.insert(0, {here!r})
import torch; from peak import products
if torch.cuda.is_available(): print(max(products(torch.bfloat16, (4096, 8192), "cuda").values()))
"""


class TimeIsUpError(Exception):
    """The nine minutes are over."""


@dataclass
class Trial:
    """All that is run, in a folder that goes away."""

    folder: Path
    work: str
    rounds: int
    pythons: Mapping[str, str]  # of ours and of the peer
    lines: list[str] = field(default_factory=list)

    def command(self, side: str, size: str, options: str) -> list[str]:
        """What a side runs."""
        who = "ours" if side == "ours" else "peer"
        script = ["run.py", "ppo"] if side == "ours" else ["peer_ppo.py"]
        models = [
            "--model",
            str(self.folder / size),
            "--reward",
            str(self.folder / f"{size}-reward"),
        ]
        words = shlex.split(f"{self.work} {SIDES[side]} {options}")
        return [self.pythons[who], str(HERE / script[0]), *script[1:], *models, *words]

    def make(self, size: str) -> None:
        """Write the random models of a size."""
        words = [str(HERE / "models.py"), size, "--output", str(self.folder / size)]
        run([self.pythons["ours"], *words])

    def compare(self, size: str, sides: Sequence[str], peak: float | None) -> None:
        """The sides take turns; their lines are printed when all rounds are done."""
        turns: dict[str, list[dict[str, Any]]] = {}
        try:
            with ExitStack() as stack:
                programs: dict[str, Program] = {}
                for side in sides:
                    words = self.command(side, size, f"--iterations {self.rounds}")
                    program = stack.enter_context(Program(words, environment()))
                    try:
                        program.turn(1)
                    except ProgramError as error:
                        self.say(f"{size}, {side}: failed: {last_line(str(error))}")
                        continue
                    programs[side], turns[side] = program, []
                for number in range(self.rounds if programs else 0):
                    for side in order(list(programs), number):
                        turns[side].append(programs[side].turn(1))
        except ProgramError as error:
            self.say(f"{size}: stopped: {last_line(str(error))}")
        finally:  # the time may be up: what there is counts
            for side, found in turns.items():
                if found:
                    self.say(f"{size}, {side}: {self._describe(size, side, found, turns, peak)}")

    def _describe(
        self,
        size: str,
        side: str,
        found: list[dict[str, Any]],
        turns: Mapping[str, list[dict[str, Any]]],
        peak: float | None,
    ) -> str:
        speed = median(t["tokens_per_second"] for t in found)
        phases = ", ".join(
            f"{phase} {median(t['seconds'][phase] for t in found):.2f} s"
            for phase in found[0]["seconds"]
        )
        said = f"{speed:,.0f} tokens/s, {phases}, {found[-1]['peak_memory_mb']:,.0f} MB"
        if side != "ours" and (ours := turns.get("ours")):
            pairs = list(zip(ours, found, strict=False))
            both = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
            said += f"; ours over it {median(both):.2f} ({min(both):.2f}-{max(both):.2f})"
        if peak:
            parser = argparse.ArgumentParser()
            add_arguments(parser, "ppo")
            arguments = parser.parse_args(self.command("peer, autocast", size, "")[2:])
            useful = per_token("ppo", arguments, "ours") * speed
            said += f"; {100 * useful / (1e9 * peak):.0f} % of the peak"
        return f"{said}; {len(found)} rounds"

    def repeat(self, size: str) -> None:
        """Ours twice in the deterministic mode: are the weights the same to the bit?"""
        words = self.command("ours", size, "--iterations 2 --deterministic")
        found = [json.loads(run(words).splitlines()[-1]) for _ in range(2)]
        same = found[0]["digest"] == found[1]["digest"]
        speed = median(line["tokens_per_second"] for line in found)
        self.say(
            f"{size}, deterministic mode: two runs gave "
            f"{'the same weights to the bit' if same else 'DIFFERENT WEIGHTS'}; "
            f"{speed:,.0f} tokens/s"
        )

    def say(self, line: str) -> None:
        """Print a result at once."""
        self.lines.append(line)
        print(line, flush=True)


def environment() -> dict[str, str]:
    """Of all that is started: this checkout is imported, and nothing is fetched."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(path)}


def run(words: Sequence[str]) -> str:
    """What a program prints.

    Raises: ProgramError when it fails.
    """
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ProgramError(done.stderr[-2000:])
    return done.stdout


def last_line(text: str) -> str:
    """The error itself, of a traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")


def on_alarm(_number: int, _frame: FrameType | None) -> None:
    raise TimeIsUpError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = HERE / ".peer-ppo" / "bin" / "python"
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="when it ends at the latest")
    parser.add_argument("--sides", choices=("both", "ours"), default="both")
    parser.add_argument(
        "--peer-python",
        default=str(own) if own.exists() else sys.executable,
        help="the Python that has TRL 1.12.0",
    )
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny, on any machine")
    arguments = parser.parse_args()
    sizes = ["tiny"] if arguments.tiny else arguments.sizes
    sides = ["ours"] if arguments.sides == "ours" else list(SIDES)
    signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(arguments.seconds)
    with TemporaryDirectory() as folder:
        trial = Trial(
            folder=Path(folder),
            work=TINY if arguments.tiny else WORK,
            rounds=1 if arguments.tiny else arguments.rounds,
            pythons={"ours": sys.executable, "peer": arguments.peer_python},
        )
        try:
            words = run([sys.executable, "-c", PEAK.format(here=str(HERE))]).split()
            peak = float(words[-1]) if words else None
            trial.say(f"peak: {peak:,.0f} GFLOP/s in bfloat16" if peak else "no GPU: on the CPU")
            for number, size in enumerate(sizes):
                trial.make(size)
                trial.compare(size, sides, peak)
                if number == 0:
                    trial.repeat(size)
        except ProgramError as error:
            trial.say(f"failed: {last_line(str(error))}")
            sys.exit(1)
        except TimeIsUpError:
            trial.say(f"{arguments.seconds} seconds are over: the rest was not run")
        finally:
            signal.alarm(0)


if __name__ == "__main__":
    main()
