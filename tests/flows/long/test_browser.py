"""The Prefect UI as a person uses it, in a real browser: start, cancel, approve, read the report.

Needs chromium and playwright (`pip install -e '.[browser]'`), and minutes: runs with RLHF_FAULTS=1.
With RLHF_SHOTS=FOLDER each test leaves pictures of what it saw there.
"""

import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from servers import Servers, wait_until

CHROMIUM = shutil.which("chromium")
TINY = Path(__file__).parents[1] / "tiny.yaml"
LONG = {"iterations": 2000, "rollout_size": 16, "batch_size": 16, "epochs": 1}
pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser, request, servers):
    """A page of a browser that was signed in by links, as a person does it."""
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.set_default_timeout(30_000)
    opened.goto(servers.link("mlflow"))
    opened.get_by_text("Experiments").first.wait_for()
    opened.goto(servers.link("prefect"))
    opened.get_by_text("Deployments").first.wait_for()
    yield opened
    if folder := os.environ.get("RLHF_SHOTS"):
        opened.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    opened.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    running = Servers(folder)
    configs = folder / "configs"
    configs.mkdir()
    tiny = yaml.safe_load(TINY.read_text())
    all_pass = {"min_win_rate": 0, "max_kl": 1000, "max_length_ratio": 100, "min_distinct_ratio": 0}
    all_pass |= {"max_sign_excess": 1, "min_reward_accuracy": 0, "at_alarm": "show"}
    asking = {"approval": "person", **all_pass}
    known = {"tiny": tiny, "long": {**tiny, "ppo": LONG}, "asking": {**tiny, "promotion": asking}}
    for name, config in known.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump({**config, "project": name}))
    try:
        for name in ("prefect", "mlflow"):
            running.start(name)
        running.rlhf("deploy", configs)
        running.start("worker")
        yield running
    finally:
        running.close()


def test_without_a_link_nothing_is_shown(browser, servers):
    stranger = browser.new_context().new_page()
    stranger.goto(servers.addresses.prefect)
    stranger.get_by_text(re.compile("password|login", re.IGNORECASE)).first.wait_for()
    with pytest.raises(Exception, match="ERR_INVALID_AUTH_CREDENTIALS"):
        stranger.goto(servers.addresses.mlflow)
    used = servers.link("mlflow")
    assert browser.new_context().new_page().goto(used).ok
    assert browser.new_context().new_page().goto(used).status == 403
    stranger.context.close()


def test_a_page_of_others_in_the_same_browser_starts_nothing(page, servers):
    """The browser is signed in, and the page knows the address of a deployment."""
    deployment = servers.ask("/deployments/name/rlhf/tiny")["id"]
    before = servers.ask("/flow_runs/count", {})
    url = f"{servers.addresses.prefect}/api/deployments/{deployment}/create_flow_run"
    runs = f"{servers.addresses.mlflow}/api/2.0/mlflow/experiments/create"
    page.goto("data:text/html,<title>evil</title>")
    answers = page.evaluate(
        """async (urls) => Promise.all(urls.flatMap(url => ["text/plain", "application/json"].map(
            type => fetch(url, {
                method: "POST", credentials: "include",
                headers: {"Content-Type": type}, body: '{"name": "evil"}',
            }).then(answer => answer.status, error => "refused")
        )))""",
        [url, runs],
    )
    assert answers == ["refused"] * 4
    assert servers.ask("/flow_runs/count", {}) == before
    assert servers.rows("select count(*) from experiments where name = 'evil'") == [(0,)]


@pytest.mark.parametrize("server", ["prefect", "mlflow"])
def test_the_pages_ask_nobody_else(page, servers, server):
    """Neither by themselves nor if a script of theirs wanted to."""
    heard = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    asked = set()
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for path in ("/", "/v2/"):
            page.goto(getattr(servers.addresses, server) + path)
            page.wait_for_timeout(3000)
            home = f"http://127.0.0.1:{other.server_port}/home"
            phone = "url => fetch(url).then(() => 'answered', () => 'stopped')"
            assert page.evaluate(phone, home) == "stopped"
        other.shutdown()
    assert heard == []
    own = {urlsplit(address).netloc for address in servers.addresses[:2]}
    assert asked - own - {""} <= {f"127.0.0.1:{other.server_port}"}  # "": data: and blob:


