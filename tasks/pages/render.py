"""Fills the templates of the pages. Every text is escaped unless this package made the HTML."""

import base64
from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf_core.redaction import masked
from tasks.pages.texts import duration, number, percent, shown


def environment(package: str, **filters: Callable[..., Any]) -> Environment:
    """The templates of a package, with the filters that all pages have and some more."""
    made = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"duration": duration, "number": number, "percent": percent, **filters}
    return made


@cache
def _environment() -> Environment:
    return environment("tasks.pages", picture=_picture, shown=shown)


def render(template: str, **content: Any) -> str:
    """A page as one HTML file that asks nobody for anything, without secrets."""
    return masked(_environment().get_template(template).render(**content))


def _picture(png: bytes) -> Markup:
    """A PNG as an address that holds it."""
    return Markup("data:image/png;base64,") + Markup(base64.b64encode(png).decode())
