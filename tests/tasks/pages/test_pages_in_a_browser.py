"""The pages in a real browser: nothing is asked, nothing is wide, and axe finds nothing serious.

Needs chromium and the extra `browser`, and half a minute: runs with RLHF_FAULTS=1. With
RLHF_SHOTS=FOLDER each page leaves pictures there.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import scorecard
from simulated_votes import Habit, simulate
from test_run_page import ANSWERS, CURVES

from rlhf_core.agreement.assess import assess
from rlhf_core.agreement.votes import Grouping
from tasks.feedback.quality.page import quality_page
from tasks.pages.comparison_page import write_comparison
from tasks.pages.run_page import run_page
from tasks.settings import read_settings

CHROMIUM = shutil.which("chromium")
WIDTHS = (1280, 360)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def pages(recorded, tmp_path):
    """The page of a run, that of a run without anything, and that of two runs."""
    first, run = recorded(ANSWERS, card=scorecard(), curves=CURVES)
    nothing, empty = recorded(decision=None, error="x" * 3000, curves={"sft": {"loss": [1.0]}})
    other, _ = recorded(ANSWERS, card=scorecard(0.2), curves=CURVES, seed=2)
    made = {name: tmp_path / f"{name}.html" for name in ("run", "failed", "compared")}
    made["run"].write_text(run_page(first, run), encoding="utf-8")
    made["failed"].write_text(run_page(nothing, empty), encoding="utf-8")
    write_comparison(first.run_id, other.run_id, made["compared"], settings=read_settings())
    for name, quality in agreement().items():
        made[name] = tmp_path / f"{name}.html"
        made[name].write_text(quality_page(quality), encoding="utf-8")
    return made


def agreement():
    """What eight people agree on of whom some have odd habits; and what a single vote says."""
    habit = {"presser": Habit(press=0.6), "quick": Habit(right=0.5, seconds=0.6)}
    people = {f"p{i:03d}-ab12": Habit(ties=0.1) for i in range(6)} | habit
    votes = simulate(people, pairs=300, gold=30, repeats=20, prompts=200)
    votes = replace(votes, at=1.75e9 + np.arange(len(votes)) * 4000.0)
    topics = Grouping(votes.pair % 3, ("law", "art", "a topic with a long name " * 5))
    whole = assess(replace(votes, groups={"topic": topics}), project="demo", snapshot="0f" * 32)
    few = assess(simulate({"a": Habit()}, pairs=1, each=1, gold=0, repeats=0), project="few")
    return {
        "agreement": whole.redacted(),
        "agreement-admin": whole,
        "agreement-few": few.redacted(),
    }


def test_each_page_offline_in_light_and_dark_wide_and_narrow(browser, pages):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs `browser`")
    for name, path in pages.items():
        for scheme in ("light", "dark"):
            for width in WIDTHS:
                context = browser.new_context(
                    color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True
                )
                page, asked, said = context.new_page(), [], []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
                page.goto(path.as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width
                paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
                if folder := os.environ.get("RLHF_SHOTS"):
                    shot = Path(folder) / f"{name}-{scheme}-{width}.png"
                    page.screenshot(path=shot, full_page=True)
                found = axe.Axe().run(page).response["violations"]
                serious = [v for v in found if v["impact"] in ("serious", "critical")]
                assert [(v["id"], v["nodes"][0]["html"]) for v in serious] == []
                assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
                assert said == []
                context.close()
