"""Exports a registered version as a directory for `mlflow models serve`.

    mlflow models serve -m DIRECTORY --env-manager local

(in an activated environment: MLflow starts `uvicorn` by name.)

A policy maps the column `prompt` to texts. A reward model maps the columns `prompt` and `response`
to normalised rewards, without a sigmoid. Models that were trained on messages get a prompt as a
user message. The directory does not need this package.
"""

import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from rlhf_core.data import chat_tokens
from rlhf_core.errors import ModelError
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import ModelRef

SERVED = Path(__file__).parent / "served"
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas")
SIGNATURES = {
    "policy": ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    ),
    "reward": ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.string, "response")]),
        outputs=Schema([ColSpec(DataType.double)]),
    ),
}
EXAMPLES = {
    "policy": pd.DataFrame({"prompt": ["The film"]}),
    "reward": pd.DataFrame({"prompt": ["The film"], "response": [" was long."]}),
}


def export_servable(store: MlflowModelStore, ref: ModelRef, to: Path) -> Path:
    """Write a policy or a reward model to `to`, which must not exist yet or be empty.

    Raises: ModelError for a version that does not exist or is of another kind, and if `to` is not
        empty.
    """
    if to.exists() and any(to.iterdir()):
        raise ModelError(f"{to} is not empty; export {ref.uri} to a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        model = store.fetch(ref, Path(scratch) / "model")
        kind = json.loads((model / "rlhf.json").read_text(encoding="utf-8"))["kind"]
        if kind not in SIGNATURES:
            raise ModelError(
                f"{ref.uri} is a {kind}; only {' and '.join(SIGNATURES)} models can be served"
            )
        with warnings.catch_warnings():
            # MLflow warns about its own type hints when `pyfunc` is imported.
            warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
            mlflow.pyfunc.save_model(
                str(to),
                python_model=str(SERVED / f"{kind}.py"),
                artifacts={"model": str(model), "chat_tokens": str(chat_tokens.__file__)},
                signature=SIGNATURES[kind],
                input_example=EXAMPLES[kind],
                pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
                metadata={"source": ref.uri},
            )
    return to
