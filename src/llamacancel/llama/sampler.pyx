# distutils: language = c++
"""Samplers: chains that choose a token from an output's logits."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from posix.unistd cimport getpid

from .._native.cancel.call cimport Call
from .._native.llama cimport *
from .._native.model.model cimport ModelBox
from .._native.process.exit cimport InFlight
from .._native.process.status cimport Status
from .._native.words.sampler cimport Draw, accept, force, make_grammar, reset, sample, sample_rows
from .._native.words.vocabulary cimport piece_of, tokenize
from ..cancel.token cimport core_of
from ._llama cimport check_process, drain_log
from .call cimport Interrupt, check_call, check_status, watch_signals
from .context cimport Context
from .model cimport Model

from ..constraint import Vocabulary, source_of
from ..errors import ClosedError, ContextBusyError
from .params import integer, number

cdef uint32_t _RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED


cdef class Sampler:
    """Chooses tokens: a chain of llama.cpp's samplers, in the order of its own tools.

    A sampler has a state (random numbers, penalties, grammar) and so belongs to one generation: use `clone()`
    for another, or `reset()` between two. It binds itself to the vocabulary of the first model it is used with.
    One thread uses it at a time; a second one gets a `ContextBusyError`.

    Args:
        temperature: 0 or less: always the most likely token.
        top_k: Keep the k most likely tokens; 0 for all.
        top_p, min_p, typical_p, top_n_sigma: Truncations; 1, 0, 1 and -1 turn them off.
        min_keep: Tokens that truncations leave at least.
        dynatemp_range, dynatemp_exponent: Dynamic temperature; a range of 0 turns it off.
        repeat_penalty, frequency_penalty, presence_penalty, penalty_last_n: Penalties on the last tokens.
        dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, dry_breakers: DRY; multiplier 0 is off.
        xtc_probability, xtc_threshold: XTC; probability 0 is off.
        mirostat, mirostat_tau, mirostat_eta: Mirostat 1 or 2 in place of the truncations; 0 is off.
        seed: For the random numbers; None for a random one.
        logit_bias: {token: bias}; -inf forbids a token. Clones share it.
        json_schema: JSON schema, as text or as what `json.loads` gives, that the output must follow. At most one of
            `json_schema`, `regex`, `lark` and `grammar`.
        regex: Regular expression that the whole output must match.
        lark: Grammar in llguidance's dialect of Lark that the output must follow.
        grammar: GBNF text that the output must follow, beginning with the rule `grammar_root`.
        model: Binds the sampler at once, so that a bad grammar is told here and not at its first use.
        token: A `CancelToken` under which the grammar is parsed.

    Raises:
        TypeError, ValueError: If an argument is none that it can be, or a schema, expression or grammar is out of
            bounds, cannot be parsed, begins with itself (left recursion), is too large, or is too ambiguous.
        DecodeCancelled: If `token` was cancelled.
    """
    cdef object __weakref__
    cdef llama_sampler * chain       # null until bound to a model
    cdef shared_ptr[ModelBox] box    # the model whose vocabulary the chain refers to
    cdef int pid                     # the process that the model belongs to
    cdef shared_ptr[vector[llama_logit_bias]] biases  # null without; shared by clones, and never changed
    cdef dict options
    cdef object matcher              # where the text stands in its constraint; None without one, or until bound
    cdef vector[uint32_t] mask       # the tokens that the constraint allows next, a bit for each, if `masked`
    cdef bint masked
    cdef readonly uint64_t _steps    # that the grammar took for the last token, or for its parsing before the first
    cdef bint busy                   # a thread is using the chain, perhaps without the GIL; set and cleared with it

    def __init__(self, *, temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, top_n_sigma=-1.0,
                 min_keep=1, dynatemp_range=0.0, dynatemp_exponent=1.0, repeat_penalty=1.0, frequency_penalty=0.0,
                 presence_penalty=0.0, penalty_last_n=64, dry_multiplier=0.0, dry_base=1.75, dry_allowed_length=2,
                 dry_penalty_last_n=1024, dry_breakers=("\n", ":", '"', "*"), xtc_probability=0.0, xtc_threshold=0.1,
                 mirostat=0, mirostat_tau=5.0, mirostat_eta=0.1, seed=None, logit_bias=None, json_schema=None,
                 regex=None, lark=None, grammar=None, grammar_root="root", model=None, token=None):
        self.options = {
            "temperature": number("temperature", temperature, -1e6, 1e6),
            "top_k": integer("top_k", top_k, 0, 2**31 - 1),
            "top_p": number("top_p", top_p, 0, 1),
            "min_p": number("min_p", min_p, 0, 1),
            "typical_p": number("typical_p", typical_p, 0, 1),
            "top_n_sigma": number("top_n_sigma", top_n_sigma, -1, 1e6),
            "min_keep": integer("min_keep", min_keep, 0, 2**31 - 1),
            "dynatemp_range": number("dynatemp_range", dynatemp_range, 0, 1e6),
            "dynatemp_exponent": number("dynatemp_exponent", dynatemp_exponent, 0, 1e6),
            "repeat_penalty": number("repeat_penalty", repeat_penalty, 1e-6, 1e6),
            "frequency_penalty": number("frequency_penalty", frequency_penalty, -1e6, 1e6),
            "presence_penalty": number("presence_penalty", presence_penalty, -1e6, 1e6),
            "penalty_last_n": integer("penalty_last_n", penalty_last_n, 0, 1 << 20),
            "dry_multiplier": number("dry_multiplier", dry_multiplier, 0, 1e6),
            "dry_base": number("dry_base", dry_base, 1, 1e6),
            "dry_allowed_length": integer("dry_allowed_length", dry_allowed_length, 0, 1 << 20),
            "dry_penalty_last_n": integer("dry_penalty_last_n", dry_penalty_last_n, 0, 1 << 20),
            "dry_breakers": [str(text).encode() for text in dry_breakers],
            "xtc_probability": number("xtc_probability", xtc_probability, 0, 1),
            "xtc_threshold": number("xtc_threshold", xtc_threshold, 0, 1),
            "mirostat": integer("mirostat", mirostat, 0, 2),
            "mirostat_tau": number("mirostat_tau", mirostat_tau, 0, 1e6),
            "mirostat_eta": number("mirostat_eta", mirostat_eta, 0, 1e6),
            "seed": None if seed is None else integer("seed", seed, 0, 2**32 - 2),
            "grammar": None if grammar is None else _no_zero("grammar", grammar),
            "grammar_root": _no_zero("grammar_root", grammar_root),
            "constraint": source_of(json_schema=json_schema, regex=regex, lark=lark, grammar=grammar),
        }
        if logit_bias:
            self._keep_biases(dict(logit_bias))
        if model is not None:
            self.bind(model, token)

    def __dealloc__(self):
        if self.chain == NULL:
            return
        if self.pid != getpid():
            new shared_ptr[ModelBox](self.box)  # a forked child leaves the parent's model and chain alone
            return
        with nogil:
            llama_sampler_free(self.chain)
            self.box.reset()

    cdef int _keep_biases(self, dict given) except -1:
        cdef llama_logit_bias bias
        cdef shared_ptr[vector[llama_logit_bias]] biases = make_shared[vector[llama_logit_bias]]()
        for token, value in given.items():
            bias.token = integer("logit_bias: a token", token, 0, 2**31 - 1)
            bias.bias = _bias(value)
            biases.get().push_back(bias)
        self.biases = biases
        return 0

    cdef int _enter(self, str what) except -1:
        """Claims the chain for a call of this thread, which then sets `busy` back."""
        if self.chain != NULL:
            check_process(self.pid, "the sampler")
        if self.busy:
            raise ContextBusyError(f"{what}: another thread is using the sampler; give each generation a clone() of it")
        self.busy = True
        return 0

    def bind(self, Model model not None, token=None):
        """Bind the sampler to a model's vocabulary, which parses its grammar: once, before its first use.

        Args:
            model: The model.
            token: A `CancelToken` under which to parse.

        Raises:
            ContextBusyError: If another thread uses the sampler.
            DecodeCancelled: If `token` was cancelled; the sampler is bound to nothing.
            ValueError: If it is bound to another model, the grammar cannot be used, or a bias is of no token.
        """
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt
        model._check_open()
        self._enter("bind")
        try:
            interrupt = watch_signals(call)
            check_call("bind", call, interrupt)
            self._bind(model, model.box, call, interrupt)
        finally:
            self.busy = False

    cdef int _bind(self, Model model, const shared_ptr[ModelBox] & box, Call & call, Interrupt interrupt) except -1:
        """Builds the chain for a model's vocabulary, once, under a call. The model may be closed if the box is held."""
        if self.chain != NULL:
            if self.box != box:
                raise ValueError("the sampler is bound to another model's vocabulary; make one for this model")
            return 0
        cdef shared_ptr[ModelBox] held = box
        if self.options["constraint"] is not None:
            self.matcher = self.options["constraint"].matcher(_vocabulary_of(model, held))
            self.mask.resize((llama_vocab_n_tokens(held.get().vocab()) + 31) // 32)
        cdef llama_sampler_chain_params params = llama_sampler_chain_default_params()
        cdef llama_sampler * chain = llama_sampler_chain_init(params)
        try:
            self._fill(chain, held.get().vocab(), call, interrupt)
        except BaseException:
            llama_sampler_free(chain)
            raise
        finally:
            drain_log()
        self.chain = chain
        self.box = held
        self.pid = getpid()
        return 0

    cdef int _fill(self, llama_sampler * chain, const llama_vocab * vocab, Call & call, Interrupt interrupt) except -1:
        cdef int32_t n_vocab = llama_vocab_n_tokens(vocab)
        o = self.options
        cdef uint32_t seed = _RANDOM_SEED if o["seed"] is None else o["seed"]
        cdef size_t min_keep = o["min_keep"]
        cdef llama_logit_bias bias
        cdef vector[const char *] breakers
        cdef string text, root, message
        cdef llama_sampler * part = NULL
        cdef Status status
        cdef float dry_multiplier = o["dry_multiplier"], dry_base = o["dry_base"]
        cdef int32_t dry_allowed_length = o["dry_allowed_length"], dry_penalty_last_n = o["dry_penalty_last_n"]

        if self.biases:
            for bias in self.biases.get()[0]:
                if bias.token >= n_vocab:
                    raise ValueError(
                        f"logit_bias: token {bias.token} is outside of the vocabulary (0 to {n_vocab - 1})")
        if o["grammar"] is not None:
            text, root = o["grammar"].encode(), o["grammar_root"].encode()
            self._steps = 0
            with nogil:
                status = make_grammar(vocab, text, root, call, part, message, self._steps)
            check_status(status, "parsing a grammar", message, &call, interrupt, "", ValueError, ValueError)
            llama_sampler_chain_add(chain, part)
        if o["penalty_last_n"] and (o["repeat_penalty"] != 1 or o["frequency_penalty"] or o["presence_penalty"]):
            llama_sampler_chain_add(chain, llama_sampler_init_penalties(
                n_vocab, o["penalty_last_n"], o["repeat_penalty"], o["frequency_penalty"], o["presence_penalty"]))
        if o["dry_multiplier"] > 0:
            for breaker in o["dry_breakers"]:
                breakers.push_back(breaker)
            with nogil:
                part = llama_sampler_init_dry(vocab, dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n,
                                              breakers.data(), breakers.size())
            llama_sampler_chain_add(chain, part)
        if o["temperature"] <= 0:
            llama_sampler_chain_add(chain, llama_sampler_init_greedy())
            return 0
        if o["mirostat"]:
            self._add_temperature(chain)
            llama_sampler_chain_add(
                chain, _drawing(b"mirostat" if o["mirostat"] == 1 else b"mirostat-v2", o, n_vocab, seed))
            return 0
        if o["top_n_sigma"] > 0:
            llama_sampler_chain_add(chain, llama_sampler_init_top_n_sigma(o["top_n_sigma"]))
        if o["top_k"] > 0:
            llama_sampler_chain_add(chain, llama_sampler_init_top_k(o["top_k"]))
        if o["typical_p"] < 1:
            llama_sampler_chain_add(chain, llama_sampler_init_typical(o["typical_p"], min_keep))
        if o["top_p"] < 1:
            llama_sampler_chain_add(chain, llama_sampler_init_top_p(o["top_p"], min_keep))
        if o["min_p"] > 0:
            llama_sampler_chain_add(chain, llama_sampler_init_min_p(o["min_p"], min_keep))
        if o["xtc_probability"] > 0:
            llama_sampler_chain_add(chain, _drawing(b"xtc", o, n_vocab, seed))
        self._add_temperature(chain)
        llama_sampler_chain_add(chain, _drawing(b"dist", o, n_vocab, seed))
        return 0

    cdef int _add_temperature(self, llama_sampler * chain) except -1:
        o = self.options
        llama_sampler_chain_add(chain, llama_sampler_init_temp_ext(
            o["temperature"], o["dynatemp_range"], o["dynatemp_exponent"]))
        return 0

    def sample(self, Context ctx not None, i=-1, token=None):
        """Choose a token from an output of the context's last batch, and remember it.

        Args:
            ctx: The context.
            i: The row of the batch, or negative from the last output.
            token: A `CancelToken` under which to wait for the context, and that stops a grammar which takes long. An
                already cancelled token starts no work.

        Raises:
            DecodeCancelled: If `token` was cancelled; nothing was chosen.
            ContextBusyError: If another thread uses the sampler, or the context and there is no token to wait under.
            IndexError: If the row has no logits.
            ValueError: If the logits are not numbers, no token is left to choose, or the grammar is so ambiguous that
                the next token cannot be told in reasonable time.
        """
        cdef int32_t row = integer("i", i, -2**31, 2**31 - 1)
        cdef Draw draw
        cdef int32_t n_vocab
        draw.call = Call(core_of(token))
        ctx._acquire(&draw.call, None, "sample")
        try:
            self._enter("sample")
            try:
                self._prepare(draw, ctx, row)
                n_vocab = ctx.box.get().outputs().n_vocab
                with nogil:
                    sample(draw, n_vocab)
                self._steps = draw.steps
                self._follow(draw)
            finally:
                self.busy = False
        finally:
            ctx.box.get().release()
        return _chosen(draw)

    cdef int _prepare(self, Draw & draw, Context ctx, int32_t row) except -1:
        """Sets what is drawn from, in a context that the caller holds."""
        self._bind(ctx.model, ctx.box.get().model(), draw.call, Interrupt())
        draw.chain = self.chain
        draw.biases = self.biases.get()
        draw.logits = ctx._logits_of(row)
        if self.matcher is not None:
            self._fill_mask()
            draw.mask = self.mask.data()
        return 0

    cdef int _fill_mask(self) except -1:
        """Has the constraint tell what it allows next, if that is not known."""
        cdef unique_ptr[InFlight] flight  # llguidance must not meet the interpreter's end
        if self.masked:
            return 0
        with nogil:
            flight.reset(new InFlight())
        try:
            self.matcher.fill(<size_t> self.mask.data(), self.mask.size() * sizeof(uint32_t))
            self.masked = True
        finally:
            with nogil:
                flight.reset()
        return 0

    @property
    def _lacks_mask(self):
        """Whether there is a constraint that has not told yet what it allows next."""
        return self.matcher is not None and not self.masked

    def _make_mask(self):
        """What `sample()` does first, for those who have time for it before: while the logits are computed."""
        self._enter("mask")
        try:
            self._fill_mask()
        finally:
            self.busy = False

    cdef int _follow(self, Draw & draw) except -1:
        """Takes the constraint on behind what was drawn."""
        if self.matcher is not None and draw.status == Status.Done:
            self._take(draw.token)
        return 0

    cdef int _take(self, llama_token token) except -1:
        if not (self.matcher.stopped and llama_vocab_is_eog(self.box.get().vocab(), token)):
            self.masked = False
            self.matcher.take(token)
        return 0

    def _take_forced(self, least, most):
        """Takes the tokens that the constraint leaves no choice about, as `sample()` would one after the other.

        Args:
            least: Of fewer tokens none are taken.
            most: Of more tokens the first ones are taken.

        Returns:
            The tokens; behind them, or alone, one that ends the text, if nothing else can follow.
        """
        cdef list taken = []
        cdef llama_token token
        cdef string message
        cdef Status status
        self._enter("sample")
        try:
            if self.matcher is None or self.chain == NULL or self.biases:  # with a bias nothing may be left to choose
                return taken
            forced = self.matcher.forced()
            for token in forced[:most] if len(forced) >= least else ():
                with nogil:
                    status = force(self.chain, token, message)
                check_status(status, "sample", message, NULL, None, "", ValueError, ValueError)
                self._take(token)
                taken.append(token)
            self.matcher.check()
            if self.matcher.stopped and len(taken) < most:
                taken.append(self.matcher.vocabulary.end)
        finally:
            self.busy = False
        return taken

    def accept(self, token, *, model=None):
        """Tell the chain of a token that was chosen elsewhere (a prompt's, say), for penalties and grammar.

        Raises:
            ContextBusyError: If another thread uses the sampler.
            ValueError: If the sampler is bound to no model, or the grammar does not allow the token.
        """
        cdef llama_token chosen
        cdef string message
        cdef Status status
        if model is not None:
            self.bind(model)
        self._enter("accept")
        try:
            if self.chain == NULL:
                raise ValueError("the sampler is bound to no model yet: pass model=")
            chosen = integer("token", token, 0, llama_vocab_n_tokens(self.box.get().vocab()) - 1)
            if self.matcher is not None and not self.matcher.allows(chosen):
                self.matcher.check()
                raise ValueError(f"the token is not accepted: the constraint does not allow {chosen} here")
            self._steps = 0
            with nogil:
                status = accept(self.chain, chosen, message, self._steps)
            if self.matcher is not None and status == Status.Done:
                self._take(chosen)
        finally:
            self.busy = False
        check_status(status, "accept", message, NULL, None, "the token is not accepted: ", ValueError, ValueError)

    def reset(self):
        """Forget what was chosen; the random numbers begin again.

        Raises:
            ContextBusyError: If another thread uses the sampler.
        """
        self._enter("reset")
        try:
            if self.chain != NULL:
                if self.matcher is not None:
                    self.matcher = self.options["constraint"].matcher(self.matcher.vocabulary)
                    self.masked = False
                with nogil:
                    reset(self.chain)
        finally:
            self.busy = False

    def clone(self, *, seed=None):
        """A sampler with the same options and a copy of the state.

        Args:
            seed: Another seed for the random numbers, which begin again.

        Raises:
            ContextBusyError: If another thread uses the sampler.
        """
        cdef Sampler other = Sampler.__new__(Sampler)
        other.options = self.options
        other.biases = self.biases
        if seed is not None:
            other.options = {**self.options, "seed": integer("seed", seed, 0, 2**32 - 2)}
        self._enter("clone")
        try:
            if self.chain != NULL:
                if seed is None:
                    with nogil:
                        other.chain = llama_sampler_clone(self.chain)
                else:
                    other.chain = self._reseeded(other.options["seed"])
                other.box = self.box
                other.pid = self.pid
            if self.matcher is not None:
                other.matcher = self.matcher.copy()
                other.mask, other.masked = self.mask, self.masked
        finally:
            self.busy = False
        return other

    def constrained(self, lark):
        """A sampler with the same options, at its beginning, that follows a constraint (`ChatPrompt.constraint`).

        Raises:
            ValueError: If this one has a constraint or a grammar of its own.
        """
        if self.options["constraint"] is not None or self.options["grammar"] is not None:
            raise ValueError("the sampler has a constraint of its own, and the output can follow one")
        cdef Sampler other = Sampler.__new__(Sampler)
        other.options = {**self.options, "constraint": source_of(lark=lark)}
        other.biases = self.biases
        return other

    cdef llama_sampler * _reseeded(self, uint32_t seed) except NULL:
        """A copy of the chain in which what draws random numbers is made anew."""
        o = self.options
        cdef int32_t n_vocab = llama_vocab_n_tokens(self.box.get().vocab())
        cdef llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params())
        cdef llama_sampler * old
        cdef llama_sampler * part
        cdef int i
        for i in range(llama_sampler_chain_n(self.chain)):
            old = llama_sampler_chain_get(self.chain, i)
            part = _drawing(bytes(llama_sampler_name(old)), o, n_vocab, seed)
            if part == NULL:
                with nogil:
                    part = llama_sampler_clone(old)
            llama_sampler_chain_add(chain, part)
        return chain

    def __repr__(self):
        o = self.options
        return f"<Sampler temperature={o['temperature']} seed={o['seed']}>"


