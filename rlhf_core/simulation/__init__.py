"""A small RLHF problem with a known true reward, so that learning can be verified.

    grammar      writes short reviews of hotels, films and phones: demonstrations and pairs
    truth        the hidden reward: VADER sentiment minus penalties that annotators hardly notice
    annotators   simulated people who compare two reviews, each with individual biases
    tables       draws the three data tables of the pipeline from one seed

The reward model sees only the votes; `true_reward` is for evaluation. Where the two differ (length,
repetition, features of the wrong kind) a policy can over-optimise, as it can against real people.
Every draw comes from a `random.Random` seeded by the run's seed and a purpose.
"""

from rlhf_core.settings.simulation import AnnotatorsConfig, SimulationConfig
from rlhf_core.simulation.annotators import Annotator, Vote, draw_annotators, vote
from rlhf_core.simulation.grammar import all_prompts, vocabulary, write_review
from rlhf_core.simulation.tables import SimulatedTables, simulate
from rlhf_core.simulation.truth import true_reward

__all__ = [
    "Annotator",
    "AnnotatorsConfig",
    "SimulatedTables",
    "SimulationConfig",
    "Vote",
    "all_prompts",
    "draw_annotators",
    "simulate",
    "true_reward",
    "vocabulary",
    "vote",
    "write_review",
]
