"""The report as one HTML page."""

from rlhf_core.agreement.quality import Quality
from tasks.pages.render import render

PAGE = "report.html"


def quality_page(quality: Quality) -> str:
    """The whole page as HTML."""
    return render("agreement.html", quality=quality)
