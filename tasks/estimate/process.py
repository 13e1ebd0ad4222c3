"""The process of the trials: python -m tasks.estimate.process JOB.json

It imports what a run imports, and then forks once for each stage: so each has its own peak of
memory, and one that is killed for want of it takes nothing with it. It writes a line of JSON for
each stage. What is on its standard input is not read: when that ends, whoever asked is gone, and so
is everything here.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from rlhf_core.errors import UserError, brief
from rlhf_core.estimate.clock import Clock, Span
from rlhf_core.estimate.lengths import AnswerLengths, answers_end
from rlhf_core.estimate.trial import STEP, Trial, run_seconds, trial
from rlhf_core.settings.data import SNAPSHOT
from rlhf_core.settings.model import ModelConfig, SamplingConfig
from rlhf_core.settings.training import TrainingSection
from tasks.estimate.job import Job, StageJob, Tried
from tasks.settings import QUIET, Settings

LENGTHS, MADE, RESULT = "lengths.json", "made.json", "result.json"
MOST_LENGTHS = 2000  # demonstrations whose lengths are looked at
CHECKPOINTS_KEPT = 3  # two, and the one that is being written
FULL = 28  # exit status of a trial that could not even write what it found
NO_ROOM = "there is no room left in the temporary folder; set TMPDIR to a larger disk"
ADAM = 3  # a weight and its two moments, in a checkpoint


def main(path: Path) -> None:
    """Try every stage of a job."""
    begun = time.monotonic()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = Job.model_validate_json(path.read_bytes())
    _end_with(job.folder)
    _settle(job)
    import tasks.steps.stage  # noqa: F401 - before the forks
    from rlhf_core.stages.table import load_stage

    for module in job.imports:
        import_module(module)
    for stage in job.stages:
        load_stage(stage.stage)
    _say(lines, {"imported": time.monotonic() - begun, "cpu": time.process_time()})
    for number, stage in enumerate(job.stages):
        folder = job.folder / f"{number:02d}-{stage.stage}"
        folder.mkdir()
        _say(lines, {"begins": stage.stage})
        child = os.fork()
        if child == 0:
            _child(job, stage, folder)
        status = os.waitpid(child, 0)[1]
        _say(lines, _outcome(stage, folder, status).model_dump(mode="json"))


def _say(lines: TextIO, what: Mapping[str, Any]) -> None:
    print(json.dumps(what), file=lines, flush=True)


def _end_with(folder: Path) -> None:
    """End this process group, and remove its files, when standard input ends."""

    def wait() -> None:
        while sys.stdin.buffer.read(1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _settle(job: Job) -> None:
    """A home of its own: nothing is registered in that of the installation."""
    home = job.folder / "home"
    home.mkdir(parents=True)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "RLHF_PROCESSES", "RLHF_PASSWORD"):
        os.environ.pop(name, None)
    os.environ.update(
        QUIET,
        RLHF_HOME=str(home),
        PREFECT_HOME=str(home / "prefect"),
        RLHF_CHECKPOINT_SECONDS="1000000",
    )


def _outcome(stage: StageJob, folder: Path, status: int) -> Tried:
    with suppress(OSError, ValueError):
        return Tried.model_validate_json((folder / RESULT).read_bytes())
    left: dict[str, Any] = {"stage": stage.stage, "left_out": stage.left_out}
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        killed = os.WTERMSIG(status) == signal.SIGKILL
        why = "the system ended it with SIGKILL, as it does when memory runs out"
        return Tried(**left, problem=why if killed else f"it ended with {name}", no_memory=killed)
    code = os.WEXITSTATUS(status)
    return Tried(**left, problem=NO_ROOM if code == FULL else f"it ended with status {code}")


def _child(job: Job, stage: StageJob, folder: Path) -> None:
    """Try a stage and end this process."""
    code = 0
    try:
        found = _try(job, stage, folder)
    except MemoryError:
        found = _failed(stage, "memory ran out", no_memory=True)
    except UserError as error:
        found = _failed(stage, brief(str(error)))
    except Exception as error:
        if _is_disk(error):
            found = _failed(stage, NO_ROOM)
        elif _is_memory(error):
            found = _failed(stage, "memory ran out", no_memory=True)
        elif isinstance(error, OSError):
            found = _failed(
                stage, brief(f"{error.strerror or error} ({error.filename or 'a file'})")
            )
        else:
            traceback.print_exc()
            found = _failed(stage, brief(f"{type(error).__name__}: {error}"))
    except BaseException as error:
        found = _failed(stage, type(error).__name__)
    try:
        (folder / RESULT).write_text(found.model_dump_json(), encoding="utf-8")
    except OSError:
        code = FULL
    finally:
        sys.stderr.flush()
        os._exit(code)


def _failed(stage: StageJob, problem: str, *, no_memory: bool = False) -> Tried:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Tried(
        stage=stage.stage,
        problem=problem,
        no_memory=no_memory,
        memory=peak if no_memory else 0,
        left_out=stage.left_out,
    )


def _is_disk(error: Exception) -> bool:
    """Whether the temporary folder is full."""
    said = str(error).lower()
    return getattr(error, "errno", 0) == errno.ENOSPC or any(
        words in said for words in ("no space left", "disk is full", "disk full")
    )


def _is_memory(error: Exception) -> bool:
    """Whether a library means that memory ran out."""
    return "OutOfMemory" in type(error).__name__ or any(
        words in str(error).lower()
        for words in ("can't allocate memory", "cannot allocate memory", "out of memory")
    )


def _try(job: Job, stage: StageJob, folder: Path) -> Tried:
    from rlhf_core.stages.table import STAGES
    from tasks.estimate.rows import less_data
    from tasks.record.record import Record
    from tasks.record.run import open_run
    from tasks.registry.refs import DatasetRef, ModelRef
    from tasks.steps.stage import do_stage

    spec = STAGES[stage.stage]
    config = spec.config.model_validate(stage.config)
    sections = {n: kind.model_validate(stage.sections[n]) for n, kind in spec.sections.items()}
    made = _made(job)
    plan = trial(stage.stage, config, sections, job.facts)
    given: dict[str, Path] = {}
    inputs: dict[str, Any] = {}
    for role, kind in stage.inputs.items():
        if kind.startswith("models:"):
            given[role] = _fetched(job, kind)
            continue
        uri = made.get(kind) or made.get(stage.stand_ins.get(role, ""))
        if uri is None:
            raise UserError(f"it needs what an earlier stage makes ({kind}), which was not tried")
        inputs[role] = (DatasetRef if kind == "data" else ModelRef).model_validate(uri)
    if stage.stage == "prepare" and job.snapshot is not None:
        given[SNAPSHOT] = job.snapshot
    if "data" in inputs:
        given["data"] = folder / "data"
        section = config if isinstance(config, TrainingSection) else None
        less_data(_data(job), folder / "data", plan, stage.stage, section, job.seed)
    extra = 0.0
    if stage.stage == "sft" and not sections["model"].source:  # type: ignore[attr-defined]
        extra, sections["model"] = _fresh(job, sections["model"], folder)
    lengths = AnswerLengths(_lengths(job))
    clock: list[Clock] = []

    def watch(opened: Any) -> Any:
        def heard(phase: str) -> None:
            lengths.heard(phase)
            # The first iteration has the longest answers that there can be: the most memory.
            lengths.longest = bool(plan.samples_anew and plan.warm and clock[0].unit == 0)

        clock.append(Clock(opened.logger, between=STEP if plan.units else "", heard=heard))
        return replace(opened, logger=clock[0])

    record = Record.open(patient=False)  # makes the database, which a run finds made
    device = record.settings.training_device if spec.trains else record.settings.device
    _warm_up(device)
    with open_run(job.project, config, job.seed) as run, answers_end(lengths):
        begun = time.monotonic(), time.process_time()
        outputs = do_stage(
            stage.stage,
            plan.config,
            run,
            inputs=inputs,
            sections=sections | _in_process(sections),
            returns=lambda found: found,
            given=given,
            watch=watch,
        )
        took = time.monotonic() - begun[0], time.process_time() - begun[1]
    spans = clock[0].stop()
    _dump(folder, spans)
    outside = [took[0] - sum(s.seconds for s in spans), took[1] - sum(s.cpu_seconds for s in spans)]
    seconds = extra + max(outside[0], 0.0) + run_seconds(plan, spans)
    cpu = extra + max(outside[1], 0.0) + run_seconds(plan, spans, cpu=True)
    refs = {k: ref.model_dump(mode="json") for k, ref in outputs.models.items()}
    if outputs.data is not None:
        refs["data"] = outputs.data.model_dump(mode="json")
    (job.folder / MADE).write_text(json.dumps({**made, **refs}), encoding="utf-8")
    if stage.stage == "sft":
        _measure_lengths(job, record.store.fetch(outputs.models["sft"], folder / "sft"), sections)
    kept, working, state = _disk(job, stage, plan, outputs, record)
    return Tried(
        stage=stage.stage,
        says=plan.says,
        measured=_measured(plan, took[0]),
        seconds=seconds,
        cpu_seconds=cpu,
        memory=_peak(device),
        copy_of_state=_copied(state, device) if seconds > job.checkpoint_seconds else 0,
        kept=kept,
        working=working,
        took=took[0],
        left_out=stage.left_out,
    )


def _copied(state: int, device: str) -> int:
    """Bytes of the copy of a state from which a run writes a checkpoint; 0 without room for it."""
    import torch

    from rlhf_core.machine.memory import free_memory
    from rlhf_core.training.beside import SHARE

    return state if state <= SHARE * free_memory(torch.device(device)) else 0


def _in_process(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Servers sample for a run, and not for its estimate."""
    return {n: s.in_process for n, s in sections.items() if isinstance(s, SamplingConfig)}


