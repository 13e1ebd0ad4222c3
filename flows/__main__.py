"""The command `rlhf`. Says what exists and prints; the work is done elsewhere.

Exit status: 0 done, 1 the run or a service failed, 2 a mistake of the user, 130 interrupted by
Ctrl-C, 143 by SIGTERM.
What is slow to import is imported by the command that needs it.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import typer
from rich.markup import escape
from typer.core import TyperGroup

from flows.cli.failures import explain
from flows.cli.loading import presets
from flows.cli.printing import (
    err,
    line,
    responses_as_json,
    responses_as_text,
    say_aloud,
    show_comparison,
    show_error,
    show_links,
    show_plan,
    show_report,
    show_services,
    show_start,
    show_validation,
)
from flows.local import allocator, find, serve
from flows.local.supervisor import ServiceError
from rlhf_core.errors import NumericsError, UserError
from tasks.settings import StoreSettings, read_settings

if TYPE_CHECKING:
    from flows.config import PipelineConfig
    from tasks.settings import Settings

FAILED, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Commands(TyperGroup):
    """Turns what a user can mend into one sentence and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a defect passes and keeps its traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _end("Interrupted.", INTERRUPTED) from None
        except (ServiceError, NumericsError) as error:
            raise _end(str(error), FAILED) from None
        except UserError as error:
            raise _end(str(error), MISTAKE) from None
        except Exception as error:
            if sentence := explain(error):
                raise _end(sentence, FAILED) from None
            raise


