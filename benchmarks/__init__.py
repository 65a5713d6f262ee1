"""Measurements of llamacancel: what a token costs, how soon a cancel is honoured, what a rollback takes.

Run them with `python -m benchmarks`; see `python -m benchmarks --help`.
"""
