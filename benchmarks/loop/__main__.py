"""`make loop`, or python -m benchmarks.loop: people, trainings and a gate, in a loop, in minutes.

python -m benchmarks.loop                          # in a new folder for temporary files
python -m benchmarks.loop --home FOLDER --seed 1   # in a folder that is empty or not there yet
python -m benchmarks.loop --rounds 1 --first 60 --each 40 --set ppo.iterations=2
python -m benchmarks.loop --draw A.json B.json --output docs/images/loop.png
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.loop.sizes import Sizes
from rlhf_command import leaving_when_interrupted
from rlhf_core.errors import UserError, brief

if TYPE_CHECKING:
    from benchmarks.loop.rounds import Round

INTERRUPTED, FAILED, USER_ERROR = 130, 1, 2
PICTURES = (".png", ".svg", ".pdf")


def main(words: list[str] | None = None) -> int:
    """Run the command. Returns: its exit status."""
    options = _options(words)
    console = Console(stderr=True)
    try:
        if options.draw:
            draw(options.draw, options.output)
            return 0
        return show(options, console)
    except UserError as error:
        console.print(f"loop: {brief(str(error))}", markup=False, highlight=False)
        return USER_ERROR


def show(options: argparse.Namespace, console: Console) -> int:
    """Show the loop."""
    began = time.monotonic()
    home, is_own = _home(options.home)
    _alone(home)
    # Only now: they read their environment when they are imported, and they take seconds.
    with leaving_when_interrupted():
        from benchmarks.loop.show import Plan, Show
        from benchmarks.loop.world import make_world
        from flows.local import serve
        from flows.local.supervisor import ServiceError
        from tasks.settings import read_settings

    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    plan = Plan(sizes, options.seed, refusal=not options.no_refusal)
    running, status = None, 0
    try:
        world = make_world(home / "presets", options.seed, sizes, options.set)
        running = Show(world, plan, home, console)
        console.print("Starting the services of `rlhf up` …", highlight=False)
        serve.up(
            read_settings(),
            **_ports(),
            configs=world.folder,
            on_ready=running.begin,
            on_error=lambda name, error, log: console.print(
                f"{name} logged an error: {error} (see {log})", markup=False, highlight=False
            ),
            until=lambda: running.over.is_set() and not (options.stay and not running.error),
        )
    except KeyboardInterrupt:
        status = 0 if running and running.over.is_set() else INTERRUPTED
    except ServiceError as error:
        console.print(f"loop: {error}", markup=False, highlight=False)
        status = FAILED
    finally:
        if running is not None:
            running.stop()
        elif is_own:
            shutil.rmtree(home, ignore_errors=True)
    if running is None:
        return status
    if running.error is not None and not status:
        if not isinstance(running.error, UserError):
            raise running.error
        console.print(f"loop: {running.error}", markup=False, highlight=False, soft_wrap=True)
        status = FAILED
    if running.rounds:
        _end(running.rounds, options, home, console)
    how = "Interrupted after" if status == INTERRUPTED else "Took"
    seconds = time.monotonic() - began
    console.print(f"{how} {seconds:.0f} s. All services have been stopped.", highlight=False)
    if is_own and not running.rounds:
        shutil.rmtree(home, ignore_errors=True)
        return status
    for line in (
        f"Everything is in {home}, and can be deleted. To look at it again:",
        f"  RLHF_HOME={home} rlhf up --configs {home / 'presets'}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return status


def _end(rounds: "list[Round]", options: argparse.Namespace, home: Path, console: Console) -> None:
    """The table, the picture, and why the gate refused."""
    from benchmarks.loop import rounds as results

    console.print(results.table(rounds))
    for found in rounds:
        for rule in found.failed:
            console.print(
                f"{found.title} is {found.outcome}: {rule}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
    picture = options.output or home / "loop.png"
    results.plot([("True reward by round", rounds)]).savefig(picture, dpi=150)
    results.write(rounds, picture.with_suffix(".json"), seed=options.seed)
    console.print(f"Picture: {picture}", markup=False, highlight=False, soft_wrap=True)


def draw(files: list[Path], output: Path | None) -> None:
    """The picture of several shows, from the files beside their pictures; and print their table."""
    if output is None:
        raise UserError("--draw needs --output, the picture to write")
    from benchmarks.loop import rounds as results

    shows = []
    for path in files:
        try:
            rounds, about = results.read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no file of a show ({brief(str(error))})") from None
        shows.append((f"seed {about.get('seed', '?')}", rounds))
    results.plot(shows).savefig(output, dpi=150)
    print(results.markdown(shows))


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--home", type=Path, help="folder for everything; new or empty")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(Sizes):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=_count, default=field.default, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-refusal", action="store_true", help="no round of spammers")
    parser.add_argument("--stay", action="store_true", help="serve the pages until Ctrl-C")
    parser.add_argument(
        "--output", type=_picture, help="the picture; its numbers are put beside it"
    )
    parser.add_argument(
        "--draw", type=Path, nargs="+", metavar="FILE", help="only draw these shows"
    )
    return parser.parse_args(words)


def _picture(text: str) -> Path:
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text} is no picture: it ends with {', '.join(PICTURES)}"
        )
    return Path(text)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _home(given: Path | None) -> tuple[Path, bool]:
    """The folder of everything, and whether it was made for this."""
    if given is None:
        return Path(tempfile.mkdtemp(prefix="rlhf-loop-")), True
    home = given.expanduser().resolve()
    try:
        if home.exists() and (not home.is_dir() or any(home.iterdir())):
            raise UserError(f"--home {home} is not empty: name another folder, or empty it")
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--home {home} cannot be used ({error.strerror})") from None
    return home, False


def _alone(home: Path) -> None:
    """Forget the servers and the home that this shell may have, before anything reads them."""
    from tasks.settings import QUIET, Settings

    for name, setting in Settings.model_fields.items():
        if name not in ("device_name", "outage_seconds"):
            os.environ.pop(str(setting.validation_alias), None)
    os.environ.update(QUIET, RLHF_HOME=str(home))


def _ports() -> dict[str, int]:
    """Free ports, so that a `rlhf up` of yours may run beside it."""
    import socket

    probes = [socket.socket() for _ in range(3)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return dict(zip(("prefect_port", "mlflow_port", "label_port"), ports, strict=True))


if __name__ == "__main__":
    sys.exit(main())
