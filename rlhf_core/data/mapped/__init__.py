"""Prepared tables and their tokens in files, of which a stage holds only what it is working on."""
