"""The command `rlhf`: it parses options and prints; other modules do the work.

Exit status: 0 success, 1 the run or a service failed, 2 user error, 3 the run waits for people, 4
an answer about lineage has gaps, 130 interrupted by Ctrl-C, 143 by SIGTERM. Each command imports
its own slow dependencies, so that `--help` is fast.
"""

import json
import math
import os
import sys
from functools import partial
from getpass import getuser
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli import feedback
from flows.cli.loading import presets
from flows.cli.printing import (
    err,
    line,
    responses_as_json,
    responses_as_text,
    secret_line,
    show_comparison,
    show_error,
    show_estimate,
    show_links,
    show_plan,
    show_report,
    show_services,
    show_snapshot,
    show_start,
    show_validation,
    warn_on_terminal,
)
from flows.cli.process import (
    Command,
    Commands,
    ended_by_sigterm,
    load,
    own_prefect,
    run_here,
    stoppable,
)
from flows.local import allocator, find, serve
from rlhf_core.errors import UserError, printable
from tasks.settings import StoreSettings, apply_environment, read_settings

if TYPE_CHECKING:
    from flows.config import PipelineConfig
    from rlhf_core.data.validation import Validation
    from tasks.settings import Settings

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


command = partial(app.command, cls=Command)
app.add_typer(feedback.app)


def _print_version(version_option: bool) -> None:
    if version_option:
        versions = {name: version(name) for name in ("torch", "prefect", "mlflow")}
        libraries = ", ".join(f"{name} {number}" for name, number in versions.items())
        typer.echo(f"rlhf {version('rlhf-pipeline')} (Python {python_version()}, {libraries})")
        raise typer.Exit


