"""The preference store: one database of pairs, people and votes, and snapshots of it."""
