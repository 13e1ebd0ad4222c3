"""The page of a run: whole, safe against texts of others, and honest about what is missing."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recorded_runs import DEFAULTS, REFUSED, scorecard

from rlhf_core.promotion.decision import Decision
from tasks.pages import publish
from tasks.pages.publish import write_run_page
from tasks.pages.run_page import run_page
from tasks.pages.sentences import gate, verdict
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import ModelRef

HOSTILE = (
    "</p><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\x1b[31m\u202eevil"
)
ANSWERS = [
    ("Is it good?", "sft", "It is long."),
    ("Is it good?", "policy", "It is short."),
    (HOSTILE, "sft", HOSTILE),
    (HOSTILE, "policy", "ok " + "word " * 1_000_000),
]
CURVES = {
    "sft": {"loss": [3.0, 2.0, 1.0], "held_out/loss": [2.5]},
    "ppo": {"objective/kl": [0.0, 1.0, 2.0], "objective/score": [0.1, 0.5, 0.4]},
}


class Document(HTMLParser):
    """The elements of a page, and what is wrong with it."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.ids = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def require_self_contained(html):
    """Nothing runs, nothing is asked for; links are for people who click."""
    page = Document(html)
    assert "default-src 'none'" in html
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "xlink:href", "data", "poster", "background"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        if tag != "a":
            assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", html)
    return page


PAGES = {}  # made once


@pytest.fixture
def whole(request):
    if not PAGES:
        recorded, settings = request.getfixturevalue("recorded"), {"kl_coef": 0.3, "iterations": 5}
        PAGES["whole"] = run_page(*recorded(ANSWERS, card=scorecard(), curves=CURVES, ppo=settings))
    return PAGES["whole"]


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_says_what_came_of_the_run(whole):
    require_self_contained(whole)
    text = text_of(whole)
    for part in (
        "The new policy was not promoted, and there is still no champion",
        "What speaks against it: length, not approved by Ada.",
        "win 75 % (55 % to 95 %) of the comparisons",
        "The reward model is at fault.",
        "65 % (45 % to 85 %)",  # at equal length
        "ppo.kl_coef 0.3 0.1",
        "26 requests, 4,321 tokens, 1 min 15 s",
        "padded",
        "from 3 at step 1 to 1 at step 3",
    ):
        assert part in text, part
    assert "dpo.iterations" not in text  # of an algorithm that did not run
    assert len(whole) < 1_000_000


def test_the_table_of_the_gate_has_every_rule(whole):
    rows = re.findall(r"<tr>(.*?)</tr>", whole.partition('id="gate"')[2].partition("</table>")[0])
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    texts = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in cells]
    assert texts == [
        ["Result", "Rule", "Measured", "Asked", "p and level", "Can show"],
        ["FAIL", "length limits", "41 tokens", "at most 40", "", ""],
        [
            *("pass", "win rate over sft win rate", "0.750", "above 0.5", "0.012 &lt; 0.025"),
            "0.08 in 80 % of the evaluations",
        ],
        ["n/a", "canaries limits", "none", "at most 0.5", "", ""],
    ]
    text = text_of(whole)
    assert "FAIL: not approved by Ada" in text
    assert "look 2 at this opponent (models:/p-policy/1)" in text
    assert "5 %; 2 % are spent" in text.replace("spend is ", "")


def test_texts_of_models_are_texts(whole):
    assert "<script>alert" not in whole
    assert "&lt;script&gt;alert(1)" in whole
    assert "\x1b" not in whole
    assert "\u202e" not in whole
    assert "It is<del> long</del>." in whole
    assert "It is<ins> short</ins>." in whole
    assert "more characters are left out" in whole


def test_a_run_that_failed_has_a_page_that_says_where_and_why(recorded):
    facts, run = recorded(decision=None, curves={"sft": {"loss": [1.0]}}, error=f"boom {HOSTILE}")
    page = run_page(facts, run)
    require_self_contained(page)
    text = text_of(page)
    assert "This run failed in the stage sft: RuntimeError: boom" in text
    assert "the evaluation: this run has none" in text
    assert "the decision about promotion: this run has none" in text
    assert 'id="wins"' not in page
    assert 'href="#wins"' not in page


