"""The cases of each surface: damaged files on the disk, and the command line that meets them."""

import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import material
import pyarrow as pa
import yaml
from mutations import (
    RAW,
    TEXTS,
    YAML_VALUES,
    damage_bytes,
    damage_json,
    damage_text,
    damage_value,
    damage_yaml,
)

Case = dict[str, Any]
SMALL = ("\0", "\udcff", "\ud800")  # what an argument or a variable cannot hold, or is rarely met


def _short(texts: tuple[str, ...]) -> list[str]:
    return [t for t in texts if len(t) < 100_000 and not set(t) & set(SMALL)]


# ---- data files ----


def data(rng: random.Random, folder: Path) -> Case:
    """`rlhf validate` of a config whose data file is damaged."""
    how = rng.choice((_file, _file, _file, _disk, _disk, _columns, _odd_file))
    path = how(rng, folder)
    section: dict[str, Any] = {"source": "files", "eval_fraction": 0.4}
    section["on_bad_row"] = rng.choice(("error", "error", "drop"))
    table = rng.choice(("preferences", "preferences", "preferences", "demonstrations", "prompts"))
    section[table] = {"path": str(path)}
    if table != "preferences":
        good = folder / "good.jsonl"
        good.write_bytes(material.as_lines(material.pairs()))
        section["preferences"] = {"path": str(good)}
        section["allow_shared_prompts"] = True
    if rng.random() < 0.1:
        section[table]["limit"] = rng.choice((1, 5, 20))
    config = yaml.safe_load(material.CONFIG) | {"data": section}
    if rng.random() < 0.2:
        section["prompt_style"] = "chat"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return {"argv": ["validate", "--no-probe", str(folder / "config.yaml")]}


def _file(rng: random.Random, folder: Path) -> Path:
    rows = rng.choice(material.FORMS)()
    suffix, content = rng.choice(list(material.files(rows).items()))
    path = folder / f"data{suffix}"
    kind = rng.randrange(4)
    if suffix == ".parquet" or kind == 0:
        content = damage_bytes(rng, content)
    elif kind == 1 and suffix != ".jsonl.gz":
        content = damage_text(rng, content.decode())
    elif suffix == ".json":
        content = damage_json(rng, rows)
    elif suffix == ".csv":
        content = material.as_csv([_as_row(rng, row, rows[0]) for row in rows])
    else:
        lines = content if suffix == ".jsonl" else gzip.decompress(content)
        split = lines.split(b"\n")
        at = rng.randrange(len(rows))
        split[at] = damage_json(rng, rows[at])
        content = b"\n".join(split)
        content = content if suffix == ".jsonl" else gzip.compress(content)
    path.write_bytes(content)
    return path


