"""The page of a pipeline's run, for people who did not build it."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mlflow.entities import Run

from rlhf_core.evaluation.card.findings import findings
from rlhf_core.evaluation.card.findings import verdict as card_verdict
from rlhf_core.evaluation.scorecard import Scorecard
from tasks.history.overoptimisation import chart_of
from tasks.pages import charts
from tasks.pages.curves import curves
from tasks.pages.differences import marked
from tasks.pages.drawing import Drawing
from tasks.pages.facts import EVALUATION, TOURNAMENT, Facts, StageFacts
from tasks.pages.reading import Reader, Row
from tasks.pages.render import render
from tasks.pages.sentences import gate, judge, notes, verdict
from tasks.pages.texts import number, percent, shown
from tasks.record import tags

SAMPLES = 12  # prompts
TABLE_ROWS = 30
TITLES = {
    "prepare": "Preparing the data",
    "sft": "Learning from demonstrations (SFT)",
    "reward_model": "Learning what people prefer (reward model)",
    "report_card": "Examining the reward model",
    "held_out": "The reward model of the monitor (held out)",
    "ppo": "Training the policy (PPO)",
    "rloo": "Training the policy (RLOO)",
    "grpo": "Training the policy (GRPO)",
    "dpo": "Training the policy (DPO)",
    TOURNAMENT: "Tournament of checkpoints",
    EVALUATION: "Evaluation on held-out prompts",
    "promotion": "Promotion",
}
DOING = {
    "FINISHED": "done",
    "FAILED": "failed",
    "KILLED": "stopped",
    "RUNNING": "running",
    "SCHEDULED": "waiting",
}


class Sample(NamedTuple):
    """A prompt with an answer of each arm; where they differ from SFT is marked."""

    prompt: str
    answers: Sequence[tuple[str, Any, str]]  # title, HTML, rewards


class Table(NamedTuple):
    """A table of a stage."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


class Part(NamedTuple):
    """A stage with its charts."""

    stage: StageFacts
    title: str
    curves: Sequence[Drawing]


def run_page(facts: Facts, run: Run) -> str:
    """The whole page as HTML."""
    reader = facts.reader
    scorecard, card = facts.scorecard, facts.card
    made = {
        "verdict": verdict(facts),
        "gate": gate(facts.decision) if facts.decision else [],
        "notes": notes(facts.decision) if facts.decision else [],
        "wins": scorecard and reader.attempt("win rates", lambda: charts.win_rates(scorecard)),
        "comparisons": _comparisons(scorecard) if scorecard else [],
        "differences": _differences(scorecard) if scorecard else [],
        "arms": _arms(scorecard) if scorecard else [],
        "samples": list(samples(facts.samples, _titles(facts))),
        "of_samples": len({row["prompt"] for row in facts.samples}),
        "parts_of": [_part(stage, reader) for stage in facts.stages],
        "card_verdict": card and card_verdict(card),
        "findings": findings(card) if card else [],
        "card_charts": card and (reader.attempt("the report card", lambda: _cards(card)) or []),
        "chart": reader.attempt("the over-optimisation chart", lambda: _chart(facts, run)),
        "tournament": _tournament(facts),
        "lineage": lineage(facts),
        "basics": basics(facts),
        "when": when(facts.started),
        "slices": _slices(scorecard) if scorecard else [],
        "names": charts.NAMES,
        "doing": DOING,
        "kinds": {"doubt": "doubt", "unknown": "unknown", "good": "fine"},
    }
    # Last, when everything was tried.
    return render("run.html", facts=facts, missing=missing(facts), **made)


def missing(facts: Facts) -> list[str]:
    """What the page cannot show, and what could not be read."""
    absent = [
        ("the evaluation", facts.scorecard),
        ("the decision about promotion", facts.decision),
        ("the report card of the reward model", facts.card),
        ("sample answers", facts.samples),
        ("the settings that differ from the defaults", facts.changed is not None),
    ]
    return [*(f"{name}: this run has none" for name, there in absent if not there), *facts.missing]


