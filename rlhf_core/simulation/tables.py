"""Draw the three tables of the pipeline (demonstrations, preferences, prompts) from one seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import pandas as pd

from rlhf_core.seeding import stream_seed
from rlhf_core.settings.simulation import SimulationConfig
from rlhf_core.simulation.annotators import Annotator, Preference, Vote, draw_annotators, vote
from rlhf_core.simulation.grammar import all_prompts, write_review
from rlhf_core.simulation.truth import true_reward


@dataclass(frozen=True)
class SimulatedTables:
    """The raw data of a pipeline, as a user would provide it, and its annotators."""

    demonstrations: pd.DataFrame  # id, prompt, response
    preferences: pd.DataFrame  # the columns of `rlhf_core.data.prepared`, response_a shown first
    prompts: pd.DataFrame  # id, prompt
    annotators: tuple[Annotator, ...]  # in the order of their names


def simulate(config: SimulationConfig, seed: int) -> SimulatedTables:
    """Simulate the data of a seed: the same in every process, whatever else has been drawn.

    Each table has its own random stream, so that more demonstrations do not change the preferences.
    """
    prompts = _stream(seed, "prompts").sample(all_prompts(), config.prompts)
    annotators = draw_annotators(config.annotators, _stream(seed, "annotators"))
    known = round(config.gold_share * config.preference_pairs)
    gold = _gold(known, prompts, _stream(seed, "gold"))
    votes = _preferences(
        config.preference_pairs,
        prompts,
        annotators,
        _stream(seed, "preferences"),
        _Flips(config.annotators.flip_share, _stream(seed, "flips")),
    )
    return SimulatedTables(
        demonstrations=_demonstrations(
            config.demonstrations, prompts, _stream(seed, "demonstrations")
        ),
        preferences=pd.concat([votes, gold], ignore_index=True) if known else votes,
        prompts=pd.DataFrame(
            {"id": [f"prompt-{n:05d}" for n in range(len(prompts))], "prompt": prompts}
        ),
        annotators=tuple(annotators),
    )


def _stream(seed: int, purpose: str) -> Random:
    return Random(stream_seed(seed, f"simulation/{purpose}"))


def _demonstrations(rows: int, prompts: Sequence[str], rng: Random) -> pd.DataFrame:
    chosen = [rng.choice(prompts) for _ in range(rows)]
    return pd.DataFrame(
        {
            "id": [f"demonstration-{n:05d}" for n in range(rows)],
            "prompt": chosen,
            "response": [write_review(prompt, rng) for prompt in chosen],
        }
    )


class _Flips(NamedTuple):
    """Which votes are recorded the wrong way round; a stream of its own, so that flipped votes
    are the votes on the same pairs."""

    share: float
    rng: Random

    def record(self, cast: Vote) -> Vote:
        return cast.flipped() if self.rng.random() < self.share else cast


def _preferences(
    rows: int,
    prompts: Sequence[str],
    annotators: Sequence[Annotator],
    rng: Random,
    flips: _Flips,
) -> pd.DataFrame:
    records = []
    for n in range(rows):
        prompt = rng.choice(prompts)
        annotator = rng.choice(annotators)
        cast = vote(annotator, (write_review(prompt, rng), write_review(prompt, rng)), rng)
        records.append(_row(f"pair-{n:05d}", prompt, flips.record(cast), annotator.name))
    return pd.DataFrame(records)


def _gold(rows: int, prompts: Sequence[str], rng: Random) -> pd.DataFrame:
    """Pairs with the right answer; nobody has seen them, so neither text was the first."""
    records = []
    for n in range(rows):
        prompt = rng.choice(prompts)
        texts = write_review(prompt, rng), write_review(prompt, rng)
        first, second = true_reward([prompt, prompt], texts)
        right: Preference = "a" if first > second else "b" if second > first else "tie"
        known = _row(f"gold-{n:05d}", prompt, Vote(*texts, right), "gold")
        records.append(known | {"shown_first": "", "gold": True})
    return pd.DataFrame(records)


def _row(name: str, prompt: str, cast: Vote, annotator: str) -> dict[str, object]:
    """A row of the preferences; the text that was shown first is response_a."""
    return {
        "id": name,
        "prompt": prompt,
        **cast._asdict(),
        "shown_first": "a",
        "annotator": annotator,
        "gold": False,
        "margin": 0.0,
        "time": "",
        "source": "simulated",
    }
