"""The key that identifies a stage: a digest of its settings, seed, inputs and code.

A stage runs again only if its own code changes. Its code is the modules of `rlhf_core` that it
imports, directly or indirectly, the functions that its settings name, and the releases of the
libraries that affect its numbers.
"""

import ast
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import rlhf_core
from rlhf_core.config import identifying
from rlhf_core.rewards.functions import source_file
from tasks.record import tags
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref, SnapshotRef
from tasks.reward_places import reward_places

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy")
# The first module of a stage, unless it is the one in `rlhf_core.stages` with its name.
STARTS = {"promotion": "rlhf_core.promotion.rules"}
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")  # package.module:function
# `reuse` replaces a training, so it is not a setting of one; how long people are waited for, and
# when they are asked, changes no verdict.
NO_SETTINGS: Any = {"reuse": True, "people": {"days": True, "priority": True}}
ROOT = Path(rlhf_core.__file__).parent


@dataclass(frozen=True)
class Definition:
    """What defines a stage, apart from its code."""

    name: str
    sections: Mapping[str, BaseModel]  # its own settings under its name, then shared ones
    run: PipelineRun
    inputs: Mapping[str, Ref]  # by role
    context: str = "training"  # what its data are used for, shown in MLflow

    @property
    def seed(self) -> int:
        """The seed of the pipeline."""
        return self.run.seed

    def content(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {name: section.model_dump(mode="json") for name, section in self.sections.items()}

    def key(self, store: MlflowModelStore) -> str:
        """The key of the stage, 16 hex digits: stages with equal keys give equal bits."""
        settings = {
            name: identifying(section, exclude=NO_SETTINGS)
            for name, section in self.sections.items()
        }
        facts = {
            "stage": self.name,
            "project": self.run.project,
            "seed": self.seed,
            "settings": settings,
            "inputs": {role: _content(ref, store) for role, ref in self.inputs.items()},
            "code": stage_code(self.name, settings),
        }
        return short_digest(facts)


def _content(ref: Ref, store: MlflowModelStore) -> str:
    """The digest of the files of a reference; a version trained again has the same digest."""
    if isinstance(ref, DatasetRef | SnapshotRef):
        return ref.digest
    assert isinstance(ref, ModelRef)
    return store.tags(ref).get(tags.DIGEST, ref.uri)


def short_digest(facts: Mapping[str, Any]) -> str:
    """A digest of JSON values, 16 hex digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def code_identity() -> dict[str, str]:
    """Tags for the version of this package, its git commit in a checkout, and a digest of the whole
    core: a stopped run is resumed only with exactly the same code."""
    here = Path(__file__)
    # An installed copy may lie in another repository, so we check that this file is tracked.
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    commit = _git(here.parent, "rev-parse", "HEAD") if tracked else None
    dirty = bool(_git(here.parent, "status", "--porcelain")) if commit else False
    return {
        tags.CODE_VERSION: version("rlhf-pipeline"),
        tags.CODE_DIGEST: _digest(sorted(ROOT.rglob("*.py"))),
        tags.GIT_COMMIT: commit or "unknown",
        tags.GIT_DIRTY: tags.flag(dirty),
    }


def stage_code(stage: str, settings: Mapping[str, Any]) -> str:
    """Digest of the code that determines the numbers of a stage.

    Args:
        stage: its name; an unknown stage is taken to run the whole core.
        settings: its sections as JSON values; functions that they name are part of the code, unless
            they may not be imported.
    """
    start = STARTS.get(stage, f"rlhf_core.stages.{stage}")
    files = set(closure(start)) if _file(start) else set(ROOT.rglob("*.py"))
    for module in sorted(_modules(settings)):
        if module.partition(".")[0] == "rlhf_core":
            files |= closure(module)
        elif found := source_file(module, reward_places()):
            files.add(found)
    return _digest(sorted(files))


@cache
def closure(module: str) -> frozenset[Path]:
    """The files of `rlhf_core` that a module imports, directly or indirectly, at any time."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if path is None or path in found:
            continue
        found.add(path)
        parents = name.split(".")[:-1]  # importing a module imports its packages first
        waiting += [".".join(parents[: end + 1]) for end in range(len(parents))]
        waiting += _imports(path)
    return frozenset(found)


def _imports(path: Path) -> Iterator[str]:
    """The modules that a file imports; `from a import b` may import the module `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str) -> Path | None:
    """The file of a module of the core; None for any other name."""
    first, *rest = module.split(".")
    if first != "rlhf_core":
        return None
    place = ROOT.joinpath(*rest)
    candidates = (place / "__init__.py", place.with_suffix(".py") if rest else place)
    return next((path for path in candidates if path.is_file()), None)


def _modules(value: object) -> set[str]:
    """The modules of all functions that the settings name."""
    if isinstance(value, Mapping):
        return set().union(*map(_modules, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_modules, value))
    match = FUNCTION.fullmatch(value) if isinstance(value, str) else None
    return {match[1]} if match else set()


def _digest(files: list[Path]) -> str:
    releases = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    sha = hashlib.sha256(releases.encode())
    for path in files:
        inside = path.is_relative_to(ROOT)
        name = path.relative_to(ROOT).as_posix() if inside else path.name
        sha.update(f"\n{name}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
