"""The certificate of an erasure: what was done, and what is out of reach, without saying of whom.

It is JSON and a page in Markdown, under `RLHF_HOME/erasures` and in an MLflow run. The person is in
it as HMAC-SHA256 of the pseudonym; the key is a code that is shown once, and kept nowhere.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.redaction import masked
from tasks.feedback.erasure import backups
from tasks.feedback.erasure.places import CERTIFICATES
from tasks.feedback.erasure.requests import Request
from tasks.feedback.store import clock
from tasks.feedback.store.store import Store
from tasks.record import tags
from tasks.record.describe import ensure_experiment, origin
from tasks.record.record import Record
from tasks.settings import Settings

HASH = "HMAC-SHA256 of the pseudonym; the key is the code that was shown when the erasure began"
CHECK = "printf %s PSEUDONYM | openssl dgst -sha256 -hmac CODE"
OUT_OF_REACH = (
    "files that were exported or copied to other places, and what others made of them",
    "files of your own that votes were imported from: take the rows out there, or an import of the "
    "same file brings the person back as a new one",
    "traces in MLflow's review queues of a server that is not under this home, and its accounts",
    "votes that wait in the browser of the person, who is signed out: they are refused",
    "the write-ahead log and replicas of a Postgres server, until it recycles them",
    "models that were downloaded or exported before",
)


def content(request: Request, settings: Settings) -> dict[str, Any]:
    """The certificate, as JSON values."""
    steps = request.steps
    files = steps.get("files", {})
    done = steps.get("votes", {})
    kept = backups.kept(settings, request.finished_at or clock.now())
    return {
        "erasure": request.id,
        "project": request.project.name,
        "person": {"hash": request.mark, "how": HASH, "check": CHECK},
        "begun": request.begun_at.isoformat(timespec="seconds"),
        "finished": request.finished_at and request.finished_at.isoformat(timespec="seconds"),
        "by": request.by,
        "steps": {name: facts["at"] for name, facts in steps.items() if "at" in facts},
        "rows": done.get("rows", {}),
        "snapshots": done.get("snapshots", []),
        "models": _models(steps),
        "purged": steps.get("purge", {}).get("versions", []),
        "retraining": steps.get("retraining", {}),
        "runs": steps.get("data", {}).get("runs", {}),
        "files": {
            "searched": files.get("searched", 0),
            "counts": dict(sorted(Counter(files.get("files", {}).values()).items())),
            "what": files.get("files", {}),
            "databases": files.get("databases", {}),
        },
        "left": {
            "not_changed": files.get("left", {}),
            "found_afterwards": steps.get("search", {}).get("found", []),
            "places_with_the_same_word": files.get("same_word", 0),
            "overwritten_in_the_database": steps.get("finish", {}).get("overwritten"),
        },
        "backups": [
            {
                "folder": backup.folder,
                "made": backup.at.isoformat(timespec="seconds"),
                "expires": backup.expires and backup.expires.isoformat(timespec="seconds"),
                "found": backup.there,
                "sentence": backup.sentence(),
            }
            for backup in kept
        ],
        "out_of_reach": list(OUT_OF_REACH),
    }


def _models(steps: Mapping[str, Any]) -> list[dict[str, Any]]:
    after = steps.get("retraining", {}).get("models", {})
    found = steps.get("models", steps.get("models_found", {})).get("models", [])
    return [
        {
            "version": model["version"],
            "kind": model["kind"],
            "digest": model["digest"],
            "aliases_retired": list(model["aliases"]),
            "after": after.get(model["version"]),
        }
        for model in found
    ]


def page(made: Mapping[str, Any]) -> str:
    """The certificate as Markdown, for people."""
    rows, files, left = made["rows"], made["files"], made["left"]
    lines = [
        f"# Certificate of erasure {made['erasure']}",
        "",
        f"A person was erased from the feedback project **{made['project']}**. It began on "
        f"{made['begun']} and "
        + (f"ended on {made['finished']}." if made["finished"] else "has **not ended yet**."),
        "",
        f"The person is `{made['person']['hash']}`: {made['person']['how']}. Whoever has the code "
        f"can check it with `{made['person']['check']}`.",
        "",
        "## The preference store",
        "",
        *(f"* {number:,} {_plain(name)}" for name, number in rows.items() if number),
        "",
        "## Snapshots",
        "",
        "| before | after |",
        "|---|---|",
        *(f"| {one['before']} | {one['after'] or 'no votes left'} |" for one in made["snapshots"]),
        "",
        "## Models that learnt from the votes",
        "",
        "Their aliases are retired, and none of them can become the champion.",
        "",
        "| version | digest of the files | aliases retired | trained again |",
        "|---|---|---|---|",
        *map(_model_line, made["models"]),
        "",
        *(f"* {sentence}" for sentence in made["retraining"].get("notes", [])),
        *(f"* The files of {version} are deleted." for version in made["purged"]),
        "",
        "## Runs, files and databases",
        "",
        f"{files['searched']:,} files were searched.",
        "",
        *(f"* {number:,} files: {outcome}" for outcome, number in files["counts"].items()),
        *(
            f"* {sum(tables.values()):,} cells of {place} written anew"
            for place, tables in files["databases"].items()
        ),
        *(f"* run {run}: {', '.join(paths)} deleted" for run, paths in made["runs"].items()),
        "",
        "## What is left",
        "",
        *(f"* {path}: {why}" for path, why in left["not_changed"].items()),
        *(
            f"* {path} still has it"
            for path in left["found_afterwards"]
            if path not in left["not_changed"]
        ),
        *_words(left["places_with_the_same_word"]),
        *(
            ["* the log of the database could not be emptied, as somebody read it"]
            if left["overwritten_in_the_database"] is False
            else []
        ),
        "* of each vote a row that says that there was one on its pair, and when it came in",
        "",
        "Back-ups that were made before, and still hold the votes:",
        "",
        *(f"* {one['sentence']}" for one in made["backups"]),
        *([] if made["backups"] else ["* none is known here"]),
        "",
        "Out of reach:",
        "",
        *(f"* {what}" for what in made["out_of_reach"]),
        "",
    ]
    return "\n".join(lines)


def _plain(name: str) -> str:
    return {
        "judgments": "votes, skips and withdrawals emptied",
        "log_entries": "entries of the log without the pseudonym now",
        "pairs": "pairs were touched",
        "reopened": "of these pairs want votes again",
    }.get(name, f"{name} deleted")


def _model_line(model: Mapping[str, Any]) -> str:
    after = model["after"]
    again = f"{after['version']} `{after['digest'][:16]}`" if after else "no"
    aliases = ", ".join(model["aliases_retired"]) or "none"
    return f"| {model['version']} | `{model['digest'][:16]}` | {aliases} | {again} |"


def _words(number: int) -> list[str]:
    if not number:
        return []
    return [
        f"* {number:,} files and cells have the same word for something else: it is a common one, "
        "so it was taken out only where annotators are named"
    ]


def write(request: Request, settings: Settings) -> Path:
    """Write the certificate under the home; the page."""
    folder = settings.home / CERTIFICATES
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = content(request, settings)
    name = f"erasure-{request.id}"
    _put(folder / f"{name}.json", json.dumps(made, ensure_ascii=False, indent=1))
    _put(folder / f"{name}.md", page(made))
    return folder / f"{name}.md"


def publish(store: Store, request: Request, record: Record) -> str:
    """The MLflow run with the certificate, in the experiment of the project."""
    experiment = ensure_experiment(record.client, request.project.name, record.settings)
    run_id = request.steps.get("published", {}).get("run")
    name = f"erasure-{request.id}"
    if run_id is None or record.runs.find_active(run_id) is None:
        run_id = str(record.client.create_run(experiment, run_name=name).info.run_id)
        own = {tags.STAGE: tags.ERASURE, **origin(0, record.settings)}
        record.add_tags(run_id, own)
    made = content(request, record.settings)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "certificate.json").write_text(
            json.dumps(made, ensure_ascii=False, indent=1), encoding="utf-8"
        )
        record.client.log_artifacts(run_id, scratch)
    record.write_page(run_id, masked(page(made)), "certificate.md")
    record.client.set_terminated(run_id, "FINISHED")
    return str(run_id)


def _put(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