def _dump(folder: Path, spans: list[Span]) -> None:
    """For whoever wants to know: the seconds of each phase."""
    rows = [[s.what, s.part, s.parts, s.unit, s.seconds, s.cpu_seconds] for s in spans]
    (folder / "spans.json").write_text(json.dumps(rows), encoding="utf-8")


def _measured(plan: Trial, seconds: float) -> str:
    if not plan.units:
        return (
            f"all of it in {seconds:.1f} s" if plan.unit == "step" else f"a part in {seconds:.1f} s"
        )
    counted = plan.tried - plan.warm
    return f"mean of {counted} {plan.unit}{'' if counted == 1 else 's'}"


def _peak(device: str) -> int:
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _warm_up(device: str) -> None:
    """Start the device, which a process does once."""
    import torch

    torch.ones(8, 8, device=device).sum().item()


def _made(job: Job) -> dict[str, Any]:
    path = job.folder / MADE
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _fetched(job: Job, uri: str) -> Path:
    """A registered model of the installation."""
    from tasks.record.record import Record

    settings = Settings.model_validate(
        {"RLHF_HOME": job.home, "MLFLOW_TRACKING_URI": job.tracking_uri}
    )
    store = Record.open(settings).store
    ref = store.resolve(uri)
    to = job.folder / f"{ref.name}-{ref.version}"
    return to if to.exists() else store.fetch(ref, to)