@app.callback()
def options(
    version_option: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Handle the options that belong to no single command."""


def _number(value: float) -> float:
    if math.isnan(value):  # it passes every bound
        raise typer.BadParameter("nan is not a number.")
    return value


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable."),
]


@command(epilog="Examples: rlhf run configs/demo.yaml · rlhf run my.yaml --set ppo.kl_coef=0.1")
def run(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    force: Annotated[
        list[str],
        typer.Option(
            "--force",
            metavar="STAGE",
            help="Run a stage again even if a result can be reused: prepare, sft, reward_model, "
            "report_card, policy, tournament or evaluation; repeatable.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Run the whole pipeline in this process and print its report.

    The command uses the MLflow and Prefect servers in MLFLOW_TRACKING_URI and PREFECT_API_URL, else
    those of a running `rlhf up`, else files under RLHF_HOME (default .rlhf), which `rlhf up` can
    show later. A run whose policy is not promoted has not failed: its exit status is 0.

    Stages that were run before with the same settings, inputs and code are reused from the
    registry. To resume an interrupted or killed run, repeat the command: the stage that was
    interrupted resumes from its last checkpoint.
    """
    settings = find.join(read_settings(), prefect=True)
    show_start(settings)
    run_here(_load(config, overrides), force, settings)


@command(epilog="Example: rlhf resume happy-otter")
def resume(
    run: Annotated[str, typer.Argument(help="A pipeline run: id, prefix of the id, or name.")],
) -> None:
    """Resume a pipeline run that was stopped or killed.

    Finished stages are reused from the registry, and the interrupted stage resumes from its last
    checkpoint. A run of a deployment is returned to its workers once its state has settled, because
    Prefect loses a retry within seconds of a crash. Any other run resumes in this process.
    """
    settings = find.join(read_settings(), prefect=True)
    load("tasks.history.stopped", "tasks.record.run", "flows.config")
    from tasks.history.stopped import find_stopped

    stopped = find_stopped(run, settings=settings)
    if settings.prefect_api_url:
        from flows.cli.resume import is_deployed, resume_deployed

        if is_deployed(stopped.flow_run_id):
            name = resume_deployed(stopped.flow_run_id, say=line)
            address = f"{settings.prefect_public_url}/runs/flow-run/{stopped.flow_run_id}"
            line(f"{name} resumes: {address}")
            return
    if stopped.flow_name not in ("", "rlhf"):
        raise UserError(
            f"{run} was started by the flow {stopped.flow_name}: set PREFECT_API_URL to the server "
            "that it ran on, or start that flow again"
        )
    from flows.config import PipelineConfig
    from tasks.record.run import mark_for_resume

    pipeline = PipelineConfig.model_validate(stopped.config)
    mark_for_resume(pipeline.project, pipeline, pipeline.seed, stopped.run_id, settings)
    show_start(settings)
    run_here(pipeline, [], settings)


@command(epilog="Example: rlhf sweep my.yaml --grid ppo.kl_coef=0.02,0.05,0.1 --seeds 3")
def sweep(
    config: ConfigFile,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid", metavar="KEY=V,V,...", help="Values to try for a setting; repeatable."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination.")] = 1,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a pipeline for every combination of some settings, and plot reward against KL for each.

    All points are children of one MLflow run, which gets the final table and plot. Stages that
    points share run once. Nothing is promoted. To resume an interrupted or killed sweep, repeat the
    command.
    """
    settings = find.join(read_settings(), prefect=True)
    show_start(settings)
    pipeline = _load(config, overrides)
    with stoppable(), own_prefect(settings):
        from flows.sweep import as_sweep
        from flows.sweep import sweep as run_sweep

        report = run_sweep(as_sweep(pipeline, grid, seeds))
    show_report(report)


@command(epilog="Examples: rlhf up · rlhf up --prefect-port 4201 --mlflow-port 5001")
def up(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow.")] = 5000,
    label_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the page for annotators.")
    ] = 4300,
    configs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of YAML presets [default: ./configs, else the presets in the package]. "
            "Relative paths in them start from it, and modules in it may be rewards."
        ),
    ] = None,
) -> None:
    """Run Prefect, MLflow, the page for annotators and a worker on this machine until Ctrl-C.

    In the Prefect UI each preset is a deployment: a form with its values filled in, which you can
    edit, start or schedule. Each single stage and retraining have a form too. The services listen
    on the loopback address only and stop together. Earlier runs of `rlhf run` are shown as well.

    Prefect and MLflow require a password, which is generated at each start. Open them with the
    printed links, each of which signs in one browser; `rlhf sign-in` prints new ones. Other
    commands find the password themselves. Annotators come in by links of `rlhf feedback invite`.
    """
    err.print("Starting Prefect, MLflow, the page for annotators and a worker …", highlight=False)
    try:
        serve.up(
            read_settings(),
            prefect_port=prefect_port,
            mlflow_port=mlflow_port,
            label_port=label_port,
            configs=configs or presets(),
            on_ready=show_services,
            on_error=show_error,
        )
    except KeyboardInterrupt:
        err.print("All services have been stopped.", highlight=False)


@command(epilog="Examples: rlhf label demo · rlhf label demo --port 4301")
def label(
    project: Annotated[str, typer.Argument(help="A feedback project.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 4300,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 lets in this machine only.")
    ] = find.HOST,
    url: Annotated[
        str | None,
        typer.Option(
            help="Address of the page for browsers, used in links [default: RLHF_LABEL_URL, else "
            "that of this machine]."
        ),
    ] = None,
) -> None:
    """Serve the page on which people label until Ctrl-C, and print two links that let you in.

    One link is for labelling, the other for running the project: inviting people, and seeing how
    far they are and what they wrote. The page shows the pairs of the preference store of this
    installation. `rlhf up` serves it too.
    """
    load("flows.local.label")
    from flows.local.label import serve_label

    serve_label(
        read_settings(),
        project,
        host=host,
        port=port,
        url=url,
        say=secret_line,
        warn=warn_on_terminal,
    )


@command(name="sign-in", epilog="Example: rlhf sign-in")
def sign_in() -> None:
    """Print links to the pages of a running `rlhf up`; each link signs in one browser, once."""
    show_links(*find.signed_in(read_settings()))


@command(
    name="exec",
    epilog="Example: rlhf exec prefect deployment run rlhf/demo",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run_program(
    program: Annotated[str, typer.Argument(help="A program, for example prefect or mlflow.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
) -> None:
    """Run another program with this home's server addresses and password in its environment."""
    find.join(read_settings(), prefect=True)
    find.become(program, arguments or [])


