"""Evaluation: SFT, the policy, best-of-n and the champion answer the same held-out prompts.

Every arm is judged by the texts it writes, with the same reward model, at the same temperature.
Intervals are 95 % bootstraps that draw whole prompts, since answers to one prompt resemble each
other. Where a hidden truth is known (`true_reward`), it decides who wins; elsewhere the reward
model does, and its verdict on a policy trained against it is to be read with that in mind.

Best-of-n is the reference point for over-optimisation: n samples of the SFT policy, the best under
the reward model kept, at the known price of log n - (n - 1)/n nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.backbone.models import ModelConfig, context_of, load_tokenizer, require_context
from rlhf_core.backbone.networks import Policy, Precision, ScalarModel
from rlhf_core.backbone.responses import Written, lay_out, response_logprobs
from rlhf_core.backbone.sampling import SAMPLING_LENGTH, SamplingConfig, respond
from rlhf_core.config import Section
from rlhf_core.data.encoding import (
    Prompt,
    decode_responses,
    encode_prompt,
    encode_response,
    left_pad,
    render_prompt,
    right_pad,
    same_tokens,
)
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import DataError
from rlhf_core.evaluation.scorecard import ARMS, Arm, ArmName, Comparison, Scorecard
from rlhf_core.functional.ranking import (
    Interval,
    best_of_n_kl,
    clustered_bootstrap,
    win_rate,
)
from rlhf_core.metrics import StageLogger, counted
from rlhf_core.rewards.scoring import (
    PIPELINE_REWARD,
    Reward,
    RewardFunction,
    RewardTerm,
    call_function,
    load_function,
)
from rlhf_core.seeding import generator
from rlhf_core.types import PromptBatch, Report, Responses
from rlhf_core.work import Work


class EvaluationConfig(Section):
    """Settings of the evaluation."""

    prompts: int = Field(128, ge=2, description="Held-out prompts to answer, at most")
    samples_per_prompt: int = Field(2, ge=1, description="Answers of each policy to each prompt")
    best_of: int = Field(8, ge=1, description="n of best-of-n: SFT samples to choose from")
    true_reward: str = Field(
        "",
        description="Import path module:function of the known truth, called with prompts and "
        "responses (lists of str), returning one number each; empty = there is none",
    )
    sample_rows: int = Field(32, ge=1, description="Prompts shown in the table of samples")
    precision: Precision = Field(
        "float32",
        description="What matrix products are computed in, in every arm and in the reward model; "
        "bfloat16 is faster on GPUs and on CPUs that have instructions for it",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Report):
    """The scorecard, with tables and plots."""

    scorecard: Scorecard

    @property
    def result(self) -> Scorecard:
        """The scorecard, on which a promotion is decided."""
        return self.scorecard

    def summary(self) -> dict[str, float]:
        """Every number of the scorecard as `arm/measure` or `win_rate/candidate_over_opponent`."""
        numbers: dict[str, float] = {}
        for arm in self.scorecard.arms:
            for name, value in arm:
                if isinstance(value, Interval):
                    numbers |= _spread(f"{arm.name}/{name}", value)
                elif isinstance(value, float):
                    numbers[f"{arm.name}/{name}"] = value
        for c in self.scorecard.comparisons:
            numbers |= _spread(f"win_rate/{c.candidate}_over_{c.opponent}", c.win_rate)
        return numbers


@dataclass(frozen=True)
class _Answers:
    """The answers of an arm: some to each prompt, prompt by prompt."""

    texts: list[str]
    prompt: Tensor  # (N,) which prompt
    tokens: Tensor  # (N,) length
    proxy: Tensor  # (N,) normalised reward-model score
    true: Tensor | None  # (N,)
    kl: Tensor | None  # (N,) log π - log π_sft, summed over the response
    sft_logprob: Tensor  # (N,) log π_sft, summed over the response, at temperature 1

    def pick(self, index: Tensor) -> "_Answers":
        """Some of the answers."""
        return _Answers(
            texts=[self.texts[i] for i in index.tolist()],
            prompt=self.prompt[index],
            tokens=self.tokens[index],
            proxy=self.proxy[index],
            true=None if self.true is None else self.true[index],
            kl=None if self.kl is None else self.kl[index],
            sft_logprob=self.sft_logprob[index],
        )


@dataclass(frozen=True)
class _Bench:
    """What every arm is measured with."""

    prompts: list[Prompt]
    sft: Policy
    tokenizer: PreTrainedTokenizerBase
    reward_model: ScalarModel
    reward_tokenizer: PreTrainedTokenizerBase
    truth: RewardFunction | None
    sampling: SamplingConfig
    seed: int
    logger: StageLogger


def evaluate(config: EvaluationConfig, work: Work) -> EvaluationReport:
    """Let every arm answer the held-out prompts, and compare.

    Args:
        work: inputs sft, policy, reward and data, and the champion if there is one; section
            sampling.

    Raises: ModelError, DataError, ConfigError for what a user can fix.
    """
    sampling, logger, device = work.section(SamplingConfig), work.logger, work.device
    reward_model = work.inputs["reward"]
    table = read_table(work.inputs["data"], "prompts", "eval")
    if table.empty:
        raise DataError("there are no held-out prompts; raise data.eval_fraction")
    logger.progress(0, 4, "SFT policy")
    logger.phase("loading the models")
    sft_policy, tokenizer = Policy.load(work.inputs["sft"], device, config.precision)
    bench = _Bench(
        prompts=list(table["prompt"].iloc[: config.prompts]),
        sft=sft_policy,
        tokenizer=tokenizer,
        reward_model=ScalarModel.load(reward_model, device, config.precision),
        reward_tokenizer=load_tokenizer(ModelConfig(source=str(reward_model)), ()),
        truth=_known_truth(config),
        sampling=sampling,
        seed=work.seed,
        logger=logger,
    )
    k, n = config.samples_per_prompt, config.best_of
    others: tuple[ArmName, ...] = ("policy", "champion")
    answers: dict[ArmName, _Answers] = {}
    pool = _answer(bench, "sft", sft_policy, tokenizer, max(k, n))
    answers["sft"] = pool.pick(_first_of_each(pool.prompt, k))
    answers["best_of_n"] = pool.pick(_best_of_each(pool.prompt, pool.proxy, n))
    for done, name in enumerate(others, start=2):
        logger.progress(done, 4, name)
        if name in work.inputs:
            logger.phase(f"loading the {name}")
            actor = Policy.load(work.inputs[name], device, config.precision)
            answers[name] = _answer(bench, name, *actor, k)
    logger.progress(4, 4, "comparisons")
    return _report(config, bench, {name: answers[name] for name in ARMS if name in answers})


def _known_truth(config: EvaluationConfig) -> RewardFunction | None:
    if not config.true_reward:
        return None
    return load_function(config.true_reward, setting="evaluation.true_reward")


@torch.no_grad()
def _answer(
    bench: _Bench,
    name: ArmName,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    k: int,
) -> _Answers:
    """k answers of a policy to each prompt, measured."""
    require_context(policy.model, bench.sampling.max_length, SAMPLING_LENGTH)
    prompts = [prompt for prompt in bench.prompts for _ in range(k)]
    rows = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    comparable = same_tokens(tokenizer, bench.tokenizer)
    texts: list[str] = []
    tokens, proxy, sft_logprob, kl = [], [], [], []
    reward = Reward(
        [RewardTerm()],
        {PIPELINE_REWARD: bench.reward_model},
        {PIPELINE_REWARD: bench.reward_tokenizer},
        tokenizer,
        max_length=bench.sampling.max_length,
    )
    draws, between = generator(bench.seed, f"evaluation/{name}"), partial(counted, bench.logger)
    for batch, responses in respond(
        policy, rows, bench.sampling, generator=draws, between=between, what="answers"
    ):
        bench.logger.phase("scoring", len(texts), len(rows))
        said = decode_responses(responses.tokens, responses.mask, tokenizer)
        asked = prompts[len(texts) : len(texts) + len(said)]
        written = lay_out(batch, responses)
        proxy.append(reward(asked, written, responses).total)
        if comparable:
            bench.logger.phase("KL to SFT", len(texts), len(rows))
            at = bench.sampling.temperature
            kl.append(_sums(policy, written, at) - _sums(bench.sft, written, at))
        else:
            batch, responses = _encode_again(bench, asked, said, responses)
            written = lay_out(batch, responses)
        bench.logger.phase("perplexity under SFT", len(texts), len(rows))
        texts += said
        tokens.append(responses.mask.sum(-1).float())
        sft_logprob.append(_sums(bench.sft, written, 1.0))
    return _Answers(
        texts=texts,
        prompt=torch.arange(len(bench.prompts)).repeat_interleave(k),
        tokens=torch.cat(tokens).cpu(),
        proxy=torch.cat(proxy).cpu(),
        true=_truth(bench, prompts, texts),
        kl=torch.cat(kl).cpu() if comparable else None,
        sft_logprob=torch.cat(sft_logprob).cpu(),
    )


def _sums(policy: Policy, written: Written, temperature: float) -> Tensor:
    """(B,) log-probability of each whole response in nats."""
    return response_logprobs(policy, written, temperature=temperature).sum(-1)


def _encode_again(
    bench: _Bench, prompts: list[Prompt], texts: list[str], said: Responses
) -> tuple[PromptBatch, Responses]:
    """Texts of a policy with another tokenizer, in the tokens of the SFT policy."""
    tokenizer, device = bench.tokenizer, bench.sft.model.device
    rows = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    batch = left_pad(rows, tokenizer.pad_token_id, bench.sampling.max_prompt_length).to(device)
    encoded = [encode_response(text, tokenizer) for text in texts]
    ended = said.finished.tolist()
    kept = [ids if end else ids[:-1] or ids for ids, end in zip(encoded, ended, strict=True)]
    context = context_of(bench.sft.model)
    if context is not None:  # the same text may be longer in these tokens
        kept = [ids[: context - batch.input_ids.shape[-1]] for ids in kept]
    tokens, mask = right_pad(kept, tokenizer.pad_token_id)
    return batch, Responses(tokens.to(device), mask.to(device), said.finished)


def _truth(bench: _Bench, prompts: list[Prompt], texts: list[str]) -> Tensor | None:
    """(N,) true reward of each answer, where a truth is known."""
    if bench.truth is None:
        return None
    bench.logger.phase("true reward")
    asked = [render_prompt(prompt, bench.tokenizer) for prompt in prompts]
    return call_function(bench.truth, "evaluation.true_reward", asked, texts)


def _first_of_each(prompt: Tensor, k: int) -> Tensor:
    """Index of the first k answers to each prompt."""
    per_prompt = int((prompt == prompt[0]).sum())
    return torch.arange(len(prompt)).view(-1, per_prompt)[:, :k].reshape(-1)


def _best_of_each(prompt: Tensor, score: Tensor, n: int) -> Tensor:
    """Index of the best of the first n answers to each prompt."""
    index = _first_of_each(prompt, n).view(-1, n)
    return index.gather(1, score[index].argmax(1, keepdim=True)).squeeze(1)


def _report(
    config: EvaluationConfig, bench: _Bench, answers: dict[ArmName, _Answers]
) -> EvaluationReport:
    arms = tuple(_arm(name, found, config, bench.seed) for name, found in answers.items())
    pairs: list[tuple[ArmName, ArmName]] = [
        ("policy", "sft"),
        ("best_of_n", "sft"),
        ("policy", "best_of_n"),
        ("policy", "champion"),
    ]
    comparisons = tuple(
        _compare(pair, answers, bench.seed)
        for pair in pairs
        if all(name in answers for name in pair)
    )
    bars: dict[str, list[Interval | None]] = {
        "true reward": [arm.true_reward for arm in arms],
        "reward model": [arm.proxy_reward for arm in arms],
        "KL to SFT (nats a sequence)": [arm.kl for arm in arms],
    }
    if bench.truth is None:
        del bars["true reward"]
    plots = {"evaluation_arms": figures.arms([arm.name for arm in arms], bars)}
    if bench.truth is not None:
        plots["evaluation_proxy_against_truth"] = figures.proxy_against_truth(
            {
                name: list(zip(a.proxy.tolist(), a.true.tolist(), strict=True))
                for name, a in answers.items()
                if a.true is not None
            }
        )
    return EvaluationReport(
        scorecard=Scorecard(arms=arms, comparisons=comparisons),
        tables={"evaluation_samples": _samples(config, bench, answers)},
        figures=plots,
    )


def _arm(name: ArmName, answers: _Answers, config: EvaluationConfig, seed: int) -> Arm:
    # A stream of its own: whether a champion takes part must not move another arm's bounds.
    draws = generator(seed, f"evaluation/bootstrap/{name}")

    def spread(values: Tensor) -> Interval:
        return clustered_bootstrap(values, answers.prompt, generator=draws)

    kl = None if answers.kl is None else spread(answers.kl)
    if name == "best_of_n":
        kl = Interval(*[best_of_n_kl(config.best_of)] * 3)
    one_each = answers.pick(_first_of_each(answers.prompt, 1)).texts
    nats = -answers.sft_logprob.sum() / answers.tokens.sum()
    return Arm(
        name=name,
        proxy_reward=spread(answers.proxy),
        true_reward=None if answers.true is None else spread(answers.true),
        kl=kl,
        perplexity=nats.exp().item(),
        length=answers.tokens.mean().item(),
        distinct_1=distinct_n(one_each, 1),
        distinct_2=distinct_n(one_each, 2),
    )


def _compare(
    pair: tuple[ArmName, ArmName], answers: dict[ArmName, _Answers], seed: int
) -> Comparison:
    """Answer against answer: the i-th of the one to a prompt with the i-th of the other."""
    ours, theirs = (answers[name] for name in pair)
    k = min(int((arm.prompt == arm.prompt[0]).sum()) for arm in (ours, theirs))
    ours, theirs = (arm.pick(_first_of_each(arm.prompt, k)) for arm in (ours, theirs))
    if ours.true is not None and theirs.true is not None:
        gap = ours.true - theirs.true
    else:
        gap = ours.proxy - theirs.proxy
    outcome = (gap.sign() + 1) / 2  # a tie is half a win
    counts = [int((outcome == points).sum()) for points in (1, 0.5, 0)]
    draws = generator(seed, f"evaluation/bootstrap/{pair[0]}/{pair[1]}")
    # Answers to one prompt resemble each other, so the bounds are not Wilson's.
    bounds = clustered_bootstrap(outcome, ours.prompt, generator=draws)
    return Comparison(
        candidate=pair[0],
        opponent=pair[1],
        judge="reward_model" if ours.true is None else "true_reward",
        wins=counts[0],
        ties=counts[1],
        losses=counts[2],
        prompts=len(outcome) // k,
        win_rate=bounds._replace(value=win_rate(*counts).value),
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different word n-grams over all word n-grams of the texts together; 0 when there is none.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    words = (text.split() for text in texts)
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _samples(
    config: EvaluationConfig, bench: _Bench, answers: dict[ArmName, _Answers]
) -> pd.DataFrame:
    """The first answer of every arm to some prompts, side by side."""
    rows = []
    for p, prompt in enumerate(bench.prompts[: config.sample_rows]):
        for name, arm in answers.items():
            i = int((arm.prompt == p).nonzero()[0])
            rows.append(
                {
                    "prompt": render_prompt(prompt, bench.tokenizer),
                    "arm": name,
                    "response": arm.texts[i],
                    "reward_model": round(arm.proxy[i].item(), 3),
                    "true_reward": None if arm.true is None else round(arm.true[i].item(), 3),
                }
            )
    return pd.DataFrame(rows)


def _spread(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three numbers."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
