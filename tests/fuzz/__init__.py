"""Random input from strangers, for as long as is asked: `make fuzz SECONDS=600`.

`targets.py` says what is drawn and what must be true of it. Each input is tried in a process of its own kind
(`worker.py`), since what is looked for may end it. One that fails is made smaller by hypothesis and kept in `cases/`;
`test_cases.py` tries the kept ones again, and a few fresh ones, with all the other tests.
"""
