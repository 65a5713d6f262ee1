"""What a Sampler chooses: its options, its state, its grammar."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.llama import choose_tokens
from tests.conftest import batch_of, prompt
from tests.laws.words import run_python

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]


@pytest.fixture
def ctx(model_of: LoadedModel, new_context: NewContext) -> lc.Context:
    """A context with logits to choose from: those of the last row, and of row 3."""
    context = new_context("llama")
    batch = lc.Batch(12)
    for i, token in enumerate(prompt(model_of("llama"), 12)):
        batch.add(int(token), i, 0, logits=i in (3, 11))
    context.decode(batch)
    return context


def chosen(sampler: lc.Sampler, ctx: lc.Context, n: int = 30) -> list[int]:
    return [sampler.sample(ctx) for _ in range(n)]


def ranked(ctx: lc.Context) -> list[int]:
    return [int(t) for t in np.argsort(-ctx.logits(), kind="stable")]


def test_a_temperature_of_zero_takes_the_most_likely(ctx: lc.Context) -> None:
    for temperature in (0, -1.0):
        sampler = lc.Sampler(temperature=temperature, seed=1)
        assert set(chosen(sampler, ctx)) == {int(np.argmax(ctx.logits()))}
        assert sampler.sample(ctx, 3) == sampler.sample(ctx, -2) == int(np.argmax(ctx.logits(3)))


def test_a_seed_gives_the_same_choices_again(ctx: lc.Context) -> None:
    options = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    first = chosen(lc.Sampler(**options, seed=7), ctx)  # type: ignore[arg-type]
    assert chosen(lc.Sampler(**options, seed=7), ctx) == first  # type: ignore[arg-type]
    assert chosen(lc.Sampler(**options, seed=8), ctx) != first  # type: ignore[arg-type]
    assert len(set(first)) > 5
    assert chosen(lc.Sampler(**options), ctx) != chosen(lc.Sampler(**options), ctx)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 2])
def test_every_seed_is_a_seed(seed: int, ctx: lc.Context) -> None:
    assert chosen(lc.Sampler(temperature=2.0, top_k=0, seed=seed), ctx) == chosen(
        lc.Sampler(temperature=2.0, top_k=0, seed=seed), ctx
    )


def test_reset_begins_again(ctx: lc.Context) -> None:
    sampler = lc.Sampler(temperature=1.5, top_k=0, seed=3, repeat_penalty=1.3)
    first = chosen(sampler, ctx)
    assert chosen(sampler, ctx) != first
    sampler.reset()
    assert chosen(sampler, ctx) == first
    lc.Sampler().reset()


def test_a_clone_goes_on_from_the_same_state(ctx: lc.Context) -> None:
    sampler = lc.Sampler(temperature=1.5, top_k=0, seed=3, repeat_penalty=1.3)
    chosen(sampler, ctx, 5)
    clone = sampler.clone()
    following = chosen(sampler, ctx)
    assert chosen(clone, ctx) == following
    clone.reset()
    sampler.reset()
    assert chosen(clone, ctx) == chosen(sampler, ctx)


def test_an_unbound_sampler_can_be_cloned(ctx: lc.Context) -> None:
    sampler = lc.Sampler(temperature=1.0, seed=4)
    assert chosen(sampler.clone(), ctx) == chosen(sampler, ctx)


WILD = {"temperature": 4.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}


@pytest.mark.parametrize(("option", "most"), [
    ({"top_k": 1}, 1), ({"top_k": 3}, 3), ({"top_p": 0.0}, 1), ({"min_p": 1.0}, 1), ({"typical_p": 0.001}, 60),
    ({"top_n_sigma": 0.01}, 2),
])  # fmt: skip
def test_a_truncation_leaves_few_tokens(option: dict[str, float], most: int, ctx: lc.Context) -> None:
    free = set(chosen(lc.Sampler(**WILD), ctx, 60))  # type: ignore[arg-type]
    kept = set(chosen(lc.Sampler(**{**WILD, **option}), ctx, 60))  # type: ignore[arg-type]
    assert len(free) > 55
    assert 1 <= len(kept) <= most


def test_top_k_keeps_the_most_likely(ctx: lc.Context) -> None:
    assert set(chosen(lc.Sampler(**{**WILD, "top_k": 4}), ctx, 200)) == set(ranked(ctx)[:4])  # type: ignore[arg-type]


def test_min_keep_leaves_more_tokens(ctx: lc.Context) -> None:
    assert len(set(chosen(lc.Sampler(**{**WILD, "top_p": 0.0, "min_keep": 5}), ctx, 200))) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [
    {"temperature": 0.1}, {"dynatemp_range": 3.9}, {"dynatemp_range": 3.9, "dynatemp_exponent": 5.0},
    {"repeat_penalty": 5.0},
    {"frequency_penalty": 5.0}, {"presence_penalty": 20.0}, {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    {"mirostat": 1}, {"mirostat": 2}, {"mirostat": 2, "mirostat_tau": 1.0}, {"mirostat": 1, "mirostat_eta": 0.9},
    {"logit_bias": {5: 50.0}}, {"repeat_penalty": 5.0, "penalty_last_n": 1}, {"seed": 12}, {"top_k": 2},
])  # fmt: skip
def test_each_option_has_an_effect(option: dict[str, object], ctx: lc.Context) -> None:
    base = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "seed": 11}
    assert chosen(lc.Sampler(**{**base, **option}), ctx, 60) != chosen(lc.Sampler(**base), ctx, 60)  # type: ignore[arg-type]


def test_a_repeat_penalty_makes_room_for_others(ctx: lc.Context) -> None:
    seen = chosen(lc.Sampler(temperature=0, presence_penalty=100.0), ctx, 10)
    assert seen == ranked(ctx)[:10]
    assert chosen(lc.Sampler(temperature=0, presence_penalty=100.0, penalty_last_n=0), ctx, 3) == [seen[0]] * 3
    assert chosen(lc.Sampler(temperature=0, presence_penalty=100.0, penalty_last_n=1), ctx, 4) == [seen[0], seen[1]] * 2


def test_dry_breaks_a_loop(model_of: LoadedModel, ctx: lc.Context) -> None:
    loop = [int(t) for t in model_of("llama").tokenize("one two three four ", add_special=False)] * 4
    plain = lc.Sampler(temperature=0, logit_bias={loop[0]: 100.0}, model=model_of("llama"))
    dry = lc.Sampler(
        temperature=0,
        logit_bias={loop[0]: 100.0},
        dry_multiplier=500.0,
        dry_allowed_length=1,
        dry_breakers=(),
        model=model_of("llama"),
    )
    for token in loop:
        plain.accept(token)
        dry.accept(token)
    assert plain.sample(ctx) == loop[0]
    assert dry.sample(ctx) != loop[0]


def test_what_is_accepted_counts_like_what_was_chosen(model_of: LoadedModel, ctx: lc.Context) -> None:
    best = ranked(ctx)[0]
    sampler = lc.Sampler(temperature=0, presence_penalty=100.0)
    sampler.accept(best, model=model_of("llama"))
    assert sampler.sample(ctx) == ranked(ctx)[1]


def test_a_bias_forbids_or_forces(ctx: lc.Context) -> None:
    best = ranked(ctx)[:3]
    assert lc.Sampler(temperature=0, logit_bias=dict.fromkeys(best, -math.inf)).sample(ctx) == ranked(ctx)[3]
    assert lc.Sampler(temperature=0, logit_bias={77: 1000.0}).sample(ctx) == 77
    assert lc.Sampler(temperature=0, logit_bias={np.int32(77): np.float32(1000)}).sample(ctx) == 77
    assert set(chosen(lc.Sampler(**WILD, logit_bias={77: 1000.0}), ctx)) == {77}  # type: ignore[arg-type]


# -- grammar


def generate(model: lc.Model, context: lc.Context, sampler: lc.Sampler, n: int = 40) -> str:
    """Text that follows the context's prompt."""
    tokens: list[int] = []
    pos = context.memory.pos_max(0) + 1
    while len(tokens) < n:
        token = sampler.sample(context)
        if model.is_eog(token):
            break
        tokens.append(token)
        context.decode(batch_of(np.array([token], np.int32), pos=pos))
        pos += 1
    return b"".join(model.token_to_piece(t) for t in tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_grammar_restricts_the_text(temperature: float, model_of: LoadedModel, ctx: lc.Context) -> None:
    grammar = 'root ::= ("yes" | "no") ", " [0-9]{3} "."'
    text = generate(model_of("llama"), ctx, lc.Sampler(grammar=grammar, temperature=temperature, seed=5))
    assert text[-4:-1].isdigit()
    assert text[:-4] in ("yes, ", "no, ")
    assert text.endswith(".")


def test_a_grammar_with_other_scripts_works(model_of: LoadedModel, ctx: lc.Context) -> None:
    text = generate(model_of("llama"), ctx, lc.Sampler(grammar='root ::= "日本" [あ-ん]{2}', temperature=1.0, seed=5))
    assert text.startswith("日本")
    assert len(text) == 4


def test_a_grammar_can_begin_with_another_rule(model_of: LoadedModel, ctx: lc.Context) -> None:
    sampler = lc.Sampler(grammar='root ::= "a"\nother ::= "b"', grammar_root="other")
    assert generate(model_of("llama"), ctx, sampler) == "b"


def test_a_grammar_begins_again_after_a_reset(model_of: LoadedModel, ctx: lc.Context) -> None:
    sampler = lc.Sampler(grammar='root ::= "ab"', temperature=0)
    assert generate(model_of("llama"), ctx, sampler) == "ab"
    sampler.reset()
    assert generate(model_of("llama"), ctx, sampler) == "ab"


def test_a_clone_follows_the_grammar_from_where_it_was(model_of: LoadedModel, ctx: lc.Context) -> None:
    sampler = lc.Sampler(
        grammar='root ::= "a" "b" "c" [0-9]', temperature=0, logit_bias=_long_tokens(model_of("llama"))
    )
    model = model_of("llama")
    assert model.token_to_piece(sampler.sample(ctx)) == b"a"
    clone = sampler.clone()
    assert [model.token_to_piece(s.sample(ctx)) for s in (sampler, clone, clone, sampler)] == [b"b", b"b", b"c", b"c"]


def _long_tokens(model: lc.Model) -> dict[int, float]:
    return {t: -math.inf for t in range(model.n_vocab) if len(model.token_to_piece(t)) > 1}


# -- use


def test_a_sampler_works_with_every_context_of_its_model(
    model_of: LoadedModel, new_context: NewContext, ctx: lc.Context
) -> None:
    sampler = lc.Sampler(temperature=0, model=model_of("llama"))
    other = new_context("llama")
    other.decode(batch_of(prompt(model_of("llama"), 9, seed=3)))
    assert sampler.sample(ctx) == int(np.argmax(ctx.logits()))
    assert sampler.sample(other) == int(np.argmax(other.logits()))


def test_a_sampler_outlives_the_model_that_it_is_bound_to(model_of: LoadedModel) -> None:
    with lc.Model.load(model_of("llama").path) as model:
        sampler = lc.Sampler(grammar='root ::= "a"', model=model)
    sampler.accept(next(t for t in range(32000) if model_of("llama").token_to_piece(t) == b"a"))
    del sampler, model


def test_choosing_leaves_the_logits_as_they_were(ctx: lc.Context) -> None:
    before = ctx.logits().tobytes()
    chosen(lc.Sampler(temperature=2.0, repeat_penalty=2.0, logit_bias={3: 10.0}, seed=1), ctx)
    assert ctx.logits().tobytes() == before


def test_logits_that_are_no_numbers_are_not_sampled(model_of: LoadedModel, new_context: NewContext) -> None:
    model, context = model_of("llama"), new_context("llama")
    rows = lc.Batch(1, n_embd=model.n_embd)
    rows.add(np.zeros(model.n_embd, np.float32), 0, 0, logits=True)
    assert rows._embd is not None
    rows._embd[:] = math.nan  # as a model with such weights would compute it
    context.decode(rows)
    assert np.isnan(context.logits()).any()
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not numbers"):
            lc.Sampler(temperature=temperature, seed=1).sample(context)


def test_the_sampler_says_what_it_is() -> None:
    assert repr(lc.Sampler(temperature=0.5, seed=3)) == "<Sampler temperature=0.5 seed=3>"


def deep(levels: int) -> object:
    schema: object = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_that_cannot_be_expressed_is_refused_in_words(model_of: LoadedModel) -> None:
    model = model_of("llama")
    unknown = {"type": "nothing"}, {"$ref": "#/nowhere"}, {"$ref": "http://nowhere.invalid/x.json"}
    for schema in ("{", "", b"\xff", *unknown, deep(200), deep(100_000), 5, [1]):
        with pytest.raises((ValueError, TypeError), match=r".") as told:
            lc.Sampler(json_schema=schema, model=model)  # type: ignore[arg-type]
        assert str(told.value).strip()


# ---- several rows at a time -----------------------------------------------------------------------------------------


def test_several_rows_get_the_tokens_that_they_would_get_one_by_one(model_of: LoadedModel) -> None:
    with model_of("llama").context(n_ctx=256, n_threads=2) as ctx:
        ctx.decode(batch_of(prompt(model_of("llama"), 40), logits="all"))
        letters = {"grammar": "root ::= [a-z]+"}
        together = [
            lc.Sampler(temperature=1.5, top_k=0, seed=i, **letters if i % 4 == 0 else {})  # type: ignore[arg-type]
            for i in range(40)
        ]
        alone = [sampler.clone() for sampler in together]
        for _ in range(5):
            found = choose_tokens(ctx, [(sampler, i, lc.CancelToken(), None) for i, sampler in enumerate(together)])
            assert [token for token, _, _ in found] == [sampler.sample(ctx, i) for i, sampler in enumerate(alone)]


def test_of_several_rows_each_fails_alone(ctx: lc.Context) -> None:
    gone, going = lc.CancelToken(), lc.CancelToken()
    gone.cancel("gone")
    impossible = lc.Sampler(logit_bias=dict.fromkeys(range(ctx.model.n_vocab), -math.inf))
    samplers = [lc.Sampler(temperature=1.5, top_k=0, seed=i) for i in range(5)]
    rest = [sampler.clone() for sampler in samplers]
    for _ in range(3):
        found = choose_tokens(
            ctx,
            [
                (samplers[0], 3, going, None),
                (samplers[1], 4, going, None),  # has no logits
                (samplers[2], 11, gone, None),
                (impossible, 3, going, None),
                (samplers[0], 11, going, None),  # is in use
                (samplers[3], -1, going, None),
            ],
        )
        kinds = [type(one) for one in found]
        assert kinds == [tuple, IndexError, lc.DecodeCancelled, ValueError, lc.ContextBusyError, tuple]
        assert isinstance(found[2], lc.DecodeCancelled)
        assert found[2].reason == "gone"
        assert "no token of the vocabulary" in str(found[3])
        assert (found[0][0], found[5][0]) == (rest[0].sample(ctx, 3), rest[3].sample(ctx, 11))
    assert [s.sample(ctx) for s in samplers] == [r.sample(ctx) for r in rest], "those that failed are as they were"


def test_no_rows_get_no_tokens(ctx: lc.Context) -> None:
    assert choose_tokens(ctx, []) == []


# ---- log probabilities ----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_float64(ctx: lc.Context) -> None:
    values = ctx.logits(3).astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    ((token, logprob, top),) = choose_tokens(ctx, [(lc.Sampler(temperature=2.0, seed=5), 3, lc.CancelToken(), 20)])  # type: ignore[misc]
    assert logprob == pytest.approx(values[token], abs=1e-6)
    best = np.argsort(-values, kind="stable")[:20]
    assert [each for each, _ in top] == best.tolist()
    assert [value for _, value in top] == pytest.approx(values[best].tolist(), abs=1e-6)
    greedy = lc.Sampler(temperature=0)
    none, zero = choose_tokens(ctx, [(greedy, 3, lc.CancelToken(), None), (greedy.clone(), 3, lc.CancelToken(), 0)])
    assert none == (int(best[0]), None, ())
    assert isinstance(zero, tuple)
    assert zero[1] == pytest.approx(values.max(), abs=1e-6)
    assert zero[2] == ()


def test_of_equal_log_probabilities_the_lower_token_comes_first(model_of: LoadedModel, new_context: NewContext) -> None:
    model, context = model_of("llama"), new_context("llama")
    rows = lc.Batch(1, n_embd=model.n_embd)
    rows.add(np.zeros(model.n_embd, np.float32), 0, 0, logits=True)
    context.decode(rows)
    assert len(set(context.logits().tolist())) == 1
    ((_, logprob, top),) = choose_tokens(context, [(lc.Sampler(seed=1), -1, lc.CancelToken(), 5)])  # type: ignore[misc]
    assert [token for token, _ in top] == [0, 1, 2, 3, 4]
    assert logprob == pytest.approx(-math.log(model.n_vocab), abs=1e-6)


# ---- clones and biases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"xtc_probability": 0.5, "xtc_threshold": 0.0}, {"mirostat": 1}, {"mirostat": 2},
    {"grammar": "root ::= [a-z]+"}, {"regex": "[a-z]+"}, {"logit_bias": {77: 5.0}},
])  # fmt: skip
def test_a_clone_with_another_seed_draws_as_one_that_was_made_with_it(
    options: dict[str, object], ctx: lc.Context
) -> None:
    base = {"temperature": 1.5, "top_k": 0, **options}
    bound = lc.Sampler(**base, seed=3, model=ctx.model)  # type: ignore[arg-type]
    assert chosen(bound.clone(seed=9), ctx) == chosen(lc.Sampler(**base, seed=9), ctx)  # type: ignore[arg-type]
    assert chosen(lc.Sampler(**base, seed=3).clone(seed=9), ctx) == chosen(bound.clone(seed=9), ctx)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bias", "kind"), [
    ({10**5000: 1.0}, ValueError), ({-1: 1.0}, ValueError), ({"9" * 5000: 1.0}, TypeError), ({1: math.inf}, ValueError),
    ({1: math.nan}, ValueError), ({1: 10**5000}, ValueError), ({1: 1e300}, ValueError), ({1: "x" * 9000}, TypeError),
])  # fmt: skip
def test_an_absurd_bias_is_refused_in_words(bias: dict[int, float], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="logit_bias") as told:
        lc.Sampler(logit_bias=bias)
    assert len(str(told.value)) < 6000


def test_biases_and_a_constraint_go_together(ctx: lc.Context) -> None:
    model = ctx.model
    a, b = (next(t for t in range(300, model.n_vocab) if model.token_to_piece(t) == piece) for piece in (b"a", b"b"))
    biases = dict.fromkeys(range(model.n_vocab), -1.0)
    for best in (a, b):
        sampler = lc.Sampler(temperature=0, regex="a|b", logit_bias={**biases, best: 50.0})
        assert sampler.sample(ctx) == best


# ---- another process ------------------------------------------------------------------------------------------------


def test_a_bound_sampler_is_refused_in_a_forked_child() -> None:
    ran = run_python("""
import os, sys
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
model = lc.Model.load(cached_model("llama", "tiny"))
bound, unbound = lc.Sampler(seed=1, model=model), lc.Sampler(seed=1)
child = os.fork()
if child == 0:
    for act in (bound.clone, bound.reset, lambda: bound.accept(3)):
        try:
            act()
            os._exit(1)
        except lc.ClosedError as error:
            assert "forked" in str(error)
    unbound.clone()
    del act, bound
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
bound.accept(3)
print("well")
""")
    assert (ran.returncode, ran.stdout) == (0, "well\n"), ran.stderr
