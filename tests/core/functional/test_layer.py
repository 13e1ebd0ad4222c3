"""The function layer as a whole: what it stands on, and how it refuses a wrong shape."""

import subprocess
import sys

import pytest
import torch

from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.advantages import gae
from rlhf_core.functional.logprobs import entropy, kl_estimate, token_logprobs
from rlhf_core.functional.losses import (
    bradley_terry,
    clipped_policy,
    clipped_value,
    completion_nll,
    pointwise_mse,
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
"""


def test_a_fresh_interpreter_imports_the_layer_without_the_heavy_libraries():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True
    )
    count, forbidden = done.stdout.splitlines()
    assert int(count) >= 6
    assert forbidden == "[]"


def test_the_message_names_the_tensor_the_wanted_and_the_found_shape():
    with pytest.raises(ValueError, match=r"tokens must have shape \(B=2, R=3\), got \(2, 4\)"):
        check_shapes(logits=(torch.zeros(2, 3, 5), "BRV"), tokens=(torch.zeros(2, 4), "BR"))
    with pytest.raises(ValueError, match=r"x must have shape \(B=any, R=any\), got \(3,\)"):
        check_shapes(x=(torch.zeros(3), "BR"))


ROWS, WIDE, FLAT, CUBE = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 3, 5)
SHORT = torch.zeros(3)
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
    "gae values": lambda: gae(ROWS, WIDE, ROWS),
    "gae mask": lambda: gae(ROWS, ROWS, WIDE),
    "completion_nll": lambda: completion_nll(CUBE, WIDE.long()),
    "bradley_terry": lambda: bradley_terry(FLAT, SHORT),
    # (B, 1) against (B,) would compare every chosen with every rejected.
    "bradley_terry rank": lambda: bradley_terry(FLAT, FLAT.unsqueeze(1)),
    "bradley_terry margin": lambda: bradley_terry(FLAT, FLAT, margin=SHORT),
    "bradley_terry smoothing": lambda: bradley_terry(FLAT, FLAT, label_smoothing=SHORT),
    "pointwise_mse": lambda: pointwise_mse(FLAT, FLAT.unsqueeze(1)),
    "clipped_policy": lambda: clipped_policy(ROWS, ROWS, FLAT, ROWS),
    "clipped_policy mask": lambda: clipped_policy(ROWS, ROWS, ROWS, WIDE),
    "clipped_value": lambda: clipped_value(ROWS, ROWS, WIDE, ROWS),
    "clustered_bootstrap": lambda: clustered_bootstrap(FLAT, SHORT, generator=torch.Generator()),
    "expected_calibration_error": lambda: expected_calibration_error(FLAT, SHORT),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_is_refused(call):
    with pytest.raises(ValueError, match="shape"):
        call()
