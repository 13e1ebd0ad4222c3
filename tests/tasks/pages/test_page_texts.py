"""Texts of others on a page, and what differs between two of them."""

import time
from random import Random

import pytest
from markupsafe import Markup

from tasks.pages.curves import course, thinned
from tasks.pages.differences import marked
from tasks.pages.texts import duration, number, percent, shown


def test_a_long_text_is_cut_with_a_note():
    text = shown("a" * 5_000_000)
    assert text == "a" * 2000 + " … (4,998,000 more characters are left out)"
    assert shown("a" * 2000) == "a" * 2000


def test_what_a_browser_would_obey_is_an_escape():
    assert shown("a\x1b[31m\x00b\u202ec\u2066d") == "a\\x1b[31m\\x00b\\u202ec\\u2066d"
    assert shown("two\nlines\tand a tab") == "two\nlines\tand a tab"


def test_secrets_are_hidden_even_where_the_text_is_cut():
    secret = "https://ada:hunter2hunter2@host/x"
    assert "hunter2" not in shown(secret)
    assert "hunter2" not in shown("a" * 1990 + secret)


def test_words_that_differ_are_marked_and_nothing_else():
    both = marked("The film was long.", "The film was short and good.")
    assert both.first == "The film was<del> long</del>."
    assert both.second == "The film was<ins> short and good</ins>."
    assert isinstance(both.first, Markup)
    assert marked("same", "same") == ("same", "same")
    assert marked("", "new") == ("", "<ins>new</ins>")


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "</p><img src=x onerror=y>", "&lt;"]
)
def test_marks_are_the_only_html(hostile):
    for both in (marked(hostile, "a"), marked("a", hostile), marked(hostile, hostile)):
        text = "".join(both)
        for mark in ("<del>", "</del>", "<ins>", "</ins>"):
            text = text.replace(mark, "")
        assert "<" not in text
        assert ">" not in text
    assert marked("&lt;", "&lt;").first == "&amp;lt;"


def test_texts_of_megabytes_are_compared_in_no_time():
    begun = time.monotonic()
    random = Random(1)
    for words in ("ab", "a", "abcdefgh"):
        first, second = (" ".join(random.choices(words, k=1_000_000)) for _ in range(2))
        both = marked(first, second)
        assert len(both.first) < 20_000
        assert Markup.striptags(both.first).startswith(first[:1000])
    assert time.monotonic() - begun < 20


def test_numbers_and_times_as_people_write_them():
    assert (percent(0.923), percent(0.5), percent(1)) == ("92.3\u00a0%", "50\u00a0%", "100\u00a0%")
    assert (number(12345.0), number(0.123456)) == ("12,345", "0.1235")
    times = [duration(s) for s in (4.4, 60, 95, 3_700, None)]
    assert times == ["4 s", "1 min", "1 min 35 s", "1 h 1 min", "unknown"]


def test_a_long_curve_keeps_its_ends_its_peaks_and_its_order():
    points = [(float(step), 0.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 300
    assert {9.0, -9.0} <= {y for _, y in kept}
    assert kept == sorted(kept)
    assert kept[0] == points[0]
    assert kept[-1][0] > 99_000
    assert thinned(points[:300]) == points[:300]


def test_a_curve_in_words():
    assert course("Reward", [(1, 0.5), (2, 2.0), (3, 1.25)]) == (
        "Reward: from 0.5 at step 1 to 1.25 at step 3; lowest 0.5, highest 2."
    )
    assert course("Reward", [(4, 0.5)]) == "Reward: 0.5 at step 4."