def _end(sentence: str, status: int) -> typer.Exit:
    err.print(f"[bold red]rlhf:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    return typer.Exit(status)


app = typer.Typer(
    cls=Commands,
    name="rlhf",
    help="RLHF as a pipeline: prepare data, SFT, reward model, policy, evaluation, promotion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        versions = {name: version(name) for name in ("torch", "prefect", "mlflow")}
        beside = ", ".join(f"{name} {number}" for name, number in versions.items())
        typer.echo(f"rlhf {version('rlhf-pipeline')} (Python {python_version()}, {beside})")
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take what concerns no single command."""


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be given many times."),
]


@app.command(epilog="Examples: rlhf run configs/demo.yaml · rlhf run my.yaml --set ppo.kl_coef=0.1")
def run(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    force: Annotated[
        list[str],
        typer.Option(
            "--force",
            metavar="STAGE",
            help="Do a stage again though it was done before: prepare, sft, reward_model, policy "
            "or evaluation; may be given many times.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Run the whole pipeline here and now, and print what came out of it.

    MLflow and Prefect are those that MLFLOW_TRACKING_URI and PREFECT_API_URL name, else those of a
    running `rlhf up`, else files under RLHF_HOME (default .rlhf), which `rlhf up` shows later. A
    policy that is not promoted is a result and not a failure: the exit status is 0.

    Stages that were done before with the same settings, inputs and code are taken from the
    registry. A run that was interrupted or killed is continued by the same command: the stage in
    which it stopped goes on from its last checkpoint.
    """
    settings = find.join(read_settings(), prefect=True)
    show_start(settings)
    _run(_load(config, overrides), force, settings)


@app.command(epilog="Example: rlhf resume happy-otter")
def resume(
    run: Annotated[str, typer.Argument(help="A pipeline run: its id, the start of it, or name.")],
) -> None:
    """Go on with a pipeline run that was stopped or killed.

    Finished stages are taken from the registry, and the one that was interrupted goes on from its
    last checkpoint. A run of a deployment goes back to its workers, once its state has settled: a
    retry that comes within seconds of a crash would be lost. Any other goes on here and now.
    """
    settings = find.join(read_settings(), prefect=True)
    from tasks.history.stopped import find_stopped

    stopped = find_stopped(run, settings=settings)
    if settings.prefect_api_url:
        from flows.cli.resume import is_deployed, resume_deployed

        if is_deployed(stopped.flow_run_id):
            name = resume_deployed(stopped.flow_run_id, say=line)
            address = f"{settings.prefect_public_url}/runs/flow-run/{stopped.flow_run_id}"
            line(f"{name} goes on: {address}")
            return
    if stopped.flow_name not in ("", "rlhf"):
        raise UserError(
            f"{run} was begun by the flow {stopped.flow_name}: set PREFECT_API_URL to the server "
            "that it ran on, or start the same again"
        )
    from flows.config import PipelineConfig
    from tasks.record.run import mark_for_resume

    pipeline = PipelineConfig.model_validate(stopped.config)
    mark_for_resume(pipeline.project, pipeline, pipeline.seed, stopped.run_id, settings)
    show_start(settings)
    _run(pipeline, [], settings)


@app.command(epilog="Example: rlhf sweep my.yaml --grid ppo.kl_coef=0.02,0.05,0.1 --seeds 3")
def sweep(
    config: ConfigFile,
    grid: Annotated[
        list[str],
        typer.Option("--grid", metavar="KEY=V,V,...", help="A setting to try; many times: all."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination.")] = 1,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a pipeline for every combination of some settings, and show what each gains at which KL.

    All points are children of one MLflow run, which ends with the table and the plot. Stages that
    points share are done once. Nothing is promoted. Interrupted or killed, the same command goes
    on.
    """
    settings = find.join(read_settings(), prefect=True)
    show_start(settings)
    pipeline = _load(config, overrides)
    with _stoppable(), _prefect(settings):
        from flows.sweep import as_sweep
        from flows.sweep import sweep as run_sweep

        report = run_sweep(as_sweep(pipeline, grid, seeds))
    show_report(report)


@app.command(epilog="Examples: rlhf up · rlhf up --prefect-port 4300 --mlflow-port 5300")
def up(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow.")] = 5000,
    configs: Annotated[
        Path | None,
        typer.Option(help="Its YAML files are the presets; else ./configs, else those that ship."),
    ] = None,
) -> None:
    """Run Prefect, MLflow and a worker on this machine until Ctrl-C.

    In the Prefect UI each preset is a deployment: a form that is filled in, to change and to start,
    or to give a schedule. So are the stages, one by one, and retraining. Everything listens on the
    loopback address only and is stopped together. What `rlhf run` did before is there too.

    Both pages ask for a password that is made at each start. Open them by the links that are
    printed, each of which signs in one browser; `rlhf sign-in` prints new ones. Other commands find
    the password by themselves.
    """
    err.print("Starting Prefect, MLflow and a worker …", highlight=False)
    try:
        serve.up(
            read_settings(),
            prefect_port=prefect_port,
            mlflow_port=mlflow_port,
            configs=configs or presets(),
            on_ready=show_services,
            on_error=show_error,
        )
    except KeyboardInterrupt:
        err.print("All services have been stopped.", highlight=False)


@app.command(name="sign-in", epilog="Example: rlhf sign-in")
def sign_in() -> None:
    """Print links that open the pages of a running `rlhf up`; each signs in one browser, once."""
    show_links(*find.signed_in(read_settings()))


@app.command(
    name="exec",
    epilog="Example: rlhf exec prefect deployment run rlhf/demo",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run_program(
    program: Annotated[str, typer.Argument(help="A program, such as prefect or mlflow.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What it is called with.")] = None,
) -> None:
    """Run another program with the addresses and the password of this home's servers."""
    find.join(read_settings(), prefect=True)
    find.become(program, arguments or [])


@app.command(epilog="Example: PREFECT_API_URL=http://prefect:4200/api rlhf deploy")
def deploy(
    configs: Annotated[
        Path | None,
        typer.Argument(help="A folder of YAML files; else ./configs, else those that ship."),
    ] = None,
    working_dir: Annotated[
        str, typer.Option(help="What relative paths in a config refer to, on the worker.")
    ] = "",
    owner: Annotated[str, typer.Option(help="Who answers for them: a tag.")] = find.OWNER,
    write: Annotated[
        Path | None, typer.Option(help="Write them for `prefect deploy --all` instead.")
    ] = None,
) -> None:
    """Register every flow as a deployment of a running Prefect server.

    Each YAML file is a preset: the pipeline and retraining, filled in. The stages one by one start
    with the values of `demo`, else of the first preset. Made with them: the work pool `rlhf` and
    the concurrency limit `rlhf-accelerator`, which lets one training run at a time.

    `rlhf up` does this by itself. Anywhere else name the server by PREFECT_API_URL, and start a
    worker where this package is installed: rlhf exec prefect worker start --pool rlhf
    """
    if write is not None:
        from flows.deploy.deployments import prefect_yaml

        write.write_text(prefect_yaml(configs or presets(), owner), encoding="utf-8")
        return
    settings = find.join(read_settings(), prefect=True)
    if not settings.prefect_api_url:
        raise UserError("No Prefect server runs here: start `rlhf up`, or set PREFECT_API_URL.")
    from flows.deploy.deployments import deploy as register_deployments

    for name in register_deployments(configs or presets(), working_dir=working_dir, owner=owner):
        line(name)
    from flows.deploy import automations

    for made in automations.register(settings):
        line(made)


@app.command(epilog="Example: rlhf validate my.yaml --set data.preferences=pairs.jsonl")
def validate(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Check a config and its data, and print what a run would do with them; nothing is trained.

    Every setting is parsed and held against the others; the data are read as the pipeline would
    read them: rows kept and dropped with reasons, duplicates, contradictions, lengths, truncation.
    Then come the steps of each stage, the parameters that learn, and whether there are enough
    held-out prompts to find anything out. No weights are loaded.
    """
    find.join(read_settings())
    pipeline = _load(config, overrides)
    from rlhf_core.plan import make_plan
    from rlhf_core.stages.prepare import inspect
    from tasks.record.terminal import on_terminal

    with on_terminal("validate") as logger:
        limits, seed = pipeline.length_limits, pipeline.seed
        found = inspect(pipeline.data, pipeline.model, limits, seed, logger)
        logger.phase("counting parameters")
        plan = make_plan(pipeline.plan_sections, found)
    show_validation(found)
    show_plan(plan)


@app.command(name="config", epilog="Example: rlhf config configs/demo.yaml --set ppo.kl_coef=0.1")
def show_config(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Print a config as YAML with every default filled in: a file that `rlhf run` takes."""
    import yaml

    find.join(read_settings())
    resolved = _load(config, overrides).model_dump(mode="json")
    typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), nl=False)


@app.command(
    epilog='Examples: rlhf generate --model models:/demo-policy@champion "The hotel" · '
    "rlhf generate --model gpt2 --temperature 0 < prompts.txt"
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none: one a line from standard input.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="models:/NAME/VERSION, models:/NAME@ALIAS, a folder or a hub id.")
    ] = "models:/demo-policy@champion",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response (tokens).")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same texts.")] = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Ask as a user's message; a policy trained on messages is asked so anyway.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print an object a line: prompt, sample (from 1) and response."
        ),
    ] = False,
) -> None:
    """Let a policy continue prompts, and print its responses.

    One response to one prompt is printed as it is. Of several, each prompt stands above its
    responses, on lines that begin with `>`; the responses are indented, and numbered where a prompt
    has more than one.
    """
    texts = prompts or _lines()
    settings = find.join(read_settings())
    from tasks.record.terminal import on_terminal
    from tasks.serving.generation import generate as generate_texts

    with on_terminal("generate") as logger:
        answers = generate_texts(
            model,
            texts,
            settings=settings,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            samples=samples,
            seed=seed,
            chat=chat,
            logger=logger,
        )
    typer.echo(responses_as_json(texts, answers) if as_json else responses_as_text(texts, answers))


