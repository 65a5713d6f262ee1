"""The check on a GPU: the laws on it, and what a cancel costs there. `make gpu-check`, or `python -m benchmarks.gpu`.

Each step runs in a process of its own, within a time limit, and leaves its result in a file: what is done once is not
done again, and a fault of a driver ends one step only.
"""
