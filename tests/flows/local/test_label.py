"""`rlhf label`: from the command to a vote, how it ends, and what it refuses in a sentence."""

import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from servers import free_port, wait_until

from flows.local import find, label
from rlhf_core.errors import UserError
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import Store
from tasks.settings import Settings


@pytest.fixture
def local(tmp_path) -> Settings:
    settings = Settings.model_validate({"RLHF_HOME": tmp_path / "home"})
    find.make_home(settings)
    store = Store.open(settings)
    pairs = [NewPair(f"p{n}", Answer("yes"), Answer("no"), wanted=1) for n in range(3)]
    store.project("demo", make=True).content.add(pairs)
    store.close()
    return settings


def serve(settings, project="demo", **more):
    given = {"host": "127.0.0.1", "port": free_port(), "url": None, **more}
    label.serve_label(settings, project, **given, say=print, warn=print)


@pytest.mark.integration
def test_from_the_command_to_a_vote_and_its_end(local, tmp_path):
    port, output = free_port(), tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows", "label", "demo", "--port", str(port)],
            env={**os.environ, "RLHF_HOME": str(local.home), "OMP_NUM_THREADS": "1"},
            cwd=find.__file__.rpartition("/flows/")[0],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "to run the project" in output.read_text() or process.poll(), 120)
        assert process.poll() is None, output.read_text()
        mine, admins = re.findall(r"(http://127.0.0.1:\d+/enter/\S+)", output.read_text())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as page:
            assert "server" not in page.get("/health").headers
            assert page.post(mine, json={}).json() == {"to": "/"}
            consent = page.get("/consent").text
            page.headers["X-CSRF-Token"] = re.search(r'name="csrf" content="([^"]+)"', consent)[1]
            page.post("/consent", json={"version": "1", "agreed": True})
            task = page.get("/api/tasks").json()["tasks"][0]["task"]
            said = {"task": task, "choice": "tie", "key": "0123456789abcdef"}
            assert page.post("/api/votes", json=said).is_success
            assert page.get("/admin").status_code == 403
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as page:
            assert page.post(admins, json={}).json() == {"to": "/admin"}
            assert page.get("/admin").status_code == 200
        with pytest.raises(UserError, match=f"Port {port} is already in use: .*--port"):
            serve(local, port=port)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    said = output.read_text()
    assert "What was labelled is kept" in said
    assert "Traceback" not in said
    store = Store.open(local)
    assert [vote.vote for vote in store.project("demo").judgments.stream()] == ["tie"]
    store.close()


def test_what_cannot_be_served_is_said_in_a_sentence(local):
    with pytest.raises(UserError, match=r"no feedback project 'nope' .*rlhf feedback import nope"):
        serve(local, "nope")
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 lets other machines in.*add --url"):
        serve(local, host="0.0.0.0")
    for url in ("label.example.org", "ftp://x", "https://", "https://x/y"):
        with pytest.raises(UserError, match=r"--url is '.*without a path"):
            serve(local, url=url)


def test_a_link_is_to_where_the_page_is(local):
    given = {"name": "", "role": "annotator", "days": 1.0, "by": "me"}
    link = label.invitation(local, "demo", back="", **given)
    assert link.startswith("http://127.0.0.1:4300/enter/")
    named = local.model_copy(update={"label_public_url": "https://label.example.org"})
    assert label.invitation(named, "demo", back="", **given).startswith(
        "https://label.example.org/enter/"
    )
    with pytest.raises(UserError, match="Nobody in the project demo is called 'p9'"):
        label.invitation(local, "demo", back="p9", **given)


def test_a_server_of_votes_starts_without_torch():
    code = (
        "import sys, tasks.feedback.page.app; "
        "print({'torch', 'transformers', 'mlflow', 'scipy', 'matplotlib'} & {*sys.modules})"
    )
    root = find.__file__.rpartition("/flows/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
