"""What PPO, RLOO and GRPO share: experience, where an iteration stands, the update of the policy.

An iteration samples responses, has them scored, and takes a few epochs of updates over them. The
stages differ in what a token's advantage is and in what else learns; they say so themselves.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.data import read_table
from rlhf_core.encoding import Prompt, decode_responses, encode_prompt, left_pad
from rlhf_core.errors import DataError, NumericsError
from rlhf_core.functional.logprobs import KLKind
from rlhf_core.functional.rewards import MissingEOS
from rlhf_core.kl_control import MAX_ERROR, AdaptiveKL, FixedKL, KLController
from rlhf_core.metrics import Between, StageLogger, batch_name, uncounted
from rlhf_core.models import read_card, require_context
from rlhf_core.networks import Policy, Precision, ScalarModel, on_trunk, start_adapter
from rlhf_core.optim import Batches, Learner, TrainingSection, chunks, require_finite
from rlhf_core.ranks import Ranks
from rlhf_core.recovery import NO_RECOVERY, Recovery, identity
from rlhf_core.rollout import (
    lay_out,
    response_logprobs,
    response_values,
    rounding,
    share_below,
)
from rlhf_core.sampling import SAMPLING_LENGTH, SamplingConfig, sample, uniforms
from rlhf_core.scoring import PIPELINE_REWARD, Reward, RewardTerm, check_terms, load_reward
from rlhf_core.seeding import generator, stream_seed
from rlhf_core.session import Session
from rlhf_core.types import PromptBatch, Report, Responses, Rollout

_log = logging.getLogger(__name__)


class OnPolicySection(TrainingSection):
    """Settings that PPO, RLOO and GRPO have in common."""

    learning_rate: float = Field(3e-6, gt=0, description="Peak learning rate of the policy")
    iterations: int = Field(100, ge=1, description="Roll-outs, each followed by its updates")
    rollout_size: int = Field(128, ge=2, description="Responses sampled in one iteration")
    epochs: int = Field(4, ge=1, description="Passes over the responses of one iteration")
    rewards: tuple[RewardTerm, ...] = Field(
        (RewardTerm(),), min_length=1, description="What a response is worth: a weighted sum"
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="ε: the ratio counts within 1 ± ε")
    dual_clip: float = Field(
        0.0, ge=0, description="c > 1 bounds the loss of bad actions at c·|advantage|; 0 = off"
    )
    kl_coef: float = Field(0.05, ge=0, description="β: price of one nat of KL (reward units)")
    kl_budget: float = Field(
        0.0, ge=0, description="KL at which the run stops or warns (nats per sequence); 0 = none"
    )
    at_kl_budget: Literal["stop", "warn"] = Field("stop", description="What happens at kl_budget")
    update_kl_limit: float = Field(
        0.05,
        ge=0,
        description="The epochs of an iteration end when the policy has moved 1.5 times this far "
        "from the one that sampled (nats a token); 0 = never",
    )
    missing_eos: MissingEOS = Field(
        "subtract", description="What becomes of the score of a response that never ends"
    )
    missing_eos_value: float = Field(
        1.0, description="The penalty to subtract, or the score to put instead (reward units)"
    )

    @model_validator(mode="after")
    def _minibatch_within_rollout(self) -> Self:
        if self.batch_size > self.rollout_size:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than rollout_size "
                f"{self.rollout_size}; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _dual_clip_off_or_above_one(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError(
                f"dual_clip {self.dual_clip:g} has to be above 1, or 0 for no dual clip"
            )
        return self

    @model_validator(mode="after")
    def _terms_can_be_told_apart(self) -> Self:
        check_terms(self.rewards)
        return self

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run, if no epoch ends early."""
        return self.iterations * self.epochs * -(-self.rollout_size // self.batch_size)


class KLSection(OnPolicySection):
    """Settings of a KL penalty within the reward."""

    kl_control: Literal["fixed", "adaptive"] = Field(
        "adaptive", description="Whether β stays, or moves to hold kl_target"
    )
    kl_target: float = Field(6.0, gt=0, description="KL that β holds (nats per sequence)")
    kl_horizon: float = Field(
        10_000, gt=0, description="Sequences over which β moves by a fifth at most"
    )
    kl_estimator: KLKind = Field("k1", description="Which estimate of the KL is the penalty")

    @model_validator(mode="after")
    def _adaptive_control_can_move(self) -> Self:
        if self.kl_control == "fixed":
            return self
        if self.kl_coef == 0:
            raise ValueError(
                "kl_coef 0 stays 0 however it is scaled; raise it, or set kl_control to fixed"
            )
        if MAX_ERROR * self.rollout_size >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon:g} is too short for rollout_size "
                f"{self.rollout_size}: raise it above {MAX_ERROR * self.rollout_size:g}"
            )
        return self

    def kl_controller(self) -> KLController:
        """What owns β."""
        if self.kl_control == "fixed":
            return FixedKL(self.kl_coef)
        return AdaptiveKL(self.kl_coef, self.kl_target, self.kl_horizon)


