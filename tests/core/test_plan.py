"""The plan of a pipeline: steps and parameters by hand, and what so few prompts can tell."""

import pytest
import torch

from rlhf_core.backbone.base_model import load_base, outline
from rlhf_core.backbone.directory import save_model
from rlhf_core.backbone.networks import Network, Policy, ScalarModel
from rlhf_core.data.validation import TableSummary, Validation
from rlhf_core.errors import ModelError
from rlhf_core.plan import NetworkPlan, Sections, make_plan
from rlhf_core.seeding import generator
from rlhf_core.settings.evaluation import EvaluationConfig, ReportCardConfig, RewardGateConfig
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, PPOConfig
from rlhf_core.settings.promotion import PromotionConfig
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig

MODEL = ModelConfig(fresh=FreshModelConfig(layers=3, width=16, heads=2, context=512))
VOCABULARY = 290
# GPT-2: per block 12·d² + 13·d, embeddings V·d and C·d, a last norm of 2·d; the head is tied.
BLOCK = 12 * 16**2 + 13 * 16
BODY = VOCABULARY * 16 + 512 * 16 + 3 * BLOCK + 2 * 16
# LoRA beside d -> 3d, d -> d, d -> 4d and 4d -> d: rank · (4 + 2 + 5 + 5)·d.
ADAPTERS = 16 * 16


def table(train, held_out=30, prompts=20):
    return TableSummary(
        source="x",
        rows=train + held_out,
        examples=train + held_out,
        train=train,
        eval=held_out,
        eval_prompts=prompts,
        dropped={},
    )


def validation(prompts=20, voted=20):
    """101 demonstrations, 65 votes, and so many held-out prompts."""
    return Validation(
        tables={
            "demonstrations": table(101),
            "preferences": table(65, prompts=voted),
            "prompts": table(50, prompts, prompts),
        },
        bad_rows=[],
        unread=[],
        ties=0,
        known_sides=0,
        timed=0,
        gold=0,
        contradictory_pairs=0,
        shared_prompts=0,
        lengths=[],
        truncated={},
        vocabulary=VOCABULARY,
    )


def sections(algorithm="ppo", **changes):
    trainings = {
        "sft": SFTConfig(epochs=3, batch_size=25),
        "reward_model": RewardModelConfig(epochs=2, batch_size=32),
        "policy": PPOConfig(iterations=7, rollout_size=20, batch_size=8, epochs=4),
    }
    trainings |= {name: changes.pop(name) for name in trainings if name in changes}
    trainings[algorithm] = trainings.pop("policy")
    given = {
        "model": MODEL,
        "trainings": {name: section for name, section in trainings.items() if section is not None},
        "sampling": SamplingConfig(max_prompt_length=32, max_new_tokens=16),
        "report_card": ReportCardConfig(),
        "evaluation": EvaluationConfig(),
        "reward_gate": RewardGateConfig(),
        "promotion": PromotionConfig(),
    }
    return Sections(**{**given, **changes})


def plan(found=None, **changes):
    return make_plan(sections(**changes), found or validation())


def learnt(name, parameters, rank=0, frozen=0):
    return NetworkPlan(network=name, parameters=parameters, lora_rank=rank, frozen=frozen)


def test_steps_and_parameters_by_hand():
    stages = {stage.stage: stage for stage in plan().stages}
    assert list(stages) == ["sft", "reward_model", "report_card", "ppo", "evaluation"]
    # ⌈101 / 25⌉ = 5 three times; ⌈65 / 32⌉ = 3 twice; 7 · 4 · ⌈20 / 8⌉.
    steps = {name: stage.steps for name, stage in stages.items()}
    assert steps == {
        **{"sft": 15, "reward_model": 6, "report_card": None, "ppo": 84},
        "evaluation": None,
    }
    assert stages["report_card"].work.endswith(" 256 samples of SFT, known-bad answers")
    assert stages["sft"].work == "3 epochs of 101 demonstrations, 25 a step"
    assert stages["reward_model"].work == "2 epochs of 65 votes, 32 a step"
    assert stages["ppo"].work == "7 iterations of 20 responses: 4 epochs of 3 updates"
    assert stages["evaluation"].work == (
        "20 prompts: 8 answers of SFT, 2 of the base model, the policy and a champion"
    )
    assert stages["sft"].networks == (learnt("policy", BODY),)
    assert stages["reward_model"].networks == (learnt("reward model", BODY + 16),)
    assert stages["ppo"].networks == (learnt("policy", BODY), learnt("critic", BODY + 16))


def test_members_have_adapters_and_heads_of_their_own_on_what_is_frozen_once():
    config = RewardModelConfig(lora_rank=4, lora_layers=2, members=3, epochs=2, batch_size=32)
    stage = plan(reward_model=config).stages[1]
    each = 2 * 4 * ADAPTERS + 16
    assert stage.networks == (learnt("reward model, 3 members", 3 * each, 4, BODY),)
    assert stage.steps == 6


