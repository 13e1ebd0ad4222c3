"""A person is erased while the page is open in a browser, which sends what it still has."""

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from rlhf_core.errors import DataError
from tasks.feedback.erasure import requests, votes
from tasks.feedback.erasure.names import Name
from tasks.feedback.page.app import create_app
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair

URL = "http://127.0.0.1:4300"


def test_a_browser_that_was_offline_is_signed_out_and_its_vote_not_kept(store, project):
    project.content.add(
        NewPair(f"p{n}", Answer(f"a{n}"), Answer(f"b{n}"), wanted=1) for n in range(3)
    )
    session = store.door.enter(project.people.invite(name="Ada"))
    who = store.door.who(session)
    rules = project.rules
    project.people.agree(
        who.annotator, version=rules.consent_version, text=rules.consent, licence=rules.licence
    )
    client = TestClient(create_app(store), base_url=URL, raise_server_exceptions=False)
    client.cookies.set(client.app.state.address.cookie, session)
    client.headers["X-CSRF-Token"] = who.csrf
    first, second = (task["task"] for task in client.get("/api/tasks").json()["tasks"])
    vote = {"task": first, "choice": "left", "key": f"{1:032x}"}
    assert client.post("/api/votes", json=vote).status_code == 204
    late = {"task": second, "choice": "left", "key": f"{2:032x}"}

    request = requests.begin(store, who.pseudonym, "", "admin")
    votes.sign_out(request)
    assert client.post("/api/votes", json=late).status_code == 401  # half way
    name = Name(who.pseudonym, telling=True)
    assert votes.erase_rows(request, name).judgments == 1
    requests.finish(store, request)
    for send in (vote, late):  # the one that was kept does not come back either
        answer = client.post("/api/votes", json=send)
        assert answer.status_code == 401
        assert who.pseudonym not in answer.text
    assert client.get("/api/tasks").status_code == 401
    with store.database.reading() as reading:
        assert reading.scalar(select(func.count()).select_from(Assignment)) == 0
        assert reading.scalar(select(func.count()).select_from(Annotator)) == 0
        counted = reading.execute(select(Pair.votes, Pair.taken, Pair.state)).all()
        assert {tuple(row) for row in counted} == {(0, 0, "open")}
        [row] = reading.scalars(select(Judgment)).all()
    assert (row.annotator_id, row.vote, row.erasure) == (None, "withdrawn", request.id)
    with pytest.raises(DataError, match="nobody in any feedback project"):
        requests.begin(store, who.pseudonym, "", "admin")
