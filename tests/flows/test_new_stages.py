"""A new row of the stage table: task, flow, form, plan and pipeline follow from it."""

from functools import partial

import pytest
from mlflow import MlflowClient
from pydantic import BaseModel, Field, ValidationError

from flows import stages
from flows.config import PipelineConfig
from flows.rlhf import rlhf
from rlhf_core.config import Section
from rlhf_core.data.prepared import read_table
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.kl_control import FixedKL
from rlhf_core.onpolicy.loop import iterate
from rlhf_core.onpolicy.report import describe
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.plan import make_plan
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.stages.prepare import inspect
from rlhf_core.stages.table import STAGES, StageSpec
from rlhf_core.training.learner import Learner
from rlhf_core.types import Report
from tasks.record import tags
from tasks.record.record import Record

pytestmark = pytest.mark.integration


class ToyConfig(OnPolicySection):
    """REINFORCE with the mean of the roll-out as its baseline."""


def credit(rollout, kl_coef):
    """A = score - mean score, the same for every token."""
    advantages = (rollout.scores - rollout.scores.mean()).unsqueeze(-1) * rollout.responses.mask
    return advantages, describe(rollout, kl_coef)


def train_toy(config, work):
    """The whole algorithm."""
    actors = Actors.load(config, work)
    learner = Learner(actors.policy, config, config.updates, ranks=work.ranks)
    report = iterate(
        "toy",
        config,
        work,
        actors,
        learners={"policy": learner},
        controller=FixedKL(config.kl_coef),
        credit=credit,
        update=partial(
            optimise_policy,
            learner=learner,
            config=config,
            temperature=work.section(SamplingConfig).temperature,
            ranks=work.ranks,
        ),
    )
    actors.save(work.outputs["policy"], work, report.iterations)
    return report


class CardConfig(Section):
    """What a card shows."""

    rows: int = Field(2, ge=1, description="Prompts to list")


class Card(BaseModel):
    """What a card says."""

    prompts: list[str]


class CardReport(Report):
    """A report that holds a card."""

    card = Card(prompts=[])

    @property
    def result(self):
        """The card."""
        return self.card


def write_card(config, work):
    """List some held-out prompts; nothing is trained."""
    table = read_table(work.inputs["data"], "prompts", "eval")
    report = CardReport()
    object.__setattr__(report, "card", Card(prompts=list(table["prompt"][: config.rows])))
    return report


class ToyPipelineConfig(PipelineConfig):
    """The section of the new algorithm beside the others."""

    toy: ToyConfig = Field(default_factory=ToyConfig)


@pytest.fixture(scope="module", autouse=True)
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            STAGES,
            "toy",
            StageSpec(
                config=ToyConfig,
                function=train_toy,
                sections={"sampling": SamplingConfig},
                inputs=("sft", "data"),
                optional_inputs=("reward", "reward.*"),
                outputs=("policy",),
                optional_outputs=("milestones",),
                learns={"policy": "policy"},
            ),
        )
        patch.setitem(
            STAGES,
            "card",
            StageSpec(
                config=CardConfig, function=write_card, inputs=("policy", "data"), result=Card
            ),
        )
        yield


@pytest.fixture(scope="module")
def config(tiny):
    sections = {name: getattr(tiny, name) for name in PipelineConfig.model_fields}
    toy = ToyConfig(iterations=2, rollout_size=16, batch_size=16, epochs=1, keep_every=1)
    return ToyPipelineConfig(**sections | {"algorithm": "toy", "toy": toy})


@pytest.fixture(scope="module")
def result(shared_home, config):
    return rlhf(config)


def test_the_pipeline_runs_the_new_algorithm(result, shared_home):
    client = MlflowClient(tracking_uri=shared_home.mlflow_uri)
    version_tags = Record.open(shared_home).store.tags(result.policy)
    run = client.get_run(version_tags[tags.RUN])
    assert run.data.tags[tags.STAGE] == "toy"
    assert run.data.params["toy.keep_every"] == "1"
    assert result.critic is None
    assert "| TOY |" in result.report


def test_milestones_are_versions_with_the_number_of_their_iteration(result, shared_home):
    store = Record.open(shared_home).store
    version_tags = [store.tags(store.resolve(f"models:/tiny-milestone/{n}")) for n in (1, 2)]
    assert [found[tags.ITERATION] for found in version_tags] == ["1", "2"]
    assert {found[tags.KIND] for found in version_tags} == {"milestone"}
    # After its last iteration the policy is what was registered as the policy, but for its card.
    assert version_tags[1][tags.RUN] == store.tags(result.policy)[tags.RUN]


def test_the_plan_has_its_steps_and_the_config_its_name(config):
    validation = inspect(config.data, config.model, config.length_limits, seed=0)
    plan = {stage.stage: stage for stage in make_plan(config.plan_sections, validation).stages}
    assert list(plan) == ["sft", "reward_model", "report_card", "toy", "evaluation"]
    assert plan["toy"].steps == 2
    assert [learnt.network for learnt in plan["toy"].networks] == ["policy"]
    with pytest.raises(ValidationError, match="must be one of ppo, rloo, grpo, dpo, toy"):
        ToyPipelineConfig(algorithm="tay")
    schema = PipelineConfig.model_json_schema()["properties"]["algorithm"]
    assert schema["enum"] == ["ppo", "rloo", "grpo", "dpo", "toy"]


def test_a_stage_that_trains_nothing_is_a_form_and_a_flow(result, shared_home):
    form = stages.stage_form("card", "A card of a registered policy.")
    assert list(form.model_fields) == ["project", "seed", "policy", "data", "card"]
    with pytest.raises(ValidationError, match="policy"):
        form(project="tiny")
    flow = stages.stage_flow("card", form, "Write a card of a registered policy.")
    assert flow.name == "card"
    client = MlflowClient(tracking_uri=shared_home.mlflow_uri)

    def runs():
        found = client.search_runs([result.run.experiment_id], f"tags.{tags.STAGE} = 'card'")
        return {run.info.run_id: tags.CACHED_FROM in run.data.tags for run in found}

    given = {"project": "tiny", "policy": result.policy.uri}
    card = flow(form(**given))
    assert len(card.prompts) == 2
    assert list(runs().values()) == [False]
    # Again, in a run of its own: found, and not written again.
    assert flow(form(**given)) == card
    assert sorted(runs().values()) == [False, True]
    assert len(flow(form(**given, card=CardConfig(rows=1))).prompts) == 1
    assert sorted(runs().values()) == [False, False, True]


def test_each_row_has_a_flow():
    names = {flow.name for flow in stages.SINGLE_FLOWS}
    rows = {name for name, spec in STAGES.items() if not spec.optimises} - {"card"}
    assert names == {row.replace("_", "-") for row in rows} | {"policy"}
