"""How long a save of a checkpoint holds training up, and its CPU seconds, beside it and waiting.

    python benchmarks/checkpoints.py [--parameters 134515008] [--saves 3]

The learner has as many parameters as SmolLM2-135M, with AdamW's two moments: twelve bytes each.
Ways take turns; half of the free memory has to hold the state once more.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from rlhf_core.metrics import MemoryLogger
from rlhf_core.training import beside
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.training.session import Session


def learner(parameters: int) -> dict[str, nn.Module | torch.optim.Optimizer]:
    model = nn.ParameterList(torch.zeros(parameters // 64) for _ in range(64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=134_515_008)
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    learners = learner(options.parameters)
    if beside.copied({name: part.state_dict() for name, part in learners.items()}) is None:
        raise SystemExit("there is too little free memory for a copy: nothing to compare")
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for turn in range(options.saves):
        for way, every in (("waiting", 0.0), ("beside", 1e-9)):
            with tempfile.TemporaryDirectory() as folder:
                session = Session(
                    MemoryLogger(),
                    checkpoints=Checkpoints(Path(folder)),
                    identity={},
                    learners=learners,
                    positions={},
                    every_seconds=every,
                )
                start, cpu = time.perf_counter(), time.process_time()
                thread = time.thread_time()
                with session:
                    session.safe_point()
                    held, own = time.perf_counter() - start, time.thread_time() - thread
                found[way].append((held, own, time.process_time() - cpu))
            print(turn, way, [round(value, 2) for value in found[way][-1]], flush=True)
    print("\n| | training held up (s) | CPU s in its thread | CPU s in all |\n|---|---|---|---|")
    for way, rows in found.items():
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"| {way} | {' | '.join(f'{value:.2f}' for value in medians)} |")


if __name__ == "__main__":
    main()
