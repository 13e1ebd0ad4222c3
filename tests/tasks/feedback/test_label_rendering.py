"""Texts of models as HTML: nothing acts, nothing is loaded, and no word is lost."""

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.feedback.page.rendering import LONGEST_MARKDOWN, rendered, rendered_prompt

TAGS = {
    *("p", "br", "hr", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em"),
    *("strong", "s", "a", "span", "div", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"dir", "class", "href", "target", "rel", "value"}
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)><animate onbegin=alert(1)>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<iframe src='javascript:alert(1)'></iframe><object data=x><embed src=x>",
    "<style>@import 'https://evil.example/x.css';</style>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<form action=https://evil.example><button>go</button></form>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:msgbox)",
    "[x](&#106;avascript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](//evil.example/a)",
    "[x](/leave)",
    "[x](https:evil)",
    "<javascript:alert(1)>",
    "![x](https://evil.example/p.png)",
    "![x](javascript:alert(1))",
    "![x](https://evil.example/p.png 'onerror=alert(1)')",
    "[![x](https://evil.example/p.png)](https://evil.example/)",
    "[r]: javascript:alert(1)\n\n[r]",
    "[x](https://a.example/\"onmouseover=alert(1))",
    "```\"><script>alert(1)</script>\nx\n```",
    "`<b onclick=alert(1)>`",
    "| <script>alert(1)</script> | b |\n|---|---|\n| 1 | <img src=x onerror=alert(1)> |",
    "{{ 7 * 7 }}{% include 'x' %}${7*7}",
    "$<img src=x onerror=alert(1)>$ \\(<script>\\) $$<svg onload=alert(1)>$$",
    "\\[\n<script>alert(1)</script>\n\\]",
    "<!-- --><script>alert(1)</script>",
    "<a name=csrf id=page>",
)  # fmt: skip


