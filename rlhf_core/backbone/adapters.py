"""LoRA: train a small matrix product beside each frozen linear layer of the blocks.

    y = W·x + (alpha / rank)·B·A·x,   A ~ Kaiming uniform, B = 0

so a fresh adapter changes nothing, and a model with its adapters off is the base model. Several
adapters can share one body and are switched on in turn: policy, critic and reward model share one
trunk, and the reference is the trunk itself. peft provides the matrices; this module names,
switches, merges and stores them. The experts of a mixture, and their router, are no linear layers
in transformers but stacked weights, and stay frozen.

Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_core.backbone.packing import blocks, is_packed
from rlhf_core.errors import ConfigError, ModelError

if TYPE_CHECKING:  # half a second, which a run without adapters saves
    from peft.tuners.lora import Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD_MODULE = "score"  # of a sequence classifier, which an adapter may bring with it
PREFIX = "base_model.model."  # peft's prefix for the names in its files
_HEAD = f"{PREFIX}{HEAD_MODULE}.weight"


def add_adapter(
    model: PreTrainedModel, name: str, *, rank: int, alpha: int, layers: int = 0, seed: int = 0
) -> None:
    """Put an adapter beside every linear layer of the body, and freeze all other weights.

    Args:
        layers: how many blocks get one, counted from the last; 0 for all.

    Raises: ConfigError when the model has fewer blocks.
    """
    number = len(blocks(model.base_model)[1])
    if layers > number:
        raise ConfigError(
            f"lora_layers is {layers}, but the model has {number} blocks; lower it, or "
            "set 0 for all"
        )
    depth = number - layers if layers else 0
    if not (targets := _linear_layers(model.base_model, depth)):
        raise ModelError(
            f"the blocks of {type(model).__name__} have no linear layers for adapters; set "
            "lora_rank to 0, or take another family"
        )
    _add(model, name, targets, rank=rank, alpha=alpha, seed=seed)


def adapted_from(model: PreTrainedModel) -> int | None:
    """The first block with an adapter. All networks on this model share the blocks before it.

    None when they share none: there are no adapters, the first block has one, or the model computes
    padded blocks.
    """
    if not is_packed(model.base_model):
        return None
    _, rows = blocks(model.base_model)
    numbers = (n for n, block in enumerate(rows) if any(True for _ in _layers(block)))
    return next(numbers, None) or None


def _add(
    model: PreTrainedModel, name: str, targets: list[str], *, rank: int, alpha: int, seed: int = 0
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    # Given the whole body, peft would take the linear layers of some mixtures of experts for their
    # experts, by name.
    stack_name, stack = blocks(model.base_model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=[target.removeprefix(f"{stack_name}.") for target in targets],
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in stack.modules()),  # GPT-2 stores W as Wᵀ
    )
    device = model.device
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
        torch.manual_seed(seed)
        inject_adapter_in_model(config, stack, adapter_name=name)
    del stack.peft_config  # we read the layers instead; peft would warn about a second adapter
    model.to(device).requires_grad_(False)
    use_adapter(model, name)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Enable one adapter and disable the others; None disables all. No effect without adapters."""
    for layer in _layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)  # a layer without this adapter computes its base


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their name in the model."""
    found = {n: p for n, p in model.named_parameters() if f".{name}." in n and ".lora_" in n}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def merged_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The weights of a plain model that computes the same as `model` with the adapter on.

    The model itself is not changed. Tied tensors stay tied.
    """
    layers = dict(_named_layers(model))
    state: dict[str, Tensor] = {}
    for key, tensor in _weights(model):
        if ".lora_" in key:
            continue
        owner, _, last = key.rpartition(".base_layer.")
        if owner and last == "weight" and name in layers[owner].r:
            tensor = tensor + layers[owner].get_delta_weight(name).to(tensor.dtype)
        state[f"{owner}.{last}" if owner else key] = tensor
    return state


