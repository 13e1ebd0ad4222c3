"""Templates filled into pages. Every text is escaped unless `rendering` made HTML of it."""

from functools import cache
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from tasks.feedback.page.rendering import markdown
from tasks.pages.texts import duration, number, percent


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tasks.feedback.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "duration": duration,
        "markdown": markdown,
        "number": number,
        "percent": percent,
    }
    return made


def page(template: str, *, status: int = 200, **content: Any) -> HTMLResponse:
    """A page as an answer that no cache keeps.

    Args:
        content: what the template shows; `csrf` becomes a meta tag that the scripts read.
    """
    text = _environment().get_template(template).render(**content)
    return HTMLResponse(text, status, {"Cache-Control": "no-store"})
