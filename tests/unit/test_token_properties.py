"""Random trees of tokens against a model of what must be cancelled, by whom and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from llamacancel.cancel import CallbackHandle, CancelToken, Cause

FAR = 1e6  # seconds; a deadline that does not come during a test


@dataclass(eq=False)
class Model:
    """A token as DESIGN.md describes it, the slow and plain way."""

    parents: list[Model]
    verdict: tuple[Cause, str] | None = None
    children: list[Model] = field(default_factory=list)
    callbacks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for parent in self.parents:
            parent.children.append(self)
            self.verdict = self.verdict or parent.verdict

    def cancel(self, cause: Cause, reason: str) -> bool:
        if self.verdict:
            return False
        reached: list[Model] = [self]
        for token in reached:
            token.verdict = (cause, reason)
            reached += {
                id(child): child for child in token.children if not child.verdict and child not in reached
            }.values()
        return True


@dataclass(eq=False)
class Pair:
    token: CancelToken
    model: Model


class TokenTrees(RuleBasedStateMachine):
    pairs: Bundle[Pair] = Bundle("pairs")
    handles: Bundle[tuple[CallbackHandle, Pair, int]] = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Pair] = []
        self.calls: list[int] = []
        self.expected: list[int] = []
        self.callbacks = 0

    def keep(self, token: CancelToken, model: Model) -> Pair:
        pair = Pair(token, model)
        self.known.append(pair)
        return pair

    @rule(target=pairs, timeout=st.sampled_from([None, FAR]))
    def make(self, timeout: float | None) -> Pair:
        return self.keep(CancelToken(timeout=timeout), Model([]))

    @rule(target=pairs)
    def make_expired(self) -> Pair:
        return self.keep(CancelToken(timeout=0), Model([], (Cause.DEADLINE, "")))

    @rule(target=pairs, parent=pairs, timeout=st.sampled_from([None, FAR]))
    def child(self, parent: Pair, timeout: float | None) -> Pair:
        return self.keep(parent.token.child(timeout=timeout), Model([parent.model]))

    @rule(target=pairs, parent=pairs)
    def expired_child(self, parent: Pair) -> Pair:
        model = Model([parent.model])
        model.verdict = model.verdict or (Cause.DEADLINE, "")
        return self.keep(parent.token.child(timeout=-1), model)

    @rule(target=pairs, parents=st.lists(pairs, min_size=1, max_size=4))
    def any_of(self, parents: list[Pair]) -> Pair:
        token = CancelToken.any_of(*[parent.token for parent in parents])
        return self.keep(token, Model([parent.model for parent in parents]))

    @rule(pair=pairs, cause=st.sampled_from(Cause), reason=st.text(max_size=5))
    def cancel(self, pair: Pair, cause: Cause, reason: str) -> None:
        before = {id(each): each.model.verdict for each in self.known}
        assert pair.token.cancel(reason, cause=cause) == pair.model.cancel(cause, reason)
        for each in self.known:
            if each.model.verdict and not before[id(each)]:
                self.expected += each.model.callbacks

    @rule(target=handles, pair=pairs)
    def add_callback(self, pair: Pair) -> Any:
        self.callbacks += 1
        number = self.callbacks
        handle = pair.token.add_callback(lambda: self.calls.append(number))
        if pair.model.verdict:
            self.expected.append(number)
        else:
            pair.model.callbacks.append(number)
        return (handle, pair, number)

    @rule(entry=handles)
    def remove_callback(self, entry: tuple[CallbackHandle, Pair, int]) -> None:
        handle, pair, number = entry
        pending = not pair.model.verdict and number in pair.model.callbacks
        assert handle.done != pending
        assert handle.remove() == pending
        if pending:
            pair.model.callbacks.remove(number)

    # The token dies, but what was derived from it is reached through it as before. Its callbacks die too,
    # unless a handle keeps the token.
    @rule(target=pairs, pair=consumes(pairs))
    def drop(self, pair: Pair) -> Any:
        if pair.model.callbacks:
            return pair
        self.known.remove(pair)
        return multiple()

    @invariant()
    def tokens_agree_with_the_model(self) -> None:
        for pair in self.known:
            verdict = pair.model.verdict
            assert pair.token.cancelled == (verdict is not None)
            assert (pair.token.cause, pair.token.reason) == (verdict or (None, None))

    @invariant()
    def each_callback_runs_once_when_its_token_is_cancelled(self) -> None:
        assert sorted(self.calls) == sorted(self.expected)


TestTokenTrees = TokenTrees.TestCase
TestTokenTrees.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