@command(epilog="Example: PREFECT_API_URL=http://prefect:4200/api rlhf deploy")
def deploy(
    configs: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of YAML presets [default: ./configs, else the presets in the package]."
        ),
    ] = None,
    working_dir: Annotated[
        str,
        typer.Option(
            help="Where the folder of the presets lies on the worker: relative paths start there."
        ),
    ] = "",
    owner: Annotated[
        str, typer.Option(help="Who owns the deployments; shown as a tag.")
    ] = find.OWNER,
    write: Annotated[
        Path | None,
        typer.Option(help="Write a file for `prefect deploy --all` instead of registering."),
    ] = None,
) -> None:
    """Register every flow as a deployment of a running Prefect server.

    Each YAML file is a preset with two deployments, the pipeline and retraining. The forms of the
    single stages start with the values of `demo`, else of the first preset. The command also
    creates the work pool `rlhf` and the concurrency limit `rlhf-accelerator`, which lets one
    training run at a time.

    `rlhf up` does this itself. For any other server set PREFECT_API_URL, and start a worker where
    this package is installed: rlhf exec prefect worker start --pool rlhf
    """
    if write is not None:
        from flows.deploy.deployments import prefect_yaml

        write.write_text(prefect_yaml(configs or presets(), owner), encoding="utf-8")
        return
    settings = find.join(read_settings(), prefect=True)
    if not settings.prefect_api_url:
        raise UserError(
            "No Prefect server is running here: start `rlhf up`, or set PREFECT_API_URL."
        )
    from flows.deploy.deployments import deploy as register_deployments

    for name in register_deployments(configs or presets(), working_dir=working_dir, owner=owner):
        line(name)
    from flows.deploy import automations

    for made in automations.register(settings):
        line(made)


@command(epilog="Example: rlhf validate my.yaml --set data.preferences.path=pairs.jsonl")
def validate(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Try each stage on this machine for a few steps, and estimate time, memory and "
            "disk of a run.",
        ),
    ] = True,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the estimate to a file as JSON, too."),
    ] = None,
) -> None:
    """Check a config and its data, and print what a run would do with them; nothing is trained.

    The command validates every setting and reads the data as the pipeline would. It reports rows
    kept and dropped with reasons, duplicates, contradictions, lengths and truncation, then the
    steps and trainable parameters of each stage, and whether there are enough held-out prompts to
    detect a difference. It imports the reward functions and looks up the registered models that
    the config names.

    Then it tries every stage for a few steps on this machine, in a process and a folder of its own,
    and says how long a run will take, what memory and disk it needs, and what does not fit. That
    takes about a minute or two; `--no-probe` leaves it out, and then no weights are loaded. No
    server is needed or started, nothing is registered, and no endpoint is asked.
    """
    settings = read_settings()
    apply_environment(settings)
    if as_json is not None:
        _require_writable(as_json, probe)
    pipeline = _load(config, overrides)
    load(
        "rlhf_core.plan",
        "rlhf_core.stages.prepare",
        "tasks.feedback.asking.votes",
        "tasks.record.terminal",
    )
    from rlhf_core.backbone.base_model import outline
    from rlhf_core.backbone.precision.gain import describe
    from rlhf_core.doubts import doubts
    from rlhf_core.plan import make_plan
    from rlhf_core.rewards.functions import load_function
    from rlhf_core.settings.data import LATEST
    from rlhf_core.settings.judge import ENDPOINT, PEOPLE
    from rlhf_core.settings.onpolicy import OnPolicySection
    from rlhf_core.stages.prepare import inspect
    from tasks.feedback.asking.votes import votes_now
    from tasks.record.terminal import on_terminal
    from tasks.reward_places import reward_places

    with on_terminal("validate") as logger:
        logger.phase("reward functions and registered models")
        for setting, path in pipeline.reward_functions:
            load_function(path, setting=setting, places=reward_places())
        nobody = ""
        if pipeline.judge.source == ENDPOINT:
            _ = settings.judge_address
        elif pipeline.judge.source == PEOPLE:
            from tasks.feedback.asking.batches import nobody_to_ask

            nobody = nobody_to_ask(pipeline.judge.people, pipeline.project, settings)
        if pipeline.sampling.engine == "vllm" and isinstance(pipeline.policy, OnPolicySection):
            _ = settings.vllm_addresses
        unchecked = ""
        if pipeline.registered_models:
            from tasks.registry.check import check_models  # MLflow takes seconds

            unchecked = check_models(pipeline.registered_models, settings)
        limits, seed = pipeline.length_limits, pipeline.seed
        with votes_now(pipeline.data, settings) as (votes, snapshot):
            found = inspect(pipeline.data, pipeline.model, limits, seed, logger, votes)
        logger.phase("counting parameters")
        plan = make_plan(pipeline.plan_sections, found)
        logger.phase("timing bfloat16")
        network = outline(pipeline.model, found.vocabulary)
        narrow = describe(network, pipeline.precisions, settings.device)
    show_snapshot(snapshot, latest=pipeline.data.preferences.snapshot in ("", LATEST))
    show_validation(found)
    show_plan(plan)
    for sentence in doubts(pipeline.chosen, found):
        line(f"Warning: {sentence}.")
    for sentence in filter(None, (narrow, nobody, unchecked)):
        line(sentence)
    if probe:
        parameters = sum(weight.numel() for weight in network.parameters())
        _estimate(pipeline, found, parameters, settings, as_json)