@app.command(epilog="Example: rlhf compare 3f2a happy-otter-12")
def compare(
    first: Annotated[str, typer.Argument(help="A pipeline run: its id, the start of it, or name.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Show also what the runs have in common.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")] = False,
) -> None:
    """Compare two pipeline runs: the settings, stages and metrics that differ.

    A metric stands with its 95 % interval, and a stage that was taken from another run with the
    metrics of that run.
    """
    settings = find.join(read_settings())
    from tasks.history.comparison import compare as compare_runs

    comparison = compare_runs(first, second, settings=settings)
    if as_json:
        typer.echo(comparison.model_dump_json(indent=2))
    else:
        show_comparison(comparison, everything=everything)


@app.command(epilog='Example: rlhf promote happy-otter --reason "reads better than the last one"')
def promote(
    run: Annotated[str, typer.Argument(help="A pipeline run: its id, the start of it, or name.")],
    by: Annotated[str, typer.Option(help="Who says yes; else the user of this machine.")] = "",
    reason: Annotated[str, typer.Option(help="Why, for those who ask later.")] = "",
) -> None:
    """Say yes to a promotion that waits for a person.

    A run that is suspended in Prefect gets the answer and goes on. The policy of one that has ended
    becomes the champion, if the champion is still the one that it was compared with.
    """
    settings = find.join(read_settings(), prefect=True)
    from flows.cli import logs
    from tasks.steps.promotion import promote_run

    line(promote_run(run, by=by or getuser(), reason=reason, settings=settings))
    logs.deliver()


