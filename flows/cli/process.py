"""The process of the command: its exit status, how it is stopped, and the Prefect of its flows."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

import rlhf_command
from flows.cli.failures import explain, was_interrupted
from flows.cli.printing import err, show_report, warn_on_terminal
from flows.local import serve
from flows.local.supervisor import ServiceError
from rlhf_core.errors import NumericsError, UserError, VerdictsPendingError, brief
from rlhf_core.machine.imports import importing
from rlhf_core.redaction import mask_error, masked

if TYPE_CHECKING:
    from flows.config import PipelineConfig
    from tasks.settings import Settings

USAGE_ERROR = typer.BadParameter.__bases__  # of typer: a wrong option, argument or command
FAILED, USER_ERROR, WAITING, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


class Command(TyperCommand):
    """Refuses an argument or option that was given as nothing, as by an unset shell variable."""

    MAY_BE_EMPTY = frozenset({"by", "reason", "working_dir", "prompts", "arguments"})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises: UserError that names the empty argument.
        """
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        parameter: Any
        for parameter in self.get_params(ctx):
            value = given.get(parameter.name or "")
            values = value if isinstance(value, list | tuple) else [value]
            if parameter.name not in self.MAY_BE_EMPTY and any(
                isinstance(text, str) and not text.strip() for text in values
            ):
                raise UserError(
                    f"{parameter.get_error_hint()} is empty: pass a value, and check the shell "
                    "variables in the command."
                )
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """Turns errors that a user can fix into one sentence and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a defect propagates with its traceback."""
        rlhf_command.interruptible()
        try:
            return super().invoke(ctx)
        except typer.Exit:  # its sentence was said
            raise
        except KeyboardInterrupt:
            raise end("Interrupted.", INTERRUPTED) from None
        except (ServiceError, NumericsError) as error:
            raise end(str(error), FAILED) from None
        except VerdictsPendingError as error:
            raise end(str(error), WAITING) from None
        except UserError as error:
            raise end(str(error), USER_ERROR) from None
        except Exception as error:
            if isinstance(error, USAGE_ERROR):
                error.message = brief(str(error.message))  # type: ignore[attr-defined]
                raise
            if was_interrupted(error):  # a library made an error of its own of it
                raise end("Interrupted.", INTERRUPTED) from None
            if sentence := explain(error):
                raise end(sentence, FAILED) from None
            mask_error(error)  # a defect, whose traceback Python prints
            raise


def end(sentence: str, status: int) -> typer.Exit:
    """Print a sentence, and return what ends the command with this status."""
    err.print(
        f"[bold red]rlhf:[/] {escape(brief(masked(sentence)))}", highlight=False, soft_wrap=True
    )
    return typer.Exit(status)


def load(*modules: str) -> None:
    """Import slow modules before the command begins anything: Ctrl-C ends the process at once.

    An import that KeyboardInterrupt interrupts may swallow it, or make another error of it.
    """
    with rlhf_command.leaving_when_interrupted(), importing():
        for module in modules:
            import_module(module)


def run_here(pipeline: "PipelineConfig", force: list[str], settings: "Settings") -> None:
    """Run a pipeline in this process."""
    with stoppable(), own_prefect(settings):
        with importing():
            from flows.rlhf import Forceable, rlhf

        stages: tuple[Forceable, ...] = get_args(Forceable)
        if unknown := sorted(set(force) - set(stages)):
            raise UserError(f"--force takes {', '.join(stages)}; not '{unknown[0]}'")
        result = rlhf(pipeline, force=tuple(stage for stage in stages if stage in force))
    show_report(result.report)


@contextmanager
def own_prefect(settings: "Settings") -> Iterator[None]:
    """Start a Prefect server for the flows of this process if none is set, while imports run."""
    with serve.prefect_server(settings, warn_on_terminal) as ready:
        from flows.cli import logs

        with importing():
            logs.quiet_terminal()
        ready()
        try:
            yield
        finally:
            logs.deliver()


class Terminated(BaseException):
    """The command received SIGTERM. Like KeyboardInterrupt, it is not an Exception."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does, and tell the user how to resume."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    how_to_resume = "repeat the command to resume from the last checkpoint."
    try:
        yield
    except KeyboardInterrupt:
        raise end(f"Interrupted; {how_to_resume}", INTERRUPTED) from None
    except Exception as error:
        if was_interrupted(error):
            raise end(f"Interrupted; {how_to_resume}", INTERRUPTED) from None
        raise
    except Terminated:
        raise end(f"Terminated; {how_to_resume}", TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does, so that it leaves nothing behind."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Terminated:
        raise end("Terminated.", TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
