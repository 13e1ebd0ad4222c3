"""The model card of a policy, in the format of Hugging Face, and a description of a few lines."""

import re
from collections.abc import Iterator, Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rlhf_core.errors import printable
from rlhf_core.evaluation.card.findings import findings
from rlhf_core.evaluation.card.findings import verdict as card_verdict
from rlhf_core.evaluation.scorecard import Arm, Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.redaction import masked
from tasks.lineage.records import Saw
from tasks.lineage.words import lines_of
from tasks.pages import charts
from tasks.pages.facts import Facts
from tasks.pages.run_page import basics
from tasks.pages.sentences import gate, judge, notes, verdict
from tasks.pages.texts import duration, shown
from tasks.registry.refs import ModelRef

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = re.compile(r"\.(jsonl?|csv|parquet|gguf|gz|zst|txt|tsv)$", re.IGNORECASE)
_MEASURES = {
    "true_reward": "Known true reward",
    "proxy_reward": "Reward of the reward model (normalised)",
    "kl": "KL to SFT (nats a sequence)",
    "length": "Length (tokens)",
    "distinct_2": "Distinct-2",
    "perplexity": "Perplexity under SFT",
}
_TABLES = ("demonstrations", "preferences", "prompts")


def model_card(facts: Facts, policy: ModelRef, saw: Saw | None = None) -> str:
    """The README.md of a policy: metadata that the hub understands, and the facts for people.

    Args:
        saw: what it was trained on, with the models that it was made from. Annotators are counted
            and not named: a card is copied with the model, and nobody is erased from copies.
    """
    data = _metadata(facts, policy)
    body = "\n".join(_body(facts, policy, saw))
    return masked(
        str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=True))
    )


def description(facts: Facts, policy: ModelRef) -> str:
    """What the registry shows beside a version: Markdown of a few lines."""
    known = dict(basics(facts))
    lines = [
        f"**{_text(verdict(facts).sentence)}**",
        "",
        *(f"{_text(detail)}\n" for detail in verdict(facts).details),
        *(
            f"- {name}: {_text(known[name])}"
            for name in ("Data", "Base model", "Algorithm", "Seed")
        ),
        *(f"- {name}: {_text(known[name])}" for name in ("Code", "Machine")),
        *(f"- Reward model: {_text(card_verdict(card))}" for card in [facts.card] if card),
        *(f"- Doubt: {_text(line)}" for line in _doubts(facts)),
        f"- [The report of the run]({facts.page_url}); README.md of this version is its model card",
    ]
    return masked("\n".join(lines))


def _metadata(facts: Facts, policy: ModelRef) -> ModelCardData:
    base = facts.params.get("model.source", "")
    paths = [facts.params.get(f"data.{table}.path", "") for table in _TABLES]
    datasets = list(dict.fromkeys(filter(_on_hub, paths)))
    results = list(_results(facts.scorecard)) if facts.scorecard else []
    return ModelCardData(
        model_name=f"{policy.name} version {policy.version}",
        base_model=base if _on_hub(base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in ("rlhf", facts.algorithm, "rlhf-pipeline") if tag],
        datasets=datasets or None,
        eval_results=results or None,
    )


