"""Judges for tests, as functions that a config names; each keeps what it was asked."""

ASKED: list[tuple[str, str, str]] = []
FAILS = {"after": 10**9}


def longer(prompts, a, b):
    """Prefers the longer answer, whatever comes first, and then the first."""
    ASKED.extend(zip(prompts, a, b, strict=True))
    return ["a" if len(x) >= len(y) else "b" for x, y in zip(a, b, strict=True)]


def first(prompts, a, b):
    """Prefers what it reads first."""
    ASKED.extend(zip(prompts, a, b, strict=True))
    return ["a"] * len(a)


def failing(prompts, a, b):
    """As `longer`, until it has answered so many questions."""
    if len(ASKED) >= FAILS["after"]:
        raise OSError("the model does not answer")
    return longer(prompts, a, b)


def often_first(prompts, a, b):
    """Prefers the fine answer, and on every second prompt whatever it reads first."""
    ASKED.extend(zip(prompts, a, b, strict=True))
    reads = [int(prompt.split()[-1]) % 2 == 0 for prompt in prompts]
    return [
        ("a" if "fine" in one else "b") if read else "a" for read, one in zip(reads, a, strict=True)
    ]
