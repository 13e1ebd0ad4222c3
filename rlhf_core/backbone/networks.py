"""The two networks: a policy returns log-probabilities, a scalar model returns values. Both read
packed texts, and both are modules whose `forward` is all that an update needs.

A network is a transformer, the adapter that is enabled in it (or none), and a head. Several
networks may share one transformer. This module knows nothing about optimisation.

With precision bfloat16 every matrix product is computed in it, the vocabulary projection included,
forward and backward. Norms, softmax, losses, weights and their gradients stay in float32, and so
does the scalar head: it is a single row, and 8-bit scores would tie texts that differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_core.backbone.adapters import (
    adapter_parameters,
    add_adapter,
    load_adapter,
    merged_state,
    save_adapter,
    use_adapter,
)
from rlhf_core.backbone.classifiers import classifiers, has_classifier, on_body
from rlhf_core.backbone.directory import (
    ModelKind,
    add_facts,
    load_policy,
    read_card,
    require_kind,
    save_model,
    weights_digest,
)
from rlhf_core.backbone.load_check import broken, settle
from rlhf_core.backbone.packing import Packed, blocks, hidden_states
from rlhf_core.backbone.precision.machine import warn_if_slow
from rlhf_core.backbone.precision.working_copy import WorkingCopy
from rlhf_core.backbone.pretrained import MAIN, load_weights, read_pretrained
from rlhf_core.errors import ModelError, NumericsError
from rlhf_core.functional.chunked_head import ChunkedLoss, TokenLoss
from rlhf_core.functional.logprobs import (
    chunked_token_logprobs,
    chunked_token_loss,
    entropy,
    token_logprobs,
)
from rlhf_core.settings.model import Precision

ADAPTER = "adapter"  # the folder in a model directory, and the card's entry for its base
HEAD = "score.weight"  # of a scalar model, in its model directory
# Tokens whose logits exist at a time. In bfloat16 each chunk's gradient of the head is widened and
# added, which costs as much as a product of 128 tokens; so chunks are larger there.
CHUNKS: dict[Precision, int] = {"float32": 128, "bfloat16": 512}
# Rows from which on the two layouts of a product with the vocabulary have the same bits, where it
# was measured.
TALL = 16


class Network(nn.Module):
    """A transformer with one of its adapters enabled, in one precision."""

    def __init__(
        self, model: PreTrainedModel, adapter: str | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__()
        self.model = settle(model)
        self.adapter = adapter
        self.precision = precision

    @property
    def precision(self) -> Precision:
        """The type of matrix products: float32 or bfloat16."""
        return self._precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"a network computes in float32 or bfloat16, not in {precision!r}; call the stage "
                "by `run_stage`, or make a type of the setting with `resolved`"
            )
        self._precision: Precision = precision

    def hidden(self, packed: Packed) -> Tensor:
        """(N, d) last hidden states."""
        self.switch()
        with self.autocast():
            return hidden_states(self.model.base_model, packed)

    def switch(self) -> None:
        """Enable this network's adapter in the transformer, which other networks may share."""
        use_adapter(self.model, self.adapter)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which matrix products are computed."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context that computes in `precision`, with a working copy of the weights; the weights
        themselves stay in float32."""
        if self.precision == "float32":
            yield
            return
        device = self.model.device.type
        warn_if_slow(device)
        copy = WorkingCopy.of(self.model)
        with torch.autocast(device, dtype=self.dtype), copy.used_by(self.model):
            yield

    @contextmanager
    def autocast_once(self) -> Iterator[None]:
        """Like `autocast`, for many forward passes without gradients: casts each weight once.

        Autocast caches the cast of a weight only if it requires a gradient, so all do meanwhile:
        those that the working copy does not have.
        """
        casts = self.precision != "float32"
        frozen = [p for p in self.model.parameters() if casts and not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with self.autocast():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def cast(self, weight: Tensor) -> Tensor | None:
        """A weight as it is in the working copy; None if the copy does not have it."""
        if self.precision == "float32":
            return None
        return WorkingCopy.of(self.model).cast(self.model, weight)

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks in order."""
        return list(blocks(self.model.base_model)[1])

    def learnable(self) -> dict[str, nn.Parameter]:
        """The parameters that train: those of the adapter, or all of them without one."""
        if self.adapter is None:
            return dict(self.named_parameters())
        body = adapter_parameters(self.model, self.adapter)
        return {f"model.{name}": parameter for name, parameter in body.items()}


