"""The function layer as a whole: its contract, what it stands on, what holds for all of it."""

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_core import functional
from rlhf_core.functional import (
    _contracts,
    advantages,
    annotators,
    chunked_head,
    holm,
    interval,
    kinds,
    length_control,
    logprobs,
    losses,
    masking,
    ranking,
    rewards,
)
from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.advantages import gae, group_relative, leave_one_out
from rlhf_core.functional.annotators import CastVotes, fit_habits, vote_logits, vote_nll
from rlhf_core.functional.logprobs import (
    chunked_token_logprobs,
    chunked_token_loss,
    entropy,
    kl_estimate,
    token_logprobs,
)
from rlhf_core.functional.losses import (
    bradley_terry,
    clipped_policy,
    clipped_value,
    completion_nll,
    dpo,
    importance_weights,
    pointwise_mse,
    token_nll,
)
from rlhf_core.functional.masking import masked_mean, masked_whiten
from rlhf_core.functional.ranking import clustered_bootstrap, expected_calibration_error
from rlhf_core.functional.rewards import missing_eos, shaped_rewards

IMPORT_ALL = """
import importlib, pkgutil, sys
import rlhf_core.functional as layer
names = [m.name for m in pkgutil.iter_modules(layer.__path__)]
for name in names:
    importlib.import_module(f"{layer.__name__}.{name}")
print(len(names))
print(sorted({"transformers", "pandas", "pydantic", "mlflow", "prefect"} & set(sys.modules)))
print(*sorted(m for m in sys.modules if m.startswith("rlhf_core.") and "functional" not in m))
"""

# Names, order, kinds and defaults that callers may rely on; further keywords have defaults.
PUBLISHED = """
masking.masked_mean(x, mask, dim=None)
masking.masked_whiten(x, mask, *, shift_mean=True, unbiased=True)
logprobs.token_logprobs(logits, tokens, *, temperature=1.0)
logprobs.chunked_token_logprobs(hidden, lm_head_weight, tokens, *, temperature=1.0, chunk_size=256)
logprobs.chunked_token_loss(hidden, lm_head_weight, tokens, token_loss, *, with_entropy=False)
logprobs.entropy(logits)
logprobs.kl_estimate(logprobs, ref_logprobs, *, kind="k1")
rewards.shaped_rewards(scores, kl, mask, *, kl_coef)
rewards.missing_eos(scores, finished, *, mode, value)
advantages.gae(rewards, values, mask, *, gamma=1.0, lam=0.95)
advantages.group_relative(scores, group_size, *, scale=True)
advantages.leave_one_out(scores, group_size)
losses.token_nll(logprobs, *, normalizer=None)
losses.completion_nll(logits, labels)
losses.bradley_terry(chosen, rejected, *, margin=None, label_smoothing=0.0, center_coef=0.0)
losses.clipped_policy(logprobs, old_logprobs, advantages, mask, *, clip_range=0.2, dual_clip=None)
losses.importance_weights(logprobs, sampled_logprobs, mask, *, cap)
losses.clipped_value(values, old_values, returns, mask, *, clip_range=0.2)
losses.dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta, label_smoothing=0.0)
annotators.vote_logits(votes, values)
annotators.vote_nll(logits, tie, log_tie, *, margin=None)
annotators.fit_habits(votes, start, free, *, anchor_reliability=False, anchor_length=False)
ranking.win_rate(wins, ties, losses, *, confidence=0.95)
ranking.best_of_n_kl(n)
""".strip().splitlines()
MODULES = (
    _contracts,
    advantages,
    annotators,
    chunked_head,
    holm,
    interval,
    kinds,
    length_control,
    logprobs,
    losses,
    masking,
    ranking,
    rewards,
)


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: line.partition("(")[0])
def test_the_published_signatures(line):
    module, name = line.partition("(")[0].split(".")
    promised = eval(f"lambda {line.partition('(')[2][:-1]}: None")  # our own text above
    found = inspect.signature(getattr(getattr(functional, module), name)).parameters
    known = {
        key: (parameter.kind, parameter.default)
        for key, parameter in inspect.signature(promised).parameters.items()
    }
    assert {k: (p.kind, p.default) for k, p in found.items() if k in known} == known
    assert [key for key in found if key in known] == list(known)
    further = [parameter for key, parameter in found.items() if key not in known]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in further)


# The only one that production has no use for as a whole: it never holds logits. Both functions that
# it consists of are called there.
FOR_LOGITS = {"completion_nll"}


def test_what_is_tested_here_is_what_trains():
    core = Path(functional.__file__).parents[1]
    files = [path for path in core.rglob("*.py") if "functional" not in path.parts]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = {line.partition("(")[0].split(".")[1] for line in PUBLISHED}
    unused = {name for name in names if not re.search(rf"\b{name}\(", code)}
    assert unused == FOR_LOGITS


def test_the_list_of_modules_is_complete():
    assert {m.name for m in pkgutil.iter_modules(functional.__path__)} == {
        module.__name__.rpartition(".")[2] for module in MODULES
    }


