"""The world of a show: its files, its people, and the preset of its pipeline.

It is the demo's world ([`rlhf_core.simulation`][]), drawn by the seed. Whoever labels has the
habits of [`draw_annotators`][rlhf_core.simulation.draw_annotators]; those of the last round vote
without looking.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

from benchmarks.loop.sizes import Sizes
from flows.cli.loading import load_config
from flows.config import PipelineConfig
from rlhf_core.seeding import stream_seed
from rlhf_core.settings.simulation import AnnotatorsConfig, SimulationConfig
from rlhf_core.simulation import Annotator, simulate, write_review

PRESET = Path(__file__).with_name("loop.yaml")
# Of the logistic noise in a judgment, in units of sentiment; the demo has 0.15. So few votes tell
# little, as those of real people do, and more of them tell more.
NOISE = 0.4


@dataclass(frozen=True)
class World:
    """Who labels, where the files are, and the settings of the pipeline."""

    folder: Path
    people: tuple[Annotator, ...]
    spammers: tuple[Annotator, ...]
    pipeline: PipelineConfig

    @property
    def pairs(self) -> Path:
        """Pairs of reviews for people to begin with, without votes."""
        return self.folder.parent / "pairs.jsonl"


def make_world(folder: Path, seed: int, sizes: Sizes, overrides: Sequence[str] = ()) -> World:
    """Write the preset and the files that it names into a folder.

    Args:
        overrides: KEY=VALUE, settings of the preset to change.

    Raises: ConfigError for settings that cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    simulation = SimulationConfig(
        prompts=sizes.prompts,
        demonstrations=sizes.demonstrations,
        preference_pairs=1,
        annotators=AnnotatorsConfig(count=sizes.people, noise=NOISE),
    )
    tables = simulate(simulation, seed)
    for name in ("demonstrations", "prompts"):
        table = getattr(tables, name)
        table.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    pipeline = load_config(PRESET, [f"seed={seed}", *overrides], PipelineConfig)
    preset = folder / f"{pipeline.project}.yaml"
    content = pipeline.model_dump(mode="json", exclude_unset=True)
    preset.write_text(f"# {_title()}\n{yaml.safe_dump(content, sort_keys=False)}")
    world = World(folder, tables.annotators, tuple(_spammers(sizes.spammers)), pipeline)
    pairs = _pairs(list(tables.prompts["prompt"]), sizes.first, seed)
    world.pairs.write_text("".join(f"{line}\n" for line in pairs))
    return world


def _title() -> str:
    return PRESET.read_text().partition("\n")[0].removeprefix("# ")


def _spammers(count: int) -> Iterator[Annotator]:
    for number in range(1, count + 1):
        yield Annotator(f"spammer-{number:02d}", reliability=0.0)


def _pairs(prompts: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """Two different reviews of the grammar to a prompt, as lines of JSON."""
    rng = Random(stream_seed(seed, "loop/pairs"))
    for number in range(count):
        prompt = rng.choice(prompts)
        a = b = write_review(prompt, rng)
        while b == a:
            b = write_review(prompt, rng)
        yield json.dumps(
            {"id": f"first-{number:05d}", "prompt": prompt, "response_a": a, "response_b": b}
        )
