"""Evaluation as a Prefect task."""

from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.stages import evaluation
from rlhf_core.stages.evaluation import EvaluationConfig, Scorecard
from tasks.prefect.ui import stage_task
from tasks.record.stage import open_stage
from tasks.registry.model_store import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.settings import read_settings


@stage_task("evaluate", "evaluation")
def evaluate(
    config: EvaluationConfig,
    sampling: SamplingConfig,
    sft: ModelRef,
    policy: ModelRef,
    reward_model: ModelRef,
    champion: ModelRef | None,
    data: DatasetRef,
    run: PipelineRun,
) -> Scorecard:
    """Compare the policy with SFT, best-of-n and the present champion on held-out prompts."""
    inputs: dict[str, Ref] = {"sft": sft, "policy": policy, "reward": reward_model, "data": data}
    if champion is not None:
        inputs["champion"] = champion
    with open_stage(
        "evaluation",
        config=config,
        beside={"sampling": sampling},
        run=run,
        inputs=inputs,
        context="evaluation",
        reuse="any",
    ) as stage:
        if not stage.cached:
            report = evaluation.evaluate(
                config,
                sampling,
                sft=stage.fetch(sft),
                policy=stage.fetch(policy),
                reward_model=stage.fetch(reward_model),
                champion=None if champion is None else stage.fetch(champion),
                data=stage.fetch(data),
                seed=run.seed,
                device=read_settings().device,
                logger=stage.logger,
            )
            stage.record(report)
            stage.keep(report.scorecard)
        return stage.result(stage.kept(Scorecard))