def test_adapters_by_hand():
    lora = {"lora_rank": 4}
    found = plan(
        sft=SFTConfig(**lora),
        reward_model=RewardModelConfig(**lora, lora_layers=2),
        policy=PPOConfig(lora_rank=2, lora_layers=1),
    ).stages
    assert found[0].networks == (learnt("policy", 3 * 4 * ADAPTERS, 4, BODY),)
    # A scalar head learns beside its adapter.
    assert found[1].networks == (learnt("reward model", 2 * 4 * ADAPTERS + 16, 4, BODY),)
    assert found[3].networks == (
        learnt("policy", 2 * ADAPTERS, 2, BODY),
        learnt("critic", 2 * ADAPTERS + 16, 2, BODY),
    )


@pytest.mark.parametrize(
    ("algorithm", "policy", "steps", "work"),
    [
        (
            "grpo",
            GRPOConfig(iterations=1, rollout_size=8, batch_size=8, epochs=1, group_size=4),
            1,
            "1 iteration of 8 responses: 1 epoch of 1 update",
        ),
        ("dpo", DPOConfig(epochs=2, batch_size=10), 14, "2 epochs of 65 votes, 10 a step"),
    ],
)
def test_the_other_algorithms_have_no_critic(algorithm, policy, steps, work):
    found = plan(algorithm=algorithm, policy=policy).stages[3]
    assert (found.stage, found.steps, found.work) == (algorithm, steps, work)
    assert found.networks == (learnt("policy", BODY),)


def test_models_that_are_there_already_are_not_trained():
    found = plan(sft=None, reward_model=None).stages
    assert [stage.stage for stage in found] == ["report_card", "ppo", "evaluation"]
    assert found[1].networks == ()  # it depends on a model that nobody has looked at
    found = plan(reward_model=None)
    assert [stage.stage for stage in found.stages] == [*("sft", "report_card", "ppo", "evaluation")]
    assert found.stages[2].networks == (learnt("policy", BODY),)
    assert len(found.certainty) == 1


def test_an_outline_has_the_weights_of_the_model_and_none_of_their_bytes(tmp_path):
    model, tokenizer = load_base(MODEL, ["a room with a view"] * 3, seed=0)
    save_model(model, tokenizer, tmp_path / "policy", kind="policy")
    for path in (tmp_path / "policy").glob("*.safetensors"):
        path.unlink()  # nothing but the config is read
    shapes = {name: p.shape for name, p in model.named_parameters()}
    saved = ModelConfig(source=str(tmp_path / "policy"))
    for drawn in (outline(MODEL, len(tokenizer)), outline(saved, len(tokenizer))):
        assert {name: p.shape for name, p in drawn.named_parameters()} == shapes
        assert {p.device.type for p in drawn.parameters()} == {"meta"}
    wider = outline(saved, len(tokenizer) + 3)
    assert wider.get_input_embeddings().weight.shape == (len(tokenizer) + 3, 16)


def test_the_count_is_that_of_what_the_stages_train(tmp_path):
    model, tokenizer = load_base(MODEL, ["a room with a view"] * 3, seed=0)
    save_model(model, tokenizer, tmp_path, kind="policy")
    networks: list[Network] = [Policy(model), ScalarModel.from_policy(tmp_path, generator(0, "x"))]
    found = validation().model_copy(update={"vocabulary": len(tokenizer)})
    counted = [stage.networks[0].parameters for stage in plan(found).stages[:2]]
    assert counted == [sum(p.numel() for p in n.learnable().values()) for n in networks]


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="there is no model folder"):
        plan(model=ModelConfig(source=str(tmp_path / "nowhere")))


def test_how_much_can_be_known():
    # Wilson at one half: z / (2·√(n + z²)) with z = 1.96: 0.2007 and 0.0962.
    assert plan(validation(prompts=20, voted=100)).certainty == (
        "Decision: 20 held-out prompts, 2 answers to each; a win rate near 0.5 will be known to "
        # Of 20 prompts 15 have to be won, which 0.8 of the evaluations do at a rate of 0.80.
        "about ± 0.20. At the first look (level 0.025) the gate shows that it exceeds 0.5 in 80 of "
        "100 evaluations if it is truly 0.81; for 0.55 it needs 923 prompts.",
        "Reward model: 30 held-out votes on 100 prompts; an accuracy near 0.5 will be known to "
        "about ± 0.10.",
    )
    few = EvaluationConfig(prompts=2, samples_per_prompt=1)
    assert plan(evaluation=few).certainty[0].startswith("Decision: 2 held-out prompts, 1 answer")


