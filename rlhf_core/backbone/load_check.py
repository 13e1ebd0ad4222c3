"""Decide how a loaded model is computed, and refuse one that would be computed wrongly.

A few short texts are computed by the model as transformers computes it, with eager attention and
one text at a time; then packed, and token by token as the sampler does; then, if that differs, as a
padded block with the model's own attention. The first way that gives the same states is taken.

Windows of attention are made as short as these texts while they are checked. Texts longer than the
rope allows are refused elsewhere: `context.require_rope`.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.backbone.context import context_of
from rlhf_core.backbone.memory import continuation
from rlhf_core.backbone.packing import (
    ATTENTION,
    blocks,
    hidden_states,
    is_packed,
    pack,
    position_ids,
)
from rlhf_core.backbone.pretrained import quiet
from rlhf_core.errors import ModelError, UserError, lacks_memory

# Largest difference of hidden states, relative to their root mean square. Rounding gives 3e-5 in 30
# blocks of attention and up to 5e-4 in scans of states; the faults that were found give 3e-3 with
# the smallest of weights, and 0.1 and more with others.
CLOSE = 1e-3
WINDOW = 4  # tokens; shorter than every text of the check
WINDOWS = ("sliding_window", "attention_chunk_size")  # settings of how far back a layer looks
TESTED = "GPT-2, Llama, Qwen, SmolLM, Mistral, Gemma 3, Phi, OLMo, ..."

_log = logging.getLogger(__name__)


_NOT_COMPUTED = {"_name_or_path", "architectures", "transformers_version"}
_NOT_COMPUTED |= {"reward_mean", "reward_std", "id2label", "label2id"}
_ways: dict[tuple[str, ...], str] = {}  # the attention that is right, by class, config and device


@torch.no_grad()
def settle(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model compute packed rows if that is right for it, else padded blocks.

    A family is checked once a process, since its class and config decide what it computes.

    Raises: ModelError when neither is right.
    """
    if model.device.type == "meta":
        return model
    key = (type(model).__qualname__, _computed_by(model), model.device.type)
    if key not in _ways:
        _ways[key] = _find(model)
    _attend(model, _ways[key])
    return model


def _computed_by(model: PreTrainedModel) -> str:
    """The config without what no block reads: where it was loaded from, constants of a reward."""
    config = {
        key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPUTED
    }
    return json.dumps(config, sort_keys=True, default=str)


def _find(model: PreTrainedModel) -> str:
    """The first attention that is right, and leave the model as it was."""
    body: Any = model.base_model
    was: str = model.config._attn_implementation
    if body is model:
        raise _refused(model, "its body cannot be called without its head")
    texts = _texts(model)
    try:
        with quiet(), _short_windows(model):
            plain = "eager" if model._can_set_attn_implementation() else was
            wanted = _plain_states(model, plain, texts)
            wrong = []
            for attention in dict.fromkeys(
                (ATTENTION, "sdpa", plain) if plain == "eager" else (was,)
            ):
                try:
                    _attend(model, attention)
                    _require_equal(body, texts, wanted)
                except Exception as error:  # whatever a family raises when it is called this way
                    if lacks_memory(error):
                        raise
                    wrong.append(f"{_label(attention)}, {_line(error)}")
                    continue
                if wrong:
                    _log.info(
                        "%s is computed without packing, which is slower: %s",
                        type(model).__name__,
                        wrong[0],
                    )
                return attention
    finally:
        _attend(model, was)
    raise _refused(model, "; ".join(wrong))


def _plain_states(
    model: PreTrainedModel, attention: str, texts: Sequence[list[int]]
) -> list[Tensor]:
    """The states of each text as transformers computes it, after checking that a policy has such.

    Raises: ModelError when the forward pass fails, is not finite, or looks ahead.
    """
    body: Any = model.base_model
    try:
        _attend(model, attention)
        rows = (torch.tensor([text], device=model.device) for text in texts)
        states = [body(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]
    except Exception as error:
        if lacks_memory(error):
            raise
        raise _refused(model, f"a plain forward pass fails ({_line(error)})") from error
    if not all(state.isfinite().all() for state in states):
        raise broken(model)
    one, other = texts[:2]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    if not _same(states[0][:same], states[1][:same]):
        raise _refused(model, "the states of a token depend on later tokens")
    return states


def broken(model: PreTrainedModel) -> ModelError:
    """The error for a model that computes no numbers."""
    return ModelError(
        f"{type(model).__name__} (model_type {model.config.model_type}) computes NaN or infinity "
        "for a plain text, so its weights are broken or not all of them were read; take intact "
        "weights"
    )


def _refused(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} (model_type {model.config.model_type}) cannot be used, because "
        f"what is computed here would not be what transformers computes: {reason}; take another "
        f"family ({TESTED})"
    )


