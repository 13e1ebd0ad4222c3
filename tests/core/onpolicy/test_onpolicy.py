"""The update of the policy against a second implementation in plain words, and what an on-policy
run needs to go on: its prompts, its iteration with the roll-out."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import log_softmax
from torch.testing import assert_close

from rlhf_core.backbone import networks
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import position_ids
from rlhf_core.backbone.responses import lay_out, response_logprobs
from rlhf_core.backbone.sampling import PolicySampler
from rlhf_core.data.encoding import left_pad, right_pad
from rlhf_core.engines.engine import Builtin
from rlhf_core.errors import NumericsError
from rlhf_core.functional.losses import clipped_policy
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy import update as update_module
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.experience import Collector, PromptTable
from rlhf_core.onpolicy.loop import Iteration, require_kl_zero
from rlhf_core.onpolicy.observe import over_kl_budget
from rlhf_core.onpolicy.report import describe, group_std
from rlhf_core.onpolicy.update import optimise_policy, update_policy, went_too_far
from rlhf_core.rewards.scoring import load_reward
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.settings.rewards import PIPELINE_REWARD, RewardTerm
from rlhf_core.training.learner import Learner
from rlhf_core.training.order import PromptStream, chunks
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery
from rlhf_core.types import PromptBatch, Responses, Rollout

PROMPTS = [[20, 30, 40], [20, 30, 40], [50], [60, 70], [60, 70], [80, 90, 100, 110]]
SAID = [[21, 31, 41, 0], [21, 51, 0], [0], [61, 71, 81, 91, 101], [62, 72, 0], [83, 0]]
TOKENS = sum(map(len, SAID))
WIDTH = max(map(len, SAID))
TEMPERATURE = 0.7
LEFT_OUT = [0, 2, 3, 4, 5]  # a minibatch need not be all of the roll-out


def section(**settings):
    plain = {"schedule": "constant", "warmup_ratio": 0.0, "rollout_size": 6, "batch_size": 6}
    return OnPolicySection(**plain | settings)


def batch():
    tokens, mask = right_pad(SAID, 1)
    finished = torch.tensor([said[-1] == 0 for said in SAID])
    return left_pad(PROMPTS, 1, 99), Responses(tokens, mask, finished)


@torch.no_grad()
def experience(policy, micro=6):
    """A roll-out whose log-probabilities are the policy's own, measured as a stage does."""
    prompts, responses = batch()
    parts = [
        response_logprobs(
            policy,
            lay_out(prompts.rows(torch.tensor(rows)), responses.rows(torch.tensor(rows))),
            temperature=TEMPERATURE,
        )
        for rows in chunks(list(range(len(SAID))), micro)
    ]
    logprobs = torch.cat(parts)
    zero = torch.zeros_like(logprobs)
    return Rollout(prompts, responses, logprobs, logprobs.clone(), zero, zero.sum(-1), {})


def noise(size, seed):
    draws = torch.Generator().manual_seed(seed)
    return size * torch.randn(len(SAID), WIDTH, generator=draws)


def moved(policy, size=0.5):
    """The same, sampled by other policies than the present one; garbage where nothing was said."""
    rollout, mask = experience(policy), batch()[1].mask
    old, ref = (
        torch.where(mask, rollout.logprobs + noise(size, seed), torch.tensor(7.0))
        for seed in (1, 2)
    )
    return replace(rollout, logprobs=old, ref_logprobs=ref)


def update(policy, rollout, advantages, config, *, picked=LEFT_OUT, normalizer=7.0, **options):
    """Gradient and means of one minibatch, before any step."""
    learner = Learner(policy, config, 5)
    learner.drop_gradient()
    stats = update_policy(
        learner,
        rollout,
        advantages,
        picked,
        normalizer=normalizer,
        config=config,
        temperature=TEMPERATURE,
        ranks=Ranks(),
        check=lambda: None,
        **options,
    )
    named = dict(policy.model.named_parameters())
    return stats, {name: p.grad.clone() for name, p in named.items()}


