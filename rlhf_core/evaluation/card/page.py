"""The report card as a page for people: what it means in sentences, then the tables."""

from collections.abc import Iterator, Sequence

import pandas as pd

from rlhf_core.evaluation.card.findings import Finding, findings, verdict
from rlhf_core.evaluation.card.report_card import ReportCard, Share
from rlhf_core.functional.interval import Interval
from rlhf_core.rewards.canaries import not_measured

_SHOWN = 20  # slices on the page; the table has them all
_KINDS = {"doubt": "What is doubtful", "unknown": "What is not known", "good": "What is good"}


def page(card: ReportCard) -> str:
    """The card as Markdown."""
    found = findings(card)
    lines = ["# Report card of the reward model", "", f"**{verdict(card)}**", ""]
    for kind, title in _KINDS.items():
        if some := [finding for finding in found if finding.kind == kind]:
            lines += [f"## {title}", "", *map(_line, some), ""]
    lines += ["## Held-out votes", "", *_basis(card), "", *_table(_measures(card)), ""]
    if card.bins:
        lines += ["## Reliability", "", *_reliability(card), ""]
    if card.slices or card.small_slices:
        lines += ["## Slices", "", *_slices(card), ""]
    if card.canaries:
        lines += ["## Canaries", "", *_canaries(card), ""]
    if card.leaks is not None:
        lines += ["## Texts that training has seen", "", *_leaks(card), ""]
    lines += [
        "Intervals are 95 % and over prompts, since votes on one prompt are not independent. "
        '"Interval unknown": there are too few prompts for one, or nothing varies.'
    ]
    return "\n".join(lines) + "\n"


def slices_table(card: ReportCard) -> pd.DataFrame:
    """Every judged slice, the worst first, and a row for those of each column that are not."""
    judged = sorted(card.slices, key=lambda part: part.accuracy.share.value)
    rows: list[dict[str, object]] = [
        {
            "column": part.column,
            "value": part.value,
            **_numbers(part.accuracy),
            "clearly_worse": part.worse,
        }
        for part in judged
    ]
    rows += [
        {
            "column": small.column,
            "value": f"{_names(small.named, small.values)}: too few prompts to judge",
            "votes": small.votes,
        }
        for small in card.small_slices
    ]
    columns = ["column", "value", "accuracy", "low", "high", "votes", "prompts", "clearly_worse"]
    return pd.DataFrame(rows, columns=columns, dtype=object)


def canaries_table(card: ReportCard) -> pd.DataFrame:
    """How often each canary beats the real answer, the worst first."""
    worst = sorted(card.canaries, key=lambda canary: -canary.beats_real.value)
    return pd.DataFrame(
        [
            {
                "canary": canary.kind,
                "beats_real": canary.beats_real.value,
                "low": canary.beats_real.low,
                "high": canary.beats_real.high,
                "prompts": canary.prompts,
                "left_out": canary.left_out,
                "example": canary.example,
            }
            for canary in worst
        ]
    )


def _line(finding: Finding) -> str:
    return f"- {finding.says}" + (f" *{finding.advice}*" if finding.advice else "")


def _basis(card: ReportCard) -> Iterator[str]:
    left_out = [
        f"{number:,} {why}"
        for number, why in (
            (card.ties, "ties, which count for the log-loss only"),
            (card.same_after_cut, "left out, whose answers are the same tokens after the cut"),
            (card.not_sampled, "not drawn (report_card.votes)"),
        )
        if number
    ]
    yield (
        f"{card.votes:,} votes with a winner on {card.prompts:,} prompts"
        + "".join(f"; {said}" for said in left_out)
        + "."
    )


