"""What `precision: auto` is in a run: decided once, by the first stage that asks, and recorded."""

import logging
from typing import Any, TypeVar, cast

from rlhf_core.backbone.precision.machine import resolve
from rlhf_core.config import Section
from rlhf_core.errors import ConfigError
from rlhf_core.settings.model import Precision
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import PipelineRun

S = TypeVar("S", bound=Section)
log = logging.getLogger(__name__)


def with_precision(config: S, record: Record, run: PipelineRun, *, trains: bool) -> S:
    """The settings of a stage with a type instead of `auto`.

    The first stage of a pipeline run decides by its machine and tags the run; later stages, and the
    same stages when they are resumed, use what is there. So the key, the parameters and the
    checkpoints of a stage name the type, and a run that is resumed on another machine does not
    change it: that is said, and costs time, but no number.
    """
    setting: Any = getattr(config, "precision", None)
    if setting != "auto":
        return config
    settings = record.settings
    if settings.cluster:
        raise ConfigError(
            "precision is auto, which is decided by this machine, but RLHF_CLUSTER is set and its "
            "machines compute; set precision to float32 or bfloat16"
        )
    here = resolve("auto", settings.training_device if trains else settings.device)
    kept = record.runs.tags(run.run_id).get(tags.AUTO_PRECISION)
    if kept not in ("float32", "bfloat16"):
        record.add_tags(run.run_id, {tags.AUTO_PRECISION: here})
        kept = here
    elif kept != here:
        log.warning(
            "precision is auto, which is %s on this machine, but this run began in %s and goes on "
            "in it; start a new run for %s",
            here,
            kept,
            here,
        )
    log.info("precision auto is %s in this run", kept)
    return config.model_copy(update={"precision": cast(Precision, kept)})