class Read(HTMLParser):
    """Tags and attributes of HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html.encode().decode())  # no Markup, which would escape what is added
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.text += "".join(value for name, value in attrs if name == "value")

    def handle_data(self, data):
        self.text += data


def check(html: str) -> Read:
    read = Read(html)
    assert set(read.tags) <= TAGS
    for tag, name, value in read.attributes:
        assert name in ATTRIBUTES
        if name == "href":
            assert tag == "a"
            assert re.match(r"https?://[^/]", value, re.IGNORECASE)
    links = read.tags.count("a")
    assert read.attributes.count(("a", "rel", "noopener noreferrer nofollow")) == links
    assert read.attributes.count(("a", "target", "_blank")) == links
    return read


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_texts(text):
    for shown in (text, f"- {text}", f"> {text}", f"# {text}", f"**{text}**"):
        both = rendered(shown)
        check(both.markdown)
        assert set(check(both.plain).tags) <= {"div", "span"}


def test_what_is_no_link_is_shown_as_it_was_written():
    assert "[x](javascript:alert(1))" in Read(rendered("[x](javascript:alert(1))").markdown).text
    assert "<script>alert(1)</script>" in Read(rendered(HOSTILE[0]).markdown).text


def test_a_link_says_where_it_leads_and_a_picture_what_it_would_load():
    read = check(
        rendered('[here](https://a.example/x "hover") ![cat](https://b.example/c.png)').markdown
    )
    assert 'here (https://a.example/x "hover")' in read.text
    assert "image: cat https://b.example/c.png" in read.text
    assert "img" not in read.tags
    bare = check(rendered("<https://a.example/>").markdown).text
    assert bare.strip() == "https://a.example/"


letters = st.text(alphabet=st.sampled_from("ab1*_`~#>-+.|[]()!<>&\\$\"' \n\t=:"), max_size=120)


@given(text=letters | st.text(max_size=80))
@settings(max_examples=400, deadline=None)
@example("| a | b |\n|---|---|\n| 1 | 2 | 3 |")
@example("[hidden]: https://a.example 'title'")
@example("1. a\n1. b\n7. c")
@example("~~~a b\nc\n~~~")
@example("> " * 40 + "deep")
@example("&amp;&#65;&copy;")
def test_no_letter_is_lost_in_either_view(text):
    """The letters and digits of the text, counted; the views may add notes, and take nothing."""
    both = rendered(text)
    for view in both:
        left = Read(view).text
        for sign in set(filter(str.isalnum, text)):
            assert left.count(sign) >= text.count(sign), (sign, view)
        check(view)


def test_markdown_is_read():
    read = check(
        rendered("# T\n\n*a* **b** ~~c~~ `d`\n\n1. x\n   - y\n\n> q\n\n```py\ncode\n```").markdown
    )
    assert {"h3", "em", "strong", "s", "code", "ol", "ul", "li", "blockquote", "pre"} <= set(
        read.tags
    )
    assert "py" in read.text


def test_numbers_of_a_list_are_those_that_were_written():
    read = Read(rendered("1. a\n1. b\n4. c").markdown)
    assert [value for tag, name, value in read.attributes if name == "value"] == ["1", "1", "4"]


def test_line_breaks_stay():
    html = rendered("roses are red\nviolets are blue\n\n- one\n  two").markdown
    assert "red\nviolets" in html  # the style sheet shows line feeds
    assert "one\ntwo" in html


@pytest.mark.parametrize(
    "formula",
    ["$x_1*y*z$", "$$\\sum_i a_i$$", "\\(a_b\\)", "\\[a\\\\b\\]", "\\[\n- a\n= b\n\\]",
     "\\begin{align}\n x_1 &= *2* \\\\\n\\end{align}"],
)  # fmt: skip
def test_formulas_are_shown_as_written(formula):
    read = Read(rendered(f"Before\n\n{formula}\n\nafter").markdown)
    assert formula in read.text
    assert "em" not in read.tags


def test_prices_are_no_formulas():
    assert "<code" not in rendered("It costs $5 to $10, or $7-$8.").markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b", "a⟨U+0000⟩b"),
        ("a\x1b[31mb", "a⟨U+001B⟩[31mb"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("a\u200bb", "a⟨U+200B⟩b"),
        ("a\ud800b", "a⟨U+D800⟩b"),
        ("a\U000e0041b", "a⟨U+E0041⟩b"),
        ("a\r\nb", "a\nb"),
        ("\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e", None),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", None),
    ],
)
def test_what_a_browser_would_hide_is_shown(text, shown):
    for view in rendered(text):
        assert (shown or text) in Read(view).text
        view.encode()


def test_white_space_at_the_ends_is_marked():
    assert Read(rendered("  a\n").plain).text == "··a⏎\n"
    assert "only white space: 3 characters" in rendered(" \n ").markdown
    assert "(empty)" in rendered("").markdown


def test_directions_of_writing():
    html = rendered("- שלום\n- abc\n\nabc").markdown
    assert '<ul dir="rtl">' in html
    assert '<p dir="auto">abc</p>' in html


def test_a_chat_is_a_list_of_messages_with_roles():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "**Hi**"},
            {"role": "<b>robot</b>", "content": ""}]  # fmt: skip
    read = check(rendered_prompt(chat).markdown)
    assert read.tags.count("h3") == 3
    assert "SystemBe brief." in read.text
    assert "<b>robot</b>" in read.text
    assert ("div", "class", "message other") in read.attributes
    assert "(empty)" in read.text


def test_a_prompt_of_text():
    assert rendered_prompt("*a*") == rendered("*a*")


@pytest.mark.parametrize(
    "text", ["[" * 99_999, "- a\n1. b\n" * 9999, "*a " * 33_333, "> " * 50_000, "|a" * 50_000]
)
def test_a_long_or_hostile_text_takes_seconds_at_most(text):
    start = time.monotonic()
    assert "as it was written" in rendered(text).markdown
    rendered(text[:LONGEST_MARKDOWN])
    assert time.monotonic() - start < 20