class GroupSection(OnPolicySection):
    """Settings of algorithms that compare the responses to one prompt with each other."""

    group_size: int = Field(4, ge=2, description="Responses to each prompt of an iteration")

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        for name in ("rollout_size", "batch_size"):
            if getattr(self, name) % self.group_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of group_size "
                    f"{self.group_size}; change one of them"
                )
        return self


class PromptStream(Iterator[list[int]]):
    """Numbers of prompts for ever, every prompt once before any comes again."""

    def __init__(self, prompts: int, size: int, order: torch.Generator) -> None:
        self._prompts = prompts
        self._size = size
        self._order = order
        self._waiting: list[int] = []

    def __next__(self) -> list[int]:
        while len(self._waiting) < self._size:
            self._waiting += torch.randperm(self._prompts, generator=self._order).tolist()
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"waiting": list(self._waiting), "order": self._order.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._waiting = list(state["waiting"])
        self._order.set_state(state["order"])


@dataclass
class Iteration:
    """Where an on-policy run stands. All of it goes into a checkpoint, the roll-out included."""

    config: OnPolicySection
    order: torch.Generator
    device: str
    number: int = 1
    rollout: Rollout | None = None  # of this iteration, once it is there
    used: list[dict[str, float]] = field(default_factory=list)  # of the updates done with it
    samples: list[dict[str, Any]] = field(default_factory=list)  # texts to look at
    ended: bool = False

    def __post_init__(self) -> None:
        self.minibatches = self._all_minibatches()

    @property
    def experience(self) -> Rollout:
        """The roll-out of this iteration, which has begun."""
        assert self.rollout is not None
        return self.rollout

    def begin(self, rollout: Rollout) -> None:
        """New experience to learn from.

        Raises: NumericsError when it is the first and the policy is not yet its reference.
        """
        if self.number == 1:
            require_kl_zero(rollout, self.config.precision)
        self.rollout, self.used, self.minibatches = rollout, [], self._all_minibatches()

    def finish(self, *, last: bool) -> dict[str, float]:
        """The experience is used up; returns the means over its updates."""
        means = {name: sum(s[name] for s in self.used) / len(self.used) for name in self.used[0]}
        updates = float(len(self.used))
        self.rollout, self.used, self.ended = None, [], last
        self.number += 1
        return means | {"optimizer/updates": updates}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "number": self.number,
            "rollout": self.rollout,
            "used": self.used,
            "samples": self.samples,
            "ended": self.ended,
            "minibatches": self.minibatches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        rollout = state["rollout"]
        self.rollout = None if rollout is None else rollout.to(self.device)
        self.number, self.used = state["number"], state["used"]
        self.samples, self.ended = state["samples"], state["ended"]
        self.minibatches = self._all_minibatches()
        self.minibatches.load_state_dict(state["minibatches"])

    def _all_minibatches(self) -> Batches:
        # The first epoch takes the rows as they were scored, so that its first ratio is exactly 1.
        size, epochs = self.config.rollout_size, self.config.epochs
        return Batches(size, self.config.batch_size, epochs, self.order, first_in_order=True)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an on-policy stage starts from, beside its settings."""

    sft: Path
    reward_models: Mapping[str, Path]  # by the `source` of the reward terms
    data: Path
    seed: int
    device: str
    logger: StageLogger
    recovery: Recovery = NO_RECOVERY
    ranks: Ranks = field(default_factory=Ranks)


def load_actors(
    config: OnPolicySection, given: Given
) -> tuple[Policy, Policy, PreTrainedTokenizerBase]:
    """The policy, its reference, and their tokenizer. With LoRA they are one transformer, and the
    reference is that with its adapters off."""
    given.logger.phase("loading the models")
    policy, tokenizer = Policy.load(given.sft, given.device, config.precision)
    if not config.lora_rank:
        return policy, Policy.load(given.sft, given.device, config.precision)[0], tokenizer
    reference = Policy(policy.model, precision=config.precision)
    start_adapter(
        policy,
        "policy",
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        layers=config.lora_layers,
        seed=stream_seed(given.seed, "policy/adapter"),
    )
    return policy, reference, tokenizer


def ready_rewards(config: OnPolicySection, given: Given, policy: Policy) -> dict[str, ScalarModel]:
    """The pipeline's reward model on the policy's own transformer, if it is an adapter of that."""
    directory = given.reward_models.get(PIPELINE_REWARD)
    if not config.lora_rank or directory is None:
        return {}
    found = on_trunk(directory, given.sft, policy.model, "reward", config.precision)
    return {} if found is None else {PIPELINE_REWARD: found}


@dataclass(frozen=True)
class Asked:
    """The prompts to train on, as they were written and as tokens."""

    prompts: list[Prompt]
    tokens: list[list[int]]

    @classmethod
    def read(cls, data: Path, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The training prompts of prepared data.

        Raises: DataError when there is none.
        """
        table = read_table(data, "prompts", "train")
        if table.empty:
            raise DataError(
                "there are no prompts to train on; add rows to data.prompts, or lower "
                "data.eval_fraction"
            )
        prompts = list(table["prompt"])
        return cls(prompts, [encode_prompt(prompt, tokenizer) for prompt in prompts])

    def pick(self, numbers: Sequence[int]) -> "Asked":
        """Some of them."""
        return Asked([self.prompts[i] for i in numbers], [self.tokens[i] for i in numbers])