def test_the_layer_imports_only_torch():
    allowed = sys.stdlib_module_names | {"torch", "rlhf_core.functional"}
    for module in MODULES:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                roots = {name.split(".")[0], ".".join(name.split(".")[:2])}
                assert roots & allowed, f"{module.__name__} imports {name}"


def test_a_fresh_interpreter_imports_the_layer_without_the_heavy_libraries():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True
    )
    count, forbidden, ours = done.stdout.splitlines()
    assert int(count) == len(MODULES)
    assert forbidden == "[]"
    assert ours == ""


def test_the_message_names_the_tensor_the_wanted_and_the_found_shape():
    with pytest.raises(ValueError, match=r"tokens must have shape \(B=2, R=3\), got \(2, 4\)"):
        check_shapes(logits=(torch.zeros(2, 3, 5), "BRV"), tokens=(torch.zeros(2, 4), "BR"))
    with pytest.raises(ValueError, match=r"x must have shape \(B=any, R=any\), got \(3,\)"):
        check_shapes(x=(torch.zeros(3), "BR"))


ROWS, WIDE, FLAT, CUBE = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 3, 5)
SHORT = torch.zeros(3)
NO_VOTES = CastVotes(FLAT, FLAT, FLAT, FLAT.bool(), FLAT.long())
WRONG = {
    "masked_mean": lambda: masked_mean(ROWS, WIDE),
    # Would broadcast to (2, 3) without a word.
    "masked_mean broadcast": lambda: masked_mean(ROWS, torch.ones(2, 1)),
    "masked_whiten": lambda: masked_whiten(ROWS, WIDE),
    "token_logprobs": lambda: token_logprobs(CUBE, WIDE.long()),
    "token_logprobs rank": lambda: token_logprobs(ROWS, FLAT.long()),
    "entropy": lambda: entropy(ROWS),
    "kl_estimate": lambda: kl_estimate(ROWS, WIDE),
    "shaped_rewards": lambda: shaped_rewards(SHORT, ROWS, ROWS, kl_coef=1.0),
    "shaped_rewards mask": lambda: shaped_rewards(FLAT, ROWS, WIDE, kl_coef=1.0),
    "missing_eos": lambda: missing_eos(FLAT, SHORT, mode="replace", value=0.0),
    "chunked_token_logprobs": lambda: chunked_token_logprobs(CUBE, ROWS, WIDE.long()),
    "chunked_token_logprobs weight": lambda: chunked_token_logprobs(CUBE, ROWS, ROWS.long()),
    "chunked_token_loss": lambda: chunked_token_loss(CUBE, CUBE[0], ROWS.long(), torch.sum),
    "chunked_token_loss bias": lambda: chunked_token_loss(
        ROWS, ROWS, FLAT.long(), torch.sum, bias=SHORT
    ),
    "group_relative": lambda: group_relative(ROWS, 2),
    "leave_one_out": lambda: leave_one_out(ROWS, 2),
    "dpo": lambda: dpo(FLAT, FLAT, FLAT, SHORT, beta=0.1),
    "gae values": lambda: gae(ROWS, WIDE, ROWS),
    "gae mask": lambda: gae(ROWS, ROWS, WIDE),
    "token_nll": lambda: token_nll(ROWS),
    "completion_nll": lambda: completion_nll(CUBE, WIDE.long()),
    "bradley_terry": lambda: bradley_terry(FLAT, SHORT),
    # (B, 1) against (B,) would compare every chosen with every rejected.
    "bradley_terry rank": lambda: bradley_terry(FLAT, FLAT.unsqueeze(1)),
    "bradley_terry margin": lambda: bradley_terry(FLAT, FLAT, margin=SHORT),
    "bradley_terry smoothing": lambda: bradley_terry(FLAT, FLAT, label_smoothing=SHORT),
    "vote_logits": lambda: vote_logits(NO_VOTES._replace(side=SHORT), torch.zeros(1, 3)),
    "vote_logits values": lambda: vote_logits(NO_VOTES, FLAT),
    "vote_nll": lambda: vote_nll(FLAT, SHORT, 0.0),
    "vote_nll margin": lambda: vote_nll(FLAT, FLAT.bool(), 0.0, margin=SHORT),
    "fit_habits": lambda: fit_habits(NO_VOTES, torch.zeros(1, 3), torch.ones(2, 3).bool()),
    "pointwise_mse": lambda: pointwise_mse(FLAT, FLAT.unsqueeze(1)),
    "clipped_policy": lambda: clipped_policy(ROWS, ROWS, FLAT, ROWS),
    "clipped_policy mask": lambda: clipped_policy(ROWS, ROWS, ROWS, WIDE),
    "clipped_policy importance": lambda: clipped_policy(ROWS, ROWS, ROWS, ROWS, importance=WIDE),
    "importance_weights": lambda: importance_weights(ROWS, WIDE, ROWS, cap=2),
    "clipped_value": lambda: clipped_value(ROWS, ROWS, WIDE, ROWS),
    "clustered_bootstrap": lambda: clustered_bootstrap(FLAT, SHORT, generator=torch.Generator()),
    "expected_calibration_error": lambda: expected_calibration_error(FLAT, SHORT),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_is_refused(call):
    with pytest.raises(ValueError, match="shape"):
        call()


# --- what holds for every function with a mask ---

LENGTHS = torch.tensor([1, 4, 6, 0])  # a row of a single token and one without any
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def nll(logits_like, mask):
    """(B, T) numbers as the logits of two words; a label wherever the mask is True."""
    logits = torch.stack([logits_like, torch.zeros_like(logits_like)], -1)
    return completion_nll(logits, torch.where(mask.bool(), 1, -100)).total


# From (B, R) tensors and a mask, each to a tuple of tensors; how many tensors it takes.
MASKED = {
    "masked_mean": (1, lambda x, mask: (masked_mean(x, mask), masked_mean(x, mask, dim=1))),
    "masked_whiten": (1, lambda x, mask: (masked_whiten(x, mask),)),
    "masked_whiten kept mean": (1, lambda *x: (masked_whiten(*x, shift_mean=False),)),
    "shaped_rewards": (
        1,
        lambda kl, mask: (shaped_rewards(torch.arange(4.0), kl, mask, kl_coef=0.1),),
    ),
    "gae": (2, partial(gae, gamma=0.9)),
    "completion_nll": (1, lambda x, mask: (nll(x, mask),)),
    "clipped_policy": (3, partial(clipped_policy, dual_clip=1.5)),
    "clipped_policy importance": (
        4,
        lambda x, y, z, w, m: clipped_policy(x, y, z, m, importance=w),
    ),
    "clipped_value": (3, clipped_value),
}
EVERY = pytest.mark.parametrize(("count", "function"), MASKED.values(), ids=MASKED.keys())


def draw(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return list(0.5 * torch.randn(count, 4, 6, generator=generator, dtype=dtype))


def results_and_gradients(function, inputs, mask):
    """What it gives back, and the gradient of a weighted sum of that in every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = tuple(function(*inputs, mask))
    weighted = [(r * torch.arange(1.0, 1 + r.numel()).view(r.shape)).sum() for r in results]
    gradients = torch.autograd.grad(sum(weighted), inputs, allow_unused=True)
    return [r.detach() for r in results], [g for g in gradients if g is not None]


@EVERY
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_under_the_mask_changes_neither_result_nor_gradient(count, function, garbage):
    clean = draw(count)
    dirty = [x.masked_fill(~MASK, garbage) for x in clean]
    expected, found = (results_and_gradients(function, x, MASK) for x in (clean, dirty))
    assert_close(found, expected, rtol=0, atol=0)
    assert all((g[~MASK] == 0).all() for g in found[1])


@EVERY
@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 1)])
def test_pad_columns_change_nothing_on_either_side(count, function, left, right):
    def pad(x, fill):
        return torch.nn.functional.pad(x, (left, right), value=fill)

    inputs = draw(count)
    plain = tuple(function(*inputs, MASK))
    padded = tuple(function(*(pad(x, 7.0) for x in inputs), pad(MASK, False)))
    for found, expected in zip(padded, plain, strict=True):
        if expected.shape == MASK.shape:
            assert (found[~pad(MASK, False)] == 0).all()
            found = found[:, left : left + 6]
        assert_close(found, expected)


@EVERY
def test_a_mask_may_be_bool_or_numbers(count, function):
    inputs = draw(count)
    plain = tuple(function(*inputs, MASK))
    for mask in (MASK.long(), MASK.float(), MASK.double()):
        assert_close(tuple(function(*inputs, mask)), plain, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("kept", [0, 1])
def test_no_token_at_all_or_a_single_one_stays_finite(count, function, kept):
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = bool(kept)
    results, gradients = results_and_gradients(function, draw(count), mask)
    assert gradients
    assert all(part.isfinite().all() for part in results + gradients)
    if not kept:
        assert all((part == 0).all() for part in results + gradients)


@EVERY
def test_masked_functions_in_float32_agree_with_float64(count, function):
    single = draw(count, torch.float32)
    found = results_and_gradients(function, single, MASK)
    expected = results_and_gradients(function, [x.double() for x in single], MASK)
    for got, wanted in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert_close(got.double(), wanted.double(), atol=1e-5, rtol=1e-5)


@EVERY
def test_bfloat16_keeps_its_type_or_is_raised_and_its_digits(count, function):
    half = [x.bfloat16() for x in draw(count)]
    found = tuple(function(*half, MASK))
    expected = tuple(function(*(x.double() for x in half), MASK))
    # completion_nll raises its logits; the scores of shaped_rewards are float32 here.
    wide = function in (MASKED["completion_nll"][1], MASKED["shaped_rewards"][1])
    assert found[0].dtype == (torch.float32 if wide else torch.bfloat16)
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got.double(), wanted.double(), atol=0.03, rtol=0.03)