class Policy(Network):
    """A causal language model: log-probabilities of chosen tokens, and losses on them."""

    def __init__(
        self, model: PreTrainedModel, adapter: str | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__(model, adapter, precision)
        self.logit_scale = _logit_scale(model)

    @classmethod
    def load(
        cls, directory: Path, device: str, precision: Precision = "float32"
    ) -> tuple[Self, PreTrainedTokenizerBase]:
        """A saved policy and its tokenizer.

        Raises: ModelError when the directory holds no policy.
        """
        model, tokenizer = load_policy(directory, device)
        return cls(model, precision=precision), tokenizer

    def forward(
        self,
        packed: Packed,
        positions: Tensor,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        token_loss: TokenLoss | None = None,
        with_entropy: bool = False,
    ) -> ChunkedLoss:
        """(M,) log-probabilities of `tokens`, predicted at `positions`, and their summed loss.

        Without a `token_loss` the log-probabilities can be differentiated; with one, the loss.
        Only these positions go through the head, and only one chunk of logits exists at a time.
        """
        # The last norm returns float32 under autocast; the head computes in the type of its input.
        hidden = self.hidden(packed)[positions].to(self.dtype)
        head = cast(nn.Linear, self.model.get_output_embeddings())
        if token_loss is None:
            logprobs = chunked_token_logprobs(
                hidden,
                head.weight,
                tokens,
                bias=head.bias,
                temperature=temperature / self.logit_scale,
                chunk_size=CHUNKS[self.precision],
                cast_weight=self.cast(head.weight),
            )
            return ChunkedLoss(logprobs.new_zeros(()), logprobs, None)
        return chunked_token_loss(
            hidden,
            head.weight,
            tokens,
            token_loss,
            bias=head.bias,
            temperature=temperature / self.logit_scale,
            chunk_size=CHUNKS[self.precision],
            with_entropy=with_entropy,
            cast_weight=self.cast(head.weight),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, d) last hidden states -> (B, V) logits of the next token."""
        head = self.model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and self.precision == "float32"
        if plain and hidden.device.type == "cpu" and len(hidden) >= TALL:
            # In the layout (V, B) it is 1.1 times as fast with 32 rows, and 1.2 times with 128.
            raw = torch.mm(head.weight, hidden.T).T.contiguous()
        else:
            raw = head(hidden)
        return raw if self.logit_scale == 1 else raw * self.logit_scale

    def save(
        self,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        facts: dict[str, Any],
        base: Path | None = None,
        *,
        untied: bool = False,
    ) -> None:
        """Write a model directory with all weights, and the adapter as well if there is one.

        Args:
            untied: write the head as a tensor of its own, for programs that would not renew it with
                the embeddings when they load weights again.
        """
        plain = _plain(self, type(self.model))
        model = _untied(plain) if untied else plain
        save_model(model, tokenizer, directory, kind="policy", facts=facts)
        _save_adapter(self, directory, base)


class ScalarModel(Network):
    """A scalar for every position: V(s) for a critic; a reward model reads the last token's.

    value = (head(hidden) - mean) / std, so that samples of the reference policy have mean 0 and
    standard deviation 1. The constants are kept in the model directory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Linear | None = None,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        adapter: str | None = None,
        precision: Precision = "float32",
    ) -> None:
        if head is None and not hasattr(model, "score"):
            raise ModelError(
                f"{type(model).__name__} has no scalar head named 'score'; use a decoder-only "
                "model (GPT-2, Llama, Qwen, SmolLM, Mistral, Gemma, ...)"
            )
        super().__init__(model, adapter, precision)
        self.head = cast(nn.Linear, model.score) if head is None else head
        self.mean = mean
        self.std = std

    def forward(self, packed: Packed, positions: Tensor) -> Tensor:
        """(M,) values at some positions of a packed row."""
        hidden = self.hidden(packed)[positions]
        raw: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return (raw - self.mean) / self.std

    def scores(self, packed: Packed) -> Tensor:
        """(S,) the value at the last token of each text."""
        return cast(Tensor, self(packed, packed.last()))

    def member_scores(self, packed: Packed) -> Tensor:
        """(K, S) the scores of each member; a model alone is its only member, K = 1."""
        return self.scores(packed).unsqueeze(0)

    def last_states(self, packed: Packed) -> Tensor:
        """(S, d) the hidden state at the last token of each text, which the head reads."""
        return self.hidden(packed)[packed.last()]

    def with_own_head(self) -> Self:
        """A scalar model on the same transformer with a copy of the head: equal values for now."""
        return type(self)(
            self.model,
            _copy_head(self.head),
            mean=self.mean,
            std=self.std,
            adapter=self.adapter,
            precision=self.precision,
        )

    def with_new_head(self, generator: torch.Generator) -> Self:
        """A scalar model on the same transformer with a head of its own, drawn as the first is."""
        other = self.with_own_head()
        _draw_head(other.head, generator)
        return other

    def learnable(self) -> dict[str, nn.Parameter]:
        """The parameters that train: all of them, or those of the adapter and the head."""
        if self.adapter is None:
            body = self.model.base_model.named_parameters()
            found = {f"model.{name}": parameter for name, parameter in body}
        else:
            found = super().learnable()
        head = {f"head.{name}": p.requires_grad_(True) for name, p in self.head.named_parameters()}
        return found | head

    @classmethod
    def on_body_of(cls, source: str, revision: str = MAIN) -> Self:
        """A scalar model on the body of a pretrained model; the head is not trained.

        Raises: ModelError when the source cannot be read, or its family has no such head.
        """
        return cls(_load_scalar(source, revision))

    @classmethod
    def outline(cls, policy: PreTrainedModel) -> Self:
        """A scalar model on the body of a policy, without weights, on the device meta.

        Raises: ModelError when the family has no scalar head.
        """
        config = type(policy.config).from_dict(policy.config.to_dict())
        config.num_labels = 1
        with torch.device("meta"):
            return cls(classifiers(config).from_config(config))

    @classmethod
    def from_policy(cls, directory: Path, generator: torch.Generator) -> Self:
        """The trunk of a policy with a new head: weights N(0, 1/(d+1)), no bias.

        Source: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix B.1.

        Raises: ModelError when the directory holds no policy, or one without such a head.
        """
        require_kind(directory, "policy")
        scalar = cls.on_body_of(str(directory))
        _draw_head(scalar.head, generator)
        return scalar

    @classmethod
    def load(cls, directory: Path, device: str = "cpu", precision: Precision = "float32") -> Self:
        """A saved reward model or critic, dropout off.

        Raises: ModelError when the directory holds no scalar model.
        """
        card = require_kind(directory, "reward", "critic")
        model = _load_scalar(str(directory))
        with torch.no_grad():
            cast(nn.Linear, model.score).weight.copy_(_read_tensor(directory, HEAD))
        return cls(
            model.to(device), mean=card["reward_mean"], std=card["reward_std"], precision=precision
        )

    def save(
        self,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        *,
        kind: ModelKind,
        base: Path | None = None,
    ) -> None:
        """Write a model directory, normaliser included, and the adapter if there is one."""
        constants = {"reward_mean": self.mean, "reward_std": self.std}
        whole = _plain(self, classifiers(self.model.config).from_config)
        for name, value in constants.items():
            setattr(whole.config, name, value)
        save_model(whole, tokenizer, directory, kind=kind, facts=constants)
        _save_adapter(self, directory, base)