def choose_tokens(Context ctx not None, list rows not None):
    """`Sampler.sample()` for several rows of the context's last batch at a time, with the context's threads.

    Args:
        ctx: The context.
        rows: (sampler, row, token, n_top) for each, with a sampler and a `CancelToken` of its own. With `n_top` given,
            the logarithms of probabilities are told, too.

    Returns:
        For each (token, logprob, top), or the exception that `sample()` would have raised. `logprob` is the natural
        logarithm of the probability that the model gave the token, before the sampler changed anything, and `top` has
        (token, logprob) of the `n_top` likeliest, the lower id first of two that are equal; None and () where `n_top`
        is None.

    Raises:
        ContextBusyError: If another thread uses the context.
    """
    cdef vector[Draw] draws = vector[Draw](len(rows))
    cdef size_t n = 0
    cdef int32_t n_vocab
    cdef int n_threads
    cdef Sampler sampler
    cdef list entered = []
    cdef list told = []
    ctx._acquire(NULL, None, "sample")
    try:
        for each, row, token, n_top in rows:
            sampler = each
            try:
                sampler._enter("sample")
            except (ContextBusyError, ClosedError) as error:
                entered.append(None)
                told.append(error)
                continue
            entered.append(sampler)
            try:
                draws[n].call = Call(core_of(token))
                draws[n].n_top = -1 if n_top is None else n_top
                sampler._prepare(draws[n], ctx, row)
            except Exception as error:
                told.append(error)
            else:
                told.append(None)
                n += 1
        draws.resize(n)
        n_vocab = ctx.box.get().outputs().n_vocab
        n_threads = llama_n_threads_batch(ctx.box.get().get())
        with nogil:
            sample_rows(draws, n_vocab, n_threads)
        n = 0
        for i in range(len(told)):
            if told[i] is None:
                told[i] = _followed(entered[i], draws[n])
                n += 1
    finally:
        for each in entered:
            if each is not None:
                (<Sampler> each).busy = False
        ctx.box.get().release()
    return told


