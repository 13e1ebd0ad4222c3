"""Data that are prepared a part of the prompts at a time."""