def test_lost_files_are_named_and_the_rest_is_there(recorded, home):
    facts, _ = recorded(ANSWERS, card=scorecard(), curves=CURVES)
    for kind in ("result.json", "evaluation_samples.json"):
        for file in home.glob(f"mlflow/artifacts/**/{kind}"):
            file.write_text("{not json")
    output = home / "new" / "page.html"
    record = Record.open()
    said = write_run_page(facts.run_id, output, defaults=DEFAULTS, settings=record.settings)
    assert said == "This run ended without a decision about promotion."
    page = output.read_text(encoding="utf-8")
    require_self_contained(page)
    for part in ("the numbers of the evaluation (", "the table evaluation_samples ("):
        assert part in page
    assert "from 3 at step 1 to 1 at step 3" in page


def test_a_decision_of_an_earlier_release_has_a_table_too(recorded):
    old = Decision(
        promote=True,
        reasons=(
            "pass: win rate over sft 0.912 [0.885, 0.937] by true_reward, from 4 answers to each "
            "of 91 held-out prompts; the lower bound must exceed 0.6",
            "FAIL: KL to SFT 4.72 nats per sequence; at most 1.00",
            "pass: distinct-2 0.162; at least 0.027",
            "FAIL: KL to SFT is unknown, because the tokenizers differ; at most 1.00",
            "pass: approved by Ada (reads; well)",
        ),
    )
    assert [(row.name, row.measured[:5], row.answer) for row in gate(old)] == [
        ("KL to SFT", "4.72 ", "FAIL"),
        ("KL to SFT is unknown, because the tokenizers differ; at most 1.00", "", "FAIL"),
        ("win rate over sft", "0.912", "pass"),
        ("distinct-2", "0.162", "pass"),
        ("approved by Ada (reads; well)", "", "pass"),
    ]
    facts, run = recorded(decision=old)
    assert verdict(facts).kind == "good"
    require_self_contained(run_page(facts, run))


def test_who_approved_later_is_said(recorded):
    facts, run = recorded()
    assert verdict(facts).kind == "bad"
    record = Record.open()
    record.add_tags(run.info.run_id, {tags.APPROVED: tags.WAITING})
    found = publish.gather(record, record.client.get_run(run.info.run_id), DEFAULTS)
    assert verdict(found) == ("waiting", "The new policy waits for a person to approve it.", ())
    said = {tags.APPROVED: "true", tags.APPROVED_BY: "Ada", tags.PROMOTED: "true"}
    record.add_tags(run.info.run_id, said)
    found = publish.gather(record, record.client.get_run(run.info.run_id), DEFAULTS)
    assert "was approved by Ada" in verdict(found).sentence


def test_a_tournament_is_shown_from_its_tables(recorded):
    rows = {"checkpoint": ["10", HOSTILE], "strength": [1.5, 2.0], "chosen": [False, True]}
    facts, run = recorded(tables={"tournament": rows})
    page = run_page(facts, run)
    require_self_contained(page)
    assert "<td>1.5</td><td>no</td>" in page
    assert "&lt;script&gt;" in page


def test_a_report_never_fails_the_run(recorded, monkeypatch, caplog):
    facts, _ = recorded(card=scorecard())
    record = Record.open()
    monkeypatch.setattr(publish, "run_page", lambda *_: 1 / 0)
    run = type("Run", (), {"run_id": facts.run_id, "project": "p"})()
    policy = {"policy": ModelRef(name="nothing", version=1)}
    publish.publish_report(record, run, DEFAULTS, scorecard(), REFUSED, None, policy)
    assert "the page of the run could not be written" in caplog.text
    assert "the model card of models:/nothing/1 could not be written" in caplog.text


def test_a_wheel_has_the_templates():
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["tasks.pages"]
    pages = root / "tasks" / "pages"
    inside = {path for pattern in patterns for path in pages.glob(pattern)}
    assert inside == {p for p in pages.rglob("*") if p.is_file() and p.suffix in (".html", ".css")}
