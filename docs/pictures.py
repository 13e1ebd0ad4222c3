"""The pictures of the README, of this version.

    rlhf run configs/demo.yaml --set seed=1
    rlhf up &                                      # then, once it runs:
    rlhf exec prefect deployment run rlhf/demo --watch
    rlhf exec python docs/pictures.py docs/images

Needs chromium and the extra `browser`. The plots are those of the newest pipeline; the pages are
opened by sign-in links, as a person opens them.
"""

import re
import shutil
import sys
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import Page, sync_playwright
from prefect.client.orchestration import get_client

from flows.local.find import signed_in
from tasks.servers import sign_in
from tasks.settings import read_settings

FIGURES = {
    "report_card": ("report_card_slices.png", "report_card_canaries.png"),
    "ppo": ("ppo_training.png", "ppo_frontier.png"),
    "evaluation": ("evaluation_arms.png",),
}
WINDOW = {"width": 1400, "height": 900}


def plots(client: MlflowClient, folder: Path) -> None:
    """Copy the figures of the newest run of each stage."""
    experiment = client.get_experiment_by_name("demo")
    for stage, names in FIGURES.items():
        runs = client.search_runs(
            [experiment.experiment_id],
            f"tags.stage = '{stage}' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        for name in names:
            path = client.download_artifacts(runs[0].info.run_id, f"figures/{name}")
            shutil.copy(path, folder / name)


def flow_run(page: Page, address: str, folder: Path) -> None:
    """The page of the newest run of the pipeline in Prefect."""
    with get_client(sync_client=True) as prefect:
        runs = [r for r in prefect.read_flow_runs() if r.deployment_id and r.state.is_completed()]
    newest = max(runs, key=lambda run: run.start_time)
    page.goto(f"{address}/runs/flow-run/{newest.id}")
    page.get_by_role("tab", name="Task Runs").or_(page.get_by_text("Task Runs")).first.click()
    page.get_by_text("report", exact=True).first.wait_for()
    page.wait_for_timeout(4000)  # the graph is drawn
    page.screenshot(path=folder / "prefect_flow.png")


def curves(page: Page, address: str, experiment: str, folder: Path) -> None:
    """The curves of the PPO runs side by side in MLflow."""
    view = "compareRunsMode=CHART&workflowType=machine_learning"
    page.goto(f"{address}/#/experiments/{experiment}/runs?searchFilter=tags.stage%3D'ppo'&{view}")
    page.get_by_text(re.compile("^demo.*#1$")).first.wait_for()
    page.wait_for_timeout(3000)
    assistant = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if assistant.count():
        assistant.first.click()
    for parent in reversed(page.get_by_role("link", name=re.compile("^demo.*#1$")).all()):
        place = parent.bounding_box()  # its stages are folded: the plus is left of its name
        page.mouse.click(place["x"] - 32, place["y"] + place["height"] / 2)
        page.wait_for_timeout(2000)
    page.get_by_placeholder("Search metric charts").fill("objective")
    page.get_by_text("objective/kl", exact=True).first.wait_for()
    page.wait_for_timeout(6000)  # the charts are drawn
    page.screenshot(path=folder / "mlflow_runs.png")


def report(page: Page, client: MlflowClient, folder: Path) -> None:
    """The top of the report of the newest pipeline that has one."""
    experiment = client.get_experiment_by_name("demo").experiment_id
    runs = client.search_runs([experiment], "tags.stage = 'pipeline'")
    for run in runs:
        if any(file.path == "report.html" for file in client.list_artifacts(run.info.run_id)):
            page.goto(Path(client.download_artifacts(run.info.run_id, "report.html")).as_uri())
            page.screenshot(path=folder / "report_page.png")
            return


def main(folder: Path) -> None:
    """Make all pictures in a folder."""
    services, settings = signed_in(read_settings())
    client = MlflowClient()
    plots(client, folder)
    with sync_playwright() as api:
        browser = api.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(60_000)
        for address in (services.prefect, services.mlflow):
            page.goto(sign_in.link(address, settings.account))
            page.wait_for_timeout(4000)  # the page that it leads to is there
        flow_run(page, services.prefect, folder)
        experiment = client.get_experiment_by_name("demo").experiment_id
        curves(page, services.mlflow, experiment, folder)
        report(page, client, folder)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