def basics(facts: Facts) -> list[tuple[str, str]]:
    """What ran on what."""
    params = facts.params
    source, style = params.get("data.source", ""), params.get("data.prompt_style", "")
    counted = [
        (name, facts.number(f"{name}_train"), facts.number(f"{name}_eval"))
        for name in ("demonstrations", "preferences", "prompts")
    ]
    rows = ", ".join(
        f"{number(train)} {name} (and {number(held or 0)} held out)"
        for name, train, held in counted
        if train is not None
    )
    return [
        ("Project", facts.project or "unknown"),
        ("Run", facts.name),
        ("Started", when(facts.started)),
        ("Took", ""),  # a duration, which the template formats
        (
            "Data",
            shown(
                ". ".join(
                    filter(
                        None,
                        [
                            data_source(params),
                            rows,
                            "Prompts are chat messages" if style == "chat" else "",
                        ],
                    )
                ),
                600,
            )
            or source,
        ),
        ("Base model", base_model(params)),
        ("Algorithm", facts.algorithm.upper() or "unknown"),
        ("Seed", facts.seed),
        ("Code", facts.code),
        ("Machine", facts.machine),
    ]


def data_source(params: Any) -> str:
    """Where the data came from."""
    source = params.get("data.source", "")
    if source == "simulated":
        return "simulated reviews, made by a grammar, with simulated annotators"
    paths = [
        params[name]
        for table in ("demonstrations", "preferences", "prompts")
        if params.get(name := f"data.{table}.path")
    ]
    if store := params.get("data.preferences.store"):
        paths.insert(0, f"votes of the feedback project {store}")
    return ", ".join(dict.fromkeys(paths)) or source or "unknown"


def base_model(params: Any) -> str:
    """What the training started from."""
    if reused := params.get("sft.reuse"):
        return f"the SFT model {shown(reused, 200)}"
    if source := params.get("model.source"):
        return shown(source, 200)
    layers, width = params.get("model.fresh.layers"), params.get("model.fresh.width")
    if not layers:
        return "unknown"
    return f"a fresh small model with random weights ({layers} layers, width {width})"


def when(milliseconds: int | None) -> str:
    """A time as people write it, in UTC."""
    if milliseconds is None:
        return "unknown"
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def lineage(facts: Facts) -> list[tuple[str, str, str]]:
    """What came from what: a word, a name and an address, from the data to the champion."""
    found = []
    prepared = facts.stage("prepare")
    if prepared is not None:
        digest = prepared.computed.data.tags.get(tags.DATA_DIGEST, "")
        found.append(("data", f"prepared data {digest[:12]}".strip(), prepared.url))
    words = {"sft": "SFT", "reward": "reward model", "held_out": "held-out reward model"}
    words |= {"policy": "policy", "critic": "critic"}
    for kind, word in words.items():
        if (ref := facts.models.get(kind)) is not None:
            found.append((word, ref.uri, facts.version_url(ref)))
    policy, before = facts.models.get("policy"), facts.compared_with
    if (facts.promoted or (facts.decision and facts.decision.promote)) and policy is not None:
        found.append(("champion since this run", policy.uri, facts.version_url(policy)))
    if before is not None:
        word = "compared with the champion at that time"
        found.append((word, before.uri, facts.version_url(before)))
    return found


def samples(rows: Sequence[Row], titles: dict[str, str]) -> Iterator[Sample]:
    """The first prompts with the answers of each arm, compared with that of the first."""
    by_prompt: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_prompt.setdefault(str(row["prompt"]), {})[str(row["arm"])] = row
    for prompt, arms in list(by_prompt.items())[:SAMPLES]:
        there = [(name, arms[name]) for name in titles if name in arms]
        if not there:
            continue
        (first, against), *others = there
        text = str(against["response"])
        compared = [(name, row, marked(text, str(row["response"]))) for name, row in others]
        # What the first has marked is what the second lacks.
        left = compared[0][2].first if compared else marked(text, text).first
        answers = [(titles[first], left, _rewards(against))]
        answers += [(titles[name], both.second, _rewards(row)) for name, row, both in compared]
        yield Sample(shown(prompt), answers)


def _rewards(row: Row) -> str:
    words = {"reward_model": "reward model", "true_reward": "true reward"}
    known = [(word, row.get(name)) for name, word in words.items()]
    return ", ".join(
        f"{word} {value:+.2f}" for word, value in known if isinstance(value, int | float)
    )


def _titles(facts: Facts) -> dict[str, str]:
    algorithm = f" ({facts.algorithm.upper()})" if facts.algorithm else ""
    return {"sft": "SFT", "policy": f"New policy{algorithm}", "champion": "Champion before"}


