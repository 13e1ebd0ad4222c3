"""The core's evaluation with an endpoint as judge, as a task calls it; also a program."""

import sys
from pathlib import Path

from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.work import Work
from tasks.judges.judging import MlflowJudging
from tasks.record.record import Record
from tasks.settings import read_settings


def evaluation(folder: Path, experiment: str, parallel: int = 2):
    """The report; models and data are in a folder, the address is in the environment."""
    names = ("sft", "policy", "reward", "data")
    work = Work(
        inputs={name: folder / name for name in names},
        sections={
            "sampling": SamplingConfig(max_prompt_length=16, max_new_tokens=12),
            "judge": JudgeConfig(
                source="endpoint",
                endpoint=EndpointConfig(model="m", parallel=parallel),
                canary_prompts=2,
            ),
        },
        judging=MlflowJudging(Record.open(read_settings()), experiment, MemoryLogger()),
    )
    return evaluate(EvaluationConfig(samples_per_prompt=2, best_of=2), work)


if __name__ == "__main__":
    evaluation(Path(sys.argv[1]), sys.argv[2])
