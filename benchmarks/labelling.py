"""How many labels the order of the queue saves, where the truth is known.

    python benchmarks/labelling.py                        # both tables, about ten minutes
    python benchmarks/labelling.py --seeds 3 --tables labels    # a glance
    python benchmarks/labelling.py --write                # and into docs/feedback/fewer_labels.md
    python benchmarks/labelling.py --tables labels --pools demo --seeds 3    # a few minutes more

A pair has features x = h(a) - h(b) in 32 directions of falling size, people prefer a with chance
σ(wᵀx), and log-odds have a standard deviation of 3. The queue is ordered again every 100 labels by
the functions that the project uses. Five pools of 4,000 pairs:

    iid         all prompts are different
    redundant   90 % of the pairs are small edits of 10 prompts and their answers; what counts is
                the accuracy over different prompts
    copied      the same with 40 prompts: as many as there are directions, so that labels on them
                alone tell nearly everything
    null        the features that the order is made from have nothing to do with the votes
    flat        all pairs are equally informative: |x| = 1 in every direction alike, and log-odds so
                small that every vote is nearly a coin toss
    demo        only if it is named: new pairs of the demo's world on the features of its own reward
                model, which is trained for each seed (labelling_demo.py)

"Labels needed" are those with which a last layer gets as accurate as with 1,000 in random order.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from pages import put_between
from torch import Tensor

from rlhf_core.data.near import near_groups
from rlhf_core.labelling.arms import Arm, Shares
from rlhf_core.labelling.order import Waiting, order_queue
from rlhf_core.labelling.probe import Probe, fit_probe
from rlhf_core.labelling.saved import Savings
from rlhf_core.labelling.savings import Votes, estimate_savings, keeps_design

PAGE = Path(__file__).parents[1] / "docs/feedback/fewer_labels.md"
PAIRS, TESTED, SIZE, STEP = 4000, 4000, 32, 100
RANDOM_LABELS = 1000
HOT = {"redundant": 10, "copied": 40}  # prompts that are copied
COPIES, EDIT = 0.9, 0.1  # share of the copies, and how far they are edited
POOLS = ("iid", "redundant", "copied", "null", "flat")
SHARES = Shares()
DEMO_WORK = Path(".rlhf/bench/labelling-demo")  # keeps the models of the demo


class World(NamedTuple):
    """A pool, and the truth about it."""

    features: Tensor  # (N, d) what a last layer learns from
    seen: Tensor  # (N, d) what the order is made from
    votes: Tensor  # (N,) as people would cast them
    prompts: list[str]
    test: Tensor  # (T, d)
    truth: Tensor  # (T,) chances


def draw_world(pool: str, seed: int) -> World:
    """A pool by its name."""
    if pool == "demo":
        from labelling_demo import demo_world  # the whole pipeline takes seconds

        return World(*demo_world(seed, DEMO_WORK, pool=PAIRS, tested=TESTED))
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, SIZE + 1).double().rsqrt()
    if pool == "flat":
        scales = torch.ones(SIZE).double()
    scales /= scales.square().sum().sqrt()

    def drawn(n: int) -> Tensor:
        x = torch.randn(n, SIZE, generator=g).double() * scales
        return x / x.norm(dim=1, keepdim=True) if pool == "flat" else x

    x, test = drawn(PAIRS), drawn(TESTED)
    prompts = [_words(g, 20) for _ in range(PAIRS)]
    if hot := HOT.get(pool):
        copied = torch.rand(PAIRS, generator=g) < COPIES
        of = torch.randint(hot, (PAIRS,), generator=g)
        x = torch.where(copied.unsqueeze(1), x[of] + EDIT * drawn(PAIRS), x)
        for i in copied.nonzero().squeeze(1).tolist():
            prompts[i] = f"{prompts[int(of[i])]} {_words(g, 1)}" if i >= hot else prompts[i]
    w = torch.randn(SIZE, generator=g).double()
    w *= (0.5 if pool == "flat" else 3.0) / (test @ w).square().mean().sqrt()
    votes = (torch.rand(PAIRS, generator=g) < torch.sigmoid(x @ w)).double()
    seen = drawn(PAIRS) if pool == "null" else x
    return World(x, seen, votes, prompts, test, torch.sigmoid(test @ w))


def _words(g: torch.Generator, n: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(5000, (n,), generator=g).tolist())


class Queue:
    """A queue whose pairs are labelled in their order, which is made anew every `STEP` labels."""

    def __init__(self, world: World, seed: int, *, fall_back: bool = False) -> None:
        self.world, self.salt = world, str(seed)
        self.groups = near_groups(world.prompts)
        self.names: list[str] = [""] * (max(self.groups) + 1)
        for prompt, group in zip(reversed(world.prompts), reversed(self.groups), strict=True):
            self.names[group] = prompt
        self.labelled: list[int] = []
        self.arms: dict[int, Arm] = {}
        self.fall_back = fall_back
        self.generator = torch.Generator().manual_seed(seed)

    def run(self, labels: int) -> None:
        """Label so many pairs."""
        while len(self.labelled) < labels:
            left = [i for i in range(PAIRS) if i not in self.arms]
            held = {self.groups[i] for i, arm in self.arms.items() if arm == "hold_out"}
            asked = [0] * len(self.names)
            for i in self.labelled:
                asked[self.groups[i]] += 1
            waiting = Waiting(
                keys=[str(i) for i in left],
                groups=[self.groups[i] for i in left],
                names=self.names,
                asked=asked,
                held_out=frozenset(held),
                trained_on=frozenset(),
            )
            by_design = not self.fall_back or keeps_design(self._estimate(), len(self.labelled))
            placed = order_queue(
                waiting,
                lambda some, left=left: self.world.seen[[left[i] for i in some]],  # type: ignore[misc]
                self._fit(self.world.seen, self.trained()),
                salt=self.salt,
                shares=SHARES,
                by_design=by_design,
                horizon=STEP,
            )
            for pair, arm in placed[:STEP]:
                self.labelled.append(left[pair])
                self.arms[left[pair]] = arm

    def of(self, arm: Arm) -> list[int]:
        """The labels of an arm in their order."""
        return [i for i in self.labelled if self.arms[i] == arm]

    def trained(self) -> list[int]:
        """The labels that training sees."""
        return [i for i in self.labelled if self.arms[i] != "hold_out"]

    def estimate(self) -> Savings | None:
        """What the project would say about the savings."""
        return self._estimate()

    def _estimate(self) -> Savings | None:
        design, control, hold_out = (
            Votes(
                self.world.features[some],
                self.world.votes[some],
                torch.tensor([self.groups[i] for i in some], dtype=torch.int64),
            )
            for some in (self.of("design"), self.of("random"), self.of("hold_out"))
        )
        return estimate_savings(design, control, hold_out, generator=self.generator)

    def _fit(self, features: Tensor, some: list[int]) -> Probe:
        return fit_probe(features[some], self.world.votes[some])


def learned(world: World, labels: list[int]) -> tuple[float, float]:
    """Accuracy against the true preference, and loss, of a last layer fitted to some labels."""
    fit = fit_probe(world.features[labels], world.votes[labels])
    right = (fit.logits(world.test) > 0) == (world.truth > 0.5)
    return right.double().mean().item(), fit.losses(world.test, world.truth).mean().item()


# ---- labels ----


class Curves(NamedTuple):
    """(S, K) accuracies and losses of S seeds after `STEP`, 2·`STEP`, ... labels."""

    random: Tensor  # (S, K, 2)
    design: Tensor  # the design arm alone
    queue: Tensor  # design and control arm together, as training sees them
    whole: Tensor  # the same by all labels, those of the hold-out included


def curves(pool: str, seeds: int, work: Path) -> Curves:
    """Learning curves of the random order and of the queue, computed once for a folder."""
    kept = work / f"curves-{pool}-{seeds}.pt"
    if kept.exists():
        return Curves(*torch.load(kept))
    sizes = range(STEP, RANDOM_LABELS + 1, STEP)
    found: list[list[list[tuple[float, float]]]] = [[], [], [], []]
    for seed in range(seeds):
        world = draw_world(pool, seed)
        queue = Queue(world, seed)
        g = torch.Generator().manual_seed(seed + 10_000)
        random = torch.randperm(PAIRS, generator=g)[:RANDOM_LABELS].tolist()
        queue.run(int(RANDOM_LABELS / (1 - SHARES.random - SHARES.hold_out)) + 2 * STEP)
        whole = [[i for i in queue.labelled[:n] if queue.arms[i] != "hold_out"] for n in sizes]
        orders = [random, queue.of("design"), queue.trained()]
        for rows, order in zip(found, orders, strict=False):
            rows.append([learned(world, order[:n]) for n in sizes])
        found[3].append([learned(world, some) for some in whole])
    made = Curves(*(torch.tensor(rows, dtype=torch.float64) for rows in found))
    work.mkdir(parents=True, exist_ok=True)
    torch.save(tuple(made), kept)
    return made


def saved(ours: Tensor, theirs: Tensor, measure: int) -> float:
    """Share of labels saved by mean curves: 1 - n / 1,000, n where ours reaches theirs at 1,000."""
    sign = 1 if measure == 0 else -1
    target = sign * theirs[:, -1, measure].mean().item()
    reached = (sign * ours[:, :, measure].mean(0)).cummax(0).values.tolist()
    before, size = -math.inf, 0.0
    for n, level in enumerate(reached, start=1):
        if level >= target:
            part = 1.0 if before == -math.inf else (target - before) / (level - before)
            size = (n - 1 + part) * STEP
            return 1 - size / RANDOM_LABELS
        before = level
    # Beyond the curve: by its last slope over log n.
    last, earlier = reached[-1], reached[-len(reached) // 4]
    slope = (last - earlier) / math.log(len(reached) / (len(reached) - len(reached) // 4 + 1))
    return 1 - math.exp((target - last) / slope) if slope > 0 else -math.inf


def with_interval(ours: Tensor, theirs: Tensor, measure: int) -> tuple[float, float, float]:
    """The same with 95 % bounds, bootstrapped over seeds."""
    g = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(500):
        some = torch.randint(len(ours), (len(ours),), generator=g)
        draws.append(saved(ours[some], theirs[some], measure))
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return saved(ours, theirs, measure), low.item(), high.item()


def labels_table(pools: Sequence[str], seeds: int, work: Path) -> Iterator[str]:
    """The rows of the first table; draws the picture."""
    yield "| pool | measure | design arm alone | design and control arm | with the hold-out |"
    yield "|---|---|---|---|---|"
    figure, axes = plt.subplots(1, len(pools), figsize=(3 * len(pools), 3), squeeze=False)
    for pool, axis in zip(pools, axes[0], strict=True):
        found = curves(pool, seeds, work)
        for measure, name in enumerate(("accuracy", "loss")):
            cells = [
                "{:.0%} ({:.0%} to {:.0%})".format(*with_interval(ours, found.random, measure))
                for ours in (found.design, found.queue, found.whole)
            ]
            yield f"| {pool} | {name} | " + " | ".join(cells) + " |"
        sizes = torch.arange(1, found.random.shape[1] + 1) * STEP
        for curve, label in ((found.random, "random"), (found.queue, "queue")):
            axis.plot(sizes, curve[:, :, 0].mean(0), label=label)
        axis.set(title=pool, xlabel="labels", ylabel="accuracy" if pool == pools[0] else None)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(work / "fewer_labels.png", dpi=110)


# ---- the estimate ----


def estimate_table(pools: Sequence[str], seeds: int, _: Path) -> Iterator[str]:
    """The rows of the second table: the live estimate after 500 and 1,500 labels."""
    yield (
        "| pool | labels | truly saved | estimate: median (quartiles) "
        "| interval contains the truth | estimate above 0 |"
    )
    yield "|---|---|---|---|---|---|"
    for pool in pools:
        for labels in (500, 1500):
            found: list[Savings] = []
            ours: list[Tensor] = []
            theirs: list[Tensor] = []
            for seed in range(seeds):
                world = draw_world(pool, seed)
                queue = Queue(world, seed)
                queue.run(labels)
                estimate = queue.estimate()
                assert estimate is not None
                found.append(estimate)
                ours.append(_true_losses(world, queue.of("design"), estimate.sizes))
                theirs.append(_true_losses(world, queue.of("random"), estimate.sizes))
            x = torch.tensor(found[0].sizes).double().log()
            x -= x.mean()
            mine, other = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
            slope = (x * (mine + other)).sum() / (2 * x.square().sum())
            truth = -math.expm1(-float((mine.mean() - other.mean()) / slope))
            values = torch.tensor([e.saved.value for e in found]).double()
            low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
            inside = sum(e.saved.low <= truth <= e.saved.high for e in found)
            above = int((values > 0).sum())
            yield (
                f"| {pool} | {labels:,} | {truth:.0%} | {middle:.0%} ({low:.0%} to {high:.0%}) | "
                f"{inside} of {seeds} | {above} of {seeds} |"
            )


def _true_losses(world: World, labels: list[int], sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([learned(world, labels[:n])[1] for n in sizes], dtype=torch.float64)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tables", nargs="+", choices=("labels", "estimate"),
                        default=("labels", "estimate"))  # fmt: skip
    parser.add_argument("--pools", nargs="+", choices=(*POOLS, "demo"), default=POOLS)
    parser.add_argument("--work", type=Path, default=Path(".rlhf/bench/labelling"),
                        help="keeps the curves and the picture")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="into the page of the docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"labels": labels_table, "estimate": estimate_table}
    for name in arguments.tables:
        rows = []
        for row in tables[name](arguments.pools, arguments.seeds, arguments.work):
            print(row, flush=True)
            rows.append(row)
        if arguments.write:
            begin, end = f"<!-- {name}: benchmarks/labelling.py -->", f"<!-- end of {name} -->"
            put_between("\n".join(rows), PAGE, begin, end)


if __name__ == "__main__":
    main()