@dataclass(frozen=True)
class Sampler:
    """Gathers experience: samples responses to prompts and has them measured by every network."""

    policy: Policy
    reference: Policy
    critic: ScalarModel | None
    reward: Reward
    config: OnPolicySection
    sampling: SamplingConfig
    draws: torch.Generator
    ranks: Ranks
    between: Between = uncounted

    @torch.no_grad()
    def roll_out(self, asked: Asked) -> Rollout:
        """A response to each prompt, with log-probabilities, values and scores.

        Log-probabilities are those of a forward pass like that of the update, over the same rows in
        the same micro-batches, and not those of sampling, which in bfloat16 are rounded otherwise.

        Raises: NumericsError naming what is not finite.
        """
        size = self.config.batch_size
        draws = uniforms(len(asked.tokens), self.sampling.max_new_tokens, self.draws)
        minibatches = [self.ranks.share(b) for b in chunks(list(range(len(asked.tokens))), size)]
        own = [row for minibatch in minibatches for row in minibatch]
        with self.ranks.whole(self.policy, self.critic):
            measured = self._experience(asked, draws, minibatches, own) if own else []
        rollout = self.ranks.gather(measured, own, Rollout.join)
        require_finite("the reward-model score", rollout.scores)
        require_finite("the log-probability of a sampled token", rollout.logprobs)
        require_finite("its log-probability under the reference", rollout.ref_logprobs)
        require_finite("the critic's value", rollout.values)
        return rollout

    def _experience(
        self, asked: Asked, draws: Tensor, minibatches: list[list[int]], own: list[int]
    ) -> list[Rollout]:
        """That of this rank's rows, by minibatch."""
        batches = list(chunks(own, self.sampling.batch_size))
        parts = [
            self._respond(
                asked.pick(rows),
                draws[rows],
                self.between(batch_name("sampling", number, len(batches)), draws.shape[1]),
            )
            for number, rows in enumerate(batches)
        ]
        bare = Rollout.join([Rollout.unmeasured(*part) for part in parts])
        places = {row: place for place, row in enumerate(own)}
        micros = [m for rows in minibatches for m in chunks(rows, self.config.micro_batch_size)]
        between = self.between("scoring", len(micros))
        measured = []
        for rows in micros:
            between()
            index = torch.tensor([places[row] for row in rows])
            part = bare.rows(index.to(bare.responses.tokens.device))
            measured.append(self._measure(part, asked.pick(rows).prompts))
        return measured

    def _respond(
        self, asked: Asked, draws: Tensor, between: Callable[[], None]
    ) -> tuple[PromptBatch, Responses]:
        model = self.policy.model
        pad_token_id = model.config.pad_token_id
        prompts = left_pad(asked.tokens, pad_token_id, self.sampling.max_prompt_length)
        prompts = prompts.to(model.device)
        responses = sample(
            self.policy,
            prompts,
            draws,
            temperature=self.sampling.temperature,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=pad_token_id,
            between=between,
        )
        return prompts, responses

    def _measure(self, bare: Rollout, asked: list[Prompt]) -> Rollout:
        written = share_below(lay_out(bare.prompts, bare.responses), self.policy)
        temperature = self.sampling.temperature
        scores = self.reward(asked, written, bare.responses)
        logprobs = response_logprobs(self.policy, written, temperature=temperature)
        values = torch.zeros_like(logprobs)
        if self.critic is not None:
            values = response_values(self.critic, written)
        return Rollout(
            prompts=bare.prompts,
            responses=bare.responses,
            logprobs=logprobs,
            ref_logprobs=response_logprobs(self.reference, written, temperature=temperature),
            values=values,
            scores=scores.total,
            parts=scores.parts,
            below=written.below(),
        )


