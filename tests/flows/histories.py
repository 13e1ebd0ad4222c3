"""What MLflow's database holds of the pipelines of a home: read without a server."""

import sqlite3
from pathlib import Path


def rows(home: Path, query: str) -> list[tuple]:
    uri = f"file:{home / 'mlflow' / 'mlflow.db'}?mode=ro"
    with sqlite3.connect(uri, uri=True, timeout=30) as connection:
        return connection.execute(query).fetchall()


def of_seed(seed: int) -> str:
    """The runs of the pipeline of a seed, as a query."""
    return (
        "select r.run_uuid from runs r join params p on p.run_uuid = r.run_uuid "
        f"where p.key = 'seed' and p.value = '{seed}'"
    )


def digests(home: Path, seed: int) -> list[tuple]:
    """The name and the digest of each model version of the pipeline of a seed."""
    return rows(
        home,
        "select v.name, t.value from model_versions v join model_version_tags t "
        "on t.name = v.name and t.version = v.version and t.key = 'digest' "
        f"where v.current_stage != 'Deleted_Internal' and v.run_id in ({of_seed(seed)}) "
        "order by v.name",
    )


def curves(home: Path, seed: int) -> list[tuple]:
    """Every value of every metric, without times, of the pipeline of a seed."""
    return rows(
        home,
        "select r.name, m.key, m.step, m.value from metrics m join runs r "
        f"on r.run_uuid = m.run_uuid where r.run_uuid in ({of_seed(seed)}) "
        "and m.key not like 'time/%' and r.name like '%-seed-%' order by 1, 2, 3, 4",
    )


def doubled(home: Path) -> list[tuple]:
    """Metrics that have two values at one step."""
    return rows(
        home,
        "select run_uuid, key, step from metrics group by run_uuid, key, step having count(*) > 1",
    )
