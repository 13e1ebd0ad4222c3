"""The output of an on-policy run: metrics of an iteration, sample texts, and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import pandas as pd
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.data.encoding import decode_responses
from rlhf_core.engines.mismatch import mismatch
from rlhf_core.onpolicy.monitor.figure import monitor_figure
from rlhf_core.onpolicy.observe import over_kl_budget
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.types import Report, Rollout


@dataclass(frozen=True, kw_only=True)
class OnPolicyReport(Report):
    """The final policy, as means over the last iteration."""

    score: float  # reward of the responses, before the penalty for missing ends
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
        alarms: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """The report on the metrics of all iterations."""
        last = history[-1]
        tables = {f"{stage}_alarms": pd.DataFrame(alarms)} if alarms else {}
        pictures = {}
        if config.monitor.on:
            pictures[f"{stage}_monitor"] = monitor_figure(config.monitor, history, alarms)
        path = [(point["objective/kl"], point["objective/score"]) for point in history]
        return cls(
            score=last["objective/score"],
            kl=last["objective/kl"],
            kl_coef=last["objective/kl_coef"],
            response_length=last["response/length"],
            iterations=len(history),
            over_kl_budget=float(over_kl_budget(last, config)),
            tables={f"{stage}_samples": pd.DataFrame(samples), **tables},
            figures={
                f"{stage}_training": figures.policy_curves(history),
                f"{stage}_frontier": figures.reward_kl_path(path),
                **pictures,
            },
        )


def describe(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """The metrics of a roll-out."""
    mask = rollout.responses.mask
    stats = {
        "objective/score": rollout.scores.mean().item(),
        "objective/score_std": rollout.scores.std().item(),
        "objective/kl": kl_to_reference(rollout).mean().item(),
        "objective/kl_coef": kl_coef,
        "response/length": mask.sum(-1).float().mean().item(),
        "response/finished": rollout.responses.finished.float().mean().item(),
    }
    if rollout.shaped is not None:
        stats["objective/shaped_score"] = rollout.shaped.mean().item()
    if len(rollout.parts) > 1:
        stats |= {f"reward/{name}": part.mean().item() for name, part in rollout.parts.items()}
    if rollout.spread is not None:
        stats["reward/spread"] = rollout.spread.mean().item()
    return stats | mismatch(rollout)


def kl_to_reference(rollout: Rollout) -> Tensor:
    """(B,) log π - log π_ref of each whole response, in nats."""
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    return log_ratio.masked_fill(~rollout.responses.mask, 0).sum(-1)


def group_std(scores: Tensor, group_size: int) -> float:
    """Standard deviation of the scores of one prompt, mean over prompts; at 0 nothing is learnt."""
    return scores.view(-1, group_size).std(1).mean().item()


def sample_rows(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, iteration: int, rows: int = 8
) -> list[dict[str, Any]]:
    """Some texts of a roll-out with their scores, for people to read."""
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
