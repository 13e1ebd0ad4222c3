"""Write the trajectories anew, after a change that is meant to change the numbers.

    .venv/bin/python tests/references/record.py [DIRECTORY]

Look at the difference before it is committed: it says what the change does to every stage.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "core" / "stages"))

from tiny import CONFIGS, World, trajectory  # noqa: E402


def main() -> None:
    """One file for each stage."""
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if sys.argv[1:] else HERE
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        world = World.build(Path(scratch) / "world")
        for stage in CONFIGS:
            steps = trajectory(stage, world, Path(scratch) / stage)
            (target / f"{stage}.json").write_text(json.dumps(steps, indent=1) + "\n")


if __name__ == "__main__":
    main()
