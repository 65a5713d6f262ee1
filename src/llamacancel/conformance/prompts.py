"""Prompts of a wanted length in words, repeatable by seed, that share no beginning."""

from __future__ import annotations

import random

__all__ = ["asking_for_much", "of_words"]

# Common words, which most vocabularies hold as one token each.
_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea kid body
information back parent face level office door health person art war history party result change morning reason
research girl guy moment air teacher force education foot boy age policy music market sense nation plan college
interest death course someone experience behind reach local six remain effect yeah suggest class control raise
care perhaps late hard field else pass former sell major sometimes require along development themselves report
role better economic effort decide rate strong possible heart drug leader light voice wife whole police mind
finally pull return free military price less according decision explain son hope develop view relationship carry
town road drive arm true
"""
_WORDS = _TEXT.split()

_ASK = " Count slowly from one upwards, one number a line, in words, and do not stop:"


def of_words(n: int, seed: int | str) -> str:
    """Return `n` words, the first of them a number that another seed has otherwise: no cached beginning fits."""
    choose = random.Random(f"conformance {seed}")
    return " ".join([f"{choose.randrange(10**6):06d}", *(choose.choice(_WORDS) for _ in range(n - 1))])


def asking_for_much(n: int, seed: int | str) -> str:
    """Return `n` words and a request whose answer has no natural end, so that a model writes until it is stopped."""
    return of_words(n, seed) + "." + _ASK
