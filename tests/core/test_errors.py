"""Messages are safe to print and short, and lack of memory is known by whatever says it."""

import errno
import pickle

import pytest
import torch

from rlhf_core.errors import (
    LONGEST_LINE,
    MOST_LINES,
    ConfigError,
    DataError,
    UserError,
    brief,
    lacks_memory,
    printable,
)


def test_control_characters_are_shown_and_not_obeyed():
    assert printable("\x1b[31mred\x07\r\x9b\u202e\ud800") == (r"\x1b[31mred\x07\r\x9b\u202e\ud800")
    assert printable("ein Wort,\tnoch eins\n中文 é 🙂") == "ein Wort,\tnoch eins\n中文 é 🙂"
    assert str(DataError("field '\x1b[2J'")) == r"field '\x1b[2J'"


def test_a_message_keeps_its_beginning_and_its_end():
    said = str(ConfigError(f"a.yaml:3: {'A' * 1_000_000} is not a number; write a number"))
    assert len(said) < LONGEST_LINE
    assert said.startswith("a.yaml:3: AAA")
    assert said.endswith("AAA is not a number; write a number")
    assert "characters are left out" in said
    short = "x" * LONGEST_LINE
    assert brief(short) == short


def test_many_lines_become_few():
    said = brief("\n".join(map(str, range(1000)))).split("\n")
    assert len(said) == MOST_LINES + 1
    assert said[-1] == f"… and {1000 - MOST_LINES} more lines"


def test_an_error_travels_between_processes():
    again = pickle.loads(pickle.dumps(UserError("a\x1bb")))
    assert type(again) is UserError
    assert str(again) == r"a\x1bb"


def test_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert lacks_memory(caught.value)
    assert lacks_memory(MemoryError())
    assert lacks_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not lacks_memory(RuntimeError("size mismatch"))
    assert not lacks_memory(ValueError("not enough memory"))
