"""Write `tables` anew for the installed releases: python -m tasks.servers.make_tables"""

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.servers.fresh_database import TABLES, known_tables

PACKAGES = ("prefect", "mlflow")


def main() -> None:
    """Replace the files of other releases."""
    TABLES.mkdir(exist_ok=True)
    for package in PACKAGES:
        for old in TABLES.glob(f"{package}-*.sql"):
            old.unlink()
        known_tables(package).write_text(tables_of(package), encoding="utf-8")


def tables_of(package: str) -> str:
    """The SQL of a database that the migrations of an installed package have made."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "new.db"
        # A process of its own: Prefect reads the address once.
        command = [sys.executable, "-P", "-m", "tasks.servers.make_tables", package, str(path)]
        subprocess.run(command, check=True)
        with closing(sqlite3.connect(path)) as connection:
            return "\n".join(connection.iterdump()) + "\n"


def migrate(package: str, path: Path) -> None:
    """Have a package make its database."""
    if package == "prefect":
        os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{path}"
        from prefect.server.database import provide_database_interface

        asyncio.run(provide_database_interface().create_db())
    else:
        from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

        engine = create_sqlalchemy_engine(f"sqlite:///{path}")
        _initialize_tables(engine)
        engine.dispose()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        migrate(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