def naive(model, rollout, advantages, config, *, kl_coef=0.0, picked=LEFT_OUT, normalizer=7.0):
    """The same with padding, whole logits and a loop over tokens, by the formulas of the papers."""
    prompts, responses = rollout.prompts, rollout.responses
    ids = torch.cat([prompts.input_ids, responses.tokens], 1)
    mask = torch.cat([prompts.mask, responses.mask], 1)
    model.zero_grad()
    logits = model(ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits
    start = prompts.input_ids.shape[1]
    logps = log_softmax(logits / TEMPERATURE, dim=-1)[:, start - 1 : -1]
    eps, c = config.clip_range, config.dual_clip
    loss = torch.zeros(())
    clipped = kl = entropy = count = 0.0
    for i in picked:
        for t in range(len(SAID[i])):
            new, old = logps[i, t, SAID[i][t]], rollout.logprobs[i, t]
            ratio, a = (new - old).exp(), advantages[i, t]
            objective = min(ratio * a, min(max(ratio, 1 - eps), 1 + eps) * a)
            if c and a < 0:
                objective = max(objective, c * a)
            loss = loss - objective / normalizer
            to_ref = rollout.ref_logprobs[i, t] - new
            loss = loss + kl_coef * (to_ref.exp() - 1 - to_ref) / normalizer
            count += 1
            clipped += objective.item() != (ratio * a).item()
            kl += (ratio - 1 - (new - old)).item()
            entropy -= (logps[i, t].exp() * logps[i, t]).sum().item()
    loss.backward()
    stats = {"clip_fraction": clipped, "approx_kl": kl, "entropy": entropy}
    means = {f"policy/{name}": value / count for name, value in stats.items()}
    return means | {"policy/loss": loss.item()}, {n: p.grad for n, p in model.named_parameters()}


def same_gradient(found, expected):
    scale = max(g.abs().max() for g in expected.values())
    for name, grad in expected.items():
        assert_close(found[name] / scale, grad / scale, rtol=0, atol=3e-6, msg=name)


# --- the update of the policy ---

CASES = {
    "clip": {},
    "tight clip": {"clip_range": 0.02},
    "dual clip": {"dual_clip": 1.1},
    "differentiated KL": {"kl": 0.3},
    "KL and both clips": {"clip_range": 0.1, "dual_clip": 1.5, "kl": 2.0},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_update_is_that_of_a_naive_padded_implementation(causal, plain, settings):
    settings = dict(settings)
    kl_coef = settings.pop("kl", 0.0)
    config = section(**settings, micro_batch_size=2)
    policy, advantages = Policy(causal[0]), noise(1.0, seed=4)
    rollout = moved(policy)
    stats, found = update(policy, rollout, advantages, config, kl_coef=kl_coef)
    expected, gradient = naive(plain(causal[0]), rollout, advantages, config, kl_coef=kl_coef)
    assert 0 < expected["policy/clip_fraction"] < 1
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-5)
    same_gradient(found, gradient)


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunks_that_end_within_a_row_give_the_same_update(causal, plain, monkeypatch, chunk):
    monkeypatch.setitem(networks.CHUNKS, "float32", chunk)
    config = section(clip_range=0.1, dual_clip=1.5, micro_batch_size=3)
    policy, advantages = Policy(causal[0]), noise(1.0, seed=4)
    rollout = moved(policy)
    stats, found = update(policy, rollout, advantages, config, kl_coef=2.0)
    expected, gradient = naive(plain(causal[0]), rollout, advantages, config, kl_coef=2.0)
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-5)
    same_gradient(found, gradient)