def _comparisons(scorecard: Scorecard) -> list[dict[str, str]]:
    return [
        {
            "pair": charts.pair(match),
            "raw": charts.interval(match.win_rate),
            "controlled": ""
            if match.length_controlled is None
            else charts.interval(match.length_controlled),
            "counts": f"{match.wins:,} / {match.ties:,} / {match.losses:,}",
            "unanswered": f"{match.unanswered:,}",
            "judge": judge(match),
            "basis": match.basis,
        }
        for match in scorecard.comparisons
    ]


def _differences(scorecard: Scorecard) -> list[str]:
    """By how much two models differ on the same prompts, in sentences."""
    names = charts.NAMES
    return [
        f"{names[pair.first]} against {names[pair.second]}, by their win rates over "
        f"{names[pair.opponent]} on the same prompts: {100 * value:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f})"
        for pair in scorecard.differences
        for value, low, high in [pair.difference]
    ]


def _slices(scorecard: Scorecard) -> list[tuple[str, str, str]]:
    """The win rate of the policy over SFT on each slice of the prompts."""
    match = scorecard.comparison("policy", "sft")
    if match is None or not match.points:
        return []
    found = []
    for part in scorecard.slices:
        points = [match.points[i] for i in part.prompts if i < len(match.points)]
        known = [point for point in points if point is not None]
        rate = percent(sum(known) / len(known)) if known else "unknown"
        found.append((part.name, number(len(part.prompts)), rate))
    return found


def _arms(scorecard: Scorecard) -> list[tuple[str, list[str]]]:
    """The measures of each arm, as rows."""
    names = {
        "true_reward": "true reward",
        "proxy_reward": "reward model",
        "kl": "distance from SFT (KL, nats a sequence)",
        "length": "length (tokens)",
        "distinct_2": "variety (distinct-2)",
        "perplexity": "perplexity under SFT (fluency; lower is better)",
    }
    arms = scorecard.arms
    rows = [
        (title, cells)
        for name, title in names.items()
        if any(cells := [_measure(getattr(arm, name)) for arm in arms])
    ]
    for kind in dict.fromkeys(kind for arm in arms for kind in arm.signs):
        shares = [arm.signs.get(kind) for arm in arms]
        if any(share is not None and share.value > 0 for share in shares):
            cells = ["" if share is None else percent(share.value) for share in shares]
            rows.append((f"answers that look bad: {kind.replace('_', ' ')}", cells))
    return rows


def _measure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        middle, low, high = value
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]" if low != high else f"{middle:.2f}"
    return f"{value:.3g}"


def _part(stage: StageFacts, reader: Reader) -> Part:
    title = TITLES.get(stage.name, stage.name)
    what = f"the curves of {stage.name}"
    return Part(stage, title, reader.attempt(what, lambda: curves(stage, reader)) or [])


def _cards(card: Any) -> list[Drawing]:
    return list(charts.report_card(card))


def _chart(facts: Facts, run: Run) -> Drawing | None:
    chart = chart_of(facts.reader.record, run)
    return charts.over_optimisation(chart) if chart.paths else None


def _tournament(facts: Facts) -> dict[str, Any] | None:
    """The tables and pictures of a tournament, as its stage stored them."""
    stage = facts.stage(TOURNAMENT)
    if stage is None:
        return None
    reader, run = facts.reader, stage.computed
    names = [path.rpartition("/")[2].removesuffix(".json") for path in reader.paths(run, "tables")]
    tables = [table(name, reader.table(run, name)) for name in names]
    result = facts.tournament
    drawn = result and reader.attempt("the tournament", lambda: charts.tournament(result))
    # Drawn anew in the colours of the page where that is possible.
    pictures = {} if drawn else reader.figures(run)
    says = result and result.sentence()
    return {"tables": tables, "pictures": pictures, "drawn": drawn, "says": says}


def table(name: str, rows: Sequence[Row]) -> Table:
    """The first rows of a table, as texts."""
    columns = list(rows[0]) if rows else []
    cells = [[_text(row[column]) for column in columns] for row in rows[:TABLE_ROWS]]
    more = f"The first {TABLE_ROWS} of {len(rows)} rows." if len(rows) > TABLE_ROWS else ""
    return Table(name.replace("_", " "), [c.replace("_", " ") for c in columns], cells, more)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else shown(value, 500)
