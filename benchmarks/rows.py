"""The rows of the table: what is computed, by whom, with which settings."""

from dataclasses import dataclass
from typing import Literal

Side = Literal["ours", "tuned", "peer"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Row:
    """A row of the table: one amount of work for all sides, and the precision of each."""

    title: str
    work: Literal["ppo", "sft", "reward"]
    model: Literal["gpt2", "smol"]
    options: str  # of run.py and of the peer's script alike
    iterations: int  # of a turn
    ours: str  # options of ours alone
    peer: str  # options of the peer alone: its best, as peer_settings found
    said: str  # both precisions, for people
    sides: tuple[Side, ...] = ("ours", "tuned")

    @property
    def precision(self) -> Precision:
        """What ours computes products in."""
        return "bfloat16" if "bfloat16" in self.ours else "float32"

    @property
    def peer_precision(self) -> Precision:
        """What the peer computes products in."""
        narrow = "bfloat16" in self.peer or "autocast" in self.peer
        return "bfloat16" if narrow else "float32"


WORKS = {  # title, work, model, options, iterations of a turn
    "ppo-gpt2": ("PPO, gpt2", "ppo", "gpt2", "", 1),
    "ppo-smol": ("PPO, smol, 8 samples", "ppo", "smol", "--batch 8", 1),
    "sft-gpt2": ("SFT, gpt2", "sft", "gpt2", "", 3),
    "sft-smol": ("SFT, smol", "sft", "smol", "", 1),
    "reward-gpt2": ("reward model, gpt2", "reward", "gpt2", "", 3),
    "reward-smol": ("reward model, smol", "reward", "smol", "", 1),
    "ppo-smol-lora": (
        "PPO, smol, 8 samples, LoRA rank 16 in the last 8 of 30 blocks",
        *("ppo", "smol", "--batch 8 --lora-rank 16 --lora-layers 8", 1),
    ),
}
# What of the peer was fastest, see "TRL's best settings" in README.md: in any number format, which
# stands beside our bfloat16; and in float32, which stands beside our float32.
BEST = dict.fromkeys(WORKS, ("--dtype bfloat16 --attention eager", "bfloat16 throughout, eager"))
for _name in ("sft-gpt2", "sft-smol"):
    BEST[_name] = ("--dtype bfloat16 --padding-free", "bfloat16 throughout, padding-free")
for _name in ("ppo-gpt2", "ppo-smol", "ppo-smol-lora"):
    BEST[_name] = (
        "--dtype bfloat16 --attention eager --no-cache",
        "bfloat16 throughout, eager, no cache in training",
    )
BEST_FLOAT32 = dict.fromkeys(("sft-gpt2", "sft-smol"), ("--padding-free", "padding-free"))


def _rows() -> dict[str, Row]:
    rows = {}
    for name, work in WORKS.items():
        options, said = BEST[name]
        rows[name] = Row(*work, "--dtype bfloat16", options, f"bfloat16; TRL {said}")
    for name, work in sorted(WORKS.items(), key=lambda item: "smol" in item[0]):
        options, said = BEST_FLOAT32.get(name, ("", ""))
        words = f"float32; TRL float32, {said}" if said else "float32"
        sides = ("ours", "tuned", "peer") if "gpt2" in name else ("ours", "tuned")
        rows[f"{name}-float32"] = Row(*work, "", options, words, sides)
    return rows


ROWS = _rows()  # the most important first, in case it is stopped early