def test_what_trains_is_the_masked_and_normalised_loss(causal, monkeypatch):
    monkeypatch.setitem(networks.CHUNKS, "float32", 4)
    masks, normalizers, logprobs = [], [], []

    def watched(new, old, advantages, mask, *, normalizer, **settings):
        masks.append(mask), normalizers.append(normalizer), logprobs.append(new.detach())
        return clipped_policy(new, old, advantages, mask, normalizer=normalizer, **settings)

    monkeypatch.setattr(update_module, "clipped_policy", watched)
    policy = Policy(causal[0])
    rollout = experience(policy)
    update(policy, rollout, noise(1.0, seed=4), section(), picked=[*range(6)])
    assert len(masks) > 1
    assert set(normalizers) == {7.0}
    # Every token is in the mask of one call, at its place, and no padding is in any.
    assert torch.equal(torch.stack(masks).sum(0), rollout.responses.mask.long())
    assert_close(torch.stack(logprobs).sum(0), rollout.logprobs)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_gradient_does_not_depend_on_the_micro_batch_size(causal, size):
    # Invariant (d).
    policy, advantages = Policy(causal[0]), noise(1.0, seed=4)
    rollout = moved(policy)
    whole = update(policy, rollout, advantages, section(micro_batch_size=99), kl_coef=0.1)
    parts = update(policy, rollout, advantages, section(micro_batch_size=size), kl_coef=0.1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    same_gradient(parts[1], whole[1])


def test_at_ratio_1_it_is_the_plain_policy_gradient(causal, plain):
    # ∇ -Σ A·log π / n, by another route than ratios.
    policy, advantages = Policy(causal[0]), noise(1.0, seed=4)
    rollout = experience(policy)
    _, found = update(policy, rollout, advantages, section(), picked=[*range(6)], first=True)
    eager, loss = plain(causal[0]), 0
    eager.zero_grad()
    for i, (prompt, said) in enumerate(zip(PROMPTS, SAID, strict=True)):
        logps = (eager(torch.tensor([prompt + said])).logits[0] / TEMPERATURE).log_softmax(-1)
        for t, token in enumerate(said):
            loss = loss - advantages[i, t] * logps[len(prompt) - 1 + t, token] / 7
    loss.backward()
    same_gradient(found, {name: p.grad for name, p in eager.named_parameters()})


def test_dual_clip_bounds_what_a_bad_action_may_cost(causal):
    # Where the ratio has passed c, a negative advantage costs c·|A| and has no gradient.
    policy = Policy(causal[0])
    rollout = experience(policy)
    far = replace(rollout, logprobs=rollout.logprobs - math.log(5))
    advantages = -torch.ones(len(SAID), WIDTH)
    whole = {"picked": [*range(6)], "normalizer": float(TOKENS)}
    free, gradient = update(policy, far, advantages, section(), **whole)
    assert free["policy/loss"] == pytest.approx(5, rel=1e-4)
    assert sum(g.abs().sum() for g in gradient.values()) > 0
    bound, gradient = update(policy, far, advantages, section(dual_clip=3.0), **whole)
    assert bound["policy/loss"] == pytest.approx(3)
    assert bound["policy/clip_fraction"] == 1
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradient.values())


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_first_ratio_is_1_to_the_bit(causal, micro):
    # Invariant (a).
    policy = Policy(causal[0])
    rollout, config = experience(policy, micro), section(micro_batch_size=micro)
    picked = [*range(6)]
    stats, _ = update(policy, rollout, noise(1.0, 4), config, picked=picked, first=True)
    assert stats["policy/approx_kl"] == stats["policy/clip_fraction"] == 0


def test_policy_that_has_moved_before_its_first_update_stops_the_run(causal):
    policy = Policy(causal[0])
    rollout = experience(policy)
    with torch.no_grad():
        causal[0].get_input_embeddings().weight[21, 0] += 1e-3
    update(policy, rollout, noise(1.0, 4), section(), picked=[*range(6)])  # later it may
    with pytest.raises(NumericsError, match="a broken invariant: the ratio is not 1"):
        update(policy, rollout, noise(1.0, 4), section(), picked=[*range(6)], first=True)


def test_kl_that_is_not_0_at_step_0_stops_the_run(causal):
    # Invariant (b); what lies under the mask is no matter.
    rollout = experience(Policy(causal[0]))
    require_kl_zero(rollout, "float32")
    rollout.ref_logprobs[2, 1] = 9.0
    assert not rollout.responses.mask[2, 1]
    require_kl_zero(rollout, "float32")
    rollout.ref_logprobs[3, 4] += 1e-6
    with pytest.raises(NumericsError, match="the KL to the reference is not 0 at step 0"):
        require_kl_zero(rollout, "float32")


def test_loss_that_is_not_finite_is_named(causal):
    policy = Policy(causal[0])
    advantages = noise(1.0, 4)
    advantages[0, 0] = math.nan
    with pytest.raises(NumericsError, match="the policy loss is not finite"):
        update(policy, experience(policy), advantages, section())


