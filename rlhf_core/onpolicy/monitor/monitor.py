"""The monitor: measures fixed prompts at each iteration, against the SFT policy on the same ones.

Every random draw comes from a generator made of the seed and the number of the iteration, so
training draws the same numbers with a monitor as without, and a resumed run measures the same.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.encoding import encode_prompt
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import DataError
from rlhf_core.onpolicy.experience import PromptTable
from rlhf_core.onpolicy.monitor.measures import (
    Cloud,
    acceleration,
    distinct,
    rank_correlation,
    repetition,
    spread,
)
from rlhf_core.onpolicy.monitor.rules import PREFIX, RULES, Rule, since_roll_back
from rlhf_core.onpolicy.monitor.samples import Samples, Watched
from rlhf_core.onpolicy.observe import Action, Observation, Observer
from rlhf_core.seeding import generator
from rlhf_core.settings.monitor import MonitorConfig
from rlhf_core.work import Work

LEAST = 0.1  # share of SFT responses that end, below which a change of it says nothing
SETS = 4  # of SFT samples, one response to each prompt, for the baseline

_log = logging.getLogger(__name__)


def monitor_prompts(config: MonitorConfig, work: Work, tokenizer: Any, longest: int) -> PromptTable:
    """The held-out prompts that the seed chooses, fewer than wanted if there are fewer.

    Raises: DataError when there are none.
    """
    prompts = list(read_table(work.inputs["data"], "prompts", "eval")["prompt"])
    if not prompts:
        raise DataError(
            "there are no held-out prompts for the monitor; raise data.eval_fraction, or set "
            "monitor.prompts to 0"
        )
    if len(prompts) < config.prompts and work.ranks.main:
        _log.warning(
            "the monitor watches %d prompts instead of monitor.prompts %d, since no more are held "
            "out; its measures are the noisier for it",
            len(prompts),
            config.prompts,
        )
    order = torch.randperm(len(prompts), generator=generator(work.seed, "monitor/prompts"))
    chosen = [prompts[i] for i in order[: config.prompts].tolist()]
    tokens = [encode_prompt(prompt, tokenizer, longest) for prompt in chosen]
    cut = sum(
        len(encode_prompt(p, tokenizer)) > len(t) for p, t in zip(chosen, tokens, strict=True)
    )
    if cut and work.ranks.main:
        _log.warning(
            "%d of the monitor's %d prompts are cut to sampling.max_prompt_length; raise it to "
            "watch answers to the whole prompts",
            cut,
            len(chosen),
        )
    return PromptTable(chosen, tokens, list(range(len(chosen))))


@dataclass(frozen=True)
class Baseline:
    """The SFT policy on the monitor's prompts, before the first update."""

    values: dict[str, float]  # by measure, mean over the sets
    spreads: dict[str, float]  # standard deviation over the sets: the noise of one measurement
    scores: Tensor  # (N, 2) reward and held-out reward of one set; (N, 1) without the latter
    cloud: Cloud | None  # of hidden states; None without a reward model

    @classmethod
    def of(cls, sets: Sequence[Samples]) -> "Baseline":
        """The baseline from sets with one response to each prompt."""
        everything = Samples.join(sets)
        cloud = None
        if everything.states.shape[1]:
            # The last set is not in the cloud, so its distance is that of new SFT samples.
            cloud = Cloud.of(Samples.join(sets[:-1]).states)
        found = [plain(each) for each in sets]
        values = {name: _mean([each[name] for each in found]) for name in found[0]}
        spreads = {name: _std([each[name] for each in found]) for name in found[0]}
        for name, scores in (("proxy", everything.proxy), ("held_out", everything.held_out)):
            values[f"{name}_std"] = scores.std().item() if scores.numel() > 1 else math.nan
        if cloud is not None:
            values["distance"] = cloud.distances(sets[-1].states).median().item()
        return cls(values, spreads, _scores(sets[-1]), cloud)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        cloud = self.cloud and {"centre": self.cloud.centre, "offsets": self.cloud.offsets}
        known = {"values": self.values, "spreads": self.spreads, "scores": self.scores}
        return {**known, "cloud": cloud}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Baseline":
        """The baseline of such a state."""
        cloud = state["cloud"] and Cloud(state["cloud"]["centre"], state["cloud"]["offsets"])
        return cls(state["values"], state["spreads"], state["scores"], cloud)


def plain(samples: Samples) -> dict[str, float]:
    """The measures of a set of samples that need no baseline; NaN where one is not defined."""
    kept = samples.mask.clone()
    ends = samples.mask.sum(1) - 1
    rows = samples.finished.nonzero().squeeze(1)
    kept[rows, ends[rows]] = False  # the token that ends a response is no part of its text
    texts = [row[keep].tolist() for row, keep in zip(samples.tokens, kept, strict=True)]
    ratio = (samples.logprobs - samples.ref_logprobs).masked_fill(~samples.mask, 0).sum(1).double()
    tokens = samples.mask.sum().item()
    held_out = samples.held_out
    return {
        "kl": ratio.mean().item(),
        "kl_median": ratio.median().item(),
        "kl_error": (ratio.std() / math.sqrt(len(ratio))).item() if len(ratio) > 1 else math.nan,
        "proxy": samples.proxy.mean().item(),
        "held_out": held_out.mean().item() if held_out.numel() else math.nan,
        "agreement": agreement(_scores(samples)),
        "member_spread": spread(samples.members),
        "tokens": tokens / len(texts),
        "repeated": repetition(texts),
        "bigrams": distinct(texts),
        "surprise": -samples.logprobs[samples.mask].double().sum().item() / tokens,
        "ended": samples.finished.double().mean().item(),
    }


