"""Texts of others as HTML in which nothing acts, nothing is loaded and nothing is lost.

A text comes out twice: as Markdown and as it was written. Raw HTML is text in both. Images and
links to anything but http are text, so that no answer makes the browser ask somebody; what Markdown
would hide (titles, addresses, the numbers of a list, hidden definitions) is shown, and where
Markdown would still drop a word, the text is shown as it was written, with a note that says so.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markupsafe import Markup, escape

from rlhf_core.data.prompts import Prompt

LONGEST_MARKDOWN = 30_000  # characters; a longer text is shown as it was written
_LONGEST_FORMULA = 4_000  # characters
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}

# What a browser would hide or obey: controls, marks that reverse the order of writing, characters
# without width, halves of surrogate pairs. Joiners stay, as emoji and Persian need them.
_HIDDEN = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|"  # a flag that is spelled with tags
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class Rendered(NamedTuple):
    """A text in both views, each as HTML."""

    markdown: Markup
    plain: Markup


def rendered(text: str) -> Rendered:
    """Both views of an answer. An empty one says so."""
    if not text.strip():
        says = "(empty)" if not text else f"(only white space: {len(text):,} characters)"
        nothing = Markup('<p class="empty">{}</p>').format(says)
        return Rendered(nothing, nothing)
    return Rendered(markdown(text), plain(text))


def rendered_prompt(prompt: Prompt) -> Rendered:
    """Both views of a prompt; a chat is a list of messages with their roles."""
    if isinstance(prompt, str):
        return rendered(prompt)
    views = [(_role(m["role"]), str(m["role"]), rendered(m["content"])) for m in prompt]
    message = Markup('<div class="message {}"><h3 class="role">{}</h3>{}</div>')
    return Rendered(
        *(
            Markup().join(
                message.format(role.lower() if key in _ROLES else "other", role, view[which])
                for role, key, view in views
            )
            for which in (0, 1)
        )
    )


def _role(role: object) -> str:
    return _ROLES.get(str(role), visible(str(role)))


def visible(text: str) -> str:
    """The text with marks like `⟨U+202E⟩` for what a browser would hide or obey."""
    return _HIDDEN.sub(
        lambda found: found[1] or f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n")
    )


def plain(text: str) -> Markup:
    """The text as it was written; white space at its ends is marked."""
    shown = visible(text)
    body = shown.strip(" \n\t")
    start = shown.index(body)
    ends = _marked(shown[:start]), _marked(shown[start + len(body) :])
    return Markup('<div class="as-written" dir="auto">{}{}{}</div>').format(ends[0], body, ends[1])


def _marked(white: str) -> Markup:
    signs = white.replace(" ", "·").replace("\t", "→\t").replace("\n", "⏎\n")
    return Markup('<span class="white">{}</span>').format(signs) if signs else Markup()


def markdown(text: str) -> Markup:
    """The text read as Markdown, cleaned; as it was written if that would lose a word of it."""
    if len(text) > LONGEST_MARKDOWN:
        return _note("Too long for Markdown, so it is shown as it was written.") + plain(text)
    shown = visible(text)
    tokens = _reader().parse(shown)
    if _letters(shown) - _letters("".join(_said(tokens))):
        note = "Markdown would hide a part of this, so it is shown as it was written."
        return _note(note) + plain(text)
    return _cleaned(_reader().renderer.render(tokens, _reader().options, {}))


def _note(says: str) -> Markup:
    return Markup('<p class="how">{}</p>').format(says)


def _letters(text: str) -> Counter[str]:
    return Counter(filter(str.isalnum, text))


def _said(tokens: Sequence[Token]) -> Iterator[str]:
    """Everything that the tokens show, as text."""
    for token in tokens:
        if token.type == "inline":
            yield from _said(token.children or [])
        elif token.type == "list_item_open":
            yield token.info
        else:
            yield token.content
            yield token.info if token.type == "fence" else ""


# ---- the reader ----


@cache
def _reader() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    # Definitions vanish from a text, and entities say something else than they show.
    reader.disable(["reference", "entity"])
    reader.validateLink = _opens_safely  # type: ignore[method-assign]
    reader.block.ruler.before("fence", "formula", _formula_block, {"alt": ["paragraph"]})
    reader.inline.ruler.before("escape", "formula", _formula_inline)
    reader.core.ruler.push("for_people", _for_people)
    reader.add_render_rule("formula", _render_formula)
    reader.add_render_rule("address", _render_address)
    reader.add_render_rule("hardbreak", lambda *_: "<br>")  # line feeds show as such
    reader.add_render_rule("fence", _render_code)
    reader.add_render_rule("code_block", _render_code)
    reader.add_render_rule("table_open", _open_table)
    reader.add_render_rule("table_close", lambda *_: "</table></div>")
    return reader


def _opens_safely(url: str) -> bool:
    return re.match(r"https?://[^/?#]", url, re.IGNORECASE) is not None


def _cleaned(html: str) -> Markup:
    """The second lock: what the reader makes, and nothing else."""
    return Markup(
        nh3.clean(
            html,
            tags={
                *("p", "br", "hr", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote"),
                *("pre", "code", "em", "strong", "s", "a", "span", "div"),
                *("table", "thead", "tbody", "tr", "th", "td"),
            },
            attributes={
                "*": {"dir"},
                "a": {"href", "target"},
                "li": {"value"},
            },
            allowed_classes={
                "div": {"table", "code"},
                "span": {"address", "image", "language"},
                "code": {"formula"},
                "pre": {"formula"},
                "th": {"left", "center", "right"},
                "td": {"left", "center", "right"},
            },
            url_schemes={"http", "https"},
            link_rel="noopener noreferrer nofollow",
        )
    )


def _for_people(state: StateCore) -> None:
    """Directions of writing, headings below those of the page, numbers and addresses in sight."""
    for place, token in enumerate(state.tokens):
        if token.type == "inline":
            token.children = list(_with_addresses(token.children or []))
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        if token.type.startswith("paragraph_"):
            token.hidden = False  # the lines of a tight list keep their breaks as well
        if token.type == "list_item_open" and token.info:
            token.attrSet("value", token.info)
        if style := token.attrs.pop("style", None):
            token.attrSet("class", str(style).removeprefix("text-align:"))
        if token.nesting == 1 and token.tag in ("p", "h3", "h4", "h5", "h6", "th", "td"):
            token.attrSet("dir", "auto")
        if token.nesting == 1 and token.tag in ("ul", "ol", "blockquote", "table"):
            token.attrSet("dir", _direction(state.tokens[place : place + 50]))


def _direction(tokens: Iterable[Token]) -> str:
    """Where the first letter that has a direction says that the text goes."""
    for token in tokens:
        for sign in token.content:
            if (kind := unicodedata.bidirectional(sign)) in ("L", "R", "AL"):
                return "ltr" if kind == "L" else "rtl"
    return "ltr"


def _with_addresses(tokens: Sequence[Token]) -> Iterator[Token]:
    """Behind each link where it leads; in place of each image what it would load."""
    link, text = None, ""
    for token in tokens:
        if token.type == "image":
            yield _address("image: ", token.content, token)
            continue
        if token.type == "link_open":
            link, text = token, ""
            token.attrSet("target", "_blank")
        elif link is not None and token.type == "link_close":
            yield token
            if text != str(link.attrs["href"]) or link.attrs.get("title"):
                yield _address("", "", link)
            link = None
            continue
        text += token.content
        yield token


def _address(kind: str, text: str, of: Token) -> Token:
    where = str(of.attrs.get("src") or of.attrs["href"])
    title = of.attrs.get("title")
    parts = [_reader().normalizeLinkText(where), f'"{title}"' if title else ""]
    said = " ".join(filter(None, [text, *parts]))
    return Token("address", "", 0, content=f"{kind}{said}", info="image" if kind else "address")


def _render_address(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    token = tokens[index]
    return f'<span class="{token.info}"> ({escape(token.content)})</span>'


def _open_table(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    return f'<div class="table" dir="{tokens[index].attrs["dir"]}"><table>\n'


def _render_code(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    token = tokens[index]
    language = f'<span class="language">{escape(token.info.strip())}</span>' if token.info else ""
    code = escape(token.content.removesuffix("\n"))
    return f'<div class="code">{language}<pre dir="ltr"><code>{code}</code></pre></div>\n'


# ---- formulas: shown as they are written, and not read as Markdown ----

_OPENED = re.compile(r"\$\$|\\\[|\\\(|\$(?![\s$])")
_CLOSED = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "$": "$"}
_OPENED_BLOCK = re.compile(r"\$\$|\\\[|\\begin\{[a-zA-Z]+\*?\}")


def _formula_inline(state: StateInline, silent: bool) -> bool:
    opened = _OPENED.match(state.src, state.pos)
    if opened is None:
        return False
    close = _CLOSED[opened[0]]
    limit = min(state.posMax, opened.end() + _LONGEST_FORMULA)
    end = state.src.find(close, opened.end(), limit)
    if end <= opened.end():
        return False
    # "$5 to $10" are two prices: pandoc's rule
    after = state.src[end + 1 : end + 2]
    if close == "$" and (state.src[end - 1].isspace() or after.isdigit()):
        return False
    if not silent:
        state.push("formula", "code", 0).content = state.src[state.pos : end + len(close)]
    state.pos = end + len(close)
    return True


def _formula_block(state: StateBlock, start: int, last: int, silent: bool) -> bool:
    if state.is_code_block(start):
        return False
    first = state.bMarks[start] + state.tShift[start]
    opened = _OPENED_BLOCK.match(state.src, first, state.eMarks[start])
    if opened is None:
        return False
    close = _CLOSED.get(opened[0]) or opened[0].replace("begin", "end")
    end = state.src.find(close, opened.end(), first + _LONGEST_FORMULA)
    if end < 0:
        return False
    line = next((n for n in range(start, last) if state.eMarks[n] >= end + len(close)), None)
    rest = "" if line is None else state.src[end + len(close) : state.eMarks[line]]
    if line is None or rest.strip(" .,;") or any(state.sCount[n] < state.blkIndent
                                                 for n in range(start, line + 1)):  # fmt: skip
        return False
    if not silent:
        token = state.push("formula", "pre", 0)
        token.content = state.getLines(start, line + 1, state.blkIndent, False)
        token.block, token.map = True, [start, line + 1]
    state.line = line + 1
    return True


def _render_formula(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    token = tokens[index]
    code = f'<code class="formula">{escape(token.content)}</code>'
    return f'<pre class="formula" dir="ltr">{code}</pre>\n' if token.block else code
