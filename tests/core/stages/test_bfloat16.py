"""`precision: bfloat16` in every stage: what is computed in it, and how far the invariants hold.

The operands are looked at where a product is carried out, below autocast and below any function of
our own, so that nothing can say bfloat16 and multiply in float32.
"""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from test_invariants import ON_POLICY, Restless
from tiny import CONFIGS, JUDGED, MODEL, SAMPLING, World, change, digest, run
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.backbone import networks, sampling
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.responses import lay_out, response_logprobs, rounding
from rlhf_core.backbone.sampling import respond, sample, uniforms
from rlhf_core.data.encoding import left_pad
from rlhf_core.data.pairs import Pair
from rlhf_core.errors import NumericsError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.seeding import generator
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.stages.dpo import leeway
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.training.recovery import Recovery
from rlhf_core.work import Work

WIDTH = MODEL.fresh.width
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "attention")


class Products(TorchDispatchMode):
    """Remembers the operands of every product of matrices: their shapes and types."""

    def __init__(self):
        super().__init__()
        self.looking = True
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if self.looking and name.endswith(PRODUCTS):
            pair = [x for x in args if isinstance(x, Tensor)][-2:]
            shapes = tuple(tuple(x.shape[-2:]) for x in pair)
            self.seen[name, shapes, frozenset(x.dtype for x in pair)] += 1
        return func(*args, **(kwargs or {}))

    def unseen(self, function):
        """A function that is not looked at."""

        def call(*args, **kwargs):
            self.looking = False
            try:
                return function(*args, **kwargs)
            finally:
                self.looking = True

        return call

    def of(self, dtype):
        """The shapes of the products in a type."""
        return {(name, shapes) for name, shapes, dtypes in self.seen if dtypes == {dtype}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("bfloat16") / "world")


@pytest.fixture
def words(world):
    """The size of the vocabulary."""
    return Policy.load(world.sft, "cpu")[0].model.config.vocab_size


@pytest.fixture
def looking(monkeypatch):
    """Looks at the products of a stage, but for the check of a model that was loaded, and the
    merging of adapters that are saved: both are no part of the training, and exact."""

    @contextmanager
    def look():
        with Products() as products:
            for name in ("settle", "_logit_scale", "merged_state"):
                function = products.unseen(getattr(networks, name))
                monkeypatch.setattr(networks, name, function)
            yield products

    return look


def one_row(shapes):
    """Whether this is the product with a scalar head, or its gradient."""
    return any(1 in shape for shape in shapes)


def of_the_head(found, words):
    """The products with the vocabulary: forward, and the gradients of hidden states and weight."""
    kinds = set()
    for _, ((rows, inner), (_, columns)) in found:
        if words in (rows, inner, columns):
            kinds.add("hidden" if inner == words else "weight" if inner != WIDTH else "forward")
    return kinds


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_product_of_a_stage_is_in_bfloat16(world, words, looking, tmp_path, stage):
    with looking() as products:
        run(change(CONFIGS[stage], precision="bfloat16"), world, tmp_path / "out")
    narrow, wide = products.of(torch.bfloat16), products.of(torch.float32)
    assert {name for name, _ in wide} <= {"mm"}
    assert all(one_row(shapes) for _, shapes in wide), wide
    assert len(narrow) + len(wide) == len(products.seen)  # and no other type
    frozen = stage == "ppo_lora"  # its head learns nothing
    wanted = {"forward", "hidden"} if frozen else {"forward", "hidden", "weight"}
    if stage.startswith("reward_model"):
        wanted = {"forward"}  # of the sampler
    assert of_the_head(narrow, words) == wanted


def test_every_product_of_the_evaluation_is_in_bfloat16(world, words, looking):
    models = {"sft": world.sft, "policy": world.sft, "reward": world.reward}
    work = Work(
        inputs={**models, "data": world.data},
        sections=JUDGED,
    )
    config = EvaluationConfig(prompts=2, samples_per_prompt=2, best_of=2, precision="bfloat16")
    with looking() as products:
        report = evaluate(config, work)
    assert all(one_row(shapes) for _, shapes in products.of(torch.float32))
    assert of_the_head(products.of(torch.bfloat16), words) == {"forward"}
    assert report.scorecard.arm("sft").kl.value == 0


@pytest.mark.parametrize("stage", CONFIGS)
def test_float32_has_no_product_in_bfloat16(world, looking, tmp_path, stage):
    with looking() as products:
        run(CONFIGS[stage], world, tmp_path / "out")
    assert products.of(torch.float32)
    assert not products.of(torch.bfloat16)


# --- invariants ---


def history(stage, world, output, **settings):
    log = MemoryLogger()
    recovery = {"recovery": settings.pop("recovery")} if "recovery" in settings else {}
    config = change(CONFIGS[stage], precision="bfloat16", **settings)
    run(config, world, output, logger=log, **recovery)
    return [values for _, values in log.history]


