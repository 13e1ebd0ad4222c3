"""Seeded damage: to bytes, to JSON values, to the lines and values of YAML.

Each function takes a `random.Random` and something valid, and returns something that may be broken.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NESTED = 100_000
TEXTS = (
    *("", " ", "\0", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r\n\r\n", "\u2028", "\ud800"),
    *("A" * 300_000, "é" * 50_000, "{prompt}", "{{ 1/0 }}", "../../../etc/passwd", "~nosuch/x"),
    *("NaN", "1e999", "2020-13-45", "-" * 5_000, "models:/x/1", "\udcff", "\x9b31m", "<|end|>"),
)
VALUES: tuple[Any, ...] = (
    *TEXTS,
    *(None, True, False, 0, -1, 17.0, 1e308, -1e308, 2**63, 2**64, 2**70, 5e-324),
    *(float("nan"), float("inf"), [], {}, [[]], [None], {"": None}, {"role": "user"}),
    *([{"role": "user", "content": None}], [{"role": [], "content": {}}], ["a", ["b", ["c"]]]),
)
# Text that json.dumps does not write.
RAW = (
    *("9" * 5_000, "1e" + "9" * 20, "-", "[" * NESTED, '{"a":' * NESTED, "nul", "0x10", "'a'"),
    *(
        '"\\ud800\\ud800"',
        '"\\x"',
        '"\x01"',
        "Infinity",
        "-Infinity",
        "1.",
        "\ufeff",
        "[" * 40 + "]" * 40,
    ),
)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, swap, repeat, clear or replace some bytes."""
    if not data:
        return rng.randbytes(rng.randint(1, 64))
    how: Callable[[random.Random, bytearray], bytes] = rng.choice(
        (_flip, _flip, _flip, _cut, _swap, _repeat, _clear, _noise, _extremes)
    )
    return how(rng, bytearray(data))


def _span(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 8, 64, 512)))


def _flip(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data[: rng.choice((0, 1, rng.randrange(len(data)), len(data) - 1))])


def _swap(rng: random.Random, data: bytearray) -> bytes:
    (a, b), (c, d) = _span(rng, data), _span(rng, data)
    data[a:b], data[c:d] = data[c:d], data[a:b]
    return bytes(data)


def _repeat(rng: random.Random, data: bytearray) -> bytes:
    a, b = _span(rng, data)
    return bytes(data[:b] + data[a:b] * rng.choice((1, 3, 1000)) + data[b:])


def _clear(rng: random.Random, data: bytearray) -> bytes:
    a, b = _span(rng, data)
    data[a:b] = bytes(b - a)
    return bytes(data)


def _noise(rng: random.Random, data: bytearray) -> bytes:
    a, b = _span(rng, data)
    data[a:b] = rng.randbytes(b - a)
    return bytes(data)


def _extremes(rng: random.Random, data: bytearray) -> bytes:
    """A 32-bit number somewhere becomes a huge or a negative one."""
    start = rng.randrange(len(data)) & ~3
    number = rng.choice((2**31 - 1, 2**32 - 1, 2**31, 2**30, 1, 0))
    data[start : start + 4] = number.to_bytes(4, "little")
    return bytes(data)


def damage_text(rng: random.Random, text: str) -> bytes:
    """Write a text in another encoding, or with other line ends."""
    return rng.choice(
        (
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32"),
            lambda: text.encode("latin-1", errors="replace") + b"\xe9",
            lambda: b"\xef\xbb\xbf" * rng.choice((1, 2)) + text.encode(),
            lambda: text.replace("\n", rng.choice(("\r", "\r\n", "\0", "\u2028"))).encode(),
            lambda: b"",
        )
    )()


def damage_value(rng: random.Random, value: Any) -> Any:
    """Replace, remove or add one thing somewhere in a JSON value."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0 and isinstance(holder, dict):
        holder[rng.choice([t for t in TEXTS if len(t) < 10_000])] = holder.pop(key)
    elif how == 1:
        del holder[key]
    elif how == 2:
        holder[key] = [holder[key]] * rng.choice((1, 2, 50))
    else:
        holder[key] = rng.choice(VALUES)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = (
        value.keys()
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found


def damage_json(rng: random.Random, value: Any) -> bytes:
    """A JSON value as text, damaged as a value or with something that is not JSON."""
    if rng.random() < 0.7:
        return _dump(damage_value(rng, value))
    marked = damage_value(rng, value)
    text = _dump(marked)
    quoted = text.split(b'"')
    if len(quoted) < 3:
        return rng.choice(RAW).encode()
    place = rng.randrange(1, len(quoted) - 1, 2)
    raw = rng.choice(RAW).encode()
    return b'"'.join(quoted[:place]) + raw + b'"'.join(quoted[place + 1 :])


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


YAML_VALUES = (
    *("2020-01-02", "2020-13-45", "2020-01-01T25:00:00", "!!int abc", '!!int ""', "!!float x"),
    *("!!bool maybe", "!!binary '*'", "!!binary 4pyT", "!!timestamp x", "!!null 3", "!!set {a, b}"),
    *("!!omap [a: 1]", "!!pairs [a: 1]", "!!seq {}", "!!map []", "!!str [a]", "!nosuch x"),
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!python/tuple [1]"),
    *(".nan", "-.inf", ".inf", "1e400", "0x", "0o9", "190:20:30", "1:60", "~", '""', "''", "|"),
    *("- a", "[", "]", "{", "[[[[[[]]]]]]", "[" * 3_000, "{a: " * 2_000, "&a [*a]", "*nosuch"),
    *("&x {<<: *x}", "{<<: 3}", "{<<: [1]}", "{[a]: b}", "{{a: b}: c}", "{? : }", "'", '"', "%"),
    *('"\\ud800"', '"\\x1b[31m"', '"\\0"', '"\\U00110000"', '"\\q"', "@", "`", "a: b: c", "? a"),
    *("9" * 5_000, "-1", "0", "2", "1000000000", "1_000", "1e-400", "yes", "no", "null", "=", "<<"),
    *("A" * 200_000, "[a, " * 1_000, "../..", "/dev/zero", "/dev/stdin", "~nosuch/x", "/", "."),
    *("models:/x", "package:/", "package:..", "\t", "\x07", "\x85", "\ufeff", "\U0001f600"),
)


def damage_yaml(rng: random.Random, text: str) -> bytes:
    """Change lines or values of a YAML file."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        how = rng.randrange(8)
        if how < 4:
            key = lines[at].partition(":")[0]
            lines[at] = f"{key}: {rng.choice(YAML_VALUES)}"
        elif how == 4:
            lines.insert(at, rng.choice(lines))
        elif how == 5:
            lines[at] = (
                rng.choice((" ", "  ", "\t", "- ", "? ", "--- ", "%TAG ", "<<: ")) + lines[at]
            )
        elif how == 6:
            del lines[at]
        else:
            _, colon, tail = lines[at].partition(":")
            lines[at] = rng.choice(YAML_VALUES)[:2_000] + colon + tail
        text = "\n".join(lines)
    return text.encode("utf-8", errors="surrogatepass")