def _load_scalar(source: str, revision: str = MAIN) -> PreTrainedModel:
    """A body with a head `score`, whose weights are those of the source or new."""
    if has_classifier(read_pretrained(AutoConfig, source, revision)):
        kind = AutoModelForSequenceClassification
        return load_weights(kind, source, revision, new=(HEAD,), num_labels=1)
    return on_body(load_weights(AutoModel, source, revision))


def _read_tensor(directory: Path, name: str) -> Tensor:
    """A tensor of a model directory.

    Raises: ModelError when it is not there.
    """
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in list(tensors.keys()):
                return cast(Tensor, tensors.get_tensor(name))
    raise ModelError(
        f"the weights of '{directory}' are incomplete: {name} is missing; use a complete model"
    )


def load_as_adapter(
    directory: Path, base: Path, trunk: PreTrainedModel, name: str, precision: Precision
) -> ScalarModel | None:
    """The scalar model in a directory, as adapter `name` on a transformer that is already loaded.

    None when it was not trained as an adapter of the model in `base`, whose weights `trunk` has.
    """
    if read_card(directory).get(ADAPTER) != weights_digest(base):
        return None
    return adapter_of(directory, trunk, name, precision)


def adapter_of(
    directory: Path, trunk: PreTrainedModel, name: str, precision: Precision
) -> ScalarModel:
    """The scalar model in a directory, as adapter `name` on a transformer with its base's weights.

    Raises: ModelError when the directory holds no scalar model with an adapter for it.
    """
    card = require_kind(directory, "reward", "critic")
    load_adapter(trunk, name, directory / ADAPTER)
    weight = _read_tensor(directory, HEAD).to(trunk.device, torch.float32)
    return ScalarModel(
        trunk,
        _as_head(weight),
        mean=card["reward_mean"],
        std=card["reward_std"],
        adapter=name,
        precision=precision,
    )


def start_adapter(
    network: Network, name: str, *, rank: int, alpha: int, seed: int, layers: int = 0
) -> None:
    """Give a network a fresh adapter to train. Its outputs do not change yet."""
    add_adapter(network.model, name, rank=rank, alpha=alpha, layers=layers, seed=seed)
    network.adapter = name