def test_what_a_judge_behind_an_endpoint_is_asked():
    """20 prompts: policy/SFT, policy/champion, SFT/base and champion/SFT with 2 answers each, two
    pairs with best-of-n with 1: 200 verdicts. 12 kinds of canaries of 10 prompts."""
    judge = JudgeConfig(source="endpoint", endpoint=EndpointConfig(model="m"))
    asked = plan(validation(prompts=20), judge=judge).certainty[1]
    assert asked == (
        "Judge: at most 640 requests to m, two for each of 200 verdicts of the evaluation and 120 "
        "on canaries."
    )
    contest = TournamentConfig(checkpoints=5, verdicts=1000)
    asked = plan(validation(prompts=20), judge=judge, tournament=contest).certainty[1]
    assert asked.startswith("Judge: at most 2,640 requests to m, ")
    assert "evaluation, 1,000 of the tournament and 120 on canaries." in asked


MORE = "(raise data.eval_fraction, or add evaluation data)"
NO_SIGNS = {"max_sign_excess": 1.0}


@pytest.mark.parametrize(
    ("found", "changes", "said"),
    [
        # 33 prompts without a sign exclude a share of 0.2 at the level 0.025 / 11.
        (validation(prompts=33), {}, []),
        (
            validation(prompts=32),
            {},
            [
                "No policy can be promoted: 32 held-out prompts cannot show "
                "promotion.max_sign_excess 0.2 for 11 kinds of canary, even if no answer has a "
                f"sign; at least 33 are needed {MORE}."
            ],
        ),
        # Six of six have p = 1/64, five of five 1/32.
        (validation(prompts=6, voted=4), {"promotion": NO_SIGNS}, []),
        (
            validation(prompts=6, voted=4),
            {"promotion": {"min_prompts": 7, **NO_SIGNS}},
            [
                "No policy can be promoted: 6 held-out prompts cannot meet promotion.min_prompts "
                "7; raise data.eval_fraction, or add evaluation data."
            ],
        ),
        (
            validation(prompts=1),
            {},
            [
                "No policy can be promoted: 1 held-out prompt cannot show promotion.min_win_rate "
                f"0.5, even if every one of them is won; at least 6 are needed {MORE}."
            ],
        ),
        (
            validation(),
            {"evaluation": EvaluationConfig(prompts=5), "promotion": {"min_win_rate": 0.6}},
            [
                "No policy can be promoted: 5 held-out prompts cannot show promotion.min_win_rate "
                "0.6, even if every one of them is won; at least 8 are needed (raise "
                "evaluation.prompts)."
            ],
        ),
        (
            validation(prompts=6),
            {"promotion": {"min_win_rate_over_champion": 0.6}},
            [
                "No champion can be replaced: 6 held-out prompts cannot show "
                "promotion.min_win_rate_over_champion 0.6, even if every one of them is won; at "
                f"least 8 are needed {MORE}."
            ],
        ),
        (
            validation(prompts=999),
            {"promotion": {"min_win_rate": 1.0}, "evaluation": EvaluationConfig(prompts=999)},
            [
                "No policy can be promoted: 999 held-out prompts cannot show "
                "promotion.min_win_rate 1, even if every one of them is won; no number of them "
                "can; lower it."
            ],
        ),
        (
            validation(33, voted=3),
            {},
            [
                "Held-out votes on 3 prompts cannot show that the reward model is better than "
                f"chance; at least 4 are needed {MORE}."
            ],
        ),
        (
            validation(33, voted=5),
            {"reward_gate": RewardGateConfig(min_accuracy=0.6)},
            [
                "No policy will be trained: held-out votes on 5 prompts cannot show "
                "reward_gate.min_accuracy 0.6, even if all are predicted correctly; at least 6 are "
                f"needed {MORE}."
            ],
        ),
        (
            validation(33, voted=9),
            {"reward_gate": RewardGateConfig(max_canary_share=0.3)},
            [
                "No policy will be trained: a canary on 4 prompts, half of those that there are, "
                "cannot show reward_gate.max_canary_share 0.3, even if it never wins; at least 9 "
                "are needed (raise data.eval_fraction)."
            ],
        ),
        (validation(33, voted=18), {"reward_gate": RewardGateConfig(max_canary_share=0.3)}, []),
        (validation(33, voted=1), {"reward_model": None}, []),
    ],
)
def test_too_little_to_find_anything_out(found, changes, said):
    if isinstance(rules := changes.get("promotion"), dict):
        changes = {**changes, "promotion": PromotionConfig(**rules)}
    assert list(plan(found, **changes).warnings) == said


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_tournament_is_planned_with_the_milestones_that_it_needs():
    policy = PPOConfig(iterations=7, rollout_size=20, batch_size=8, epochs=4, keep_every=2)
    contest = TournamentConfig(checkpoints=3, prompts=1000, verdicts=120)
    stages = {stage.stage: stage for stage in plan(policy=policy, tournament=contest).stages}
    assert list(stages)[-3:] == ["ppo", "tournament", "evaluation"]
    prompts = validation().tables["prompts"].train
    assert stages["tournament"].work == (
        "SFT and 3 checkpoints, kept every 2 iterations: 2 answers of each to "
        f"{prompts} training prompts, 120 verdicts at most"
    )
