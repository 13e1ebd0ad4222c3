"""A new SQLite database for Prefect or MLflow, with all tables that their migrations would make.

Both make a new database by running every migration of their history: six seconds of a processor
for a home that is empty. `tables` has what comes out, for the releases that this package is tested
with; a test compares it with what their migrations make today. With another release they migrate
as ever. Whoever opens the database still migrates it, which finds nothing to do.
"""

import os
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

TABLES = Path(__file__).parent / "tables"


def known_tables(package: str) -> Path:
    """The file with the tables of the installed release of a package, which need not exist."""
    return TABLES / f"{package}-{version(package)}.sql"


def create(package: str, url: str) -> None:
    """Create the database of a package, if there is none and its tables are known.

    It is complete or absent, whenever the process is killed. One that another process makes at the
    same time stays. Anything that goes wrong is left to the package, which makes its database then
    and says what it needs.

    Args:
        package: prefect or mlflow.
        url: as SQLAlchemy writes it; other databases than files of SQLite are not touched.
    """
    scheme, _, name = url.partition(":///")
    if not scheme.startswith("sqlite") or not name or name.startswith(":") or "?" in name:
        return
    path, script = Path(name), known_tables(package)
    if path.exists() or not script.is_file():
        return
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with suppress(OSError, sqlite3.Error):
        try:
            with closing(sqlite3.connect(new)) as connection:
                connection.executescript(script.read_text(encoding="utf-8"))
            os.link(new, path)  # unlike a rename it replaces nothing
        finally:
            new.unlink(missing_ok=True)
