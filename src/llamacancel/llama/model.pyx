# distutils: language = c++
"""A model: its file, its vocabulary, its adapters."""

import os

import numpy as np

cimport cython
from libc.stdint cimport int32_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector
from posix.unistd cimport getpid

from .._native.cancel.call cimport Call
from .._native.llama cimport *
from .._native.memory.memory cimport name_of
from .._native.model.model cimport ModelBox, ProgressCallback
from .._native.process.status cimport Status
from .._native.words.vocabulary cimport detokenize, piece_of, tokenize
from ..cancel.token cimport core_of
from ._llama cimport check_forked, check_process, drain_log, entered_process
from .call cimport Interrupt, check_status, watch_signals

from ..errors import ClosedError, LoadCancelled, ModelLoadError
from .params import SPLIT_MODE, choice, endpoint, integer, number

cdef tuple _VOCAB_TYPES = ("none", "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2", "test")  # by llama_vocab_type
cdef tuple _TOKEN_ATTRIBUTES = (  # by the bits of llama_token_attr
    "unknown", "unused", "normal", "control", "user_defined", "byte", "normalized", "lstrip", "rstrip", "single_word")


@cython.final
cdef class _Progress:
    """A load's progress callback; what it raises stops the load and is raised again."""
    cdef object report
    cdef object error


cdef cbool _report_progress(float fraction, void * arg) noexcept nogil:
    with gil:
        try:
            (<_Progress> arg).report(fraction)
            return True
        except BaseException as error:
            (<_Progress> arg).error = error
            return False