def step(policy, rollout, config, **options):
    learner = Learner(policy, config, 5)
    stats = optimise_policy(
        rollout,
        noise(1.0, 4),
        LEFT_OUT,
        check=lambda: None,
        learner=learner,
        config=config,
        temperature=TEMPERATURE,
        ranks=Ranks(),
        **options,
    )
    return learner, stats


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def test_policy_that_has_moved_too_far_is_not_updated(causal):
    policy = Policy(causal[0])
    rollout, before = moved(policy), weights(policy)
    config = section(update_kl_limit=1e-3)
    learner, stats = step(policy, rollout, config, first=False)
    assert stats is None
    assert all(p.grad is None for p in policy.model.parameters())
    assert torch.equal(weights(policy), before)
    assert learner.learning_rate == config.learning_rate
    for near in (section(update_kl_limit=10.0), section(update_kl_limit=0)):
        assert step(policy, rollout, near, first=False)[1] is not None
    assert not torch.equal(weights(policy), before)


@pytest.mark.parametrize(
    ("limit", "kl", "far"), [(0.1, 0.151, True), (0.1, 0.149, False), (0.0, 9.0, False)]
)
def test_too_far_is_one_and_a_half_times_the_limit(limit, kl, far):
    assert went_too_far({"policy/approx_kl": kl}, section(update_kl_limit=limit)) == far


def test_budget_of_0_is_none():
    stats = {"objective/kl": 3.0}
    assert [over_kl_budget(stats, section(kl_budget=b)) for b in (0.0, 2.9, 3.0)] == [0, 1, 0]


