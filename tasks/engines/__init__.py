"""Servers that sample responses: the client of vLLM, and a small server that stands in for it."""