def _require_writable(path: Path, probe: bool) -> None:
    """Look before minutes are spent on what goes there."""
    if not probe:
        raise UserError("--json writes the estimate, and --no-probe makes none: leave one out.")
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--json {path}: it cannot be written ({reason}); name a file in a folder that exists."
        ) from None


def _estimate(
    pipeline: "PipelineConfig",
    found: "Validation",
    parameters: int,
    settings: "Settings",
    as_json: Path | None,
) -> None:
    """Try the stages, and print what a run will take."""
    from flows.estimate import estimate_run
    from tasks.feedback.asking.votes import votes_now
    from tasks.record.terminal import on_terminal

    with (
        ended_by_sigterm(),
        on_terminal("estimate") as logger,
        votes_now(pipeline.data, settings) as (votes, _),
    ):
        estimate = estimate_run(
            pipeline, found, settings, logger, parameters=parameters, snapshot=votes
        )
    show_estimate(estimate)
    if as_json is not None:
        as_json.write_text(json.dumps(estimate.as_json(), indent=2) + "\n", encoding="utf-8")


@command(name="config", epilog="Example: rlhf config configs/demo.yaml --set ppo.kl_coef=0.1")
def show_config(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Print a config as YAML with every default filled in; `rlhf run` accepts the output."""
    import yaml

    apply_environment(read_settings())
    resolved = _load(config, overrides).model_dump(mode="json")
    typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), nl=False)


@command(
    epilog='Examples: rlhf generate --model models:/demo-policy@champion "The hotel" · '
    "rlhf generate --model gpt2 --temperature 0 < prompts.txt"
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts [default: the lines of standard input].")
    ] = None,
    model: Annotated[
        str, typer.Option(help="models:/NAME/VERSION, models:/NAME@ALIAS, a folder or a hub id.")
    ] = "models:/demo-policy@champion",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of a response (tokens).")
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, max=100.0, callback=_number, help="Sampling temperature; 0 is greedy decoding."
        ),
    ] = 1.0,
    samples: Annotated[int, typer.Option(min=1, max=100_000, help="Responses to each prompt.")] = 1,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Seed; the same seed gives the same texts."),
    ] = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Send the prompt as a user message; always on for a policy trained on messages.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one object per line: prompt, sample (from 1) and response."
        ),
    ] = False,
) -> None:
    """Generate responses of a policy to prompts.

    A single response to a single prompt is printed as it is. Otherwise each prompt is printed above
    its responses, on lines that start with `>`; the responses are indented, and numbered if a
    prompt has several.
    """
    texts = prompts or _lines()
    settings = find.join(read_settings())
    load("tasks.record.terminal", "tasks.serving.generation")
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
    if as_json:  # for programs: JSON has escapes of its own
        typer.echo(responses_as_json(texts, answers))
    else:
        typer.echo(printable(responses_as_text(texts, answers)))


@command(
    name="ask",
    epilog="Examples: rlhf ask demo --prompts 200 · "
    "rlhf ask demo --against models:/demo-policy/2 --pairs ring",
)
def ask_people(
    project: Annotated[str, typer.Argument(help="A feedback project; made if there is none.")],
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to answer.")] = 100,
    model: Annotated[
        str,
        typer.Option(
            metavar="VERSION",
            help="Who answers: models:/NAME/VERSION or models:/NAME@ALIAS "
            "[default: models:/PROJECT-policy@champion].",
        ),
    ] = "",
    against: Annotated[
        str, typer.Option(metavar="VERSION", help="Another version, to compare the first with.")
    ] = "",
    answers: Annotated[int, typer.Option(min=1, help="Answers of each to a prompt.")] = 2,
    pairs: Annotated[
        Literal["all", "ring"],
        typer.Option(
            help="Which answers meet: all, or ring (each the next; the n-th the n-th of --against)."
        ),
    ] = "all",
    file: Annotated[
        str, typer.Option("--from", metavar="FILE", help="Prompts of your own, as JSON lines.")
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="runs:/RUN/data with the prompts [default: what the model was trained on]. Only "
            "training prompts are asked about.",
        ),
    ] = "",
    evaluation: Annotated[
        bool,
        typer.Option(
            "--eval", help="Held-out prompts instead, with --against; these votes train nothing."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Longest answer (tokens); 0 = as in training.")
    ] = 0,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, max=100.0, callback=_number, help="Of sampling; 0 = as in training."),
    ] = 0.0,
    votes: Annotated[
        int, typer.Option(min=0, help="People asked about each pair; 0 = as the project has it.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws prompts and answers.")] = 0,
    licence: Annotated[str, typer.Option(help="Licence of prompts and answers.")] = "",
    enough: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, callback=_number, help="Share of answered pairs that completes it."
        ),
    ] = 1.0,
    days: Annotated[
        float, typer.Option(min=0.0, callback=_number, help="It is complete then, however it is.")
    ] = 7.0,
    then: Annotated[
        str,
        typer.Option(metavar="FLOW/NAME", help="Deployment that is run once it is complete."),
    ] = "",
    judge: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="A machine that answers new pairs first: reward_model, models:/NAME/VERSION, "
            "package.module:function or endpoint.",
        ),
    ] = "",
    judge_model: Annotated[
        str, typer.Option(metavar="NAME", help="Of `--judge endpoint`: the model there.")
    ] = "",
    sure: Annotated[
        float,
        typer.Option(callback=_number, help="Chance from which the judge's answer is enough."),
    ] = 0.8,
    audit: Annotated[
        float,
        typer.Option(callback=_number, help="Share of those that people answer all the same."),
    ] = 0.05,
    if_down: Annotated[
        Literal["wait", "people"],
        typer.Option(help="What becomes of pairs when the judge fails midway."),
    ] = "wait",
) -> None:
    """Have people compare answers: sample them, and queue the pairs.

    The same command again goes on where it was stopped, and asks for nothing twice; another seed
    asks about other prompts. Equal answers are not asked about.
    """
    from flows.cli.asking import ask_config

    config = ask_config(
        project=project,
        prompts=prompts,
        policy=model,
        against=against,
        answers=answers,
        pairs=pairs,
        file=file,
        data=data,
        evaluation=evaluation,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        votes_per_pair=votes,
        seed=seed,
        licence=licence,
        enough=enough,
        days=days,
        then=then,
        judge={"source": judge, "endpoint": {"model": judge_model}, "if_down": if_down},
        router={"sure": sure, "audit": audit},
    )
    settings = find.join(read_settings())
    load("tasks.record.terminal", "tasks.feedback.asking.ask", "tasks.feedback.ordering.task")
    from tasks.feedback.asking.ask import ask
    from tasks.feedback.ordering.task import order_by_itself
    from tasks.record.terminal import on_terminal

    with on_terminal("ask") as logger:
        asked = ask(config, settings, logger)
    line(asked.sentence)
    if not config.evaluation and (order := order_by_itself(config.project, settings)):
        line(order.said)


@command(epilog="Example: rlhf compare 3f2a happy-otter-12")
def compare(
    first: Annotated[str, typer.Argument(help="A pipeline run: id, prefix of the id, or name.")],
    second: Annotated[str, typer.Argument(help="The run to compare it with.")],
    everything: Annotated[bool, typer.Option("--all", help="Also show what is the same.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, and write no page.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> None:
    """Compare two pipeline runs: the settings, stages and metrics that differ.

    The metrics are grouped by stage, and what differs most is first. A metric is shown with its
    95 % interval. A stage that was reused from another run is shown with the metrics of that run.
    The same is written as one HTML page, with the answers of both policies side by side.
    """
    settings = find.join(read_settings())
    load("tasks.pages.comparison_page")
    from tasks.pages.comparison_page import write_comparison

    page = None if as_json else output
    comparison = write_comparison(first, second, page, settings=settings)
    if as_json:
        typer.echo(comparison.model_dump_json(indent=2))
    else:
        show_comparison(comparison, everything=everything)
        line(f"Written: {output}")


@command(epilog="Examples: rlhf lineage --annotator p-7f3a · rlhf lineage --model happy-otter")
def lineage(
    annotator: Annotated[str, typer.Option(help="A pseudonym: which models saw their votes?")] = "",
    source: Annotated[
        str,
        typer.Option(help="A source of rows, as a file, a data set or a name in a column."),
    ] = "",
    licence: Annotated[str, typer.Option(help="A licence of rows or votes.")] = "",
    model: Annotated[
        str,
        typer.Option(
            help="What did this model see? models:/NAME/3, models:/NAME@champion, or the run that "
            "made it. With another option: did this model see that?"
        ),
    ] = "",
    project: Annotated[
        str,
        typer.Option(help="Votes of this project of the preference store only, and of files."),
    ] = "",
    in_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the models that saw an annotator, a source or a licence, or show what a model saw.

    A model saw what it was trained on, and what the models saw that it was made from. What it was
    only evaluated on is listed apart. Options together ask for rows that have all of it.

    Exit status: 0 the answer is complete, also if nothing was found; 4 something could not be
    looked into, which is listed, so that there may be more.
    """
    settings = find.join(read_settings())
    load("flows.cli.lineage")
    from flows.cli.lineage import show
    from tasks.lineage.lineage import Wanted

    wanted = Wanted(annotator, source, licence, project)
    if status := show(wanted, model, settings, in_json=in_json):
        raise typer.Exit(status)


@command(epilog="Example: rlhf report happy-otter --output reports/otter.html")
def report(
    run: Annotated[str, typer.Argument(help="A pipeline run: id, prefix of the id, or name.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write the report of a pipeline run as one HTML page, also of a run that failed.

    The page says what came of the run, what ran on what, and what speaks for and against the
    policy, for people who read no code. It needs no server and loads nothing from elsewhere. A run
    that came to a decision has it in MLflow already, as report.html.
    """
    settings = find.join(read_settings())
    load("tasks.pages.publish", "flows.config")
    from flows.config import default_settings
    from tasks.pages.publish import write_run_page

    line(write_run_page(run, output, defaults=default_settings(), settings=settings))
    line(f"Written: {output}")


@command(epilog="Example: rlhf overoptimisation happy-otter calm-heron --output charts/demo.png")
def overoptimisation(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Pipeline runs: id, prefix of the id, or name."),
    ],
    output: Annotated[
        Path, typer.Option(help="The picture to write; its numbers go to a .csv beside it.")
    ] = Path("overoptimisation.png"),
) -> None:
    """Draw what policies gained over SFT against how far they moved from it, and fit Gao's curves.

    Pass runs that differ in their seed: all are shown, and the intervals of the fits come from
    their differences. The reward model, the held-out reward model (with a monitor) and, for the
    final policy and best-of-n, the known truth are drawn; the predicted peak of each is printed.
    """
    settings = find.join(read_settings())
    load("tasks.history.overoptimisation")
    from tasks.history.overoptimisation import overoptimisation as chart_of
    from tasks.history.overoptimisation import write_chart

    chart = chart_of(runs, settings=settings)
    written = write_chart(chart, output)
    for fit in chart.fits():
        line(fit.sentence())
    line(f"Written: {' and '.join(map(str, written))}")


@command(epilog='Example: rlhf promote happy-otter --reason "reads better than the last one"')
def promote(
    run: Annotated[str, typer.Argument(help="A pipeline run: id, prefix of the id, or name.")],
    by: Annotated[str, typer.Option(help="Who approves [default: your user name].")] = "",
    reason: Annotated[
        str, typer.Option(help="Why you approve; kept with the run and the version.")
    ] = "",
) -> None:
    """Approve a pending promotion.

    A run that is suspended in Prefect receives the approval and resumes. If the run has ended, its
    policy becomes the champion, provided that the champion is still the one it was compared with.
    """
    settings = find.join(read_settings(), prefect=True)
    load("flows.cli.logs", "tasks.steps.promotion")
    from flows.cli import logs
    from tasks.steps.promotion import promote_run

    line(promote_run(run, by=by or getuser(), reason=reason, settings=settings))
    logs.deliver()


@command(epilog="Examples: rlhf rollback demo · rlhf rollback demo --to 3")
def rollback(
    project: Annotated[str, typer.Argument(help="The project whose champion to replace.")],
    to: Annotated[
        int | None,
        typer.Option(min=1, help="The version to restore [default: the previous champion]."),
    ] = None,
    by: Annotated[str, typer.Option(help="Who decides [default: your user name].")] = "",
) -> None:
    """Restore the previous champion, or any other version, as champion."""
    settings = find.join(read_settings(), prefect=True)
    load("flows.cli.logs", "tasks.steps.promotion")
    from flows.cli import logs
    from tasks.steps.promotion import roll_back

    line(roll_back(project, to=to, by=by or getuser(), settings=settings))
    logs.deliver()


@command(epilog="Example: rlhf export models:/demo-policy@champion servable")
def export(
    model: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Export a policy, which answers prompts, or a reward model for `mlflow models serve`."""
    settings = find.join(read_settings())
    load("tasks.serving.export")
    from tasks.record.record import Record
    from tasks.serving.export import export_servable

    store = Record.open(settings).store
    export_servable(store, store.resolve(model), directory)
    typer.echo(f"mlflow models serve -m {directory} --env-manager local -p 5001")


@command(epilog="Examples: rlhf erase p003-7f3a --dry-run · rlhf erase p003-7f3a --project demo")
def erase(
    pseudonym: Annotated[str, typer.Argument(help="Who, as the votes name the person.")],
    project: Annotated[
        str, typer.Option(help="The feedback project, if several have this pseudonym.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    retrain: Annotated[
        Literal["used", "all", "none"],
        typer.Option(
            help="Pipelines to run again without these votes: those with a version in use and the "
            "last one with a reward model, all, or none."
        ),
    ] = "used",
    purge_models: Annotated[
        bool,
        typer.Option(
            "--purge-models", help="Also delete the files of the models that learnt from them."
        ),
    ] = False,
) -> None:
    """Erase a person: identity, votes, and what was made of them; then train again.

    Snapshots are rebuilt without the votes, models that learnt from them lose their aliases, and
    files, logs and databases are searched for the pseudonym. A certificate says what was done, and
    what back-ups still hold. The same command again goes on where it was stopped.
    """
    settings = find.join(read_settings(), prefect=True)
    load("flows.cli.feedback_store", "tasks.feedback.erasure.preview", "flows.erasure")
    from flows.cli import feedback_store
    from flows.erasure import ErasureConfig

    config = ErasureConfig(retrain=retrain, purge_models=purge_models)
    feedback_store.erase(pseudonym, project, settings, config, yes=yes, dry_run=dry_run)


@command(epilog="Example: rlhf backup backups/monday")
def backup(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Back up databases, models, reports and results; servers and training may keep running.

    The back-up holds RLHF_HOME. In the stack of docker-compose.yml it also holds the databases and
    the bucket: `docker compose run --rm tools backup /backup/monday`.
    """
    from tasks.backup import backup as make_backup

    manifest = make_backup(read_settings(), StoreSettings(), folder)
    line(f"{len(manifest.files)} files in {folder}")


@command(epilog="Example: rlhf restore backups/monday")
def restore(
    folder: Annotated[Path, typer.Argument(help="A folder that `rlhf backup` wrote.")],
) -> None:
    """Restore a back-up into an empty RLHF_HOME that no `rlhf up` is using."""
    settings = read_settings()
    if there := find.running(settings):
        raise UserError(
            f"`rlhf up` is running for {settings.home} (process {there.pid}): stop it with Ctrl-C "
            "in its terminal, and move its folder away."
        )
    from tasks.backup import restore as restore_backup

    manifest = restore_backup(settings, StoreSettings(), folder)
    line(f"{len(manifest.files)} files from {folder}")


# ---- helpers ----


def _load(path: Path, overrides: list[str]) -> "PipelineConfig":
    load("flows.config")
    from flows.cli.loading import load_config
    from flows.cli.paths import folder_of
    from flows.config import PipelineConfig

    os.environ["RLHF_CONFIG_FOLDER"] = str(folder_of(path))
    return load_config(path, overrides, PipelineConfig, anchor=True)


def _lines() -> list[str]:
    """The lines of standard input that are not blank."""
    texts = [] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UserError(
            "There is no prompt: pass it as an argument, or one per line on standard input."
        )
    return texts


def main() -> None:
    """The entry point of the command."""
    allocator.keep_memory()
    app()


if __name__ == "__main__":
    main()
