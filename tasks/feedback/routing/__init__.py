"""A judge that is a machine: its votes, and which pairs it answers without people."""
