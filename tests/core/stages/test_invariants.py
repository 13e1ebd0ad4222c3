"""What must hold in every stage, by its letter; and that a run which breaks it stops and says so.

(e), that results do not depend on the number of processes, is in test_ranks.py.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import CONFIGS, MODEL, SAMPLING, World, change, first_gradients, run
from torch.nn.functional import cross_entropy, logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import load_policy
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.responses import lay_out
from rlhf_core.backbone.sampling import PolicySampler
from rlhf_core.data.encoding import encode_pair, encode_prompt, encode_response, left_pad, right_pad
from rlhf_core.data.pairs import encode_pairs
from rlhf_core.data.prepared import read_table
from rlhf_core.engines.engine import Builtin
from rlhf_core.errors import NumericsError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.experience import Collector, PromptTable
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.rewards.scoring import Reward, load_reward
from rlhf_core.seeding import generator
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.rewards import PIPELINE_REWARD
from rlhf_core.stages import grpo, ppo, rloo
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import NO_RECOVERY, Recovery
from rlhf_core.training.session import Session
from rlhf_core.types import PromptBatch, Responses
from rlhf_core.work import Work

ON_POLICY = ("ppo", "ppo_lora", "rloo", "grpo")
CREDIT = {"ppo": ppo.assign_credit, "rloo": rloo.assign_credit, "grpo": grpo.assign_credit}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("invariants") / "world")


@pytest.fixture
def history(world, tmp_path):
    """The metrics of a run with some settings, step by step."""

    def find(stage, *, sampling=SAMPLING, recovery=NO_RECOVERY, **settings):
        log = MemoryLogger()
        given = {"sampling": sampling, "logger": log, "recovery": recovery}
        run(change(CONFIGS[stage], **settings), world, tmp_path / "out", **given)
        return [values for _, values in log.history]

    return find


def close(one, other):
    """The same numbers, but for rounding."""
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@dataclass(frozen=True)
class Restless(Recovery):
    """Moves the weights that learn behind the back of a stage, after so many safe points."""

    after: int = 0
    by: float = 0.05

    def open(self, logger, *, learners, **settings):
        draws = torch.Generator().manual_seed(0)

        @torch.no_grad()
        def move(step):
            if step == self.after:
                for learner in learners.values():
                    for parameter in learner.network.learnable().values():
                        noise = torch.randn(parameter.shape, generator=draws)
                        parameter.add_(self.by * noise)

        class Moving(Session):
            def safe_point(self):
                super().safe_point()
                move(self.step)

        move(0)
        return Moving(logger, checkpoints=None, learners=learners, **settings)


# --- (a) ---


@pytest.mark.parametrize("micro_batch_size", [3, 8])
@pytest.mark.parametrize("stage", ON_POLICY)
def test_a_first_ratio_is_exactly_1_and_its_kl_exactly_0(history, stage, micro_batch_size):
    one = {"iterations": 1, "epochs": 1, "batch_size": 8, "micro_batch_size": micro_batch_size}
    (stats,) = history(stage, **one)
    assert stats["policy/approx_kl"] == 0
    assert stats["policy/clip_fraction"] == 0
    if "value/clip_fraction" in stats:
        assert stats["value/clip_fraction"] == 0


@pytest.mark.parametrize("stage", ON_POLICY)
def test_a_policy_that_moves_between_roll_out_and_update_stops_the_run(history, stage):
    said = "broken invariant: the ratio is not 1 on the first minibatch of an iteration"
    with pytest.raises(NumericsError, match=said):
        history(stage, recovery=Restless(after=1))


# --- (b) ---


@pytest.mark.parametrize("stage", ON_POLICY)
def test_b_kl_is_exactly_0_at_step_0(history, stage):
    first, second = history(stage, iterations=2)
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0


def test_b_first_dpo_loss_is_log_2(history):
    first, *_ = history("dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("stage", ON_POLICY)
def test_b_reference_with_other_weights_stops_the_run(history, stage):
    said = "broken invariant: the KL to the reference is not 0 at step 0"
    with pytest.raises(NumericsError, match=said):
        history(stage, recovery=Restless())


def test_b_dpo_policy_with_other_weights_than_its_reference_stops_the_run(history):
    with pytest.raises(
        NumericsError, match=r"broken invariant: the first DPO loss is .* not log 2"
    ):
        history("dpo", recovery=Restless(by=0.5))


# --- (c) ---


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_c_padding_of_prompts_does_not_change_a_trajectory(history, stage):
    # One prompt at a time is not padded; eight side by side are.
    sampling = (change(SAMPLING, batch_size=n) for n in (1, 8))
    one, eight = (history(stage, sampling=s, iterations=2, epochs=1) for s in sampling)
    close(one, eight)


def padded_block(texts, fill, more):
    """Rows padded on the right by hand, `more` columns wider than they have to be."""
    ids, mask = right_pad(texts, fill)
    wider = torch.full((len(ids), more), fill)
    return torch.cat([ids, wider], 1), torch.cat([mask, torch.zeros_like(wider).bool()], 1)


@pytest.mark.parametrize("more", [0, 7])
def test_c_padded_computations_by_hand_give_the_first_losses(history, world, more):
    whole = {"epochs": 1, "batch_size": 24, "micro_batch_size": 5}
    _, tokenizer = load_policy(world.sft)
    fill = tokenizer.pad_token_id

    table = read_table(world.data, "demonstrations", "train")
    base, _ = load_base(MODEL, table["prompt"] + table["response"], 0)
    pairs = zip(table["prompt"], table["response"], strict=True)
    encoded = [encode_pair(prompt, said, tokenizer, 14)[:2] for prompt, said in pairs]
    ids, mask = padded_block([ids for ids, _ in encoded], fill, more)
    starts = torch.tensor([start for _, start in encoded])
    labels = torch.where(mask & (torch.arange(ids.shape[1]) >= starts.unsqueeze(1)), ids, -100)
    plain = AutoModelForCausalLM.from_config(base.config, attn_implementation="eager")
    plain.load_state_dict(base.state_dict())
    with torch.no_grad():
        logits = plain.eval()(ids, attention_mask=mask.long()).logits
    nll = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert history("sft", **whole)[0]["loss"] == pytest.approx(nll.item(), rel=1e-5)

    votes = encode_pairs(read_table(world.data, "preferences", "train"), tokenizer, 14).pairs
    scalar = ScalarModel.from_policy(world.sft, generator(0, "reward/head"))
    plain = AutoModelForSequenceClassification.from_pretrained(
        world.sft, num_labels=1, attn_implementation="eager"
    ).eval()
    plain.load_state_dict(scalar.model.state_dict())
    texts = [ids for pair in votes for ids in (pair.chosen, pair.rejected)]
    ids, mask = padded_block(texts, fill, more)
    with torch.no_grad():
        scores = plain(ids, attention_mask=mask.long()).logits[:, 0].view(-1, 2)
    gap = scores[:, 0] - scores[:, 1] - torch.tensor([pair.margin for pair in votes])
    tie = torch.tensor([pair.tie for pair in votes])
    loss = torch.where(tie, -(logsigmoid(gap) + logsigmoid(-gap)) / 2, -logsigmoid(gap)).mean()
    assert history("reward_model", **whole)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


# --- (d) ---


@pytest.mark.parametrize("stage", CONFIGS)
def test_d_one_by_one_accumulated_follows_the_trajectory_of_all_at_once(history, stage):
    one, eight = (history(stage, batch_size=8, micro_batch_size=micro) for micro in (1, 8))
    assert len(one) >= 3
    close(one, eight)


# --- (f) ---


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_f_score_of_a_text_is_the_same_in_reward_evaluation_and_in_ppo(world, tmp_path, lora_rank):
    # With an adapter, PPO scores on the policy's trunk, and evaluation with a model of its own.
    config = change(CONFIGS["reward_model"], lora_rank=lora_rank)
    report = run(config, world, tmp_path / "reward")
    assert report.truncated == 0
    shown = report.tables["reward_held_out"]
    work = Work(
        inputs={"sft": world.sft, "reward": tmp_path / "reward", "data": world.data},
        sections={"sampling": SAMPLING},
    )
    config = change(CONFIGS["ppo"], lora_rank=lora_rank)
    networks = ppo.load_networks(config, work)
    tokenizer = networks.tokenizer
    reward_model = networks.rewards[PIPELINE_REWARD]
    assert (reward_model.model is networks.policy.model) == bool(lora_rank)
    models = {PIPELINE_REWARD: reward_model}
    tokenizers = {PIPELINE_REWARD: tokenizer}
    reward = Reward(config.rewards, models, tokenizers, tokenizer, max_length=14)
    asked = [encode_prompt(prompt, tokenizer) for prompt in shown["prompt"]]
    for column in ("chosen", "rejected"):
        said = [encode_response(text, tokenizer) for text in shown[column]]
        ids, mask = right_pad(said, tokenizer.pad_token_id)
        responses = Responses(ids, mask, mask.any(1))
        written = lay_out(left_pad(asked, tokenizer.pad_token_id, 14), responses)
        scores = reward(list(shown["prompt"]), written, responses).total
        expected = torch.tensor(shown[f"{column}_reward"].tolist())
        assert_close(scores, expected, rtol=1e-5, atol=1e-5)


# --- (g) ---

BOTH = {"policy": "policy/grad_norm", "critic": "value/grad_norm"}
NORMS = {
    "sft": {"policy": "grad_norm"},
    "reward_model": {"reward_model": "grad_norm"},
    "dpo": {"policy": "grad_norm"},
    "ppo": BOTH,
    "ppo_lora": BOTH,
}


@pytest.mark.parametrize("stage", NORMS | dict.fromkeys(("rloo", "grpo")))
def test_g_max_grad_norm_bounds_the_norm_and_the_norm_before_is_logged(history, tmp_path, stage):
    one = {"batch_size": 24, "epochs": 1, "learning_rate": 1e-3}
    if stage in ON_POLICY:
        one |= {"iterations": 1, "batch_size": 8}
    bounded, free = (Recovery(tmp_path / name, every_seconds=0) for name in ("bounded", "free"))
    metrics, free_metrics = (
        history(stage, recovery=recovery, max_grad_norm=bound, **one)[0]
        for recovery, bound in ((bounded, 1e-3), (free, 1e6))
    )
    for learner, name in NORMS.get(stage, {"policy": "policy/grad_norm"}).items():
        clipped, whole = (
            torch.cat([g.flatten() for g in first_gradients(r.directory, learner).values()]).norm()
            for r in (bounded, free)
        )
        assert metrics[name] == free_metrics[name] == pytest.approx(whole.item(), rel=1e-4)
        assert clipped.item() == pytest.approx(1e-3, rel=2e-3) != whole.item()


# --- (h) ---


def roll_out(world, config):
    """The first experience of a stage on the tiny world, with old log-probabilities that are not
    those of the policy any more, and a reference that never was."""
    policy, tokenizer = Policy.load(world.sft, "cpu")
    reference, _ = Policy.load(world.sft, "cpu")
    directories = {PIPELINE_REWARD: world.reward}
    collector = Collector(
        policy=policy,
        reference=reference,
        critic=ScalarModel.load(world.reward),
        reward=load_reward(config.rewards, directories, tokenizer, "cpu", max_length=14),
        engine=Builtin(PolicySampler(policy, SAMPLING.temperature), policy, SAMPLING),
        config=config,
        sampling=SAMPLING,
        draws=generator(3, "draws"),
        ranks=Ranks(),
    )
    prompts = PromptTable.read(world.data, tokenizer, SAMPLING.max_prompt_length)
    rollout = collector.roll_out(prompts.pick(range(config.rollout_size)))
    draws, mask = torch.Generator().manual_seed(0), rollout.responses.mask
    noise = [0.2 * torch.randn(mask.shape, generator=draws) * mask for _ in range(2)]
    return replace(
        rollout,
        logprobs=rollout.logprobs + noise[0],
        ref_logprobs=rollout.ref_logprobs + noise[1],
    )


def with_garbage(rollout, *, prompts=3, responses=2):
    """The same experience in more columns, with garbage in every place that does not count."""
    draws = torch.Generator().manual_seed(1)

    def filled(x, mask, before, after):
        wide = torch.randint(0, 200, (len(x), before + x.shape[1] + after), generator=draws)
        wide = wide.to(x.dtype)
        wide[:, before : before + x.shape[1]][mask] = x[mask]
        return wide

    def widened(mask, before, after):
        return torch.nn.functional.pad(mask, (before, after), value=False)

    asked, said = rollout.prompts, rollout.responses
    values = {
        name: filled(getattr(rollout, name), said.mask, 0, responses)
        for name in ("logprobs", "ref_logprobs", "values")
    }
    return replace(
        rollout,
        prompts=PromptBatch(
            filled(asked.input_ids, asked.mask, prompts, 0), widened(asked.mask, prompts, 0)
        ),
        responses=Responses(
            filled(said.tokens, said.mask, 0, responses),
            widened(said.mask, 0, responses),
            said.finished,
        ),
        **values,
    )


@pytest.mark.parametrize("stage", CREDIT)
def test_h_garbage_under_the_mask_changes_no_metric_and_no_gradient(world, stage):
    config = CONFIGS[stage]
    clean = roll_out(world, config)
    assert not clean.responses.mask.all()  # there is something to hide behind
    results = []
    for rollout in (clean, with_garbage(clean)):
        targets, stats = CREDIT[stage](rollout, 0.3, config=config)
        rows = list(range(config.rollout_size))
        policy = Learner(Policy.load(world.sft, "cpu")[0], config, 10)
        options = {"first": False, "check": lambda: None, "temperature": 0.9, "ranks": Ranks()}
        free = change(config, update_kl_limit=0)
        if stage == "ppo":
            critic = Learner(ScalarModel.load(world.reward), config, 10)
            options |= {"policy": policy, "critic": critic, "config": free}
            stats |= ppo.optimise(rollout, targets, rows, **options)
        else:
            options |= {"learner": policy, "config": free, "kl_coef": 0.3}
            stats |= optimise_policy(rollout, targets, rows, **options)
        results.append(stats)
    assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in results[0].values())


# All of a config matters then: some iteration before the last is over the budget.
ALL_ON = {"kl_budget": 1e-6, "kl_coef": 1e-3, "dual_clip": 3.0, "iterations": 6}


@pytest.mark.parametrize("stage", sorted(set(CONFIGS) - {"ppo_lora"}))
def test_h_every_field_of_every_config_is_read(world, tmp_path, recording, stage):
    settings = {"lora_rank": 2} | (ALL_ON if stage in ON_POLICY else {})
    config, seen = recording(change(CONFIGS[stage], **settings))
    sampling, seen_of_sampling = recording(SAMPLING)
    with_members = World(**vars(world) | {"reward_adapter": world.ensemble})
    run(config, with_members, tmp_path / "out", sampling=sampling)
    if stage.startswith("reward_model"):  # which reads other fields when it knows who voted
        aware, seen_of_aware = recording(change(config, annotators="aware"))
        run(aware, with_members, tmp_path / "aware", sampling=sampling)
        seen |= seen_of_aware
    assert set(type(CONFIGS[stage]).model_fields) <= seen
    if stage not in ("sft", "dpo"):  # these two do not sample
        assert set(SamplingConfig.model_fields) <= seen_of_sampling
