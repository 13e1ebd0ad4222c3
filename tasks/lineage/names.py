"""Which versions people mean: an address, an alias, or a run that made some."""

from rlhf_core.errors import ModelError
from tasks.lineage.lineage import Lineage
from tasks.record.record import Record
from tasks.registry.refs import ModelRef, is_version, name_and_alias


def versions_of(lineage: Lineage, record: Record, name: str) -> list[ModelRef]:
    """The versions that a name means: models:/NAME/3, models:/NAME@champion, or all that a run
    made: a pipeline's by id, beginning of the id or name, a stage's by its id.

    Raises: ModelError or UserError when there is none.
    """
    if is_version(name):
        return [ModelRef.parse(name)]
    if name.startswith("models:") or name_and_alias(name) is not None:
        return [record.store.resolve(name)]
    made = lineage.made_by(name)
    if not made:
        run = record.runs.pipeline(name)
        made = lineage.made_by(run.info.run_id)
    if not made:
        raise ModelError(f"the run '{name}' made no model; name a run that did, or models:/NAME/3")
    return made
