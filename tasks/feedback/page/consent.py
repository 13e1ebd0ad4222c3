"""What an annotator agrees to before the first pair, by version and time."""

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tasks.feedback.page.access import Here, OwnProject
from tasks.feedback.page.pages import page
from tasks.feedback.page.rendering import markdown

router = APIRouter()


class Agreement(BaseModel):
    """That somebody agrees, and to what: the version that the page showed."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(max_length=64)
    agreed: bool


@router.get("/consent")
def show(who: Here, project: OwnProject) -> Response:
    """The text, and a box to tick."""
    rules = project.rules
    return page(
        "consent.html",
        csrf=who.csrf,
        project=project.name,
        text=markdown(rules.consent),
        version=rules.consent_version,
        licence=rules.licence,
        agreed=project.people.has_agreed(who.annotator, rules.consent_version),
    )


@router.post("/consent")
def agree(said: Agreement, who: Here, project: OwnProject) -> dict[str, str]:
    """Keep that somebody agrees to the present version."""
    rules = project.rules
    if said.version != rules.consent_version:
        raise HTTPException(409, "The text has changed meanwhile: reload the page and read it.")
    if not said.agreed:
        raise HTTPException(422, "Tick the box to agree. Without it, there is nothing to label.")
    if not project.people.has_agreed(who.annotator, rules.consent_version):
        project.people.agree(
            who.annotator,
            version=rules.consent_version,
            text=rules.consent,
            licence=rules.licence,
        )
    return {"to": "/"}