@pytest.mark.parametrize("mean_over", ["tokens", "responses"])
def test_norm_and_rate_that_are_logged_are_those_of_the_step(causal, mean_over):
    policy, config = (
        Policy(causal[0]),
        section(learning_rate=0.01, max_grad_norm=1e-3, update_kl_limit=0),
    )
    rollout = moved(policy)
    tokens = float(sum(len(SAID[i]) for i in LEFT_OUT))
    normalizer = {"tokens": tokens, "responses": float(len(LEFT_OUT))}[mean_over]
    before, gradient = update(policy, rollout, noise(1.0, 4), config, normalizer=normalizer)
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    Learner(policy, config, 5).drop_gradient()
    _, stats = step(policy, rollout, config, first=False, mean_over=mean_over)
    assert norm > config.max_grad_norm  # that before clipping
    assert stats["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert stats["optimizer/learning_rate"] == 0.01
    assert stats["policy/loss"] == pytest.approx(before["policy/loss"], rel=1e-5)


# --- prompts ---


@given(st.integers(1, 9), st.integers(1, 14), st.integers(0, 6))
def test_prompts_go_round_and_go_on_from_any_place(prompts, size, done):
    def stream(seed):
        return PromptStream(prompts, size, torch.Generator().manual_seed(seed))

    ours = stream(0)
    drawn = [i for _ in range(done) for i in next(ours)]
    other = stream(1)
    next(other)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    later = [next(ours) for _ in range(4)]
    assert [next(other) for _ in range(4)] == later
    drawn += [i for one in later for i in one]
    whole = len(drawn) // prompts * prompts
    for start in range(0, whole, prompts):
        assert sorted(drawn[start : start + prompts]) == list(range(prompts))


@given(st.integers(1, 9), st.integers(1, 14), st.integers(0, 6))
def test_prompts_are_those_of_earlier_versions_whose_checkpoints_go_on(prompts, size, done):
    order, waiting, then = torch.Generator().manual_seed(3), [], []
    for _ in range(done + 4):
        if len(then) == done:
            state = {"waiting": list(waiting), "order": order.get_state()}
        while len(waiting) < size:
            waiting += torch.randperm(prompts, generator=order).tolist()
        then.append(waiting[:size])
        waiting = waiting[size:]
    ours = PromptStream(prompts, size, torch.Generator().manual_seed(3))
    assert [next(ours) for _ in range(done + 4)] == then
    resumed = PromptStream(prompts, size, torch.Generator().manual_seed(4))
    resumed.load_state_dict(state)
    assert [next(resumed) for _ in range(2)] == then[done : done + 2]
    again = PromptStream(prompts, size, torch.Generator().manual_seed(5))
    again.load_state_dict(copy.deepcopy(resumed.state_dict()))
    assert [next(again) for _ in range(2)] == then[done + 2 :]


# --- an iteration ---


def iteration(seed=0, **settings):
    config = section(batch_size=2, epochs=3, **settings)
    return Iteration(config, torch.Generator().manual_seed(seed), "cpu")


def same(one, other):
    """To the bit, whatever a record is made of."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (Rollout, PromptBatch, Responses)):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    return one == other


def session(folder, now):
    return Recovery(folder, every_seconds=0).open(
        MemoryLogger(),
        identity={},
        learners={},
        positions={"iteration": now},
        ranks=Ranks(),
    )


@pytest.mark.parametrize("updates", [0, 2, 5, 9])
def test_iteration_goes_on_through_a_checkpoint_with_its_rollout(causal, tmp_path, updates):
    scores = torch.arange(6.0)
    parts = {"a": scores + 1, "b": scores + 2}
    rollout = experience(Policy(causal[0]))
    rollout = replace(rollout, values=noise(1.0, 8), scores=scores, parts=parts)
    now = iteration()
    now.begin(rollout)
    for number in range(updates):
        next(now.minibatches)
        now.used.append({"loss": number / 3})
    now.samples.append({"prompt": "the room", "score": 0.1})
    with session(tmp_path, now) as kept:
        kept.safe_point()
    again = iteration(seed=5)
    with session(tmp_path, again) as kept:
        assert kept.resume()
    assert same(again.rollout, rollout)
    assert (again.number, again.used, again.samples, again.ended) == (
        1, now.used, now.samples, False
    )  # fmt: skip
    rest = list(now.minibatches)
    assert len(rest) == 9 - updates
    assert list(again.minibatches) == rest
    # And so does the iteration after it.
    for one in (now, again):
        one.used.append({"loss": 0.0})
        one.finish(last=False)
        one.begin(rollout)
    assert list(again.minibatches) == list(now.minibatches)


def test_iteration_between_two_rollouts_goes_on(causal, tmp_path):
    now, again = iteration(), iteration(seed=5)
    now.begin(experience(Policy(causal[0])))
    now.used.append({"loss": 1.0})
    now.finish(last=True)
    with session(tmp_path, now) as kept:
        kept.safe_point()
    with session(tmp_path, again) as kept:
        assert kept.resume()
    assert (again.rollout, again.number, again.ended, again.used) == (None, 2, True, [])


def test_end_of_an_iteration_is_the_mean_over_its_updates(causal):
    now = iteration()
    now.begin(experience(Policy(causal[0])))
    now.used += [{"loss": 1.0, "kl": 0.0}, {"loss": 2.0, "kl": 3.0}]
    assert now.means() == {"loss": 1.5, "kl": 1.5, "optimizer/updates": 2.0}
    now.finish(last=False)
    assert (now.number, now.used, now.ended) == (2, [], False)


def test_first_epoch_takes_the_rows_as_they_were_scored(causal):
    now = iteration()
    now.begin(experience(Policy(causal[0])))
    batches = list(now.minibatches)
    assert batches[:3] == [[0, 1], [2, 3], [4, 5]]
    epochs = [[i for batch in batches[n : n + 3] for i in batch] for n in (3, 6)]
    assert all(sorted(epoch) == [*range(6)] for epoch in epochs)
    assert len({(*range(6),), *map(tuple, epochs)}) == 3


def test_only_the_first_iteration_has_to_begin_at_its_reference(causal):
    rollout, now = moved(Policy(causal[0])), iteration()
    with pytest.raises(NumericsError, match="not 0 at step 0"):
        now.begin(rollout)
    now.number = 2
    now.begin(rollout)
    assert now.experience is rollout


# --- experience ---


@pytest.mark.parametrize("micro", [1, 2, 99])
@torch.no_grad()
def test_rollout_is_what_each_network_says_of_each_text_alone(causal, scalar, plain, micro):
    tokenizer = causal[1]
    policy = Policy(causal[0])
    reference = Policy(plain(causal[0]))
    draws = torch.Generator().manual_seed(3)
    for p in reference.model.parameters():
        p += 0.02 * torch.randn(p.shape, generator=draws)
    reference_alone = plain(reference.model)
    reference.model.set_attn_implementation(causal[0].config._attn_implementation)
    critic = scalar.with_own_head()
    critic.head.weight *= 2
    term = RewardTerm(weight=0.5)
    sampling = SamplingConfig(
        max_prompt_length=8, max_new_tokens=6, temperature=TEMPERATURE, batch_size=4
    )
    collector = Collector(
        policy=policy,
        reference=reference,
        critic=critic,
        reward=load_reward(
            (term,), {}, tokenizer, "cpu", max_length=20, loaded={PIPELINE_REWARD: scalar}
        ),
        engine=Builtin(PolicySampler(policy, TEMPERATURE), policy, sampling),
        config=section(batch_size=4, micro_batch_size=micro),
        sampling=sampling,
        draws=torch.Generator().manual_seed(1),
        ranks=Ranks(),
    )
    rollout = collector.roll_out(
        PromptTable([""] * len(PROMPTS), PROMPTS, list(range(len(PROMPTS))))
    )
    texts = [p[m].tolist() for p, m in zip(*vars(rollout.prompts).values(), strict=True)]
    assert texts == PROMPTS
    judge, ours = plain(scalar.model), plain(causal[0])
    close = {"rel": 1e-4, "abs": 1e-4}
    for i, prompt in enumerate(PROMPTS):
        said = rollout.responses.tokens[i][rollout.responses.mask[i]].tolist()
        ids, at = torch.tensor([prompt + said]), len(prompt) - 1
        score = (judge(ids).logits[0, 0] - scalar.mean) / scalar.std
        assert rollout.scores[i].item() == pytest.approx(score.item() / 2, **close)
        for model, found in ((ours, rollout.logprobs), (reference_alone, rollout.ref_logprobs)):
            logps = (model(ids).logits[0] / TEMPERATURE).log_softmax(-1)
            expected = [logps[at + t, token].item() for t, token in enumerate(said)]
            assert found[i, : len(said)].tolist() == pytest.approx(expected, **close)
            assert not found[i, len(said) :].any()
        for t in range(len(said)):
            raw = 2 * judge(torch.tensor([(prompt + said)[: at + t + 1]])).logits[0, 0]
            value = (raw - scalar.mean) / scalar.std
            assert rollout.values[i, t].item() == pytest.approx(value.item(), **close)


def test_actors_are_two_models_or_one_trunk(toy_work):
    work = toy_work(outputs={})
    actors = Actors.load(section(), work)
    assert actors.policy.model is not actors.reference.model
    actors = Actors.load(section(lora_rank=2, precision="bfloat16"), work)
    policy, reference = actors.policy, actors.reference
    assert policy.model is reference.model
    assert (policy.adapter, reference.adapter) == ("policy", None)
    assert policy.precision == reference.precision == "bfloat16"


def test_what_a_rollout_says_by_hand():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ones = torch.ones(2, 1)
    rollout = Rollout(
        PromptBatch(ones.long(), ones.bool()),
        Responses(mask.long(), mask, torch.tensor([True, False])),
        torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]]),
        torch.tensor([[-2.0, -2.5, 0.0], [-1.0, 0.0, -1.0]]),
        torch.zeros(2, 3),
        torch.tensor([1.0, 4.0]),
        {"a": torch.tensor([1.0, 3.0])},
    )
    assert describe(rollout, 0.3) == pytest.approx(
        {
            "objective/score": 2.5,
            "objective/score_std": 3 / math.sqrt(2),
            "objective/kl": (1.5 - 1.0) / 2,
            "objective/kl_coef": 0.3,
            "response/length": 2.5,
            "response/finished": 0.5,
        }
    )
    parts = describe(replace(rollout, parts=rollout.parts | {"b": torch.zeros(2)}), 0.3)
    assert (parts["reward/a"], parts["reward/b"]) == (2.0, 0.0)


def test_spread_is_that_within_the_groups():
    # Groups (1, 3) and (10, 10): standard deviations √2 and 0, whatever lies between the groups.
    scores = torch.tensor([1.0, 3.0, 10.0, 10.0])
    assert group_std(scores, 2) == pytest.approx(math.sqrt(2) / 2)
