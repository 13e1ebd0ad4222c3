"""Labelling tools of others: their exports in, tasks for them out."""
