# What we use of llama.h and ggml.h: declarations only. Nothing here takes the GIL.

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, uint32_t, uint64_t
from libcpp cimport bool


cdef extern from "ggml.h" nogil:
    int GGML_LOG_LEVEL_DEBUG, GGML_LOG_LEVEL_INFO, GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
    enum ggml_type:
        GGML_TYPE_COUNT


cdef extern from "ggml-backend.h" nogil:
    struct ggml_backend_device
    ctypedef ggml_backend_device * ggml_backend_dev_t
    struct ggml_backend_reg
    ctypedef ggml_backend_reg * ggml_backend_reg_t
    size_t ggml_backend_reg_count()
    ggml_backend_reg_t ggml_backend_reg_get(size_t index)
    const char * ggml_backend_reg_name(ggml_backend_reg_t reg)
    size_t ggml_backend_dev_count()
    ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    const char * ggml_backend_dev_name(ggml_backend_dev_t device)
    const char * ggml_backend_dev_description(ggml_backend_dev_t device)
    int ggml_backend_dev_type(ggml_backend_dev_t device)
    void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)


cdef extern from "llama.h" nogil:
    struct llama_model
    struct llama_context
    struct llama_vocab
    struct llama_adapter_lora
    struct llama_sampler
    ctypedef int32_t llama_token
    ctypedef int32_t llama_pos
    ctypedef int32_t llama_seq_id

    enum llama_split_mode:
        pass
    enum llama_load_mode:
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
        LLAMA_LOAD_MODE_MLOCK
        LLAMA_LOAD_MODE_MMAP_MLOCK
    enum llama_pooling_type:
        pass
    enum llama_rope_scaling_type:
        pass
    enum llama_flash_attn_type:
        pass

    struct llama_model_params:
        int32_t n_gpu_layers
        llama_split_mode split_mode
        llama_load_mode load_mode
        int32_t main_gpu
        const float * tensor_split
        bool vocab_only
        bool check_tensors
        bool use_extra_bufts

    struct llama_context_params:
        uint32_t n_ctx, n_batch, n_ubatch, n_seq_max
        int32_t n_threads, n_threads_batch
        llama_rope_scaling_type rope_scaling_type
        llama_pooling_type pooling_type
        llama_flash_attn_type flash_attn_type
        float rope_freq_base, rope_freq_scale
        float yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow
        uint32_t yarn_orig_ctx
        ggml_type type_k, type_v
        bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified

    struct llama_logit_bias:
        llama_token token
        float bias

    struct llama_sampler_chain_params:
        bool no_perf

    struct llama_perf_context_data:
        double t_load_ms, t_p_eval_ms, t_eval_ms
        int32_t n_p_eval, n_eval, n_reused

    void llama_backend_init()
    llama_model_params llama_model_default_params()
    llama_context_params llama_context_default_params()
    llama_sampler_chain_params llama_sampler_chain_default_params()
    const char * llama_version()
    const char * llama_print_system_info()
    bool llama_supports_rpc()
    size_t llama_max_devices()
    size_t llama_max_parallel_sequences()

    int32_t llama_model_n_ctx_train(const llama_model * model)
    int32_t llama_model_n_embd_inp(const llama_model * model)
    int32_t llama_model_n_embd_out(const llama_model * model)
    int32_t llama_model_n_layer(const llama_model * model)
    int32_t llama_model_n_head(const llama_model * model)
    int32_t llama_model_n_swa(const llama_model * model)
    uint64_t llama_model_n_params(const llama_model * model)
    uint64_t llama_model_size(const llama_model * model)
    bool llama_model_has_encoder(const llama_model * model)
    bool llama_model_has_decoder(const llama_model * model)
    llama_token llama_model_decoder_start_token(const llama_model * model)
    int32_t llama_model_desc(const llama_model * model, char * buf, size_t size)
    int32_t llama_model_meta_count(const llama_model * model)
    int32_t llama_model_meta_key_by_index(const llama_model * model, int32_t i, char * buf, size_t size)
    int32_t llama_model_meta_val_str_by_index(const llama_model * model, int32_t i, char * buf, size_t size)
    const char * llama_model_chat_template(const llama_model * model, const char * name)

    int32_t llama_vocab_n_tokens(const llama_vocab * vocab)
    bool llama_vocab_is_eog(const llama_vocab * vocab, llama_token token)
    bool llama_vocab_is_control(const llama_vocab * vocab, llama_token token)
    llama_token llama_vocab_bos(const llama_vocab * vocab)
    llama_token llama_vocab_eos(const llama_vocab * vocab)
    llama_token llama_vocab_eot(const llama_vocab * vocab)
    llama_token llama_vocab_sep(const llama_vocab * vocab)
    llama_token llama_vocab_nl(const llama_vocab * vocab)
    llama_token llama_vocab_pad(const llama_vocab * vocab)
    llama_token llama_vocab_mask(const llama_vocab * vocab)
    llama_token llama_vocab_fim_pre(const llama_vocab * vocab)
    llama_token llama_vocab_fim_suf(const llama_vocab * vocab)
    llama_token llama_vocab_fim_mid(const llama_vocab * vocab)
    llama_token llama_vocab_fim_pad(const llama_vocab * vocab)
    llama_token llama_vocab_fim_rep(const llama_vocab * vocab)
    llama_token llama_vocab_fim_sep(const llama_vocab * vocab)
    int llama_vocab_type(const llama_vocab * vocab)
    int llama_vocab_get_attr(const llama_vocab * vocab, llama_token token)
    bool llama_vocab_get_add_bos(const llama_vocab * vocab)
    bool llama_vocab_get_add_eos(const llama_vocab * vocab)

    int32_t llama_set_adapters_lora(llama_context * ctx, llama_adapter_lora ** adapters, size_t n,
                                    float * scales) except +

    uint32_t llama_n_ctx(const llama_context * ctx)
    uint32_t llama_n_ctx_seq(const llama_context * ctx)
    uint32_t llama_n_batch(const llama_context * ctx)
    uint32_t llama_n_ubatch(const llama_context * ctx)
    uint32_t llama_n_seq_max(const llama_context * ctx)
    int32_t llama_n_threads(llama_context * ctx)
    int32_t llama_n_threads_batch(llama_context * ctx)
    void llama_set_n_threads(llama_context * ctx, int32_t n_threads, int32_t n_threads_batch)
    llama_perf_context_data llama_perf_context(const llama_context * ctx)
    void llama_perf_context_reset(llama_context * ctx)

    llama_sampler * llama_sampler_chain_init(llama_sampler_chain_params params)
    void llama_sampler_chain_add(llama_sampler * chain, llama_sampler * sampler)
    llama_sampler * llama_sampler_chain_get(llama_sampler * chain, int32_t i)
    int llama_sampler_chain_n(const llama_sampler * chain)
    const char * llama_sampler_name(const llama_sampler * sampler)
    void llama_sampler_free(llama_sampler * sampler)
    void llama_sampler_reset(llama_sampler * sampler)
    llama_sampler * llama_sampler_clone(const llama_sampler * sampler)
    llama_sampler * llama_sampler_init_greedy()
    llama_sampler * llama_sampler_init_dist(uint32_t seed)
    llama_sampler * llama_sampler_init_top_k(int32_t k)
    llama_sampler * llama_sampler_init_top_p(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_min_p(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_typical(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_temp_ext(float t, float delta, float exponent)
    llama_sampler * llama_sampler_init_xtc(float p, float t, size_t min_keep, uint32_t seed)
    llama_sampler * llama_sampler_init_top_n_sigma(float n)
    llama_sampler * llama_sampler_init_mirostat(int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m)
    llama_sampler * llama_sampler_init_mirostat_v2(uint32_t seed, float tau, float eta)
    llama_sampler * llama_sampler_init_penalties(int32_t n_vocab, int32_t last_n, float repeat, float freq,
                                                 float present)
    llama_sampler * llama_sampler_init_dry(const llama_vocab * vocab, float multiplier, float base,
                                           int32_t allowed_length, int32_t last_n, const char ** breakers,
                                           size_t n_breakers)
    llama_sampler * llama_sampler_init_logit_bias(int32_t n_vocab, int32_t n, const llama_logit_bias * biases)
