"""Decide how a loaded model is computed, and refuse one that would be computed wrongly.

A few short texts are computed by the model as transformers computes it, with eager attention and
one text at a time; then packed, and token by token as the sampler does; then, if that differs, as a
padded block with the model's own attention. The first way that gives the same states is taken.

Windows of attention are made as short as these texts while they are checked. Texts longer than the
rope allows are refused elsewhere: `context.require_rope`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.backbone.context import context_of
from rlhf_core.backbone.memory import continuation
from rlhf_core.backbone.packing import ATTENTION, blocks, hidden_states, is_packed, pack, position_ids
from rlhf_core.backbone.pretrained import quiet
from rlhf_core.errors import ModelError, UserError

CLOSE = 1e-3  # largest difference of hidden states, relative to their root mean square
WINDOW = 4  # tokens; shorter than every text of the check
WINDOWS = ("sliding_window", "attention_chunk_size")  # settings that bound how far back a layer looks
TESTED = "GPT-2, Llama, Qwen, SmolLM, Mistral, Gemma 3, Phi, OLMo, ..."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """How a family is computed, and why not in a faster way."""

    attention: str  # of transformers; ATTENTION computes packed rows
    reasons: tuple[str, ...]  # why each faster way was wrong
    error: str = ""  # why every way was


_ways: dict[tuple[str, ...], Way] = {}  # by class, config and device


@torch.no_grad()
def settle(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model compute packed rows if that is right for it, else padded blocks.

    A family is checked once a process.

    Raises: ModelError when neither is right, or its body cannot be called alone.
    """
    if model.device.type == "meta":
        return model
    key = (type(model).__qualname__, model.config.to_json_string(), model.device.type)
    if key not in _ways:
        _ways[key] = _find(model)
        if not is_packed(model) and not _ways[key].error:
            _log.info("%s", explain(model, _ways[key]))
    way = _ways[key]
    if way.error:
        raise ModelError(way.error)
    _attend(model, way.attention)
    return model


def explain(model: PreTrainedModel, way: Way) -> str:
    """Why a model is not computed packed."""
    return (
        f"{type(model).__name__} is computed without packing, which is slower: "
        f"{'; '.join(way.reasons)}"
    )


def _find(model: PreTrainedModel) -> Way:
    body, name = model.base_model, type(model).__name__
    was = model.config._attn_implementation
    plain = "eager" if model._can_set_attn_implementation() else was
    reasons: list[str] = []
    texts = _texts(model)
    with quiet(), _short_windows(model):
        try:
            _attend(model, plain)
            wanted = _one_by_one(body, texts)
        except Exception as error:
            return _refused(model, f"a plain forward pass fails ({_line(error)})", was)
        shared = len(_common(texts))
        if not _same(wanted[0][:shared], wanted[1][:shared]):
            return _refused(model, "the states of a token depend on later tokens", was)
        for attention in dict.fromkeys((ATTENTION, "sdpa", plain)):
            if attention != plain and not model._can_set_attn_implementation():
                continue
            try:
                _attend(model, attention)
                _require_equal(body, texts, wanted)
            except Exception as error:
                reasons.append(f"{_label(attention)}: {_line(error)}")
                continue
            return Way(attention, tuple(reasons))
    return _refused(model, "; ".join(reasons), was)


def _refused(model: PreTrainedModel, reason: str, was: str) -> Way:
    _attend(model, was)
    return Way(
        was,
        (),
        error=f"{type(model).__name__} (model_type {model.config.model_type}) cannot be trained here, "
        f"because its log-probabilities would not be those of the plain model: {reason}; "
        f"use another family ({TESTED})",
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
        going = torch.tensor([step < steps[row] for row in alive], device=device)
        reader.keep(going)
        alive = [row for row in alive if step < steps[row]]
        following = [[texts[row][prompts[row] + step]] for row in alive]
        ids, positions = torch.tensor(following, device=device), positions[going, -1:] + 1
    if is_packed(body) and reader.layers != len(blocks(body)[1]):
        raise ModelError(
            f"{reader.layers} of its {len(blocks(body)[1])} blocks attend by transformers' functions"
        )
    return [torch.stack(states) for states in found]


def _one_by_one(body: Any, texts: Sequence[list[int]]) -> list[Tensor]:
    rows = (torch.tensor([text], device=body.device) for text in texts)
    return [body(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]


def _require_same(got: Tensor, wanted: Tensor, what: str) -> None:
    if not _same(got, wanted):
        worst = float((got - wanted).abs().max() / wanted.square().mean().sqrt())
        raise ModelError(f"{what} (by {worst:.1g} of the size of a state)")


def _same(got: Tensor, wanted: Tensor) -> bool:
    scale = wanted.square().mean().sqrt()
    return bool(((got - wanted).abs() <= CLOSE * scale).all())


def _texts(model: PreTrainedModel) -> list[list[int]]:
    """Two texts that begin alike, longer than `WINDOW`, and a third; as long as the context allows.

    Their ids come from the middle of the vocabulary, away from pad tokens and markers of images.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    room = min(context_of(model) or 24, 24)
    first, width = vocabulary // 3, max(vocabulary // 3, 1)
    ids = [first + 7 * i * (i + 3) % width for i in range(2 * room)]
    begin = ids[: room // 2]
    return [begin + ids[room : room + room // 4], begin + ids[-(room // 2) :], ids[5 : 5 + room // 3]]


def _common(texts: Sequence[list[int]]) -> list[int]:
    pairs = zip(*texts[:2], strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


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