def open_form(page, servers, preset):
    """The form that starts a run of a preset."""
    found = servers.ask(f"/deployments/name/rlhf/{preset}")
    page.goto(f"{servers.addresses.prefect}/deployments/deployment/{found['id']}/run")


def field(page, name):
    """The input of the form's first field of that name."""
    of_field = (
        "xpath=ancestor::div[contains(@class, 'schema-form-property')]"
        "[contains(@class, 'p-label')][1]"
    )
    label = page.locator("span.schema-form-property__label", has_text=name).first
    return label.locator(of_field).locator("input").first


def test_a_run_from_its_form_to_its_report(page, servers):
    open_form(page, servers, "tiny")
    form = page.url
    field(page, "kl_coef").fill("-1")
    page.get_by_role("button", name="Submit").click()
    refused = re.compile("(greater than or equal to|less than the minimum of) 0")
    page.get_by_text(refused).first.wait_for()
    assert page.url == form
    field(page, "kl_coef").fill("0.17")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile("tab=Runs"))
    newest = {"limit": 1, "sort": "START_TIME_DESC"}
    (flow_run,) = (run["id"] for run in servers.ask("/flow_runs/filter", newest))
    page.goto(f"{servers.addresses.prefect}/runs/flow-run/{flow_run}")
    assert servers.ask(f"/flow_runs/{flow_run}")["parameters"]["config"]["ppo"]["kl_coef"] == 0.17

    page.get_by_text("tiny/tiny#1").first.wait_for()
    assert servers.until(flow_run, "Completed", "Failed") == "Completed"
    page.get_by_text("Completed", exact=True).first.wait_for()

    query = {"artifacts": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200}
    artifacts = {a["key"]: a for a in servers.ask("/artifacts/filter", query)}
    address = f"{servers.addresses.prefect}/artifacts/artifact"
    page.goto(f"{address}/{artifacts['tiny-report']['id']}")
    page.get_by_text("promoted").first.wait_for()
    page.goto(f"{address}/{artifacts['tiny-ppo-mlflow']['id']}")
    page.goto(page.get_by_role("link", name="tiny ppo in MLflow").get_attribute("href"))
    page.get_by_text("ppo-seed-0").first.wait_for()


def test_cancel_stops_a_training_within_seconds(page, servers):
    flow_run = servers.trigger("rlhf/long", {})
    wait_until(lambda: servers.steps("ppo") > 0, 240)
    page.goto(f"{servers.addresses.prefect}/runs/flow-run/{flow_run}")
    page.get_by_role("button", name="Cancel").first.click()
    page.get_by_role("button", name="Confirm").click()
    ended = "select 1 from runs where name like 'ppo-%' and status = 'KILLED'"
    wait_until(lambda: servers.rows(ended), 20)
    # The process says Crashed at its end, and the worker has the last word.
    servers.until(flow_run, "Cancelled", seconds=90)
    page.get_by_text("Cancelled", exact=True).first.wait_for()


def test_a_person_approves_in_the_form(page, servers):
    flow_run = servers.trigger("rlhf/asking", {})
    servers.until(flow_run, "Suspended", "Failed", "Completed")
    page.goto(f"{servers.addresses.prefect}/runs/flow-run/{flow_run}")
    page.get_by_role("button", name="Resume").first.click()
    choice = page.locator(".schema-form-property-string button.p-select-button__control")
    choice.focus()
    page.keyboard.press("ArrowDown")
    page.get_by_role("option", name="yes").click()
    texts = page.locator(".p-modal textarea")
    texts.nth(0).fill("Ada")
    texts.nth(1).fill("reads well")
    page.get_by_role("button", name="Submit").click()
    assert servers.until(flow_run, "Completed", "Failed") == "Completed"
    said = servers.rows("select value from tags where key in ('approved', 'approved_by', 'reason')")
    assert any("Ada" in value for (value,) in said)
