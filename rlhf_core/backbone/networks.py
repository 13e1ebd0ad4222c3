"""What the stages train and ask: a policy that gives log-probabilities, a scalar model that gives
values. Both read packed texts, and both are modules whose `forward` is all that an update needs.

A network is a transformer, the adapter that is switched on in it (or none), and a head. Several
networks may share one transformer. Knows nothing about optimisation.

In bfloat16 every product of matrices is computed in it, that with the vocabulary included, forward
and backward; norms, softmax, losses, weights and their gradients stay in float32, and so does the
scalar head: it is a single row, and a score of 8 bits would make ties of texts that differ.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
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
from rlhf_core.backbone.directory import (
    Kind,
    add_facts,
    load_policy,
    read_card,
    require_kind,
    save_model,
    weights_digest,
)
from rlhf_core.backbone.packing import Packed, blocks, hidden_states
from rlhf_core.backbone.pretrained import load_weights
from rlhf_core.errors import ModelError, NumericsError
from rlhf_core.functional.chunked_head import ChunkedLoss, TokenLoss
from rlhf_core.functional.logprobs import (
    chunked_token_logprobs,
    chunked_token_loss,
    entropy,
    token_logprobs,
)

Precision = Literal["float32", "bfloat16"]
ADAPTER = "adapter"  # its folder in a model directory, and its base in the card
CHUNK = 128  # tokens whose logits exist at a time
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # its instructions on x86 and ARM

_log = logging.getLogger(__name__)


class Network(nn.Module):
    """A transformer with one of its adapters on, in one precision."""

    def __init__(
        self, model: PreTrainedModel, adapter: str | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.precision = precision

    def hidden(self, packed: Packed) -> Tensor:
        """(N, d) last hidden states."""
        self.switch()
        with self.autocast():
            return hidden_states(self.model.base_model, packed)

    def switch(self) -> None:
        """Turn on this network's adapter in the transformer that it may share."""
        use_adapter(self.model, self.adapter)

    @property
    def dtype(self) -> torch.dtype:
        """What products of matrices are computed in."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def autocast(self) -> Any:
        """The context that computes in `precision`; the weights stay in float32."""
        if self.precision == "float32":
            return nullcontext()
        _warn_if_slow(self.model.device.type)
        return torch.autocast(self.model.device.type, dtype=self.dtype)

    @contextmanager
    def autocast_once(self) -> Iterator[None]:
        """The same for many forward passes without gradients: each weight is cast once for all.

        Autocast remembers the cast of a weight only if it requires a gradient, so meanwhile all do.
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

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks from the first to the last, each with weights of its own."""
        return list(blocks(self.model.base_model)[1])

    def learnable(self) -> dict[str, nn.Parameter]:
        """What training changes: the adapter, or every weight where there is none."""
        if self.adapter is None:
            return dict(self.named_parameters())
        body = adapter_parameters(self.model, self.adapter)
        return {f"model.{name}": parameter for name, parameter in body.items()}


class Policy(Network):
    """A causal language model: log-probabilities of chosen tokens, and losses made of them."""

    def __init__(
        self, model: PreTrainedModel, adapter: str | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__(model, adapter, precision)
        _require_plain_head(model)

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
        places: Tensor,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        token_loss: TokenLoss | None = None,
        with_entropy: bool = False,
    ) -> ChunkedLoss:
        """Log-probabilities (M,) of `tokens`, predicted at `places`, and a sum of losses over them.

        Without a `token_loss` the log-probabilities can be differentiated; with one, the loss.
        Only those places go through the head, and only the logits of a chunk exist at a time.
        """
        # The last norm returns float32 under autocast, and the head computes in what it is given.
        hidden = self.hidden(packed)[places].to(self.dtype)
        head = cast(nn.Linear, self.model.get_output_embeddings())
        if token_loss is None:
            logprobs = chunked_token_logprobs(
                hidden,
                head.weight,
                tokens,
                bias=head.bias,
                temperature=temperature,
                chunk_size=CHUNK,
            )
            return ChunkedLoss(logprobs.new_zeros(()), logprobs, None)
        return chunked_token_loss(
            hidden,
            head.weight,
            tokens,
            token_loss,
            bias=head.bias,
            temperature=temperature,
            chunk_size=CHUNK,
            with_entropy=with_entropy,
        )

    def save(
        self,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        facts: dict[str, Any],
        base: Path | None = None,
    ) -> None:
        """Write a model directory with all weights, and the adapter beside them if there is one."""
        save_model(_plain(self, type(self.model)), tokenizer, directory, kind="policy", facts=facts)
        _save_adapter(self, directory, base)


class ScalarModel(Network):
    """One number for every position: V(s) for a critic; the last token's for a reward model.

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
        super().__init__(model, adapter, precision)
        if head is None and not hasattr(model, "score"):
            raise ModelError(
                f"{type(model).__name__} has no scalar head named 'score'; use a decoder-only "
                "model (GPT-2, Llama, Qwen, SmolLM, Mistral, Gemma, ...)"
            )
        self.head = cast(nn.Linear, model.score) if head is None else head
        self.mean = mean
        self.std = std

    def forward(self, packed: Packed, places: Tensor) -> Tensor:
        """(M,) values at some places of a packed row."""
        hidden = self.hidden(packed)[places]
        raw: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return (raw - self.mean) / self.std

    def scores(self, packed: Packed) -> Tensor:
        """(S,) the value at the last token of each text."""
        return cast(Tensor, self(packed, packed.last()))

    def twin(self) -> Self:
        """A scalar model on the same transformer that says the same through a head of its own."""
        return type(self)(
            self.model,
            _twin_head(self.head),
            mean=self.mean,
            std=self.std,
            adapter=self.adapter,
            precision=self.precision,
        )

    def learnable(self) -> dict[str, nn.Parameter]:
        """What training changes: every weight, or the adapter and the head."""
        if self.adapter is None:
            body = self.model.base_model.named_parameters()
            found = {f"model.{name}": parameter for name, parameter in body}
        else:
            found = super().learnable()
        head = {f"head.{name}": p.requires_grad_(True) for name, p in self.head.named_parameters()}
        return found | head

    @classmethod
    def from_policy(cls, directory: Path, generator: torch.Generator) -> Self:
        """The trunk of a policy with a new head: weights N(0, 1/(d+1)), no bias.

        Source: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix B.1.

        Raises: ModelError when the directory holds no policy, or one without such a head.
        """
        require_kind(directory, "policy")
        model = load_weights(
            AutoModelForSequenceClassification,
            str(directory),
            new=("score.weight",),
            num_labels=1,
        )
        scalar = cls(model)
        weight = scalar.head.weight
        std = (weight.shape[-1] + 1) ** -0.5
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        return scalar

    @classmethod
    def load(cls, directory: Path, device: str = "cpu", precision: Precision = "float32") -> Self:
        """A saved reward model or critic, dropout off.

        Raises: ModelError when the directory holds no scalar model.
        """
        card = require_kind(directory, "reward", "critic")
        model = load_weights(AutoModelForSequenceClassification, str(directory)).to(device)
        return cls(model, mean=card["reward_mean"], std=card["reward_std"], precision=precision)

    def save(
        self,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        *,
        kind: Kind,
        base: Path | None = None,
    ) -> None:
        """Write a model directory, normaliser included, and the adapter if there is one."""
        constants = {"reward_mean": self.mean, "reward_std": self.std}
        whole = _plain(self, AutoModelForSequenceClassification.from_config)
        for name, value in constants.items():
            setattr(whole.config, name, value)
        save_model(whole, tokenizer, directory, kind=kind, facts=constants)
        _save_adapter(self, directory, base)