@dataclass(frozen=True, kw_only=True)
class OnPolicyReport(Report):
    """Where the policy came to, as means over the last iteration."""

    score: float  # what the responses are worth, before the penalty for missing ends
    kl: float  # nats per sequence
    kl_coef: float
    response_length: float  # tokens
    iterations: int
    over_kl_budget: float  # 1 when the last iteration was over kl_budget

    @classmethod
    def of(
        cls,
        stage: str,
        config: OnPolicySection,
        history: Sequence[dict[str, float]],
        samples: list[dict[str, Any]],
    ) -> Self:
        """What the metrics of all iterations come to."""
        last = history[-1]
        path = [(point["objective/kl"], point["objective/score"]) for point in history]
        return cls(
            score=last["objective/score"],
            kl=last["objective/kl"],
            kl_coef=last["objective/kl_coef"],
            response_length=last["response/length"],
            iterations=len(history),
            over_kl_budget=float(over_budget(last, config)),
            tables={f"{stage}_samples": pd.DataFrame(samples)},
            figures={
                f"{stage}_training": figures.policy_curves(history),
                f"{stage}_frontier": figures.reward_kl_path(path),
            },
        )


class Judge(Protocol):
    """What an algorithm makes of experience."""

    def __call__(self, rollout: Rollout, kl_coef: float) -> tuple[Any, dict[str, float]]:
        """What an update moves towards, and metrics."""


class Optimise(Protocol):
    """How an algorithm learns from it."""

    def __call__(
        self,
        rollout: Rollout,
        targets: Any,
        picked: list[int],
        *,
        first: bool,
        check: Callable[[], None],
    ) -> dict[str, float] | None:
        """One update on the picked rows, and its metrics; `check` comes before each micro-batch.

        None, and no update, when the policy has moved too far from the one that sampled.
        """


