"""DPO: the policy learns from preferences directly, without a reward model and without sampling.

    d = β·(log π(y_w|x) - log π_ref(y_w|x)) - β·(log π(y_l|x) - log π_ref(y_l|x))
    L(θ) = mean(-(1 - ε)·log σ(d) - ε·log σ(-d))

y_w is the chosen and y_l the rejected response, and β is the price of moving away from the
reference. Each product with β is an implicit reward. Papers: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290;
ε (share of wrong votes): Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.

Deliberate deviations from the papers (details in docs/algorithms/dpo.md):
1. A tie is a pair with ε = 0.5: it pulls the two implicit rewards together.
2. The reference is the policy before its first update, so its log-probabilities are computed once,
   before training, and no second network is kept.
3. The prompt that a pair shares is computed once; the update equals that of separate texts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_core import figures
from rlhf_core.backbone.context import require_context
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import pack_pairs
from rlhf_core.data.mapped.training import Place, StoredPairs, pairs_of
from rlhf_core.data.pairs import Pair, half_for_ties, require_decided, smoothing
from rlhf_core.data.prepared import SPLITS
from rlhf_core.errors import NumericsError
from rlhf_core.functional import losses, ranking
from rlhf_core.functional.chunked_head import ChunkedLoss
from rlhf_core.metrics import Between, counted
from rlhf_core.seeding import generator
from rlhf_core.settings.training import DPOConfig
from rlhf_core.training.epochs import optimizer_steps
from rlhf_core.training.learner import Learner, adapt
from rlhf_core.training.order import Batches
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import run_identity
from rlhf_core.training.saving import save_policy
from rlhf_core.types import Report
from rlhf_core.work import Work


@dataclass(frozen=True, kw_only=True)
class DPOReport(Report):
    """How well the implicit reward predicts held-out votes; the accuracy excludes ties."""

    accuracy: float
    accuracy_low: float  # 95 % bounds, bootstrapped over prompts
    accuracy_high: float
    held_out_loss: float  # nats a pair
    margin: float  # implicit reward of chosen minus rejected, held out
    chosen_reward: float  # implicit, held out; below 0 the chosen text has become less likely
    train_pairs: int
    held_out_pairs: int
    truncated: int  # pairs with a text cut to max_length
    same_after_cut: int  # votes left out, since both texts are the same tokens then


def train_dpo(config: DPOConfig, work: Work) -> DPOReport:
    """Optimise the SFT policy on the prepared preferences; write the policy.

    With a recovery, a run that was killed resumes bit for bit.

    Args:
        work: inputs sft and data; output policy.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when a
    loss or gradient is not finite, or an invariant is broken; CheckpointError when the checkpoints
    are from another run.
    """
    sft, data, seed, ranks = work.inputs["sft"], work.inputs["data"], work.seed, work.ranks
    logger = work.logger
    logger.phase("loading the SFT policy")
    policy, tokenizer = Policy.load(sft, work.device, config.precision)
    require_context(policy.model, config.max_length, "dpo.max_length")
    adapt(policy, config, "policy", seed=seed, stream="policy/adapter")
    logger.phase("encoding the preferences")
    limit = (config.max_length, "dpo.max_length")
    place = Place(data, tokenizer, work.recovery.tokens, logger)
    train, held_out = (pairs_of(place, split, *limit) for split in SPLITS)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    learner = Learner(policy, config, steps, ranks=ranks)
    batches = Batches(len(train), config.batch_size, config.epochs, generator(seed, "dpo/order"))
    tell = partial(counted, logger)
    reference = _sums_of_all(policy, train, config, ranks, tell, "reference")
    held_out_reference = _sums_of_all(policy, held_out, config, ranks, tell, "held-out reference")
    with work.recovery.open(
        logger,
        identity=run_identity("dpo", seed, {"dpo": config}, {"sft": sft, "data": data}),
        learners={"policy": learner},
        positions={"batches": batches},
        ranks=ranks,
    ) as session:
        session.resume()

        def add(picked: list[int], check: Callable[[], None]) -> dict[str, float]:
            pairs = [train[i] for i in picked]
            values = _accumulate(learner, pairs, reference[picked], config, ranks, check)
            if session.step == 0:
                _require_log_two(values["loss"], pairs, config)
            return values

        for _ in optimizer_steps(session, learner, batches, add, config, ranks, total=steps):
            pass
        history = session.history

    logger.phase("saving the policy")
    facts, output = {"steps": steps}, work.outputs["policy"]
    save_policy(policy, tokenizer, output, facts, sft=sft, ranks=ranks)
    sums = _sums_of_all(policy, held_out, config, ranks, tell, "held-out votes")
    return _report(
        train,
        held_out,
        sums,
        held_out_reference,
        config,
        history,
        seed,
    )


def _accumulate(
    learner: Learner,
    pairs: list[Pair],
    reference: Tensor,
    config: DPOConfig,
    ranks: Ranks,
    check: Callable[[], None],
) -> dict[str, float]:
    """Add the gradient of one optimizer step; return its means over the pairs."""
    sums: dict[str, float] = dict.fromkeys(("loss", "accuracy", "margin", "chosen_reward"), 0.0)
    for micro in ranks.micro_batches(range(len(pairs)), config.micro_batch_size):
        check()
        rows = [pairs[i] for i in micro.rows]
        share = len(rows) * micro.weight / len(pairs)
        with learner.accumulate(last=micro.last):
            logprobs = _sums(learner, rows, learner.network.model.device)
            ties = torch.tensor([pair.tie for pair in rows])
            out = _loss(logprobs, reference[micro.rows].to(logprobs.device), ties, config)
            learner.backward(out.loss * share, "the DPO loss")
        gap = out.chosen_rewards - out.rejected_rewards
        sums["loss"] += out.loss.item() * share
        sums["accuracy"] += half_for_ties(gap).mean().item() * share
        sums["margin"] += gap.mean().item() * share
        sums["chosen_reward"] += out.chosen_rewards.mean().item() * share
    return ranks.sum(sums)


def _sums(policy: Callable[..., ChunkedLoss], pairs: list[Pair], device: torch.device) -> Tensor:
    """(B, 2) log-probability of each chosen and each rejected response, in nats."""
    packed = pack_pairs(pairs, device)
    starts = torch.tensor([start for pair in pairs for start in pair.starts], device=device)
    logprobs = policy(packed, *packed.predictions(starts)).logprobs
    owner = torch.arange(len(starts), device=device).repeat_interleave(packed.lengths - starts)
    return logprobs.new_zeros(len(starts)).index_add(0, owner, logprobs).view(-1, 2)


@torch.no_grad()
def _sums_of_all(
    policy: Policy,
    pairs: Sequence[Pair],
    config: DPOConfig,
    ranks: Ranks,
    between: Between,
    what: str,
) -> Tensor:
    """(N, 2) `_sums` of many pairs, on the CPU; a phase named `what`."""
    return ranks.collect(
        len(pairs),
        config.micro_batch_size,
        lambda rows: _sums(policy, [pairs[i] for i in rows], policy.model.device),
        between(what, ranks.passes(len(pairs), config.micro_batch_size)),
    )


def _loss(logprobs: Tensor, reference: Tensor, ties: Tensor, config: DPOConfig) -> losses.DPOLoss:
    return losses.dpo(
        *logprobs.unbind(1),
        *reference.unbind(1),
        beta=config.beta,
        label_smoothing=smoothing(ties.to(logprobs.device), config.label_smoothing),
    )


def leeway(pairs: list[Pair], config: DPOConfig) -> float:
    """How far rounding may move the first loss from log 2, in nats a pair.

    The reference was computed in other micro-batches. In bfloat16 this moves the log-probability of
    a token by 0.02 nats (root mean square, SmolLM2), and so the mean of d / 2 by
    β·0.01·√tokens / pairs; five times that is allowed.
    """
    if config.precision == "float32":
        return 1e-3
    tokens = sum(len(p.chosen) + len(p.rejected) - sum(p.starts) for p in pairs)
    return 1e-3 + 5 * 0.01 * config.beta * math.sqrt(tokens) / len(pairs)


def _require_log_two(loss: float, pairs: list[Pair], config: DPOConfig) -> None:
    """Invariant: before the first update every implicit reward is 0, so the loss is log 2."""
    if abs(loss - math.log(2)) > leeway(pairs, config):
        raise NumericsError(
            f"a broken invariant: the first DPO loss is {loss:.4f} and not log 2, though the "
            "policy is its own reference. This is a defect: please report it with the config"
        )


def _report(
    train: StoredPairs,
    held_out: StoredPairs,
    logprobs: Tensor,
    reference: Tensor,
    config: DPOConfig,
    history: list[tuple[int, dict[str, float]]],
    seed: int,
) -> DPOReport:
    out = _loss(logprobs, reference, held_out.ties, config)
    gap = out.chosen_rewards - out.rejected_rewards
    decided = ~held_out.ties
    require_decided(decided)
    accuracy = ranking.clustered_share(
        half_for_ties(gap[decided]),
        held_out.prompts[decided],
        generator=generator(seed, "dpo/bootstrap"),
    )
    return DPOReport(
        accuracy=accuracy.value,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        held_out_loss=out.loss.item(),
        margin=gap.mean().item(),
        chosen_reward=out.chosen_rewards.mean().item(),
        train_pairs=len(train),
        held_out_pairs=len(held_out),
        truncated=train.truncated + held_out.truncated,
        same_after_cut=train.same + held_out.same,
        figures={
            "dpo_training": figures.preference_curves(history),
            "dpo_rewards": figures.score_histogram(
                out.chosen_rewards.tolist(), out.rejected_rewards.tolist()
            ),
        },
    )