def _label(attention: str) -> str:
    return "packed" if attention == ATTENTION else f"padded with {attention} attention"


def _require_equal(
    body: PreTrainedModel, texts: Sequence[list[int]], wanted: Sequence[Tensor]
) -> None:
    """Raise ModelError unless all states are those of each text computed plainly."""
    packed = pack(texts, body.device)
    states = packed.unpack(hidden_states(body, packed))
    for got, text in zip(states, wanted, strict=True):
        _require_same(got[: len(text)], text, "texts computed together change each other")
    prompts = [len(text) // 2 for text in texts]
    for got, text, start in zip(_continued(body, texts, prompts), wanted, prompts, strict=True):
        _require_same(
            got, text[start - 1 :], "a text read token by token differs from one read at once"
        )


def _continued(
    body: PreTrainedModel, texts: Sequence[list[int]], prompts: Sequence[int]
) -> list[Tensor]:
    """The last state of each prompt, and of each token after it, as the sampler computes them.

    Prompts are padded on the left, and a text that has ended leaves the batch.
    """
    device, width = body.device, max(prompts)
    steps = [len(text) - start for text, start in zip(texts, prompts, strict=True)]
    rows = [
        [text[0]] * (width - start) + text[:start]
        for text, start in zip(texts, prompts, strict=True)
    ]
    mask = torch.arange(width) >= width - torch.tensor(prompts).unsqueeze(1)
    ids, mask = torch.tensor(rows, device=device), mask.to(device)
    positions = position_ids(mask)
    reader = continuation(body, mask, max(steps))
    found: list[list[Tensor]] = [[] for _ in texts]
    alive = list(range(len(texts)))
    for step in range(max(steps) + 1):
        for row, state in zip(alive, reader.read(ids, positions), strict=True):
            found[row].append(state)
        going = torch.tensor([step < steps[row] for row in alive], device=device).nonzero()[:, 0]
        reader.keep(going)
        alive = [row for row in alive if step < steps[row]]
        following = [[texts[row][prompts[row] + step]] for row in alive]
        ids, positions = torch.tensor(following, device=device), positions[going, -1:] + 1
    if is_packed(body) and reader.layers != (number := len(blocks(body)[1])):
        raise ModelError(
            f"{reader.layers} of its {number} blocks attend by transformers' functions"
        )
    return [torch.stack(states) for states in found]


def _require_same(got: Tensor, wanted: Tensor, what: str) -> None:
    if not _same(got, wanted):
        worst = float((got - wanted).abs().max() / wanted.square().mean().sqrt())
        raise ModelError(f"{what} (by {worst:.1g} of the size of a state)")


def _same(got: Tensor, wanted: Tensor) -> bool:
    scale = wanted.square().mean().sqrt()
    return bool(((got - wanted).abs() <= CLOSE * scale).all())


def _texts(model: PreTrainedModel) -> list[list[int]]:
    """Two texts that begin alike, longer than `WINDOW`, and a third; as long as the context allows.

    Their ids are from the middle of the vocabulary, away from pad tokens and markers of images.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    room = min(context_of(model) or 24, 24)
    first, width = vocabulary // 3, max(vocabulary // 3, 1)
    ids = [first + 7 * i * (i + 3) % width for i in range(2 * room)]
    begin = ids[: room // 2]
    return [
        begin + ids[room : room + room // 4],
        begin + ids[-(room // 2) :],
        ids[5 : 5 + room // 3],
    ]


def _attend(model: PreTrainedModel, attention: str) -> None:
    if attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten every window of attention, in the config and in the modules that copied it."""
    text = model.config.get_text_config(decoder=True)
    lengths = {name: getattr(text, name, None) for name in WINDOWS}
    changed: list[tuple[Any, str, int]] = [
        (owner, name, length)
        for owner in (text, *model.modules())
        for name, length in lengths.items()
        if length and getattr(owner, name, None) == length
    ]
    for owner, name, length in changed:
        setattr(owner, name, min(length, WINDOW))
    try:
        yield
    finally:
        for owner, name, length in changed:
            setattr(owner, name, length)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else repr(error)
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first[:150]}"
