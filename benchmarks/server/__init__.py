"""Our server against llama.cpp's own, in turn: throughput, time to first token, and how soon a hang-up frees a slot.

Run it with `python -m benchmarks.server`; see `python -m benchmarks.server --help`.
"""
