"""Pairs that the pipeline has people compare, and what they said."""
