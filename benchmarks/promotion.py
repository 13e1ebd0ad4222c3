"""The promotion gate under simulated verdicts: what it promotes, look by look.

    python benchmarks/promotion.py --trials 200 --write

Each trial is the reign of a champion. At every look a new policy, SFT and the champion answer the
same prompts several times; what an answer is worth to the judge is drawn, with an effect of policy
and prompt that all answers share. Verdicts, win rates and win rates at equal length are those of an
evaluation (`play`, `sum_up`, `at_equal_length`), the look has its share of alpha, and `decide` says
whether the policy is promoted, with every rule that such a scorecard allows. The trial ends there.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pages import put_between
from scipy import stats
from torch import Tensor

from rlhf_core.evaluation.answers import Answers
from rlhf_core.evaluation.comparison import Match, at_equal_length, play, sum_up
from rlhf_core.evaluation.scorecard import Arm, ArmName, PromptLeaks, PromptSlice, Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.decision import Decision
from rlhf_core.promotion.evidence import prompts_needed
from rlhf_core.promotion.facts import Facts
from rlhf_core.promotion.looks import first_alpha, take_look
from rlhf_core.promotion.rules import decide
from rlhf_core.seeding import generator
from rlhf_core.settings.promotion import PromotionConfig

HERE = Path(__file__).parent
LINES = HERE / "promotion.jsonl"
BEGIN = "<!-- written by promotion.py -->"
END = "<!-- end of what promotion.py has written -->"
SPREAD = 12.0  # characters, of the length of an answer
LENGTH = 60.0  # characters, mean


@dataclass(frozen=True)
class World:
    """How a policy compares with the champion and with SFT, in truth."""

    name: str
    says: str  # what is planted
    asked: str  # what is asked of the gate
    prompts: int
    looks: int = 1
    over_champion: float = 0.5  # win rates at equal length
    over_sft: float = 0.62
    answers: int = 2
    agreement: float = 1.0  # variance of the effect of a policy on a prompt, beside 1 of an answer
    tie: float = 0.1  # grid of what answers are worth; the same value is a tie
    longer: float = 0.0  # characters, mean, that the policy writes more
    bias: float = 0.0  # worth of SPREAD characters to the judge
    bad_slice: float | None = None  # win rate over both in a protected quarter of the prompts


def worlds() -> list[World]:
    """The planted worlds."""
    effect = 0.05
    enough = prompts_needed(effect, 0.5, first_alpha(PromotionConfig().alpha))
    assert enough is not None
    return [
        World(
            "the same again",
            "each new policy is as good as the champion, and better than SFT",
            "at most 5 %",
            prompts=91,
            looks=20,
        ),
        World(
            "the same again, one answer",
            "as above, of 1 answer to each prompt, without ties",
            "at most 5 %",
            prompts=91,
            looks=20,
            answers=1,
            tie=0.0,
        ),
        World(
            "five points",
            f"a true win rate of {0.5 + effect} over the champion, at its first look",
            "at least 80 %",
            prompts=enough,
            over_champion=0.5 + effect,
        ),
        World(
            "five points, one answer",
            "as above, of 1 answer to each prompt, without ties",
            "at least 80 %",
            prompts=enough,
            over_champion=0.5 + effect,
            answers=1,
            tie=0.0,
        ),
        World(
            "padding",
            "answers a fifth longer and a little worse, under a judge that likes them longer",
            "never",
            prompts=200,
            over_champion=0.45,
            over_sft=0.45,
            longer=12.0,
            bias=1.2,
        ),
        World(
            "length alone",
            "as above, and no worse at equal length",
            "alpha, 2.5 %",
            prompts=200,
            over_champion=0.5,
            over_sft=0.5,
            longer=12.0,
            bias=1.0,
        ),
        World(
            "twice as long",
            "hardly any answer is as short as the other, so that nobody can tell the rest",
            "never",
            prompts=200,
            over_champion=0.5,
            over_sft=0.5,
            longer=58.0,
            bias=0.3,
        ),
        World(
            "bad slice",
            "much better on three quarters of the prompts, worse on the protected quarter",
            "never",
            prompts=200,
            over_champion=0.72,
            over_sft=0.8,
            bad_slice=0.3,
        ),
    ]


def trial(world: World, seed: int) -> tuple[int, list[Decision]]:
    """The look at which a policy is promoted, 0 for none, and the decisions until then."""
    config = PromotionConfig(protected=("kind",) if world.bad_slice is not None else ())
    spent, decisions = list[float](), list[Decision]()
    for number in range(1, world.looks + 1):
        look = take_look(number, config.alpha, spent, "models:/simulated-policy/1")
        spent.append(look.alpha)
        matches = evaluate(world, stream := seed * 1000 + number)
        facts = Facts(look=look, alarms={})
        decision = decide(config, scorecard(world, matches, stream), facts)
        # A fit at equal length is slow, and may only refuse: it is made where the rest does not.
        if all(rule.passed is not False or EQUAL in rule.name for rule in decision.rules):
            rates = at_equal_length(matches, stream)
            decision = decide(config, scorecard(world, matches, stream, rates), facts)
        decisions.append(decision)
        if decision.promote:
            return number, decisions
    return 0, decisions


EQUAL = "equal length"


def evaluate(world: World, seed: int) -> list[Match]:
    """Answers of three arms, compared by a judge that goes by their worth and their length."""
    draws = generator(seed, "benchmark/promotion")
    arms: dict[ArmName, Answers] = {"policy": _answers(world, draws, world.longer)}
    for name, rate in (("sft", world.over_sft), ("champion", world.over_champion)):
        arms[name] = _answers(world, draws, 0.0, behind=_behind(world, rate))
    prompts = [f"prompt {number}" for number in range(world.prompts)]
    return [play(("policy", name), arms, prompts) for name in ("sft", "champion")]


def _behind(world: World, rate: float) -> Tensor:
    """(P,) by how much the answers of an opponent are worth less, for this win rate over it."""
    rates = torch.full((world.prompts,), rate, dtype=torch.float64)
    if world.bad_slice is not None:
        rates[::4] = world.bad_slice
    scale = math.sqrt(2 * (1 + world.agreement))
    return torch.tensor(stats.norm.ppf(rates.numpy())) * scale


def _answers(
    world: World, draws: torch.Generator, longer: float, behind: Tensor | float = 0.0
) -> Answers:
    shape = world.prompts, world.answers
    noise = torch.randn(*shape, generator=draws, dtype=torch.float64)
    effect = torch.randn(world.prompts, generator=draws, dtype=torch.float64)
    worth = noise + (math.sqrt(world.agreement) * effect - behind).unsqueeze(1)
    lengths = LENGTH + longer + SPREAD * torch.randn(*shape, generator=draws, dtype=torch.float64)
    lengths = lengths.round().clamp_min(1)
    worth = worth + world.bias * lengths / SPREAD
    if world.tie:
        worth = (worth / world.tie).round()
    zero = torch.zeros(world.prompts * world.answers)
    return Answers(
        texts=["x" * int(length) for length in lengths.flatten().tolist()],
        prompt=torch.arange(world.prompts).repeat_interleave(world.answers),
        tokens=lengths.flatten() / 4,
        proxy=worth.flatten(),
        true=None,
        kl=zero,
        sft_logprob=zero,
    )


def scorecard(
    world: World,
    matches: list[Match],
    seed: int,
    equal: list[Interval | None] | None = None,
) -> Scorecard:
    """The scorecard of these matches; all that is not compared is in order."""
    rates = equal or [None] * len(matches)
    longer = {"policy": world.longer}
    arms = tuple(
        Arm(
            name=name,
            proxy_reward=Interval(0, 0, 0),
            true_reward=None,
            kl=Interval(4, 4, 4),
            perplexity=3,
            length=(LENGTH + longer.get(name, 0.0)) / 4,
            distinct_1=0.5,
            distinct_2=0.5,
            signs={"list": Interval(0.01, 0, 0.05)},
        )
        for name in ("sft", "policy", "champion")
    )
    quarter = tuple(range(0, world.prompts, 4))
    others = tuple(number for number in range(world.prompts) if number % 4)
    return Scorecard(
        arms=arms,
        comparisons=tuple(
            sum_up(match, seed, rate) for match, rate in zip(matches, rates, strict=True)
        ),
        slices=(
            PromptSlice(column="kind", value="rare", prompts=quarter),
            PromptSlice(column="kind", value="common", prompts=others),
        ),
        leaks=PromptLeaks(prompts=world.prompts, equal=0, near=0, compared=1000, of=1000),
    )


def measure(world: World, trials: int) -> dict[str, Any]:
    """What the gate does in a world, as a line of the table."""
    promoted, refused = 0, dict[str, int]()
    seen: dict[str, list[float]] = {}
    for seed in range(trials):
        at, decisions = trial(world, seed)
        promoted += bool(at)
        for decision in decisions:
            for rule in decision.rules:
                if rule.passed is False:
                    refused[rule.family] = refused.get(rule.family, 0) + 1
                if rule.family in ("win rate", "win rate at equal length") and rule.p is not None:
                    seen.setdefault(rule.name, []).append(float(rule.measured.split()[0]))
    return {
        **{name: asdict(world)[name] for name in ("name", "says", "asked", "prompts", "looks")},
        "answers": world.answers,
        "trials": trials,
        "promoted": promoted,
        "measured": {name: sum(v) / len(v) for name, v in seen.items()},
        "refused": refused,
        "date": datetime.now(UTC).date().isoformat(),
    }


def render(lines: list[dict[str, Any]]) -> str:
    """The table."""
    return "\n".join(_rows(lines))


def _rows(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| planted | prompts × answers, looks | win rate over the champion: raw, at equal length "
        "| asked | promoted |"
    )
    yield "|---|---|---|---|---|"
    for line in lines:
        found = line["measured"]
        raw, equal = (found.get(f"win rate over champion{end}") for end in ("", " at equal length"))
        rates = ", ".join("–" if rate is None else f"{rate:.3f}" for rate in (raw, equal))
        share = line["promoted"] / line["trials"]
        yield (
            f"| {line['name']}: {line['says']} | {line['prompts']} × {line['answers']}, "
            f"{line['looks']} | {rates} | {line['asked']} | **{line['promoted']} of "
            f"{line['trials']}** ({share:.1%}) |"
        )
    yield ""
    dates = " to ".join(sorted({lines[0]["date"], lines[-1]["date"]}))
    yield (
        f"{dates}. Win rates are means over all looks; at equal length over those that no other "
        "rule refused, which are chosen for that and so too high."
    )


def read(path: Path) -> list[dict[str, Any]]:
    """What was measured, a line for each world."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="measure these worlds; without it, all")
    parser.add_argument(
        "--write", action="store_true", help="keep what was measured, in promotion.jsonl and README"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = {line["name"]: line for line in read(LINES)}
    for world in worlds():
        if arguments.only is None or world.name in arguments.only:
            lines[world.name] = measure(world, arguments.trials)
            print(json.dumps(lines[world.name]), flush=True)
    found = [lines[world.name] for world in worlds() if world.name in lines]
    print(render(found))
    if arguments.write:
        LINES.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
        put_between(render(found), HERE / "README.md", BEGIN, END)


if __name__ == "__main__":
    main()