cdef object _followed(Sampler sampler, Draw & draw):
    """What came of one of several rows: what was chosen, or the exception."""
    try:
        sampler._follow(draw)
        sampler._steps = draw.steps
        return (_chosen(draw), draw.logprob if draw.n_top >= 0 else None, tuple(draw.top))
    except Exception as error:
        return error


cdef llama_sampler * _drawing(bytes name, dict o, int32_t n_vocab, uint32_t seed) except? NULL:
    """The part of a chain that has this name, if it draws random numbers."""
    if name == b"xtc":
        return llama_sampler_init_xtc(o["xtc_probability"], o["xtc_threshold"], o["min_keep"], seed)
    if name == b"dist":
        return llama_sampler_init_dist(seed)
    if name == b"mirostat":
        return llama_sampler_init_mirostat(n_vocab, seed, o["mirostat_tau"], o["mirostat_eta"], 100)
    if name == b"mirostat-v2":
        return llama_sampler_init_mirostat_v2(seed, o["mirostat_tau"], o["mirostat_eta"])
    return NULL


cdef object _chosen(Draw & draw):
    """The token that was drawn; raises why there is none."""
    check_status(draw.status, "sample", draw.message, &draw.call, None, "", ValueError, ValueError)
    return draw.token


cdef object _vocabulary_of(Model model, const shared_ptr[ModelBox] & box):
    """The model's vocabulary for constraints, which no second thread makes at the same time."""
    if model._vocabulary is None:
        model._vocabulary = Vocabulary(_Pieces.of(box))
    return model._vocabulary


