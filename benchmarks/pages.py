"""Put what a script measured into a page, between two marks."""

from pathlib import Path


def put_between(section: str, page: Path, begin: str, end: str) -> None:
    """Replace what stands between the marks in a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ending, after = rest.partition(end)
    if not mark or not ending:
        raise SystemExit(f"{page} has no place for the table; put these lines there: {begin} {end}")
    page.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")
