"""A matplotlib figure as SVG inside a page: in the colours of the page, and with a description."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from markupsafe import Markup, escape

from rlhf_core.figures import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a figure draws in, and the variable of the style sheet that stands for it, for dark pages.
_COLORS: Final = {
    "#000000": "currentColor",
    "#808080": "var(--grey)",
    "#b0b0b0": "var(--grey)",  # of grid lines
    GREY: "var(--grey)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}
_NARROW = 5.0  # inches


class Drawing(NamedTuple):
    """A chart of a page."""

    title: str
    says: str  # what to look at
    numbers: tuple[str, ...]  # what it shows, a sentence each: for those who do not see it too
    svg: Markup
    wide: bool  # legible only with a width that a phone does not have


def drawing(figure: "Figure", key: str, title: str, says: str, numbers: Sequence[str]) -> Drawing:
    """Draw a figure as SVG without any address outside it.

    Args:
        key: unique on the page; makes the ids of the SVG unique.
        numbers: the text alternative, a sentence each.
    """
    import matplotlib

    buffer = io.StringIO()
    # Texts stay texts, so that they take the colour of the page and are small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    label = f"{title}. The numbers follow below the chart."
    svg, wide = Markup(_inline(buffer.getvalue(), key, label)), figure.get_figwidth() > _NARROW
    return Drawing(title, says, tuple(numbers), svg, wide)


def _inline(svg: str, key: str, label: str) -> str:
    """The element alone: no header, no metadata, no name spaces; ids that no other SVG has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w.-]+)[\")]", svg))
    svg = re.sub(r'\s+id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    for color, ours in _COLORS.items():
        svg = svg.replace(color, ours)
    svg = re.sub(r"<text\b(?![^>]*fill)([^>]*style=\")", r"<text\1fill: currentColor; ", svg)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups()  # type: ignore[union-attr]
    size = f'width="{float(width) * 4 / 3:.0f}" height="{float(height) * 4 / 3:.0f}"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
