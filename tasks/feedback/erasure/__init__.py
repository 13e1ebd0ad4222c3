"""Erasing a person: their votes, what was made of them, and every trace of the pseudonym."""