def on_trunk(
    directory: Path, base: Path, trunk: PreTrainedModel, name: str, precision: Precision
) -> ScalarModel | None:
    """The scalar model of a directory as an adapter `name` on a transformer that is loaded already.

    None when it was not trained as an adapter of the model in `base`, whose weights `trunk` has.
    """
    card = read_card(directory)
    if card.get(ADAPTER) != weights_digest(base):
        return None
    load_adapter(trunk, name, directory / ADAPTER)
    head = _twin_head(ScalarModel.load(directory).head)
    return ScalarModel(
        trunk,
        head.to(trunk.device),
        mean=card["reward_mean"],
        std=card["reward_std"],
        adapter=name,
        precision=precision,
    )


def start_adapter(
    network: Network, name: str, *, rank: int, alpha: int, seed: int, layers: int = 0
) -> None:
    """Train a network through a fresh adapter from here on: it computes what it did before."""
    add_adapter(network.model, name, rank=rank, alpha=alpha, layers=layers, seed=seed)
    network.adapter = name


@cache
def _warn_if_slow(device: str) -> None:
    """Say so, once a process, where bfloat16 takes longer than float32."""
    capabilities = torch.cpu.get_capabilities()
    if device == "cpu" and not any(capabilities.get(name) for name in BFLOAT16):
        _log.warning(
            "precision is bfloat16, but this CPU has no instructions for it (avx512_bf16, amx_bf16 "
            "or ARM's bf16): training takes 2 to 6 times as long as in float32. Set precision to "
            "float32 here"
        )