@cython.final
@cython.no_gc_clear
cdef class _Pieces:
    """A vocabulary, read for constraints. It holds the native model, not the Python one, which holds it."""
    cdef shared_ptr[ModelBox] box
    cdef int pid

    @staticmethod
    cdef _Pieces of(const shared_ptr[ModelBox] & box):
        cdef _Pieces pieces = _Pieces.__new__(_Pieces)
        pieces.box = box
        pieces.pid = getpid()
        return pieces

    def __dealloc__(self):
        if self.box and self.pid != getpid():
            new shared_ptr[ModelBox](self.box)  # a forked child leaves the parent's model alone
        with nogil:
            self.box.reset()

    def __call__(self):
        """The bytes that each token adds to a text, the tokens that add none, those that end a text, a tokenizer."""
        cdef const llama_vocab * vocab = self.box.get().vocab()
        cdef llama_token token
        pieces, special, ends = [], [], []
        for token in range(llama_vocab_n_tokens(vocab)):
            piece = <bytes> piece_of(vocab, token, False)
            ends_text = llama_vocab_is_eog(vocab, token)
            if ends_text:
                ends.append(token)
            if ends_text or not piece:
                special.append(token)
                piece = <bytes> piece_of(vocab, token, True) or b"<%d>" % token
            pieces.append(piece)
        return pieces, special, ends, self.encode

    def encode(self, text):
        """The tokens of a text."""
        cdef string data = text.encode("utf-8", "replace")
        cdef vector[llama_token] tokens
        cdef string message
        cdef Status status
        cdef Call call
        with nogil:
            status = tokenize(self.box.get().vocab(), data, False, False, call, tokens, message)
        check_status(status, "tokenize", message, &call, None, "the text cannot be tokenized: ", ValueError, ValueError)
        return tokens


cdef double _bias(value) except? -1e300:
    cdef double bias
    try:
        bias = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"logit_bias: a bias must be a number, not {str(value)[:40]!r}") from None
    except OverflowError:
        bias = float("inf")
    if bias != bias or bias > 3e38:
        raise ValueError("logit_bias: a bias must be a number that a float can hold, or -inf; NaN is none")
    return bias


cdef str _no_zero(str name, value):
    try:
        if isinstance(value, str) and "\0" not in value:
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{name} must be text without zero characters and lone surrogates")