def _data(job: Job) -> Path:
    """The prepared data of the run, all of them."""
    from tasks.record.record import Record
    from tasks.registry.datasets import fetch_dataset
    from tasks.registry.refs import DatasetRef

    folder = job.folder / "data"
    if not folder.exists():
        ref = DatasetRef.model_validate(_made(job)["data"])
        fetch_dataset(Record.open(patient=False).client, ref, folder)
    return folder


def _fresh(job: Job, model: Any, folder: Path) -> tuple[float, ModelConfig]:
    """A fresh model with the vocabulary that all the data give it, and how long that takes."""
    from rlhf_core.backbone.base_model import load_base
    from rlhf_core.backbone.directory import save_model
    from rlhf_core.data.prepared import read_table, training_texts

    begun = time.process_time()
    texts = training_texts(read_table(_data(job), "demonstrations", "train"))
    made, tokenizer = load_base(model, texts, job.seed)
    took = time.process_time() - begun
    save_model(made, tokenizer, folder / "base", kind="policy")
    return took, ModelConfig(source=str(folder / "base"))


def _lengths(job: Job) -> list[int]:
    path = job.folder / LENGTHS
    return json.loads(path.read_bytes()) if job.sft_is_trained and path.is_file() else []


def _measure_lengths(job: Job, sft: Path, sections: Mapping[str, Any]) -> None:
    """Note how long the demonstrations' answers are, with the token that ends them."""
    from rlhf_core.backbone.directory import load_saved_tokenizer
    from rlhf_core.data.encoding import encode_response
    from rlhf_core.data.prepared import read_table

    tokenizer = load_saved_tokenizer(sft)
    table = read_table(_data(job), "demonstrations", "train")
    if len(table) > MOST_LENGTHS:
        table = table.sample(MOST_LENGTHS, random_state=job.seed % 2**32)
    found = [
        len(encode_response(text, tokenizer, chat=not isinstance(prompt, str)))
        for prompt, text in zip(table["prompt"], table["response"], strict=True)
    ]
    (job.folder / LENGTHS).write_text(json.dumps(found), encoding="utf-8")


def _disk(
    job: Job, stage: StageJob, plan: Trial, outputs: Any, record: Any
) -> tuple[int, int, int]:
    """Bytes that the run keeps of a stage, that it needs beside them while the stage runs, and of
    one checkpoint."""
    from rlhf_core.stages.table import STAGES

    sizes = {}
    for kind, ref in outputs.models.items():
        folder = record.store.fetch(ref, job.folder / "sizes")
        sizes[kind] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
    if outputs.data is not None:
        sizes["data"] = sum(p.stat().st_size for p in _data(job).rglob("*") if p.is_file())
    milestones = [size for kind, size in sizes.items() if kind.startswith("milestone")]
    kept = sum(size for kind, size in sizes.items() if not kind.startswith("milestone"))
    if milestones:
        kept += int(milestones[0] * plan.once.get("saving a milestone", 0))
    state = 0
    spec = STAGES[stage.stage]
    if spec.trains:
        rank = int(stage.config.get("lora_rank", 0))
        learnt = max((sizes[k] for k in spec.outputs if k in sizes), default=0) * len(spec.learns)
        state = 0 if rank else ADAM * learnt
    return kept, kept + CHECKPOINTS_KEPT * state, state


if __name__ == "__main__":
    main(Path(sys.argv[1]))