def _measures(card: ReportCard) -> list[tuple[str, str, str]]:
    shares: list[tuple[str, Share | None]] = [
        ("Accuracy", card.accuracy),
        ('"Prefer the longer"', card.longer),
        ('"Prefer the answer shown first"', card.first_shown),
        ("Accuracy where the shorter answer won", card.shorter_won),
        ("Accuracy where the longer answer won", card.longer_won),
    ]
    if card.leaks is not None and card.leaks.votes:
        shares.append(("Accuracy on votes that training has not seen", card.elsewhere))
    if card.agreement is not None:
        shares += [
            ("Votes of two people on a pair agree", card.agreement.pairwise),
            ("Ceiling: a vote by the majority of the others", card.agreement.majority),
            ("Accuracy on these votes", card.agreement.accuracy),
        ]
    if card.members is not None:
        shares += [
            (f"Accuracy of member {n}", own) for n, own in enumerate(card.members.accuracies, 1)
        ]
        shares.append(("Members disagree", card.members.disagreement))
    rows = [
        (name, "unknown", "")
        if share is None
        else (name, str(share), f"{share.votes:,} on {share.prompts:,}")
        for name, share in shares
    ]
    if card.agreement is None:
        rows.append(("Ceiling: a vote by the majority of the others", "unknown", ""))
    else:
        limit = f"{card.agreement.limit:.3f}"
        rows.append(("No model exceeds, without a leak", limit, ""))
    for name, estimate, unit in (
        ("Log-loss (nats; a coin has 0.693)", card.log_loss, ""),
        ("Calibration error", card.calibration_error, ""),
        ("Spearman of reward and length", card.length_correlation, f"{card.samples:,} samples"),
    ):
        rows.append((name, "unknown" if estimate is None else str(estimate), unit))
    return rows


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    head = ["| Measure | Value | Votes on prompts |", "|---|---|---|"]
    return head + [f"| {name} | {value} | {basis} |" for name, value, basis in rows]


def _reliability(card: ReportCard) -> list[str]:
    rows = [
        f"| {dot.predicted:.3f} | {_bounds(dot.observed)} | {dot.votes:,} |" for dot in card.bins
    ]
    head = ["| Predicted | Observed | Votes, each in both orders |", "|---|---|---|"]
    return [*head, *rows]


def _slices(card: ReportCard) -> list[str]:
    judged = sorted(card.slices, key=lambda part: part.accuracy.share.value)
    lines = []
    if judged:
        lines += ["| Slice | Accuracy | Votes on prompts | |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(part.column)} = {_cell(part.value)} | {part.accuracy} | "
            f"{part.accuracy.votes:,} on {part.accuracy.prompts:,} | "
            f"{'clearly worse' if part.worse else ''} |"
            for part in judged[:_SHOWN]
        ]
        if len(judged) > _SHOWN:
            lines += ["", f"{len(judged) - _SHOWN} more are in the table report_card_slices."]
        if card.worst_slice_gap is not None:
            lines += ["", f"The worst is {card.worst_slice_gap:.3f} below the whole."]
    for small in card.small_slices:
        which = _cell(_names(small.named, small.values))
        lines += [
            "",
            f"Not judged, with fewer than {card.min_slice_prompts} prompts each: {small.column} "
            f"{which} ({small.votes:,} votes).",
        ]
    return lines


def _canaries(card: ReportCard) -> list[str]:
    rows = canaries_table(card).to_dict("records")
    lines = [
        f"How often a bad answer gets a better reward than the {card.canaries_against}:",
        "",
        "| Canary | Beats the real answer | Prompts |",
        "|---|---|---|",
        *(
            f"| {row['canary']} | {_bounds(Interval(row['beats_real'], row['low'], row['high']))} "
            f"| {row['prompts']:,} |"
            for row in rows
        ),
    ]
    if absent := not_measured(card.canaries):
        reason = "each would be a real answer or no worse than one, or there are too few prompts"
        lines += ["", f"No canary could be made of some kinds ({reason}): {', '.join(absent)}."]
    return lines


def _leaks(card: ReportCard) -> list[str]:
    leaks = card.leaks
    if leaks is None:
        return []
    searched = f"the first {leaks.compared:,} of " if leaks.compared < leaks.of else ""
    return [
        f"Of {leaks.prompts:,} held-out prompts {leaks.equal_prompts:,} equal one of training and "
        f"{leaks.near_prompts:,} nearly do; of {leaks.answers:,} held-out answers "
        f"{leaks.equal_answers:,} and {leaks.near_answers:,}. Nearly equal: at least 0.8 of their "
        f"three-word sequences are shared, with texts of {searched}{leaks.of:,} training votes."
    ]


def _numbers(share: Share) -> dict[str, object]:
    value, low, high = share.share
    return {
        "accuracy": value,
        "low": low,
        "high": high,
        "votes": share.votes,
        "prompts": share.prompts,
    }


def _bounds(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _names(named: Sequence[str], values: int) -> str:
    more = f" and {values - len(named):,} more" if values > len(named) else ""
    return ", ".join(named) + more


def _cell(text: str) -> str:
    """A text of the data in a cell: one line, short, and no end of the cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 200 else f"{line[:199]}…"
