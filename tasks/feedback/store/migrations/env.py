"""Alembic runs this to bring the tables up to date, on the connection that it is given."""

from alembic import context
from sqlalchemy import text

from tasks.feedback.store.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,  # SQLite can do it too: all of a version, or nothing
)
with context.begin_transaction():
    if connection.dialect.name == "postgresql":  # one at a time
        connection.execute(text("SELECT pg_advisory_xact_lock(8241)"))
    context.run_migrations()
connection.commit()