@pytest.mark.parametrize("micro_batch_size", [3, 8])
@pytest.mark.parametrize("stage", ON_POLICY)
def test_on_a_cpu_the_first_ratio_is_exactly_1_and_the_first_kl_exactly_0(
    world, tmp_path, stage, micro_batch_size
):
    one = {"iterations": 1, "epochs": 1, "batch_size": 8, "micro_batch_size": micro_batch_size}
    (stats,) = history(stage, world, tmp_path / "out", **one)
    assert stats["policy/approx_kl"] == 0
    assert stats["policy/clip_fraction"] == 0
    assert stats["objective/kl"] == 0


@pytest.mark.parametrize("stage", ON_POLICY)
def test_a_policy_that_is_not_the_one_that_sampled_or_not_its_reference_is_noticed(
    world, tmp_path, stage
):
    for recovery, said in ((Restless(after=1), "the ratio is not 1"), (Restless(), "the KL to")):
        with pytest.raises(NumericsError, match=f"broken invariant: {said}"):
            history(stage, world, tmp_path / "out", recovery=recovery)


def test_log_probabilities_of_the_same_work_may_lie_apart_by_two_units_of_the_last_place():
    on_cpu, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    assert rounding(on_cpu, "float32") == rounding(on_cpu, "bfloat16") == 0
    # From 16 to 32 a bfloat16 has 7 bits behind the leading one.
    unit = torch.tensor(16.0).bfloat16().nextafter(torch.tensor(32.0).bfloat16()) - 16
    assert rounding(elsewhere, "bfloat16") == 2 * unit == 0.25
    assert rounding(elsewhere, "float32") == 0.05


def test_first_dpo_loss_is_log_2_within_what_rounding_may_do(world, tmp_path):
    exact = CONFIGS["dpo"]
    pairs = [Pair([1] * 60, [1] * 24, (10, 10), False, 0.0, False)] * 4
    assert leeway(pairs, exact) == 1e-3
    # By hand: 4 x (50 + 14) tokens, √256 = 16; 5 x 0.01 x 0.1 x 16 / 4.
    narrow = change(exact, precision="bfloat16", beta=0.1)
    assert leeway(pairs, narrow) == pytest.approx(1e-3 + 0.02)
    first, *_ = history("dpo", world, tmp_path / "out")
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-3)
    with pytest.raises(NumericsError, match=r"the first DPO loss is .* not log 2"):
        history("dpo", world, tmp_path / "out", recovery=Restless(by=0.5))


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_run_that_was_broken_off_and_resumed_has_the_bits_of_one_that_was_not(
    world, tmp_path, stage
):
    class BreaksOff(MemoryLogger):
        def progress(self, done, total, note=""):
            if done == max(total // 2, 1):
                raise RuntimeError("broken off")

    history(stage, world, tmp_path / "one")
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=0)
    other = tmp_path / "other"
    narrow = change(CONFIGS[stage], precision="bfloat16")
    with pytest.raises(RuntimeError, match="broken off"):
        run(narrow, world, other, recovery=recovery, logger=BreaksOff())
    assert list((tmp_path / "checkpoints").glob("step-*"))
    run(narrow, world, other, recovery=recovery)
    assert digest(tmp_path / "one") == digest(other)


# --- what is sampled, and what is learnt from it ---


@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_sampler_draws_from_what_the_update_computes_but_for_rounding(
    world, monkeypatch, precision, within
):
    policy, tokenizer = Policy.load(world.sft, "cpu", precision)
    said = []

    def draw(logits, uniform, temperature, *, really=sampling.draw):
        token, logprob = really(logits, uniform, temperature)
        logprobs = (logits.float() / temperature).log_softmax(-1)
        said.append(logprobs.gather(1, token.unsqueeze(1))[:, 0])
        return token, logprob

    monkeypatch.setattr(sampling, "draw", draw)
    prompts = left_pad([[10, 20, 30]] * 4, tokenizer.pad_token_id, 6)
    responses = sample(
        policy,
        prompts,
        uniforms(4, 8, generator(0, "draws")),
        temperature=0.9,
        eos_token_id=-1,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = response_logprobs(policy, lay_out(prompts, responses), temperature=0.9)
    assert_close(torch.stack(said, 1), found.detach(), rtol=0, atol=within)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_each_weight_is_cast_once_for_all_tokens(world, lora_rank):
    policy, _ = Policy.load(world.sft, "cpu", "bfloat16")
    if lora_rank:
        networks.start_adapter(policy, "policy", rank=lora_rank, alpha=4, seed=0)
    flags = [p.requires_grad for p in policy.parameters()]
    config, casts = change(SAMPLING, max_new_tokens=6), Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].ndim == 2:
                casts[args[0].data_ptr()] += 1
            return func(*args, **(kwargs or {}))

    head = policy.model.get_output_embeddings().weight
    with Casts():
        list(respond(policy, [[10, 20]], config, generator=generator(0, "draws")))
    assert casts[head.data_ptr()] == 1
    assert max(casts[p.data_ptr()] for p in policy.parameters()) == 1
    assert [p.requires_grad for p in policy.parameters()] == flags