def _on_hub(name: str) -> bool:
    """Whether it is the id of something on the hub, and not a file or folder of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not _FILE.search(name)


def _results(scorecard: Scorecard) -> Iterator[EvalResult]:
    for match in scorecard.comparisons:
        if match.candidate == "policy":
            over = f"over {charts.NAMES[match.opponent]}"
            basis = {"judge": match.judge, "prompts": match.prompts}
            yield _result("win_rate", f"Win rate {over}", match.win_rate, basis)
            if match.length_controlled is not None:
                name = f"Win rate {over} at equal length"
                yield _result("win_rate_at_equal_length", name, match.length_controlled, basis)
    policy = scorecard.arm("policy")
    for name, title in _MEASURES.items():
        value = getattr(policy, name, None)
        if isinstance(value, tuple):
            yield _result(name, title, Interval(*value), {})
        elif value is not None:
            yield _result(name, title, Interval(value, value, value), {})


def _result(kind: str, name: str, value: Interval, basis: Mapping[str, object]) -> EvalResult:
    middle, low, high = (round(bound, 6) for bound in value)
    bounds = {"low": low, "high": high} if low != high else {}
    return EvalResult(
        task_type="text-generation",
        dataset_type="held-out-prompts",
        dataset_name="Held-out prompts of the run",
        metric_type=kind,
        metric_name=name,
        metric_value=middle,
        metric_args={**bounds, **basis} or None,
    )


def _body(facts: Facts, policy: ModelRef, saw: Saw | None) -> Iterator[str]:
    found = verdict(facts)
    known = {**dict(basics(facts)), "Took": duration(facts.seconds)}
    yield from (f"# {policy.name}, version {policy.version}", "", f"**{_text(found.sentence)}**")
    yield from (f"\n{_text(detail)}" for detail in found.details)
    yield from ("", "## Intended use", "")
    yield (
        f"A policy of the project {_text(facts.project)}: it answers prompts like those that it "
        "was trained on. It was trained to please a reward model that learned from preferences. "
        "It was measured on held-out prompts of the same kind and on nothing else, so it is not "
        "meant for other uses without an evaluation of their own."
    )
    yield from ("", "## Training and data", "", "| | |", "|---|---|")
    yield from (f"| {name} | {_text(value)} |" for name, value in known.items())
    for kind, ref in facts.models.items():
        if kind != "policy":
            yield f"| Other model: {_text(kind.replace('_', ' '))} | `{ref.uri}` |"
    if facts.changed:
        yield from ("", "Settings that differ from the defaults:", "")
        yield from _table(
            ("Setting", "Value", "Default"), [(s.name, s.value, s.default) for s in facts.changed]
        )
    if saw is not None:
        yield from (
            "",
            "## What it saw",
            "",
            "Itself, and through the models that it was made from:",
        )
        yield from ("", "| | |", "|---|---|")
        yield from (f"| {name} | {_text(value)} |" for name, value in lines_of(saw))
        yield from (f"\n- Not known: {_text(gap)}" for gap in saw.unknown)
    if facts.scorecard is not None:
        yield from _evaluation(facts.scorecard)
    if facts.decision is not None:
        yield from ("", "## Promotion", "")
        rows = [(r.name, r.measured, r.required, r.shows, r.answer) for r in gate(facts.decision)]
        yield from _table(("Rule", "Measured", "Asked", "Can show", "Result"), rows)
        yield from (f"\n- {_text(note)}" for note in notes(facts.decision))
    yield from ("", "## Limits and known doubts", "")
    doubts = _doubts(facts)
    yield from (f"- {_text(line)}" for line in doubts)
    yield (
        "- Intervals are 95 % and over prompts; they say nothing about prompts of another kind, "
        "and nothing about harm that nobody measured."
    )
    yield from ("", "## More", "", f"- [The report of the run]({facts.page_url})")
    yield f"- [The run in MLflow]({facts.url})"


def _evaluation(scorecard: Scorecard) -> Iterator[str]:
    yield from ("", "## Evaluation", "")
    rows = [
        (
            charts.pair(match),
            charts.interval(match.win_rate),
            "" if match.length_controlled is None else charts.interval(match.length_controlled),
            judge(match),
            match.basis,
        )
        for match in scorecard.comparisons
    ]
    yield from _table(("Comparison", "Win rate", "At equal length", "Judge", "Basis"), rows)
    yield ""
    names = [charts.NAMES[arm.name] for arm in scorecard.arms]
    arms = scorecard.arms
    measures = [(title, *(_cell(arm, name) for arm in arms)) for name, title in _MEASURES.items()]
    yield from _table(("Measure", *names), [row for row in measures if any(row[1:])])


def _cell(arm: Arm, name: str) -> str:
    value = getattr(arm, name)
    if value is None:
        return ""
    if isinstance(value, tuple):
        middle, low, high = value
        return f"{middle:.3g}" if low == high else f"{middle:.3g} [{low:.3g}, {high:.3g}]"
    return f"{value:.3g}"


def _doubts(facts: Facts) -> list[str]:
    """What speaks against relying on the policy, from every part that looks for it."""
    found = []
    if facts.card is not None:
        kinds = {"doubt": "Reward model", "unknown": "Reward model, not known"}
        found += [f"{kinds[f.kind]}: {f.says}" for f in findings(facts.card) if f.kind in kinds]
    for stage in facts.stages:
        found += [f"Monitor of {stage.name}: {alarm}" for alarm in stage.alarms]
    scorecard = facts.scorecard
    if scorecard is not None and scorecard.diagnosis is not None:
        found.append(f"Diagnosis: {scorecard.diagnosis.says}")
    if scorecard is not None and scorecard.judge is not None and scorecard.judge.worst_canary:
        worst = scorecard.judge.worst_canary
        found.append(
            f"The judge prefers a known-bad answer ({worst.kind}) in "
            f"{charts.interval(worst.beats_real)} of the prompts."
        )
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, without the columns that are empty."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    yield "| " + " | ".join(header[i] for i in kept) + " |"
    yield "|---" * len(kept) + "|"
    for row in rows:
        yield "| " + " | ".join(_text(row[i]) for i in kept) + " |"


def _text(text: str) -> str:
    """A text of others inside Markdown: one line, no HTML, no end of a cell, no link or picture."""
    line = " ".join(printable(shown(text)).split())
    return re.sub(r"([\\|`*\[\]])", r"\\\1", line).replace("<", "&lt;").replace(">", "&gt;")