@torch.no_grad()
def _draw_head(head: nn.Linear, generator: torch.Generator) -> None:
    weight = head.weight
    std = (weight.shape[-1] + 1) ** -0.5
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _copy_head(head: nn.Linear) -> nn.Linear:
    return _as_head(head.weight.detach().clone())


def _as_head(weight: Tensor) -> nn.Linear:
    """The linear layer of a (1, d) weight."""
    head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    return head


def _plain(network: Network, build: Callable[[Any], Any]) -> PreTrainedModel:
    """The network as a plain model, with its adapter merged."""
    model = network.model
    own_head = not isinstance(network, ScalarModel) or network.head is getattr(model, "score", None)
    if network.adapter is None and own_head and not isinstance(network, FSDPModule):
        return model
    state = merged_state(model, network.adapter)
    config = type(model.config).from_dict(model.config.to_dict())
    if isinstance(network, ScalarModel):
        body = f"{model.base_model_prefix}."
        state = {key: tensor for key, tensor in state.items() if key.startswith(body)}
        state["score.weight"] = network.head.weight.detach()
        config.num_labels = 1
    with torch.device("meta"):  # no memory: every weight comes from the state
        shell = build(config)
    shell.load_state_dict(state, assign=True)
    shell.tie_weights()
    if shell.can_generate():
        shell.generation_config = model.generation_config  # what ends a response
    return cast(PreTrainedModel, shell)


def _untied(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, with a head that shares none of them; to be saved, not to be run."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    state = model.state_dict()
    state[f"{name}.weight"] = state[f"{name}.weight"].clone()
    config = type(model.config).from_dict(model.config.to_dict())
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    with torch.device("meta"):
        shell = cast(PreTrainedModel, type(model)(config))
    shell.load_state_dict(state, assign=True)
    shell.generation_config = model.generation_config
    return shell


def _save_adapter(network: Network, directory: Path, base: Path | None) -> None:
    if network.adapter is None or base is None:
        return
    digest = weights_digest(base)
    save_adapter(network.model, network.adapter, directory / ADAPTER, base=digest)
    add_facts(directory, {ADAPTER: digest})


@torch.no_grad()
def _logit_scale(model: PreTrainedModel) -> float:
    """The factor s of a model whose logits are s·(W·h + b), as the chunked head computes them.

    A few tokens are computed both by the formulas and by the chunked head that trains; a difference
    is a NumericsError.

    Raises: ModelError for any other head, or a factor that is no number of the model's config.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        # Several tokens, since the pad token may be embedded as 0, with logits that are 0 anyway.
        text = torch.arange(min(8, head.out_features), device=model.device)
        hidden = cast(Any, model.base_model)(input_ids=text[None], use_cache=False)
        logits = model(input_ids=text[None], use_cache=False).logits
        if not logits.isfinite().all():
            raise broken(model)
        raw = head(hidden.last_hidden_state)
        for scale in _factors(model):
            if float((scale * raw - logits).abs().max()) <= 1e-4 * float(logits.abs().max()):
                _require_same_head(head, scale, hidden.last_hidden_state[0], text, logits)
                return scale
    raise ModelError(
        f"{type(model).__name__} does more to its logits than a linear head, which is not "
        "supported; use another family (GPT-2, Llama, Qwen, SmolLM, Mistral, ...)"
    )


def _factors(model: PreTrainedModel) -> Iterator[float]:
    """1, and the numbers of the config that may scale logits, or divide them."""
    yield 1.0
    for name, value in model.config.get_text_config(decoder=True).to_dict().items():
        scales = "logit" in name or "lm_head" in name
        if scales and isinstance(value, int | float) and value > 0:
            yield from (float(value), 1 / value)


def _require_same_head(
    head: nn.Linear, scale: float, hidden: Tensor, tokens: Tensor, logits: Tensor
) -> None:
    """Invariant: the chunked head agrees with `token_logprobs` and `entropy` of (1, n, V) logits.

    Shapes: hidden (n, d), tokens (n,).
    """
    chunked = chunked_token_loss(
        hidden,
        head.weight,
        tokens,
        lambda x, _: x.sum(),
        bias=head.bias,
        temperature=1 / scale,
        with_entropy=True,
    )
    expected = token_logprobs(logits, tokens[None])[0], entropy(logits)[0]
    if not (_close(chunked.logprobs, expected[0]) and _close(chunked.entropy, expected[1])):
        raise NumericsError(
            "a broken invariant: the chunked head and the model's logits give different "
            "log-probabilities or entropies. This is a defect: please report it with the config"
        )


def _close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.allclose(
        found.float(), expected.float(), rtol=1e-4, atol=1e-4, equal_nan=True
    )
