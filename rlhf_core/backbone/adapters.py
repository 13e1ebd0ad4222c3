"""LoRA: what is learnt is a small matrix product beside each frozen linear layer.

    y = W·x + (alpha / rank)·B·A·x,   A ~ Kaiming uniform, B = 0

so a fresh adapter changes nothing, and a model with its adapters off is the model it was. Several
adapters live in one body and are switched: policy, critic and reward model on one trunk, with the
reference as the trunk itself. The matrices are those of peft; this module names, switches, merges
and stores them.

Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_core.backbone.packing import blocks
from rlhf_core.errors import ConfigError, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before the names in its files


def add_adapter(
    model: PreTrainedModel, name: str, *, rank: int, alpha: int, layers: int = 0, seed: int = 0
) -> None:
    """Put an adapter beside every linear layer of the body, and freeze all other weights.

    Args:
        layers: in the last so many blocks alone; 0 for all.

    Raises: ConfigError when the model has fewer blocks.
    """
    number = len(blocks(model.base_model)[1])
    if layers > number:
        raise ConfigError(
            f"lora_layers is {layers}, but the model has {number} blocks; lower it, or 0 for all"
        )
    depth = number - layers if layers else 0
    _add(model, name, _linear_layers(model.base_model, depth), rank=rank, alpha=alpha, seed=seed)


def adapted_from(model: PreTrainedModel) -> int | None:
    """The first block with an adapter beside it, below which all networks on this model are one.

    None where there is nothing below: no adapters, or one in the first block already.
    """
    _, rows = blocks(model.base_model)
    numbers = (n for n, block in enumerate(rows) if any(True for _ in _layers(block)))
    return next(numbers, None) or None


def _add(
    model: PreTrainedModel, name: str, targets: list[str], *, rank: int, alpha: int, seed: int = 0
) -> None:
    body = model.base_model
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in body.modules()),  # GPT-2 stores W as Wᵀ
    )
    device = model.device
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        inject_adapter_in_model(config, body, adapter_name=name)
    del body.peft_config  # what is there is read from the layers; peft warns of a second adapter
    model.to(device).requires_grad_(False)
    use_adapter(model, name)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Switch one adapter on and the others off; all off with None. No effect without adapters."""
    for layer in _layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)  # a layer without this adapter is then as it was


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their name in the model."""
    found = {n: p for n, p in model.named_parameters() if f".{name}." in n and ".lora_" in n}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def merged_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The weights of the plain model that computes what `model` does with the adapter on.

    The model itself stays as it is. Shared tensors stay shared.
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


def save_adapter(model: PreTrainedModel, name: str, directory: Path, base: str) -> None:
    """Write an adapter as peft does, so that `PeftModel.from_pretrained(base, directory)` reads it.

    `base` says which model it belongs to.
    """
    carriers = {n: m for n, m in _named_layers(model.base_model) if name in m.r}
    first = next(iter(carriers.values()))
    config = LoraConfig(
        r=first.r[name],
        lora_alpha=first.lora_alpha[name],
        target_modules=sorted(carriers),
        lora_dropout=0.0,
        fan_in_fan_out=bool(first.fan_in_fan_out),
        base_model_name_or_path=base,
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    _sort_targets(directory / CONFIG)
    weights = {
        PREFIX + key.replace(f".{name}.", "."): parameter.detach().contiguous().cpu()
        for key, parameter in adapter_parameters(model, name).items()
    }
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def _sort_targets(path: Path) -> None:
    """peft keeps the names in a set, whose order differs from process to process: so would the
    digest of the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, name: str, directory: Path) -> None:
    """Put a stored adapter into a model under a name.

    Raises: ModelError when it cannot be read, or belongs to another architecture.
    """
    try:
        config = LoraConfig.from_pretrained(str(directory))
        weights = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{directory} holds no adapter that can be read ({error})") from error
    targets = sorted(config.target_modules or ())
    if strange := set(targets) - set(_linear_layers(model.base_model, 0)):
        one = min(strange)
        raise ModelError(f"the adapter in {directory} is for another model: {one} does not fit")
    _add(model, name, targets, rank=config.r, alpha=config.lora_alpha)
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


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What its `state_dict` has; asked for that, a model that FSDP spreads would give shards."""
    yield from model.named_parameters(remove_duplicate=False)
    for owner, module in model.named_modules():
        for name, buffer in module.named_buffers(owner, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _linear_layers(body: PreTrainedModel, depth: int) -> list[str]:
    """The linear layers of the blocks from `depth` on, also where an adapter is already."""
    name, rows = blocks(body)
    found = []
    for number, block in list(enumerate(rows))[depth:]:
        carriers = tuple(f"{n}." for n, _ in _named_layers(block))
        found += [
            f"{name}.{number}.{n}"
            for n, m in block.named_modules()
            if isinstance(m, (nn.Linear, Conv1D, Linear)) and not n.startswith(carriers)
        ]
    return found


def _layers(model: nn.Module) -> Iterator[Linear]:
    return (layer for _, layer in _named_layers(model))


def _named_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Linear))