@cython.no_gc_clear
cdef class Model:
    """A model and its vocabulary, loaded from a GGUF file by `Model.load`.

    Contexts keep what they need of it: a model may be closed before them.
    """

    def __init__(self):
        raise TypeError("use Model.load(path)")

    @staticmethod
    def load(path, n_gpu_layers=0, progress=None, token=None, *, use_mmap=True, use_mlock=False, check_tensors=False,
             vocab_only=False, main_gpu=0, split_mode="layer", tensor_split=None, rpc_servers=()):
        """Load a model from a GGUF file (the first one of a split model).

        Args:
            path: The file.
            n_gpu_layers: Layers to keep on GPUs and RPC servers; negative for all. Ignored where there are none.
            progress: Called with a fraction of 0 to 1 as the load goes on; an exception in it stops the load.
            token: Cancels the load. llama.cpp gives no place to look while it reads a file's description itself (some
                0.1 s for a vocabulary of 150,000 tokens) and, with `use_mlock`, while one tensor's pages are locked.
            use_mmap, use_mlock, check_tensors, vocab_only, main_gpu, split_mode, tensor_split: As in llama.cpp.
            rpc_servers: Workers to split the layers over, each "host:port" of a `llamacancel rpc-server` or
                llama.cpp's own. They come before this machine's GPUs; `tensor_split` counts all. What is sent to
                them is neither encrypted nor authenticated.

        Raises:
            LoadCancelled: If `token` was cancelled; nothing of the model is left in memory.
            ModelLoadError: If the file is missing, is no GGUF file, is damaged, or cannot be run; if nobody answers at
                an endpoint of `rpc_servers` within a few seconds, or a worker is lost on the way.
        """
        cdef llama_model_params params = llama_model_default_params()
        cdef vector[float] split
        params.n_gpu_layers = integer("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
        params.main_gpu = integer("main_gpu", main_gpu, 0, 1024)
        params.split_mode = <llama_split_mode> <int> choice("split_mode", split_mode, SPLIT_MODE)
        params.load_mode = (LLAMA_LOAD_MODE_MMAP_MLOCK if use_mmap and use_mlock else LLAMA_LOAD_MODE_MMAP if use_mmap
                            else LLAMA_LOAD_MODE_MLOCK if use_mlock else LLAMA_LOAD_MODE_NONE)
        params.check_tensors = check_tensors
        params.vocab_only = vocab_only
        if tensor_split is not None:
            split.resize(llama_max_devices())
            for i, part in enumerate(tensor_split):
                if i >= <int> split.size():
                    raise ValueError(f"tensor_split has more than {split.size()} entries")
                split[i] = number("tensor_split", part, 0)
            params.tensor_split = split.data()
        cdef vector[string] servers
        if isinstance(rpc_servers, (str, bytes)):
            raise TypeError(f"rpc_servers must be a sequence of \"host:port\", not {rpc_servers!r}")
        for server in dict.fromkeys(endpoint("rpc_servers", each) for each in rpc_servers):
            servers.push_back(server.encode())
        if servers.size() and params.n_gpu_layers == 0:
            raise ValueError("n_gpu_layers is 0: give a number of layers for rpc_servers, or -1 for all")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {progress!r}")

        check_forked()
        cdef string name = os.fsencode(path)
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef _Progress report = _Progress()
        report.report = progress
        cdef ProgressCallback callback = NULL
        if progress is not None:
            callback = _report_progress
        cdef shared_ptr[ModelBox] box
        cdef string message
        cdef Status status
        if b"\0" in os.fsencode(path):
            raise ModelLoadError(f"{path!r}: not a path (it contains a zero byte)")
        with nogil:
            status = ModelBox.load(name, params, servers, call, callback, <void *> report, box, message)
        drain_log()
        if report.error is not None:
            raise report.error
        _check_load(status, path, message, call, interrupt)
        entered_process()
        cdef Model self = Model.__new__(Model)
        self.box = move(box)
        self.pid = getpid()
        self._path = os.fspath(path)
        return self

    def context(self, **params):
        """Make a context of this model; see `Context` for the arguments."""
        from .context import Context
        return Context(self, **params)

    def close(self):
        """Let go of the model. Contexts that are open keep it until they are closed."""
        cdef shared_ptr[ModelBox] box
        if self.pid == getpid():
            self._vocabulary = None
            box.swap(self.box)
            with nogil:
                box.reset()

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.box and self.pid != getpid():
            new shared_ptr[ModelBox](self.box)  # a forked child leaves the parent's model alone
        with nogil:
            self.box.reset()

    def __repr__(self):
        if not self.box:
            return "<Model closed>"
        return f"<Model {self.description!r}>" if self.pid == getpid() else f"<Model of process {self.pid}>"

    def __reduce__(self):
        raise TypeError("a Model cannot be pickled: load it again")

    cdef int _check_open(self) except -1:
        if not self.box:
            raise ClosedError("the model is closed")
        return check_process(self.pid, "the model")

    cdef const llama_vocab * _vocab(self) except NULL:
        self._check_open()
        return self.box.get().vocab()

    cdef llama_model * _native(self) except NULL:
        self._check_open()
        return self.box.get().get()

    # -- text

    def tokenize(self, text, add_special=True, parse_special=False, token=None):
        """The token ids of a text (str, or bytes of UTF-8), int32 of shape (n,).

        Args:
            add_special: Add the BOS and EOS tokens that the model wants.
            parse_special: Read "<|eot_id|>" and the like as tokens, not as text.
            token: Cancels it.

        Raises:
            DecodeCancelled: If `token` was cancelled.
            KeyboardInterrupt: On Ctrl-C in the main thread.
            ValueError: If the vocabulary cannot express the text; or if the text has a run of some 10,000 letters,
                digits, signs or spaces that a pattern of the vocabulary takes as one: it is matched with as much
                stack as the run is long, and a thread has only so much.
        """
        self._check_open()
        if not isinstance(text, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"text must be str or bytes, not {type(text).__name__}")
        cdef string data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        cdef vector[llama_token] tokens
        cdef string message
        cdef Status status
        cdef cbool special = add_special, parse = parse_special
        if data.size() > <size_t> 2**30:
            raise ValueError(f"the text has {data.size()} bytes; at most 2**30 can be tokenized at once")
        cdef shared_ptr[ModelBox] box = self.box
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        with nogil:
            status = tokenize(box.get().vocab(), data, special, parse, call, tokens, message)
        check_status(status, "tokenize", message, &call, interrupt, "the text cannot be tokenized: ",
                     ValueError, ValueError)
        result = np.empty(tokens.size(), np.int32)
        cdef int32_t[::1] view = result
        if tokens.size():
            memcpy(&view[0], tokens.data(), tokens.size() * sizeof(int32_t))
        return result

    def detokenize(self, tokens, remove_special=False, unparse_special=False, token=None):
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            DecodeCancelled: If `token` was cancelled.
            ValueError: If a token is outside of the vocabulary, or the text would be longer than 2^31 bytes.
        """
        given = np.asarray(tokens)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"tokens are integers, not {given.dtype}")
        if given.ndim != 1:
            raise ValueError(f"tokens have shape (n,), not {given.shape}")
        self._check_tokens(given)
        values = np.ascontiguousarray(given, np.int32)
        cdef const int32_t[::1] view = values
        cdef const int32_t * data = &view[0] if view.shape[0] else NULL
        cdef int32_t n = view.shape[0]
        cdef string text, message
        cdef Status status
        cdef cbool remove = remove_special, unparse = unparse_special
        cdef shared_ptr[ModelBox] box = self.box
        if n == 0:
            return ""
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        with nogil:
            status = detokenize(box.get().vocab(), data, n, remove, unparse, call, text, message)
        check_status(status, "detokenize", message, &call, interrupt, "the tokens cannot be turned into text: ",
                     ValueError, ValueError)
        return text.decode("utf-8", "replace")

    def token_to_piece(self, token, special=True):
        """The bytes of one token, which may be part of a character."""
        cdef llama_token checked = self._check_token(token)
        return <bytes> piece_of(self.box.get().vocab(), checked, special)

    cdef int _check_tokens(self, values) except -1:
        cdef int32_t n = llama_vocab_n_tokens(self._vocab())
        if values.size and not (0 <= values.min() and values.max() < n):
            raise _outside(values[(values < 0) | (values >= n)][0], n)
        return 0

    cdef llama_token _check_token(self, token) except -1:
        self._check_open()
        value = integer("token", token, -2**63, 2**63 - 1)
        cdef int32_t n = llama_vocab_n_tokens(self._vocab())
        if not 0 <= value < n:
            raise _outside(value, n)
        return value

    def is_eog(self, token):
        """Whether the token ends a generation (EOS, end of turn, ...)."""
        return llama_vocab_is_eog(self._vocab(), self._check_token(token))

    def is_control(self, token):
        """Whether the token is a control token, which has no text of its own."""
        return llama_vocab_is_control(self._vocab(), self._check_token(token))

    def token_attributes(self, token):
        """What the vocabulary says of a token, in llama.cpp's words: a set of "normal", "control", "byte", ..."""
        cdef int attributes = llama_vocab_get_attr(self._vocab(), self._check_token(token))
        return {name for bit, name in enumerate(_TOKEN_ATTRIBUTES) if attributes >> bit & 1}

    # -- facts

    @property
    def path(self):
        """The file that the model was loaded from."""
        return self._path

    @property
    def closed(self):
        return not self.box

    @property
    def description(self):
        """Architecture, size and quantisation in llama.cpp's words."""
        cdef char buffer[256]
        llama_model_desc(self._native(), buffer, sizeof(buffer))
        return buffer.decode("utf-8", "replace")

    @property
    def metadata(self):
        """The file's metadata, but for arrays, as text."""
        cdef llama_model * model = self._native()
        if self._metadata is None:
            self._metadata = {
                _read(model, i, llama_model_meta_key_by_index): _read(model, i, llama_model_meta_val_str_by_index)
                for i in range(llama_model_meta_count(model))
            }
        return dict(self._metadata)

    @property
    def chat_template(self):
        """The model's chat template (Jinja), or None."""
        return self.get_chat_template()

    def get_chat_template(self, name=None):
        """The chat template of a name, such as "tool_use" (None: the default one), or None if the model has none."""
        cdef llama_model * model = self._native()
        cdef bytes key = b"" if name is None else str(name).encode()
        cdef const char * named = NULL
        if name is not None:
            named = key
        cdef const char * text = llama_model_chat_template(model, named)
        return None if text == NULL else text.decode("utf-8", "replace")

    @property
    def chat(self):
        """The model's chat: renders conversations by its template, and reads its answers. See `Chat`."""
        from ..chat import Chat
        self._check_open()
        return Chat(self)

    @property
    def memory_kind(self):
        """What the model's contexts remember with.

        "attention", "sliding_window", "recurrent", "hybrid", "hybrid_sliding_window", "none" (an encoder, or a
        model of text diffusion), or "other" (a class of llama.cpp's that cannot be restored).
        """
        self._check_open()
        return name_of(self.box.get().memory_kind()).decode()

    @property
    def n_vocab(self):
        return llama_vocab_n_tokens(self._vocab())

    @property
    def n_embd(self):
        """Width of an embedding."""
        return llama_model_n_embd_out(self._native())

    @property
    def n_embd_inp(self):
        """Width of a row in a batch of embeddings."""
        return llama_model_n_embd_inp(self._native())

    @property
    def n_layer(self):
        return llama_model_n_layer(self._native())

    @property
    def n_head(self):
        return llama_model_n_head(self._native())

    @property
    def n_ctx_train(self):
        """Longest context that the model was trained for, in tokens."""
        return llama_model_n_ctx_train(self._native())

    @property
    def max_position_embeddings(self):
        """Length of the model's table of learned positions, which no position can pass; None without a table."""
        self._check_open()
        return self.box.get().max_positions() or None

    @property
    def n_swa(self):
        """Width of the sliding window in tokens; 0 without one."""
        return llama_model_n_swa(self._native())

    @property
    def n_params(self):
        return llama_model_n_params(self._native())

    @property
    def size(self):
        """Bytes of all tensors."""
        return llama_model_size(self._native())

    @property
    def has_encoder(self):
        return llama_model_has_encoder(self._native())

    @property
    def has_decoder(self):
        return llama_model_has_decoder(self._native())

    @property
    def bos(self):
        """Beginning-of-sentence token, or None."""
        return _token_or_none(llama_vocab_bos(self._vocab()))

    @property
    def eos(self):
        """End-of-sentence token, or None."""
        return _token_or_none(llama_vocab_eos(self._vocab()))

    @property
    def eot(self):
        """End-of-turn token, or None."""
        return _token_or_none(llama_vocab_eot(self._vocab()))

    @property
    def sep(self):
        """Separator of sentences, or None."""
        return _token_or_none(llama_vocab_sep(self._vocab()))

    @property
    def nl(self):
        """End-of-line token, or None."""
        return _token_or_none(llama_vocab_nl(self._vocab()))

    @property
    def pad(self):
        """Padding token, or None."""
        return _token_or_none(llama_vocab_pad(self._vocab()))

    @property
    def mask(self):
        """Mask token, or None."""
        return _token_or_none(llama_vocab_mask(self._vocab()))

    @property
    def fim_pre(self):
        """Token before the prefix in fill-in-the-middle, or None."""
        return _token_or_none(llama_vocab_fim_pre(self._vocab()))

    @property
    def fim_suf(self):
        """Token before the suffix in fill-in-the-middle, or None."""
        return _token_or_none(llama_vocab_fim_suf(self._vocab()))

    @property
    def fim_mid(self):
        """Token after which the middle is generated in fill-in-the-middle, or None."""
        return _token_or_none(llama_vocab_fim_mid(self._vocab()))

    @property
    def fim_pad(self):
        """Padding token of fill-in-the-middle, or None."""
        return _token_or_none(llama_vocab_fim_pad(self._vocab()))

    @property
    def fim_rep(self):
        """Token before a repository's name in fill-in-the-middle, or None."""
        return _token_or_none(llama_vocab_fim_rep(self._vocab()))

    @property
    def fim_sep(self):
        """Token before a file's name in fill-in-the-middle, or None."""
        return _token_or_none(llama_vocab_fim_sep(self._vocab()))

    @property
    def decoder_start_token(self):
        """The token that begins the decoder's part in a model with an encoder, or None."""
        return _token_or_none(llama_model_decoder_start_token(self._native()))

    @property
    def adds_bos(self):
        """Whether `tokenize` puts the BOS token first by default."""
        return llama_vocab_get_add_bos(self._vocab())

    @property
    def adds_eos(self):
        """Whether `tokenize` puts the EOS token last by default."""
        return llama_vocab_get_add_eos(self._vocab())

    @property
    def vocab_type(self):
        """How texts are cut into tokens: "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2", "test" or "none"."""
        return _VOCAB_TYPES[llama_vocab_type(self._vocab())]

    def load_lora(self, path, token=None):
        """Load a LoRA adapter for this model; `Context.set_lora` applies it.

        Raises:
            LoadCancelled: If `token` was cancelled.
            ModelLoadError: If the file cannot be used with this model.
        """
        return LoraAdapter(self, path, token)


ctypedef int32_t (*_Reader)(const llama_model *, int32_t, char *, size_t) noexcept nogil


cdef _read(llama_model * model, int32_t i, _Reader reader):
    cdef vector[char] buffer = vector[char](256)
    cdef int32_t n = reader(model, i, buffer.data(), buffer.size())
    if n >= <int32_t> buffer.size():
        buffer.resize(n + 1)
        n = reader(model, i, buffer.data(), buffer.size())
    return buffer.data()[:max(n, 0)].decode("utf-8", "replace")


cdef int _check_load(Status status, path, const string & message, Call & call, Interrupt interrupt) except -1:
    return check_status(status, f"loading {os.fspath(path)}", message, &call, interrupt, f"{os.fspath(path)}: ",
                        ModelLoadError, ModelLoadError, LoadCancelled)


cdef _outside(token, int32_t n):
    """What is wrong with a token that the vocabulary of `n` tokens does not have."""
    return ValueError(f"token {token} is outside of the vocabulary (0 to {n - 1})")


cdef _token_or_none(llama_token token):
    return None if token < 0 else token


@cython.final
@cython.no_gc_clear
cdef class LoraAdapter:
    """A LoRA adapter of a model, made by `Model.load_lora`. Freed when neither a context nor Python needs it."""

    def __cinit__(self, Model model not None, path, token=None):
        model._check_open()
        check_forked()
        cdef string name = os.fsencode(path)
        cdef string identity, problem
        cdef shared_ptr[ModelBox] box = model.box
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef Status status
        with nogil:
            status = box.get().load_adapter(name, call, self.native, identity, problem)
        drain_log()
        _check_load(status, path, problem, call, interrupt)
        self.box = model.box
        self.pid = getpid()
        self.identity = identity
        self._path = os.fspath(path)

    def __dealloc__(self):
        if self.box and self.pid != getpid():
            new shared_ptr[ModelBox](self.box)  # a forked child leaves the parent's adapter alone
        elif self.box:
            with nogil:
                self.box.get().free_adapter(self.native)
                self.box.reset()

    def __repr__(self):
        return f"<LoraAdapter {self._path!r}>"
