"""The peers: the same work on llamacancel and on other bindings of llama.cpp, as libraries and as servers.

Run it with `python -m benchmarks.peers`; see `python -m benchmarks.peers --help`.
"""
