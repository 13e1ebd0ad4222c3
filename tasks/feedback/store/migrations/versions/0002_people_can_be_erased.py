"""People can be erased: their votes become tombstones, and nothing else may change.

A vote may be emptied while an erasure of its annotator is open, once and into one form only. Of a
snapshot and of the log such an erasure may overwrite the pseudonym. Everything else is refused, as
before.
"""

import re

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NOBODY = "(erased)"
CHANGED = ("judgments", "snapshots", "audit_log")

# In what both databases understand, but for `IS`, which compares NULLs too, and `HAS`.
_OPEN = "SELECT 1 FROM erasures e WHERE e.finished_at IS NULL AND e.project_id IS OLD.project_id"
_SAME = {
    "judgments": ("id", "project_id", "pair_id", "replaces_id", "kind", "at"),
    "snapshots": (
        *("id", "project_id", "digest", "votes", "training", "pairs", "annotators"),
        "created_at",
    ),
    "audit_log": ("id", "project_id", "at", "action"),
}
_ALLOWED = {
    "judgments": "NEW.annotator_id IS NULL AND NEW.assignment_id IS NULL AND NEW.vote = 'withdrawn'"
    " AND NEW.first = '' AND NEW.margin = 0 AND NEW.seconds IS NULL AND NEW.note = ''"
    " AND NEW.reason = '' AND NEW.source = '' AND NEW.time = '' AND NEW.kept IS NULL"
    " AND NEW.key LIKE 'erased-%' AND OLD.erasure IS NULL"
    f" AND EXISTS ({_OPEN} AND e.id = NEW.erasure AND e.annotator_id = OLD.annotator_id)",
    "snapshots": f'NEW."by" = \'{NOBODY}\' AND EXISTS ({_OPEN} AND e.pseudonym = OLD."by")',
    "audit_log": f"EXISTS ({_OPEN}"
    f" AND (NEW.actor = OLD.actor OR (NEW.actor = '{NOBODY}' AND OLD.actor = e.pseudonym))"
    f" AND (NEW.subject = OLD.subject OR (NEW.subject = '{NOBODY}'"
    " AND (HAS(OLD.subject, e.pseudonym) OR OLD.subject = CAST(e.annotator_id AS TEXT))))"
    " AND (TEXT(NEW.details) = TEXT(OLD.details) OR (TEXT(NEW.details) = '{}'"
    " AND HAS(TEXT(OLD.details), e.pseudonym))))",
}


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "erasures",
        sa.Column("id", _ID, nullable=False),
        sa.Column("project_id", _ID, nullable=False),
        sa.Column("annotator_id", _ID, nullable=True),
        sa.Column("pseudonym", sa.Text(), nullable=True),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("mark", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("steps", sa.JSON(), nullable=False),
        sa.Column("begun_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_erasures_project_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasures")),
    )
    op.create_index(op.f("ix_erasures_project_id"), "erasures", ["project_id"], unique=False)
    op.create_table(
        "erased_snapshots",
        sa.Column("snapshot_id", _ID, nullable=False, autoincrement=False),
        sa.Column("erasure_id", _ID, nullable=False),
        sa.Column("successor_id", _ID, nullable=True),
        sa.Column("made", sa.Boolean(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["erasure_id"], ["erasures.id"], name=op.f("fk_erased_snapshots_erasure_id")
        ),
        sa.ForeignKeyConstraint(
            ["snapshot_id"], ["snapshots.id"], name=op.f("fk_erased_snapshots_snapshot_id")
        ),
        sa.ForeignKeyConstraint(
            ["successor_id"], ["snapshots.id"], name=op.f("fk_erased_snapshots_successor_id")
        ),
        sa.PrimaryKeyConstraint("snapshot_id", name=op.f("pk_erased_snapshots")),
    )
    op.create_index(
        op.f("ix_erased_snapshots_erasure_id"), "erased_snapshots", ["erasure_id"], unique=False
    )
    op.add_column("judgments", sa.Column("erasure", _ID, nullable=True))
    for table in CHANGED:
        _let_erasures(table)
    _keep_for_good("erased_snapshots")


def _message(table: str) -> str:
    return f"rows of {table} are neither changed nor deleted"


def _let_erasures(table: str) -> None:
    """Refuse every change of a row but those that an open erasure makes."""
    same = " AND ".join(f"NEW.{column} IS OLD.{column}" for column in _SAME[table])
    allowed = f"{same} AND {_ALLOWED[table]}"
    if op.get_bind().dialect.name == "sqlite":
        allowed = allowed.replace("HAS(", "INSTR(").replace("TEXT(", "(")
        op.execute(f"DROP TRIGGER {table}_refuse_update")
        op.execute(
            f"CREATE TRIGGER {table}_refuse_update BEFORE UPDATE ON {table} "
            f"WHEN NOT COALESCE({allowed}, 0) "
            f"BEGIN SELECT RAISE(ABORT, '{_message(table)}'); END"
        )
        return
    for name in ("OLD", "NEW"):
        allowed = allowed.replace(f"TEXT({name}.details)", f"{name}.details::text")
    allowed = re.sub(r"HAS\(([^,]+), ([^)]+)\)", r"STRPOS(\1, \2) > 0", allowed)
    allowed = allowed.replace(" IS OLD.", " IS NOT DISTINCT FROM OLD.")
    op.execute(f"DROP TRIGGER {table}_refuse ON {table}")
    op.execute(
        f"CREATE FUNCTION {table}_refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF ({allowed}) IS TRUE THEN RETURN NEW; END IF; "
        f"RAISE EXCEPTION '{_message(table)}'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_refuse BEFORE DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()"
    )
    op.execute(
        f"CREATE TRIGGER {table}_refuse_change BEFORE UPDATE ON {table} "
        f"FOR EACH ROW EXECUTE FUNCTION {table}_refuse_change()"
    )


def _keep_for_good(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_refuse_{event.lower()} BEFORE {event} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{_message(table)}'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_message(table)}'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_refuse BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()"
    )


def downgrade() -> None:
    """To the version before: not possible once somebody was erased, as the votes are gone."""
    raise NotImplementedError("what was erased does not come back; restore a back-up")