@app.command(epilog="Examples: rlhf rollback demo · rlhf rollback demo --to 3")
def rollback(
    project: Annotated[str, typer.Argument(help="Whose champion is taken back.")],
    to: Annotated[
        int | None, typer.Option(min=1, help="A version; else the one that was replaced.")
    ] = None,
    by: Annotated[str, typer.Option(help="Who says so; else the user of this machine.")] = "",
) -> None:
    """Put the policy that the champion has replaced, or any version, back in use."""
    settings = find.join(read_settings(), prefect=True)
    from flows.cli import logs
    from tasks.steps.promotion import roll_back

    line(roll_back(project, to=to, by=by or getuser(), settings=settings))
    logs.deliver()


@app.command(epilog="Example: rlhf export models:/demo-policy@champion servable")
def export(
    model: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Write a model that MLflow serves: a policy answers prompts, a reward model scores texts."""
    settings = find.join(read_settings())
    from tasks.record.record import Record
    from tasks.serving.export import export_servable

    store = Record.open(settings).store
    export_servable(store, store.resolve(model), directory)
    typer.echo(f"mlflow models serve -m {directory} --env-manager local -p 5001")


@app.command(epilog="Example: rlhf backup backups/monday")
def backup(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Save everything that is kept: databases, models, reports, results. Nothing has to stop.

    What is saved is RLHF_HOME; in the stack of docker-compose.yml its databases and its bucket too:
    `docker compose run --rm tools backup /backup/monday`.
    """
    from tasks.backup import backup as make_backup

    manifest = make_backup(read_settings(), StoreSettings(), folder)
    line(f"{len(manifest.files)} files in {folder}")


@app.command(epilog="Example: rlhf restore backups/monday")
def restore(folder: Annotated[Path, typer.Argument(help="What `rlhf backup` wrote.")]) -> None:
    """Put back what was saved, into an RLHF_HOME that is empty and that no `rlhf up` serves."""
    settings = read_settings()
    if there := find.running(settings):
        raise UserError(
            f"`rlhf up` runs for {settings.home} (process {there.pid}): stop it with Ctrl-C in its "
            "terminal, and move its folder away."
        )
    from tasks.backup import restore as restore_backup

    manifest = restore_backup(settings, StoreSettings(), folder)
    line(f"{len(manifest.files)} files from {folder}")


# ---- helpers ----


def _run(pipeline: "PipelineConfig", force: list[str], settings: "Settings") -> None:
    """Run a pipeline in this process."""
    with _stoppable(), _prefect(settings):
        from flows.rlhf import Forceable, rlhf

        stages: tuple[Forceable, ...] = get_args(Forceable)
        if unknown := sorted(set(force) - set(stages)):
            raise UserError(f"--force takes {', '.join(stages)}; not '{unknown[0]}'")
        result = rlhf(pipeline, force=tuple(stage for stage in stages if stage in force))
    show_report(result.report)


@contextmanager
def _prefect(settings: "Settings") -> Iterator[None]:
    """A Prefect server for flows of this process, where none is in use; it starts meanwhile."""
    with serve.prefect_server(settings, say_aloud) as ready:
        from flows.cli import logs

        logs.quiet_terminal()
        ready()
        try:
            yield
        finally:
            logs.deliver()


class Terminated(BaseException):
    """SIGTERM has reached the command. No Exception, like KeyboardInterrupt."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, and either way it is said how to go on."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    way_on = "the same command goes on from the last checkpoint."
    try:
        yield
    except KeyboardInterrupt:
        raise _end(f"Interrupted; {way_on}", INTERRUPTED) from None
    except Terminated:
        raise _end(f"Terminated; {way_on}", TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _load(path: Path, overrides: list[str]) -> "PipelineConfig":
    from flows.cli.loading import load_config
    from flows.config import PipelineConfig

    return load_config(path, overrides, PipelineConfig)


def _lines() -> list[str]:
    """The lines of standard input that are not blank."""
    texts = [] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UserError("There is no prompt: give one as an argument, or one a line on the input.")
    return texts


def main() -> None:
    """The entry point of the command."""
    allocator.keep_memory()
    app()


if __name__ == "__main__":
    main()
