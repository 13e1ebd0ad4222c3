"""Templates filled into pages. Every text is escaped unless `rendering` made HTML of it."""

from functools import cache
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment

from tasks.feedback.page.rendering import markdown
from tasks.pages.render import environment


@cache
def _environment() -> Environment:
    return environment("tasks.feedback.page", markdown=markdown)


def page(template: str, *, status: int = 200, **content: Any) -> HTMLResponse:
    """A page as an answer that no cache keeps.

    Args:
        content: what the template shows; `csrf` becomes a meta tag that the scripts read.
    """
    text = _environment().get_template(template).render(**content)
    return HTMLResponse(text, status, {"Cache-Control": "no-store"})