def iterate(
    stage: str,
    config: OnPolicySection,
    sampling: SamplingConfig,
    given: Given,
    *,
    policy: Policy,
    reference: Policy,
    critic: ScalarModel | None,
    ready: Mapping[str, ScalarModel],
    tokenizer: PreTrainedTokenizerBase,
    learners: Mapping[str, Learner],
    controller: KLController,
    judge: Judge,
    optimise: Optimise,
) -> OnPolicyReport:
    """The iterations of an on-policy stage, from the last checkpoint on if there is one."""
    require_context(policy.model, sampling.max_length, SAMPLING_LENGTH)
    given.logger.phase("encoding the prompts")
    asked = Asked.read(given.data, tokenizer)
    group = config.group_size if isinstance(config, GroupSection) else 1
    order = generator(given.seed, f"{stage}/prompts")
    stream = PromptStream(len(asked.tokens), config.rollout_size // group, order)
    draws = generator(given.seed, f"{stage}/sampling")
    now = Iteration(config, generator(given.seed, f"{stage}/order"), given.device)
    sections = {stage: config, "sampling": sampling}
    inputs = {"sft": given.sft, "data": given.data, **given.reward_models}
    with given.recovery.open(
        given.logger,
        identity=identity(stage, given.seed, sections, inputs),
        learners=learners,
        positions={"prompts": stream, "draws": draws, "kl": controller, "iteration": now},
        ranks=given.ranks,
    ) as session:
        session.resume()
        session.phase("loading the reward")
        sampler = Sampler(
            policy=policy,
            reference=reference,
            critic=critic,
            reward=load_reward(
                config.rewards,
                given.reward_models,
                tokenizer,
                given.device,
                config.precision,
                max_length=sampling.max_length,
                ready=ready,
            ),
            config=config,
            sampling=sampling,
            draws=draws,
            ranks=given.ranks,
            between=session.between,
        )
        while not now.ended:
            if now.rollout is None:
                prompts = [prompt for prompt in next(stream) for _ in range(group)]
                now.begin(sampler.roll_out(asked.pick(prompts)))
                session.safe_point()
            targets, stats = judge(now.experience, controller.value)
            for picked in now.minibatches:
                parts = given.ranks.passes(len(picked), config.micro_batch_size)
                name = batch_name("updating", len(now.used), config.updates // config.iterations)
                update = optimise(
                    now.experience,
                    targets,
                    picked,
                    first=not now.used,
                    check=session.between(name, parts),
                )
                if update is None:
                    break
                now.used.append(update)
                session.safe_point()
            controller.update(stats["objective/kl"], config.rollout_size)
            finish_iteration(now, stats, session, tokenizer)
            session.safe_point()
        history = [values for _, values in session.history]
    return OnPolicyReport.of(stage, config, history, now.samples)


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    given: Given,
    iterations: int,
) -> None:
    """Write the policy, which answers messages if the SFT policy did. One rank does."""
    given.logger.phase("saving the policy")
    facts = {"iterations": iterations, "chat": read_card(given.sft).get("chat", False)}
    with given.ranks.whole(policy):
        if given.ranks.main:
            policy.save(tokenizer, output, facts, base=given.sft)


def describe(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """What a roll-out says about the policy."""
    mask = rollout.responses.mask
    stats = {
        "objective/score": rollout.scores.mean().item(),
        "objective/score_std": rollout.scores.std().item(),
        "objective/kl": kl_to_reference(rollout).mean().item(),
        "objective/kl_coef": kl_coef,
        "response/length": mask.sum(-1).float().mean().item(),
        "response/finished": rollout.responses.finished.float().mean().item(),
    }
    if len(rollout.parts) > 1:
        stats |= {f"reward/{name}": part.mean().item() for name, part in rollout.parts.items()}
    return stats


def kl_to_reference(rollout: Rollout) -> Tensor:
    """(B,) log π - log π_ref of each whole response, in nats."""
    apart = rollout.logprobs - rollout.ref_logprobs
    return apart.masked_fill(~rollout.responses.mask, 0).sum(-1)


def group_spread(scores: Tensor, group_size: int) -> float:
    """Mean standard deviation of the scores of one prompt; at 0 there is nothing to learn from."""
    return scores.view(-1, group_size).std(1).mean().item()


def require_kl_zero(rollout: Rollout, precision: Precision) -> None:
    """Invariant: before its first update the policy is its reference, so their KL is 0.

    Raises: NumericsError naming it.
    """
    apart = (rollout.logprobs - rollout.ref_logprobs)[rollout.responses.mask].abs().max().item()
    if apart > rounding(rollout.logprobs, precision):
        raise NumericsError(
            f"a broken invariant: the KL to the reference is not 0 at step 0 (log-probabilities "
            f"differ by {apart:.3g}); policy and reference must be the same model. This is a "
            "defect: please report it with the config"
        )


def finish_iteration(
    now: Iteration, stats: dict[str, float], session: Session, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log an iteration whose updates are done, keep some of its texts, and see whether it is the
    last: the planned number is reached, or the KL to the reference is over its budget."""
    number, config, rollout = now.number, now.config, now.experience
    said = f"score {stats['objective/score']:+.2f}, KL {stats['objective/kl']:.2f} nats"
    over = over_budget(stats, config)
    if over:
        _log.warning("over the KL budget of %g nats: %s", config.kl_budget, said)
    last = number == config.iterations or (over and config.at_kl_budget == "stop")
    if number == 1 or last:
        now.samples += sample_rows(rollout, tokenizer, number)
    session.metrics(stats | now.finish(last=last), number)
    session.progress(number, config.iterations, said)


def over_budget(stats: Mapping[str, float], config: OnPolicySection) -> bool:
    """Whether the KL to the reference is over its budget."""
    return 0 < config.kl_budget < stats["objective/kl"]


def sample_rows(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, iteration: int, rows: int = 8
) -> list[dict[str, Any]]:
    """Some texts of a roll-out with their scores, to read what the numbers mean."""
    prompts, responses = rollout.prompts, rollout.responses
    table = pd.DataFrame(
        {
            "iteration": iteration,
            "prompt": decode_responses(prompts.input_ids[:rows], prompts.mask[:rows], tokenizer),
            "response": decode_responses(responses.tokens[:rows], responses.mask[:rows], tokenizer),
            "score": rollout.scores[:rows].tolist(),
            "kl": kl_to_reference(rollout)[:rows].tolist(),
        }
    )
    return cast(list[dict[str, Any]], table.to_dict("records"))
