"""The loop of PPO, RLOO and GRPO: sample and score responses, then run a few epochs of updates.

The stages differ in the advantage of a token and in the networks that train; each passes two
functions, `credit` and `update`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from rlhf_core.backbone.context import SAMPLING_LENGTH, require_context
from rlhf_core.backbone.responses import rounding
from rlhf_core.backbone.sampling import PolicySampler, Sampler
from rlhf_core.engines.engine import Builtin, Engine
from rlhf_core.engines.remote import Remote
from rlhf_core.errors import ConfigError, NumericsError
from rlhf_core.metrics import batch_name
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.experience import Collector, PromptTable
from rlhf_core.onpolicy.kl_control import KLController
from rlhf_core.onpolicy.monitor.guard import Guard
from rlhf_core.onpolicy.monitor.last_good import LastGood
from rlhf_core.onpolicy.monitor.monitor import Monitor, monitor_prompts
from rlhf_core.onpolicy.monitor.rules import ACTION, SEVERITY
from rlhf_core.onpolicy.monitor.samples import Watched
from rlhf_core.onpolicy.observe import Observation, Observer, kl_budget, observe
from rlhf_core.onpolicy.report import OnPolicyReport, sample_rows
from rlhf_core.rewards.scoring import load_reward, reward_directories
from rlhf_core.rewards.shaping import Shaping
from rlhf_core.seeding import generator
from rlhf_core.settings.model import Precision, SamplingConfig
from rlhf_core.settings.monitor import HELD_OUT
from rlhf_core.settings.onpolicy import GroupSection, OnPolicySection
from rlhf_core.settings.rewards import PIPELINE_REWARD, RewardTerm
from rlhf_core.training.learner import Learner
from rlhf_core.training.order import Batches, PromptStream
from rlhf_core.training.recovery import run_identity
from rlhf_core.training.session import Session, Stateful
from rlhf_core.types import Rollout
from rlhf_core.work import Work

_log = logging.getLogger(__name__)


class Credit(Protocol):
    """How an algorithm assigns the reward to tokens."""

    def __call__(self, rollout: Rollout, kl_coef: float) -> tuple[Any, dict[str, float]]:
        """The targets of the updates, and metrics."""


class Update(Protocol):
    """How an algorithm updates its networks."""

    def __call__(
        self,
        rollout: Rollout,
        targets: Any,
        picked: list[int],
        *,
        first: bool,
        check: Callable[[], None],
    ) -> dict[str, float] | None:
        """Update on the picked rows and return metrics; calls `check` before each micro-batch.

        Returns None, without an update, when the policy has moved too far from the one that
        sampled.
        """


@dataclass
class Iteration:
    """The position of an on-policy run. A checkpoint has all of it, including the roll-out."""

    config: OnPolicySection
    order: torch.Generator
    device: str
    number: int = 1
    rollout: Rollout | None = None  # of this iteration, once sampled
    used: list[dict[str, float]] = field(default_factory=list)  # metrics of its updates so far
    spent: dict[str, float] = field(default_factory=dict)  # seconds of the engine, as metrics
    samples: list[dict[str, Any]] = field(default_factory=list)  # texts for the report
    alarms: list[dict[str, Any]] = field(default_factory=list)  # of the monitor, for the report
    ended: bool = False

    def __post_init__(self) -> None:
        self.minibatches = self._all_minibatches()

    @property
    def experience(self) -> Rollout:
        """The roll-out of this iteration; only after `begin`."""
        assert self.rollout is not None
        return self.rollout

    def begin(self, rollout: Rollout, spent: Mapping[str, float] = {}) -> None:
        """Start an iteration with new experience.

        Raises: NumericsError when it is the first and the policy differs from its reference.
        """
        if self.number == 1:
            require_kl_zero(rollout, self.config.precision)
        self.rollout, self.used, self.minibatches = rollout, [], self._all_minibatches()
        self.spent = dict(spent)

    def means(self) -> dict[str, float]:
        """The metrics averaged over the updates, and the number of updates."""
        count = len(self.used)
        means = {name: sum(used[name] for used in self.used) / count for name in self.used[0]}
        return means | {"optimizer/updates": float(count)}

    def finish(self, *, last: bool) -> None:
        """End the iteration and drop its experience."""
        self.rollout, self.used, self.ended = None, [], last
        self.number += 1

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "number": self.number,
            "rollout": self.rollout,
            "used": self.used,
            "spent": self.spent,
            "samples": self.samples,
            "alarms": self.alarms,
            "ended": self.ended,
            "minibatches": self.minibatches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        rollout = state["rollout"]
        self.rollout = None if rollout is None else rollout.to(self.device)
        self.number, self.used = state["number"], state["used"]
        self.spent = state.get("spent", {})  # earlier versions had no other engine
        self.samples, self.alarms = state["samples"], state["alarms"]
        self.ended = state["ended"]
        self.minibatches = self._all_minibatches()
        self.minibatches.load_state_dict(state["minibatches"])

    def _all_minibatches(self) -> Batches:
        # The first epoch takes the rows in scoring order, so that its first ratio is exactly 1.
        size, epochs = self.config.rollout_size, self.config.epochs
        return Batches(size, self.config.batch_size, epochs, self.order, first_in_order=True)


def iterate(
    stage: str,
    config: OnPolicySection,
    work: Work,
    actors: Actors,
    *,
    learners: Mapping[str, Learner],
    controller: KLController,
    credit: Credit,
    update: Update,
    observers: Sequence[Observer] = (),
    sampler: Sampler | None = None,
) -> OnPolicyReport:
    """Run the iterations of an on-policy stage, resuming from the last checkpoint if there is one.

    Args:
        observers: look at each iteration in addition to the KL budget, and may stop the run.
        sampler: samples the responses in this process; by default with the policy.
    """
    sampling = work.section(SamplingConfig)
    require_context(actors.policy.model, sampling.max_length, SAMPLING_LENGTH)
    engine = engine_of(sampling, work, actors, sampler)
    work.logger.phase("encoding the prompts")
    table = PromptTable.read(
        work.inputs["data"], actors.tokenizer, sampling.max_prompt_length, work.recovery.tokens
    )
    group = config.group_size if isinstance(config, GroupSection) else 1
    order = generator(work.seed, f"{stage}/prompts")
    stream = PromptStream(len(table.tokens), config.rollout_size // group, order)
    draws = generator(work.seed, f"{stage}/sampling")
    shaping = None
    if config.shaping.active:
        reference_draws = generator(work.seed, f"{stage}/reference answers")
        shaping = Shaping(config.shaping, len(table.tokens), reference_draws)
    now = Iteration(config, generator(work.seed, f"{stage}/order"), work.device)
    monitor = Monitor(config.monitor, stage, work.seed) if config.monitor.on else None
    good = LastGood(learners, controller, work.ranks) if config.monitor.rolls_back else None
    guard = Guard(config.monitor, learners, monitor, good)
    all_observers = (kl_budget(config), *(monitor.observers() if monitor else ()), *observers)
    positions: dict[str, Stateful | torch.Generator] = {
        "prompts": stream,
        "draws": draws,
        "kl": controller,
        "iteration": now,
    }
    with work.recovery.open(
        work.logger,
        identity=run_identity(stage, work.seed, {stage: config, "sampling": sampling}, work.inputs),
        learners={**learners, **({"good": good} if good else {})},
        positions=positions
        | ({"shaping": shaping} if shaping else {})
        | ({"monitor": monitor} if monitor else {}),
        ranks=work.ranks,
    ) as session:
        session.resume()
        session.phase("loading the reward")
        collector = Collector(
            policy=actors.policy,
            reference=actors.reference,
            critic=actors.critic,
            reward=load_reward(
                config.rewards,
                reward_directories(config.rewards, work.inputs),
                actors.tokenizer,
                work.device,
                config.precision,
                max_length=sampling.max_length,
                loaded=actors.rewards,
                combination=config.combine_rewards,
                variance_coef=config.variance_coef,
                members=config,
                places=work.rewards_from,
            ),
            engine=engine,
            config=config,
            sampling=sampling,
            draws=draws,
            ranks=work.ranks,
            shaping=shaping,
            between=session.between,
        )
        if monitor is not None:
            monitor.start(watched(config, work, actors, collector))
            if good is not None and good.number < 0:
                good.keep(0, halvings=0)
        while not now.ended:
            if now.rollout is None:
                prompts = [prompt for prompt in next(stream) for _ in range(group)]
                now.begin(collector.roll_out(table.pick(prompts)), engine.spent())
                session.safe_point()
            targets, stats = credit(now.experience, controller.value)
            for picked in now.minibatches:
                parts = work.ranks.passes(len(picked), config.micro_batch_size)
                name = batch_name("updating", len(now.used), config.updates // config.iterations)
                metrics = update(
                    now.experience,
                    targets,
                    picked,
                    first=not now.used,
                    check=session.between(name, parts),
                )
                if metrics is None:
                    break
                now.used.append(metrics)
                session.safe_point()
            controller.update(stats["objective/kl"], config.rollout_size)
            finish_iteration(now, stats, session, actors, work, all_observers, guard)
            session.safe_point()
        history = [values for _, values in session.history]
    return OnPolicyReport.of(stage, config, history, now.samples, now.alarms)


def engine_of(
    sampling: SamplingConfig, work: Work, actors: Actors, sampler: Sampler | None = None
) -> Engine:
    """The engine of the settings.

    Raises: ConfigError without a server; EngineError when one cannot do what is needed.
    """
    if sampling.engine == "builtin":
        inside = sampler or PolicySampler(actors.policy, sampling.temperature)
        return Builtin(inside, actors.policy, sampling)
    if work.engine is None:
        raise ConfigError(
            f"sampling.engine is {sampling.engine}, but the stage was given no servers; set "
            "RLHF_VLLM_URLS where it runs, or Work.engine, or set sampling.engine to builtin"
        )
    work.logger.phase("looking for the servers that sample")
    engine = Remote(work.engine, actors.policy, actors.tokenizer, sampling, work.ranks)
    engine.check()
    return engine


def finish_iteration(
    now: Iteration,
    stats: Mapping[str, float],
    session: Session,
    actors: Actors,
    work: Work,
    observers: Sequence[Observer],
    guard: Guard,
) -> None:
    """Log a finished iteration, keep some of its texts, and save a milestone if one is due.

    Ends the run if the planned number of iterations is reached or an observer stops it. Of several
    actions only the most severe is taken.
    """
    number, config, rollout = now.number, now.config, now.experience
    metrics = {**stats, **now.spent, **now.means()}
    history = [values for _, values in session.history]
    monitor, last = guard.monitor, number == config.iterations
    if monitor is not None and monitor.due(number, last):
        metrics |= monitor.measure(number, history)
    actions = observe(observers, Observation(number, rollout, metrics, history))
    for action in actions:
        if work.ranks.main:
            _log.warning("%s", action.reason)
        if action.alarm is not None:
            now.alarms.append(asdict(action.alarm))
            session.alarm(action.alarm)
    taken = max((action.kind for action in actions), key=SEVERITY.__getitem__, default=None)
    last |= guard.act(taken, number, metrics, history)
    if monitor is not None:
        metrics[ACTION] = SEVERITY[taken]
    if number == 1 or last:
        now.samples += sample_rows(rollout, actors.tokenizer, number)
    if config.keep_every and number % config.keep_every == 0:
        session.phase("saving a milestone")
        save_milestone(actors, work, number)
    now.finish(last=last)
    session.metrics(metrics, number)
    note = f"score {metrics['objective/score']:+.2f}, KL {metrics['objective/kl']:.2f} nats"
    session.progress(number, config.iterations, note)


def watched(config: OnPolicySection, work: Work, actors: Actors, collector: Collector) -> Watched:
    """What the monitor looks at: its prompts, the reward, and the held-out reward model if any."""
    sampling, held_out = collector.sampling, None
    if (directory := work.inputs.get(HELD_OUT)) is not None:
        held_out = load_reward(
            (RewardTerm(),),
            {PIPELINE_REWARD: directory},
            actors.tokenizer,
            work.device,
            config.precision,
            max_length=sampling.max_length,
        )
    return Watched(
        prompts=monitor_prompts(config.monitor, work, actors.tokenizer, sampling.max_prompt_length),
        policy=actors.policy,
        reference=actors.reference,
        reward=collector.reward,
        held_out=held_out,
        sampling=sampling,
        micro_batch_size=config.micro_batch_size,
        ranks=work.ranks,
        between=collector.between,
    )


def save_milestone(actors: Actors, work: Work, number: int) -> None:
    """Write the policy after an iteration, to keep it when later ones replace it."""
    actors.save(work.outputs["milestones"] / f"{number:06d}", work, number)


def require_kl_zero(rollout: Rollout, precision: Precision) -> None:
    """Invariant: before its first update the policy is its reference, so their KL is 0.

    Raises: NumericsError naming it.
    """
    difference = (
        (rollout.logprobs - rollout.ref_logprobs)[rollout.responses.mask].abs().max().item()
    )
    if difference > rounding(rollout.logprobs, precision):
        raise NumericsError(
            f"a broken invariant: the KL to the reference is not 0 at step 0 (log-probabilities "
            f"differ by {difference:.3g}); policy and reference must be the same model. This is a "
            "defect: please report it with the config"
        )