def _twin_head(head: nn.Linear) -> nn.Linear:
    twin = nn.Linear(head.in_features, 1, bias=False, device=head.weight.device)
    twin.weight = nn.Parameter(head.weight.detach().clone())
    return twin


def _plain(network: Network, build: Callable[[Any], Any]) -> PreTrainedModel:
    """The same network as one model of its own, without adapters."""
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
    with torch.device("meta"):  # a shell: every weight comes from the state
        shell = build(config)
    shell.load_state_dict(state, assign=True)
    shell.tie_weights()
    return cast(PreTrainedModel, shell)


def _save_adapter(network: Network, directory: Path, base: Path | None) -> None:
    if network.adapter is None or base is None:
        return
    digest = weights_digest(base)
    save_adapter(network.model, network.adapter, directory / ADAPTER, base=digest)
    add_facts(directory, {ADAPTER: digest})


@torch.no_grad()
def _require_plain_head(model: PreTrainedModel) -> None:
    """Raise ModelError unless logits are W·h + b: what the chunked head computes.

    The first tokens that a model is asked about go both ways, that of the formulas and that of the
    head which trains, and a difference is a NumericsError.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        # Several tokens, as that of the padding may be embedded as 0, and its logits be 0 anyway.
        text = torch.arange(min(8, head.out_features), device=model.device)
        hidden = cast(Any, model.base_model)(input_ids=text[None], use_cache=False)
        logits = model(input_ids=text[None], use_cache=False).logits
        if _close(head(hidden.last_hidden_state), logits):
            _require_same_head(head, hidden.last_hidden_state[0], text, logits)
            return
    raise ModelError(
        f"{type(model).__name__} does more to its logits than a linear head, which is not "
        "supported here; take another family (GPT-2, Llama, Qwen, SmolLM, Mistral, ...)"
    )


def _require_same_head(head: nn.Linear, hidden: Tensor, tokens: Tensor, logits: Tensor) -> None:
    """Invariant: the chunked head says what `token_logprobs` and `entropy` say of (1, n, V) logits.

    Shapes: hidden (n, d), tokens (n,).
    """
    said = chunked_token_loss(
        hidden, head.weight, tokens, lambda x, _: x.sum(), bias=head.bias, with_entropy=True
    )
    expected = token_logprobs(logits, tokens[None])[0], entropy(logits)[0]
    if not (_close(said.logprobs, expected[0]) and _close(said.entropy, expected[1])):
        raise NumericsError(
            "a broken invariant: the head that trains gives other log-probabilities or entropies "
            "than the logits of the model. This is a defect: please report it with the config"
        )


def _close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.allclose(
        found.float(), expected.float(), rtol=1e-4, atol=1e-4, equal_nan=True
    )