def average_adapters(model: PreTrainedModel, names: Sequence[str], average: str) -> None:
    """Add the adapter that moves every weight by the mean of what some others move it by.

        1/K·Σₖ (alpha/r)·Bₖ·Aₖ = (alpha/(K·r))·[B₁ … B_K]·[A₁; …; A_K]

    so it is exact, and of rank K·r. The mean of the A times the mean of the B would be something
    else.

    Args:
        names: adapters of one rank and one alpha, beside the same layers.
    """
    layers = {n: m for n, m in _named_layers(model.base_model) if names[0] in m.r}
    first = next(iter(layers.values()))
    rank, alpha = first.r[names[0]], int(first.lora_alpha[names[0]])
    _add(model, average, sorted(layers), rank=rank * len(names), alpha=alpha)
    with torch.no_grad():
        for layer in layers.values():
            for matrices, side in ((layer.lora_A, 0), (layer.lora_B, 1)):
                weights = {name: cast(Tensor, matrices[name].weight) for name in (*names, average)}
                weights[average].copy_(torch.cat([weights[name] for name in names], side))


def save_adapter(
    model: PreTrainedModel, name: str, directory: Path, base: str, head: nn.Linear | None = None
) -> None:
    """Write an adapter as peft does, so that `PeftModel.from_pretrained(base, directory)` reads it.

    `base` identifies the model it belongs to. A `head` is written as the module `score` that peft
    puts in the place of the base's own.
    """
    from peft import LoraConfig

    carriers = {n: m for n, m in _named_layers(model.base_model) if name in m.r}
    first = next(iter(carriers.values()))
    config = LoraConfig(
        r=first.r[name],
        lora_alpha=first.lora_alpha[name],
        target_modules=sorted(carriers),
        lora_dropout=0.0,
        fan_in_fan_out=bool(first.fan_in_fan_out),
        base_model_name_or_path=base,
        modules_to_save=None if head is None else [HEAD_MODULE],
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    _sort_targets(directory / CONFIG)
    weights = {
        PREFIX + key.replace(f".{name}.", "."): parameter.detach().contiguous().cpu()
        for key, parameter in adapter_parameters(model, name).items()
    }
    if head is not None:
        weights[_HEAD] = head.weight.detach().clone().cpu()
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def _sort_targets(path: Path) -> None:
    """Sort the names, which peft keeps in a set: its order, and so the digest of the file, would
    differ from process to process."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, name: str, directory: Path) -> Tensor | None:
    """Put a stored adapter into a model under a name.

    Returns: the weight of the head that was stored with it, if there is one.

    Raises: ModelError when it cannot be read, or was made for another architecture.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(directory))
        weights = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot read an adapter from {directory} ({error})") from error
    targets = sorted(config.target_modules or ())
    if strange := set(targets) - set(_linear_layers(model.base_model, 0)):
        one = min(strange)
        raise ModelError(f"the adapter in {directory} is for another model: {one} does not fit")
    _add(model, name, targets, rank=config.r, alpha=config.lora_alpha)
    head = weights.pop(_HEAD, None) if config.modules_to_save == [HEAD_MODULE] else None
    wanted = {
        PREFIX + key.replace(f".{name}.", "."): parameter
        for key, parameter in adapter_parameters(model, name).items()
    }
    for key in sorted({*wanted} | {*weights}):
        if key not in wanted or key not in weights or wanted[key].shape != weights[key].shape:
            raise ModelError(f"the adapter in {directory} is for another model: {key} does not fit")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(weights[key])
    return head


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The entries of its `state_dict`, which itself would return shards of a model under FSDP."""
    yield from model.named_parameters(remove_duplicate=False)
    for owner, module in model.named_modules():
        for name, buffer in module.named_buffers(owner, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _linear_layers(body: PreTrainedModel, depth: int) -> list[str]:
    """The linear layers of the blocks from `depth` on, including those that have an adapter."""
    name, rows = blocks(body)
    found = []
    for number, block in list(enumerate(rows))[depth:]:
        carriers = tuple(f"{n}." for n, _ in _named_layers(block))
        found += [
            f"{name}.{number}.{n}"
            for n, m in block.named_modules()
            if (_is_linear(m) or _is_adapted(m)) and not n.startswith(carriers)
        ]
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes W·x + b; the routers of some mixtures inherit from `nn.Linear`."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and isinstance(module(module.weight[:1]), Tensor)


def _is_adapted(module: nn.Module) -> "TypeGuard[Linear]":
    """Whether a module is a linear layer with adapters: none is before peft was imported."""
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and isinstance(module, lora.Linear)


def _layers(model: nn.Module) -> Iterator["Linear"]:
    return (layer for _, layer in _named_layers(model))


def _named_layers(model: nn.Module) -> Iterator[tuple[str, "Linear"]]:
    return ((n, m) for n, m in model.named_modules() if _is_adapted(m))
