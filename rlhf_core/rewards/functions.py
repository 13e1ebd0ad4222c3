"""Reward functions by import path, `package.module:function`: where they may come from, and calls.

To import a module is to run it, and a config may come from anybody who can start a run. So whoever
runs a stage for others says which places are trusted, and a module of any other place is not
imported, nor is a package above it.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, SupportsFloat, TypeAlias, cast

import torch
from torch import Tensor

from rlhf_core.digests import tree_digest
from rlhf_core.errors import ConfigError

RewardFunction: TypeAlias = Callable[[Sequence[str], Sequence[str]], Sequence[float]]

OWN = "rlhf_core.simulation"  # the demo's truth; allowed everywhere
# What `reach` has added to sys.path, with the packages that were imported from there.
_reached: dict[str, set[str]] = {}


class RewardPlaces(NamedTuple):
    """Where reward functions may come from, beside `rlhf_core.simulation`."""

    folders: tuple[str, ...] = ()  # that of the config: what lies in it, not in folders below it
    packages: tuple[str, ...] = ()  # by name, with everything below them


def load_function(path: str, *, setting: str, places: RewardPlaces | None = None) -> RewardFunction:
    """Import the function `module:name`; `setting` names the setting with the path.

    Args:
        places: where it may come from; None = anywhere, for a caller who wrote the path.

    Raises: ConfigError when it may not be imported, cannot be, or is no function.
    """
    module, _, name = path.partition(":")
    if places is not None and (refusal := refused(module, places)):
        raise ConfigError(f"{setting} '{path}' {refusal}")
    reach(places)
    try:
        function = getattr(importlib.import_module(module), name)
        _remember_import(module.partition(".")[0])
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting} '{path}' cannot be imported ({error}); write it as package.module:function"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{setting} '{path}' cannot be imported, because the module fails "
            f"({type(error).__name__}: {error}); fix the module"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"{setting} '{path}' is a {type(function).__name__}, not a function; "
            "write it as package.module:function"
        )
    return cast(RewardFunction, function)


def source_file(module: str, places: RewardPlaces | None) -> Path | None:
    """The file of a module; None if it is not found or may not be imported."""
    if places is not None and refused(module, places):
        return None
    reach(places)
    try:
        spec = find_spec(module)
    except Exception:  # a package above it fails: the import reports it later
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def code_digest(module: str, places: RewardPlaces | None) -> str | None:
    """A digest of the Python files of a module's folder, or of its whole package.

    None if the module is not found. What it imports from elsewhere does not count.
    """
    file = source_file(module, places)
    if file is None:
        return None
    above = module.count(".") + (file.name == "__init__.py")
    if above == 0:
        return tree_digest(file.parent, "*.py")
    return tree_digest(file.parents[above - 1], "**/*.py")


def refused(module: str, places: RewardPlaces) -> str:
    """Why a module may not be imported, as the end of a sentence; empty if it may.

    Nothing is imported to find out.
    """
    if any(_is_in(module, package) for package in (OWN, *places.packages)):
        return ""
    top = module.partition(".")[0]
    reach(places)
    found = _spec(top)
    if found is not None and any(_lies_in(found, Path(folder)) for folder in places.folders):
        return ""
    folder = next(iter(places.folders), "")
    if found is None:
        beside = f"is neither in {folder}, the folder of the config, nor" if folder else "is not"
        return (
            f"cannot be imported: {top} {beside} among the packages installed here; check the name "
            "and the folder"
        )
    put = f"put it in {folder}, the folder of the config, under a name of its own, or " * bool(
        folder
    )
    return (
        f"is not run: {top} is none of the packages whose functions may be a reward; {put}"
        f"add {top} to RLHF_REWARD_PACKAGES where the stage runs, if you trust it"
    )


def reach(places: RewardPlaces | None) -> None:
    """Make the modules of the config's folder and of the working folder importable.

    These folders come after all others, so that no package is shadowed. Functions of the folder of
    an earlier config are forgotten, for another may have a module of the same name.
    """
    folders = () if places is None else places.folders
    wanted = [*(str(Path(folder).absolute()) for folder in folders), str(Path.cwd())]
    for folder in [known for known in _reached if known not in wanted]:
        tops = _reached.pop(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        if folder in sys.path:
            sys.path.remove(folder)
    for folder in wanted:
        if folder not in sys.path:
            sys.path.append(folder)
            _reached[folder] = set()


def _remember_import(top: str) -> None:
    """Note from which of the added folders a package came."""
    if (found := _spec(top)) is not None:
        for folder, tops in _reached.items():
            if _lies_in(found, Path(folder)):
                tops.add(top)


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _spec(top: str) -> ModuleSpec | None:
    try:
        return find_spec(top)
    except (ImportError, ValueError):  # ValueError: __main__
        return None


def _lies_in(spec: ModuleSpec, folder: Path) -> bool:
    """Whether a top-level module or package lies directly in a folder."""
    homes = list(spec.submodule_search_locations or ())
    if not homes and spec.has_location and spec.origin:
        homes = [spec.origin]
    return bool(homes) and all(Path(home).parent.resolve() == folder.resolve() for home in homes)


def call_function(
    function: RewardFunction, name: str, prompts: Sequence[str], responses: Sequence[str]
) -> Tensor:
    """(B,) the value of a function for each response; `name` is its name in error messages.

    Raises: ConfigError when it fails or does not return one finite number each.
    """
    try:
        values: list[object] = list(function(prompts, responses))
    except Exception as error:
        raise ConfigError(
            f"{name} failed on {len(responses)} texts ({type(error).__name__}: {error}); fix the "
            "function"
        ) from error
    wanted = f"{name} must return one finite number for each of the {len(responses)} responses"
    if len(values) != len(responses):
        raise ConfigError(f"{wanted}; it returned {len(values)}")
    numbers = torch.tensor([_number(value) for value in values])
    if not numbers.isfinite().all():
        row = int(numbers.isfinite().logical_not().nonzero()[0])
        raise ConfigError(
            f"{wanted}; it returned {values[row]!r} for number {row}: {responses[row]!r}"
        )
    return numbers


def _number(value: object) -> float:
    """A value as a float; NaN if it is not a number."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # arrays of several, 10**400
        return math.nan
