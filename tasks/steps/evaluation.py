"""Evaluation as a Prefect task."""

from typing import cast

from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.judges.load import JUDGE
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from tasks.prefect.ui import stage_task
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.steps.stage import do_stage


@stage_task("evaluate", "evaluation")
def evaluate(
    config: EvaluationConfig,
    sampling: SamplingConfig,
    judge: JudgeConfig,
    sft: ModelRef,
    policy: ModelRef,
    reward_model: ModelRef,
    champion: ModelRef | None,
    data: DatasetRef,
    run: PipelineRun,
) -> Scorecard:
    """Compare the policy with SFT, best-of-n and the current champion on held-out prompts."""
    inputs: dict[str, Ref] = {"sft": sft, "policy": policy, "reward": reward_model, "data": data}
    if champion is not None:
        inputs["champion"] = champion
    if judge.is_registered:
        inputs[JUDGE] = Record.open(patient=True).store.resolve(judge.source)
    return do_stage(
        "evaluation",
        config,
        run,
        inputs=inputs,
        sections={"sampling": sampling, "judge": judge},
        returns=lambda made: cast(Scorecard, made.result),
    )
