"""The pages of whoever runs a project, and what their buttons do. Everything is for admins only."""

from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.background import BackgroundTask

from rlhf_core.errors import UserError
from tasks.feedback.admin import loops, numbers, people, writings
from tasks.feedback.admin.people import Roster
from tasks.feedback.ordering.outcome import last_order
from tasks.feedback.page.access import Admin, OwnProject, admin
from tasks.feedback.page.pages import page
from tasks.feedback.page.shield import Address
from tasks.feedback.store.people import INVITATION_DAYS, SignedIn
from tasks.feedback.store.records import ProjectRules
from tasks.feedback.store.store import FeedbackProject

router = APIRouter(prefix="/admin", dependencies=[Depends(admin)])
HIGHEST = 2**62  # of a number in an address, which the database must be able to hold
Number = Annotated[int, Query(ge=0, le=100_000)]
Before = Annotated[int | None, Query(ge=1, le=HIGHEST)]
Search = Annotated[str, Query(max_length=200)]
Id = Annotated[int, Path(ge=1, le=HIGHEST)]
Written = Literal["votes", "pairs"]
Said = dict[str, str | bool]


class _Posted(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Invite(_Posted):
    """Whom to invite."""

    name: str = Field("", max_length=200)
    email: str = Field("", max_length=320)
    role: Literal["annotator", "admin"] = "annotator"
    days: float = Field(INVITATION_DAYS, gt=0, le=people.MOST_DAYS)


class NewState(_Posted):
    """Whether somebody may label, or is let in at all."""

    state: Literal["active", "paused", "left"]


class NewRole(_Posted):
    """What somebody may do."""

    role: Literal["annotator", "admin"]


class Pause(_Posted):
    """Whether the project asks nobody for now."""

    paused: bool


class Nothing(_Posted):
    """A button without a form."""


# ---- pages ----


def _page(
    template: str, who: SignedIn, project: FeedbackProject, here: str, **content: Any
) -> Response:
    return page(
        template, csrf=who.csrf, who=who, project=project.name, rules=project.rules,
        here=here, **content,
    )  # fmt: skip


@router.get("")
def overview(who: Admin, project: OwnProject, number: Number = 0) -> Response:
    """How far the project is."""
    found = numbers.batches(project, number)
    return _page(
        "admin_overview.html",
        who,
        project,
        "overview",
        throughput=numbers.throughput(project),
        queue=numbers.queue_state(project),
        order=last_order(project),
        batches=found,
        number=number,
        is_full=len(found) == numbers.BATCHES,
    )


@router.get("/people")
def show_people(
    who: Admin, project: OwnProject, number: Number = 0, search: Search = ""
) -> Response:
    """Who is here, and how well it goes."""
    roster = Roster(project)
    count = roster.count(search)
    return _page(
        "admin_people.html",
        who,
        project,
        "people",
        people=roster.people(number, search),
        links=roster.links(),
        count=count,
        number=number,
        search=search,
        last=max(0, (count - 1) // people.PAGE),
        days=INVITATION_DAYS,
    )


@router.get("/notes")
def show_notes(
    who: Admin,
    project: OwnProject,
    search: Search = "",
    what: writings.What = "all",
    before: Before = None,
) -> Response:
    """What people wrote beside votes and skips."""
    found = writings.writings(project, what=what, search=search, before=before)
    return _page(
        "admin_notes.html",
        who,
        project,
        "notes",
        writings=found,
        search=search,
        what=what,
        before=before,
        next=found[-1].id if len(found) == writings.PAGE else None,
    )


@router.get("/rules")
def show_rules(who: Admin, project: OwnProject) -> Response:
    """The rules of the queue, to edit."""
    return _page("admin_rules.html", who, project, "rules", fields=ProjectRules.model_json_schema())


@router.get("/log")
def show_log(who: Admin, project: OwnProject, before: Before = None) -> Response:
    """Who changed what."""
    found = writings.changes(project, before=before)
    return _page(
        "admin_log.html",
        who,
        project,
        "log",
        changes=found,
        before=before,
        next=found[-1].id if len(found) == writings.PAGE else None,
    )


@router.get("/votes.jsonl")
def download(who: Admin, project: OwnProject, form: Written = "votes") -> Response:
    """The votes that count now, as a file in a form of `rlhf feedback export`."""
    from tasks.feedback.forms.options import ExportOptions  # slow, and seldom asked for
    from tasks.feedback.forms.outgoing import export_file

    folder = TemporaryDirectory(prefix="rlhf-votes-")
    path = FilePath(folder.name) / "votes.jsonl"
    try:
        export_file(project, str(path), ExportOptions(form=form), by=who.pseudonym)
    except BaseException:
        folder.cleanup()
        raise
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in project.name)
    return FileResponse(
        path,
        media_type="application/jsonl",
        filename=f"{name}-{form}.jsonl",
        background=BackgroundTask(folder.cleanup),
    )


# ---- buttons ----


@router.post("/invite")
def invite(form: Invite, who: Admin, project: OwnProject, request: Request) -> Said:
    """A link for somebody new, which is shown once."""
    roster = Roster(project)
    token = roster.invite(
        role=form.role, name=form.name.strip(), email=form.email.strip(), by=who.pseudonym,
        days=form.days,
    )  # fmt: skip
    return _link(request, token)


@router.post("/people/{id_}/link")
def link(id_: Id, _: Nothing, who: Admin, project: OwnProject, request: Request) -> Said:
    """A link with which somebody comes back."""
    return _link(request, Roster(project).link_for(id_, who.pseudonym))


def _link(request: Request, token: str) -> Said:
    address: Address = request.app.state.address
    return {"link": f"{address.public}/enter/{token}"}


@router.post("/links/{id_}/revoke")
def revoke(id_: Id, _: Nothing, who: Admin, project: OwnProject) -> Said:
    """Withdraw a link that nobody has used."""
    Roster(project).revoke(id_, who.pseudonym)
    return {"reload": True}


@router.post("/people/{id_}/state")
def set_state(id_: Id, form: NewState, who: Admin, project: OwnProject) -> Said:
    """Pause somebody, let them go on, or let them in no more."""
    _not_oneself(id_, who)
    Roster(project).set_state(id_, form.state, who.pseudonym)
    return {"reload": True}


@router.post("/people/{id_}/role")
def set_role(id_: Id, form: NewRole, who: Admin, project: OwnProject) -> Said:
    """Make somebody an admin or an annotator."""
    _not_oneself(id_, who)
    Roster(project).set_role(id_, form.role, who.pseudonym)
    return {"reload": True}


@router.post("/people/{id_}/sign-out")
def sign_out(id_: Id, _: Nothing, who: Admin, project: OwnProject) -> Said:
    """End all sessions of somebody."""
    _not_oneself(id_, who)
    Roster(project).sign_out(id_, who.pseudonym)
    return {"reload": True}


@router.post("/people/{id_}/forget")
def forget(id_: Id, _: Nothing, who: Admin, project: OwnProject) -> Said:
    """Delete who is behind a pseudonym."""
    Roster(project).forget(id_, who.pseudonym)
    return {"reload": True}


def _not_oneself(id_: int, who: SignedIn) -> None:
    if id_ == who.annotator:
        raise UserError("Ask another admin for this: you would lock yourself out.")


@router.post("/pause")
def pause(form: Pause, who: Admin, project: OwnProject) -> Said:
    """Ask nobody for now, or go on."""
    project.change(who.pseudonym, {"paused": form.paused})
    return {"reload": True}


@router.post("/batches/{id_}/stop")
def stop_loop(id_: Id, _: Nothing, who: Admin, project: OwnProject) -> Said:
    """Let nothing follow a batch."""
    loops.stop(project, who.pseudonym, id_)
    return {"reload": True}


@router.post("/rules")
def change_rules(form: dict[str, object], who: Admin, project: OwnProject) -> Said:
    """Change rules; another text to agree to needs another version, for it is agreed to anew."""
    before = project.rules
    changes = {name: value for name, value in form.items() if value != getattr(before, name, None)}
    terms = {"consent", "licence"} & changes.keys()
    if terms and "consent_version" not in changes:
        raise UserError(
            "What people agree to has changed, so give it a new version: everybody is asked again."
        )
    try:
        project.change(who.pseudonym, changes)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])).replace("_", " ")
        raise UserError(f"{field}: {first['msg']}.") from None
    return {"reload": True}
