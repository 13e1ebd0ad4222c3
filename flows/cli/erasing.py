"""`rlhf erase`: shows what there is of a person, asks, and erases."""

from getpass import getuser
from typing import TYPE_CHECKING

import typer

from flows.cli.printing import line, secret_line
from flows.cli.process import own_prefect, stoppable
from rlhf_core.errors import UserError
from tasks.settings import Settings

if TYPE_CHECKING:
    from flows.erasure import ErasureConfig


def erase(
    pseudonym: str,
    project: str,
    settings: Settings,
    config: "ErasureConfig",
    *,
    yes: bool,
    dry_run: bool,
) -> None:
    """Erase somebody, once it is confirmed.

    Raises: UserError when nobody is called so, or it is not confirmed.
    """
    from tasks.feedback.asking.votes import opened
    from tasks.feedback.erasure import requests
    from tasks.feedback.erasure.preview import preview

    with opened(settings) as store:
        for sentence in preview(store, pseudonym, project, settings):
            line(sentence)
        if dry_run:
            return
        if not (yes or typer.confirm("Erase this person for good?")):
            raise UserError("Nothing was erased.")
        request = requests.begin(store, pseudonym, project, getuser())
    line(f"This is erasure {request.id}. The code of the person, which is not shown again:")
    secret_line(str(request.code))
    chosen = config.model_copy(update={"project": request.project.name, "erasure": request.id})
    with stoppable(), own_prefect(settings):
        from flows.erasure import erasure

        for certificate in erasure(chosen):
            line(f"The certificate: {certificate}")