def _scores(samples: Samples) -> Tensor:
    return torch.cat([samples.proxy.unsqueeze(1), samples.held_out], 1)


def agreement(scores: Tensor) -> float:
    """Rank correlation of reward and held-out reward; NaN without the latter."""
    return rank_correlation(scores[:, 0], scores[:, 1]) if scores.shape[1] > 1 else math.nan


class Monitor:
    """Measures, and offers an observer for each rule. Its baseline is in the checkpoint."""

    def __init__(self, config: MonitorConfig, stage: str, seed: int) -> None:
        self.config = config
        self.baseline: Baseline | None = None
        self._stage = stage
        self._seed = seed
        self._watched: Watched | None = None

    def start(self, watched: Watched) -> None:
        """Sample the SFT policy, unless the baseline came with a checkpoint."""
        self._watched = watched
        if self.baseline is None:
            draws = self._draws("sft")
            what = "monitor: sampling the SFT policy"
            sets = [watched.respond(watched.reference, draws, what) for _ in range(SETS)]
            self.baseline = Baseline.of(sets)

    def due(self, number: int, last: bool) -> bool:
        """Whether an iteration is measured."""
        return last or number % self.config.every == 0

    def measure(self, number: int, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The metrics of the policy after an iteration, the same to the bit on every rank.

        What is not defined, such as a correlation with scores that are all equal, is left out.
        """
        assert self._watched is not None
        watched = self._watched
        samples = watched.respond(watched.policy, self._draws(str(number)), "monitor: sampling")
        found = self._compare(samples, history)
        ranks = watched.ranks
        shared = ranks.sum({name: value if ranks.main else 0.0 for name, value in found.items()})
        return {f"{PREFIX}{name}": value for name, value in shared.items() if math.isfinite(value)}

    def observers(self) -> list[Observer]:
        """One for each rule."""
        return [partial(self._observe, rule) for rule in RULES]

    def calm(self, metrics: Mapping[str, float]) -> bool:
        """Whether an iteration was measured, and nothing is beyond its limit."""
        measured = f"{PREFIX}kl" in metrics
        return measured and not any(rule.beyond(metrics, self.config) for rule in RULES)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"baseline": self.baseline and self.baseline.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.baseline = state["baseline"] and Baseline.restored(state["baseline"])

    def _observe(self, rule: Rule, seen: Observation) -> Action | None:
        if not rule.trips(seen.metrics, seen.history, self.config):
            return None
        alarm = rule.alarm(seen.metrics, seen.number, self.config)
        return Action(self.config.action(rule.measure), alarm.line, alarm)

    def _compare(
        self, samples: Samples, history: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """The measures, in the units of their limits."""
        assert self.baseline is not None
        now, sft = plain(samples), self.baseline.values
        proxy = gain(samples.proxy, sft["proxy"], sft["proxy_std"])
        held_out = gain(samples.held_out, sft["held_out"], sft["held_out_std"])
        median = f"{PREFIX}kl_median"
        past = [m[median] for m in since_roll_back(history) if median in m]
        # With SFT responses: among those of a policy alone, which are much alike, ranks are noise.
        both = agreement(torch.cat([self.baseline.scores, _scores(samples)]))
        found = {name: now[name] for name in ("kl", "kl_median", "kl_error", "proxy", "held_out")}
        found |= {
            "agreement": both,
            "proxy_gain": proxy,
            "held_out_gain": held_out,
            "kl_acceleration": acceleration([*past, now["kl_median"]], self.config.every),
            "negative_kl": _over(-now["kl"], now["kl_error"]),
            "gap": proxy - held_out,
            "agreement_drop": sft["agreement"] - both,
            "spread": _over(now["member_spread"], sft["member_spread"]),
            "length": _over(now["tokens"], sft["tokens"]),
            "repetition": now["repeated"] - sft["repeated"],
            "distinct": _over(now["bigrams"], sft["bigrams"]),
            "entropy": _over(now["surprise"], sft["surprise"]),
            "finished": _over(now["ended"], sft["ended"]) if sft["ended"] >= LEAST else math.nan,
        }
        if self.baseline.cloud is not None:
            distance = self.baseline.cloud.distances(samples.states).median().item()
            found["distance"] = _over(distance, sft["distance"])
        return found

    def _draws(self, purpose: str) -> torch.Generator:
        return generator(self._seed, f"{self._stage}/monitor/{purpose}")


def gain(scores: Tensor, sft_mean: float, sft_std: float) -> float:
    """By how many standard deviations of SFT samples the mean score is higher than theirs.

    When all SFT samples have one score, as for a rare event, the unit is that of the mixture of
    both: 4/5 SFT samples, 1/5 of the scores.
    """
    if not scores.numel():
        return math.nan
    shift = scores.double().mean().item() - sft_mean
    if sft_std > 0:
        return shift / sft_std
    within = scores.double().var(correction=0).item()
    mixed = math.sqrt(within / (SETS + 1) + shift**2 * SETS / (SETS + 1) ** 2)
    return shift / mixed if mixed else 0.0


def _over(value: float, unit: float) -> float:
    return value / unit if unit else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std().item()