def _as_row(rng: random.Random, row: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    found = damage_value(rng, row) if rng.random() < 0.1 else row
    cells = {name: found.get(name, "") for name in first} if isinstance(found, dict) else row
    return {name: str(v).encode("utf-8", "replace").decode() for name, v in cells.items()}


def _disk(rng: random.Random, folder: Path) -> Path:
    path = folder / "data.disk"
    material.save_folder(rng.choice(material.FORMS)(), path, split=rng.random() < 0.5)
    found = sorted(file for file in path.rglob("*") if file.is_file())
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice([*found, *(f for f in found if f.suffix == ".arrow")])
        how = rng.randrange(10)
        if how == 0:
            file.unlink(missing_ok=True)
            if rng.random() < 0.3:
                file.mkdir()
        elif file.suffix == ".arrow" or how < 4:
            if file.is_file():
                file.write_bytes(damage_bytes(rng, file.read_bytes()))
        elif file.is_file():
            try:
                file.write_bytes(damage_json(rng, json.loads(file.read_bytes())))
            except ValueError:
                file.write_bytes(rng.choice(RAW).encode())
    return path


_DAYS = 2**31 - 1


def _arrays(rng: random.Random, count: int) -> pa.Array:
    """A column of a type, or of values, that a text table has not."""
    text = [f"text {n}" for n in range(count)]
    long = [2**62 - n for n in range(count)]
    bad = [b"\xff\xfe\x00" + bytes([n]) for n in range(count)]
    made: list[Callable[[], pa.Array]] = [
        lambda: pa.array(long, pa.timestamp(rng.choice(("s", "ms", "us", "ns")))),
        lambda: pa.array(
            [0] * count, pa.timestamp("us", tz=rng.choice(("Mars/Phobos", "+99:99", "UTC")))
        ),
        lambda: pa.array(long, pa.timestamp("us", tz="Europe/Berlin")),
        lambda: pa.array([_DAYS] * count, pa.date32()),
        lambda: pa.array(long, pa.int64()).cast(pa.duration("s")),
        lambda: pa.array([86_399_999] * count, pa.time32("ms")),
        lambda: pa.array([2**60] * count, pa.int64()).view(pa.time64("ns")),
        lambda: pa.array([1] * count, pa.decimal128(38, 30)),
        lambda: pa.array(bad, pa.binary()),
        lambda: pa.array(bad, pa.binary()).view(pa.string()),
        lambda: pa.array(bad, pa.large_binary()).view(pa.large_string()),
        lambda: pa.array(text, pa.large_string()),
        lambda: pa.array(text).dictionary_encode(),
        lambda: pa.array([[t] for t in text], pa.list_(pa.string())),
        lambda: pa.array([[("k", t)] for t in text], pa.map_(pa.string(), pa.string())),
        lambda: pa.array([{"role": "user", "content": t} for t in text]),
        lambda: pa.nulls(count),
        lambda: pa.array([float("nan")] * count),
        lambda: pa.array([2**64 - 1] * count, pa.uint64()),
        lambda: pa.array([True] * count),
        lambda: pa.array(["A" * 50_000] * count),
        lambda: pa.array(["\x1b[2J"] * count),
        lambda: pa.array([[[[{"a": [t]}]]] for t in text]),
    ]
    return rng.choice(made)()


def _columns(rng: random.Random, folder: Path) -> Path:
    """A Parquet file or a save_to_disk folder with a column of a strange type."""
    table = pa.Table.from_pylist(rng.choice(material.FORMS)())
    at = rng.randrange(table.num_columns)
    column = _arrays(rng, table.num_rows)
    name = rng.choice((table.column_names[at], table.column_names[at], "extra", "time", "margin"))
    table = table.drop_columns([table.column_names[at]]) if name in table.column_names else table
    table = table.append_column(name, column)
    if rng.random() < 0.1:
        table = table.rename_columns(["prompt"] * table.num_columns)
    path = folder / "data.parquet"
    content = material.as_parquet(table, compression=rng.choice(("snappy", "zstd", "none")))
    path.write_bytes(content if rng.random() < 0.8 else damage_bytes(rng, content))
    return path


def _zeros() -> bytes:
    return gzip.compress(bytes(50_000_000))


def _brackets() -> bytes:
    """An archive of a megabyte that unpacks to more than a gigabyte."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(12):
            file.write(b"[" * 100_000_000)
    return packed.getvalue()


def _repeated() -> bytes:
    """One long text, 20,000 times: 400 GB of which Parquet stores 20 MB, packed to nothing."""
    index = pa.array([0] * 20_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(index, pa.array(["A" * 20_000_000]))
    table = pa.table({"prompt": column, "chosen": column, "rejected": column})
    return material.as_parquet(table, compression="zstd")


def _nothings() -> bytes:
    return material.as_parquet(pa.table({"prompt": pa.nulls(200_000_000, pa.int8())}))


BOMBS: tuple[tuple[str, Callable[[], bytes]], ...] = (
    ("zeros.jsonl.gz", _zeros),
    ("brackets.json.gz", _brackets),
    ("repeated.parquet", _repeated),
    ("nothings.parquet", _nothings),
)


def _odd_file(rng: random.Random, folder: Path) -> Path:
    """Something that is no data file at all, or that unpacks to too much."""
    how = rng.randrange(11)
    path = folder / rng.choice(("data.jsonl", "data.json", "data.csv", "data.parquet"))
    if how < 4:
        name, make = BOMBS[how]
        made = folder.parent / name  # each takes seconds to make
        if not made.exists():
            made.write_bytes(make())
        path = folder / name
        path.symlink_to(made)
    elif how == 4:
        os.mkfifo(path)
    elif how == 5:
        path.symlink_to(
            rng.choice(("/dev/zero", "/dev/full", "/proc/self/mem", "data.jsonl", "/dev/tty"))
        )
    elif how == 6:
        path.mkdir()
    elif how == 7:
        path.touch()
        os.truncate(path, 10**12)
    elif how == 8:
        path = Path(
            rng.choice(("~nosuch/data.jsonl", "A" * 5_000, f"{folder}/{'b' * 300}.jsonl", "/", "."))
        )
    elif how == 9:
        texts = {name: name[0] * 1_000_000 for name in ("prompt", "chosen", "rejected")}
        path = path.with_name("data.jsonl")
        path.write_bytes(material.as_lines([*material.pairs(), texts]))
    else:
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 100, 10_000))))
    return path


# ---- configs ----

BOMB = "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" if n else "a0: &a0 {x: 1}\n" for n in range(24)
)
LAUGHS = "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" if n else "a0: &a0 [x]\n" for n in range(12)
)


def config(rng: random.Random, folder: Path) -> Case:
    """`rlhf config` of a damaged YAML file, or with a damaged `--set`."""
    path = folder / "config.yaml"
    argv = ["config", str(path)]
    how = rng.randrange(20)
    text = material.CONFIG
    if how == 0:
        path.write_bytes(damage_bytes(rng, text.encode()))
    elif how == 1:
        path.write_bytes(damage_text(rng, text))
    elif how == 2:
        path.write_text(rng.choice((BOMB, LAUGHS)) + text)
    elif how == 3:
        path.write_text(rng.choice(("a: 1\n", "- a\n", "# c\n", "a" * 99 + "\n")) * 50_000)
    elif how == 4:
        _strange_file(rng, path)
    elif how < 8:
        keys = (
            "project",
            "seed",
            "sft",
            "sft.epochs",
            "ppo.kl_coef",
            "data.preferences.fields",
            "a.b.c",
        )
        value = rng.choice(_short(YAML_VALUES))
        path.write_text(text)
        argv += ["--set", f"{rng.choice(keys)}={value}"]
    else:
        path.write_bytes(damage_yaml(rng, text))
    return {"argv": argv}


def _strange_file(rng: random.Random, path: Path) -> None:
    how = rng.randrange(5)
    if how == 0:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/urandom", "/dev/full", "/proc/self/mem")))
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.mkdir()
    elif how == 3:
        path.symlink_to(path.name)
    else:
        path.touch()
        os.truncate(path, 10**11)


# ---- models ----

TEMPLATES = (
    *("{{ 1 / 0 }}", "{{ 1 % 0 }}", "{{ messages[0].nosuch.more }}", "{{ raise_exception('no') }}"),
    *("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",),
    *(
        "{{ 'a' * 1000000000 }}",
        "{{ 'a' * 100000000000 }}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
    ),
    *("{% for a in range(99999) %}{% for b in range(9999) %}aaaaaaaaaa{% endfor %}{% endfor %}",),
    "{% set ns = namespace(x='aa') %}"
    "{% for a in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}"
    "{% for a in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    *(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x'|center(3000000000) }}",
        "{{ '%3000000000d'|format(1) }}",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{% if %}",
        "{{",
        "{% include 'x' %}",
        "{{ messages|map('nosuch')|list }}",
    ),
    *(
        "{{ [].append(1) }}",
        "{{ messages + 1 }}",
        "{{ messages[99].content }}",
        "{{ {}['a']['b'] }}",
        "{{ 'a'.encode('x') }}",
    ),
    *(
        "{{ messages|tojson(indent=999999999) }}",
        "{{ strftime_now('%Y' * 10) }}",
        "{{ strftime_now('\ud800') }}",
        "{{ 'a'|int / 0 }}",
    ),
    *(
        "{{ 'ab'.ljust(4000000000) }}",
        "{{ '9' * 5000 | int }}",
        "{{ ('9' * 5000)|int }}",
        "{{ '{:>3000000000}'.format(1) }}",
    ),
    *(
        "\x1b[31m{{ messages }}",
        "",
        "{{ messages }}" * 10_000,
        "{{ (" * 500,
        "{% for x in messages %}" * 30,
    ),
)


def model(rng: random.Random, folder: Path) -> Case:
    """`rlhf generate` or `rlhf validate` with a damaged model folder."""
    path, whole = folder / "model", folder.parent / "model"
    if not whole.exists():
        material.save_model(whole)
    shutil.copytree(whole, path)
    how = rng.randrange(10)
    chat = ["--chat"] if how < 3 or rng.random() < 0.3 else []
    if how < 3:
        template = rng.choice(TEMPLATES)
        (path / "chat_template.jinja").write_text(template, errors="surrogatepass")
    else:
        _damage_folder(rng, path)
    if rng.random() < 0.3:
        found = yaml.safe_load(material.CONFIG)
        found["model"] = {"source": str(path)}
        found["data"]["prompt_style"] = "chat" if chat else "text"
        (folder / "config.yaml").write_text(yaml.safe_dump(found))
        return {"argv": ["validate", "--no-probe", str(folder / "config.yaml")]}
    argv = ["generate", "--model", str(path), "--max-new-tokens", "2", *chat, "Hello"]
    return {"argv": argv}


def _damage_folder(rng: random.Random, path: Path) -> None:
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice(sorted(f for f in path.iterdir() if f.is_file()))
        how = rng.randrange(8)
        if how == 0:
            file.unlink()
        elif how == 1:
            file.write_bytes(rng.choice(RAW).encode())
        elif file.suffix == ".json" and how < 7:
            try:
                file.write_bytes(damage_json(rng, json.loads(file.read_bytes())))
            except ValueError:
                file.write_bytes(b"[1, 2]")
        else:
            file.write_bytes(damage_bytes(rng, file.read_bytes()))


# ---- environments ----

ODD = (
    *_short(TEXTS),
    *(
        "/",
        "/dev/null",
        "/proc",
        "relative/path",
        "http://",
        "http://127.0.0.1:1",
        "https://[::1",
        "ftp://x",
    ),
    *(
        "http://user:pw@127.0.0.1:1/api",
        "http://127.0.0.1:99999",
        "http://exa mple",
        "sqlite:///",
        "databricks",
    ),
    *(
        "sqlite:////nosuch/x.db",
        "file:///nosuch",
        "postgresql://nosuch",
        "cuda:99",
        "cuda:",
        "1e9",
        "nan",
        "inf",
        "-1",
    ),
    *(
        "0",
        "1.5",
        "999999999999999999999",
        "true",
        "ddp ",
        "http://" + "a" * 70_000,
        "http://\u2603.test",
        "[",
        "a" * 5_000,
    ),
)
VARIABLES = (
    *(
        "RLHF_HOME",
        "RLHF_HOME",
        "MLFLOW_TRACKING_URI",
        "PREFECT_API_URL",
        "RLHF_MLFLOW_URL",
        "RLHF_PREFECT_URL",
    ),
    *("RLHF_PASSWORD", "RLHF_DEVICE", "RLHF_PROCESSES", "RLHF_STRATEGY", "RLHF_CHECKPOINT_SECONDS"),
    *(
        "RLHF_NOTIFY_WEBHOOK",
        "RLHF_OUTAGE_SECONDS",
        "RLHF_KEEP_WORK_DAYS",
        "HOME",
        "COLUMNS",
        "TERM",
        "LANG",
    ),
    *(
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "PREFECT_HOME",
        "TMPDIR",
        "HF_HOME",
        "NO_COLOR",
    ),
)


def environment(rng: random.Random, folder: Path) -> Case:
    """A command with odd values of variables."""
    path = folder / "config.yaml"
    path.write_text(material.CONFIG)
    names = rng.sample(VARIABLES, rng.choice((1, 1, 2)))
    env = {name: rng.choice(ODD) for name in names}
    argv = rng.choice(
        (
            ["config", str(path)],
            ["validate", "--no-probe", str(path)],
            ["sign-in"],
            ["config", str(path)],
        )
    )
    return {"argv": argv, "env": env}


# ---- command lines ----

COMMANDS = (
    *(
        "config",
        "validate",
        "generate",
        "compare",
        "promote",
        "rollback",
        "export",
        "backup",
        "restore",
    ),
    *("sign-in", "deploy", "nosuch", "", "-h", "--version", "resume"),
)
OPTIONS = (
    *(
        "--set",
        "--model",
        "--max-new-tokens",
        "--temperature",
        "--samples",
        "--seed",
        "--chat",
        "--json",
        "--all",
    ),
    *("--by", "--reason", "--to", "--write", "--owner", "-h", "--help", "--nosuch", "--", "-"),
)


WORDS = (
    *(
        "demo",
        "project=x",
        "seed=1",
        "sft.epochs=1e9",
        "a=b=c",
        "=",
        "runs:/x",
        "/nosuch",
        "~nosuch",
    ),
    *("models:/demo-policy@champion", "models:/a", "models:/a/999999999999999999999"),
    *("models:/../x/1", "[bold]x[/]", "[/]", "\udcff\udcfe", "a\nb", "x" * 300, "file:///x"),
    *("0" * 32, "%", "%s", "'; drop table runs; --", "é"),
)


def command(rng: random.Random, folder: Path) -> Case:
    """A command line of known and unknown words."""
    (folder / "config.yaml").write_text(material.CONFIG)
    files = (str(folder), str(folder / "config.yaml"), str(folder / "new"))
    values = [*_short(TEXTS), *ODD, *files, *WORDS]
    words = [rng.choice(COMMANDS)]
    for _ in range(rng.randrange(4)):
        if rng.random() < 0.5:
            words.append(rng.choice(OPTIONS))
        if rng.random() < 0.8:
            words.append(rng.choice(values))
    if words[0] in ("config", "validate") and rng.random() < 0.5:
        words.insert(1, str(folder / "config.yaml"))
    return {"argv": words, "stdin": rng.choice(("", "Hello\n", "\0\n", "\x1b[31m\n" * 3))}


SURFACES: dict[str, Callable[[random.Random, Path], Case]] = {
    "data": data,
    "config": config,
    "model": model,
    "environment": environment,
    "command": command,
}


def generate(surface: str, seed: int, count: int, folder: Path) -> Iterator[tuple[str, Case]]:
    """Cases by name, each in a folder of its own that is there until the next is asked for.

    Case n of a seed is the same whatever the count.
    """
    for number in range(count):
        name = f"{surface}-{seed}-{number}"
        place = folder / name
        place.mkdir(parents=True)
        yield name, SURFACES[surface](random.Random(name), place)
        shutil.rmtree(place, ignore_errors=True)
