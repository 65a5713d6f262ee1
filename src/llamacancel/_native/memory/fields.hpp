// The fields of llama_kv_cache that have no getter.
//
// An explicit instantiation may name private members ([temp.spec]/6): so they are read without a patch, and a rename
// upstream fails to compile here.
#pragma once

#include "llama-hparams.h"
#include "llama-kv-cache.h"

namespace llamacancel {

template <typename Field, auto Member>
struct Expose {
    friend constexpr auto expose(Field) { return Member; }
};

#define LLAMACANCEL_EXPOSE(Field, member)    \
    struct Field {                           \
        friend constexpr auto expose(Field); \
    };                                       \
    template struct Expose<Field, &llama_kv_cache::member>;

LLAMACANCEL_EXPOSE(SearchHeads, v_heads)
LLAMACANCEL_EXPOSE(LayersOfCache, layers)
LLAMACANCEL_EXPOSE(TransposedValues, v_trans)
LLAMACANCEL_EXPOSE(CellsOfStreams, v_cells_impl)
LLAMACANCEL_EXPOSE(CacheBeside, other)
LLAMACANCEL_EXPOSE(WindowWidth, n_swa)
LLAMACANCEL_EXPOSE(WindowType, swa_type)
LLAMACANCEL_EXPOSE(PendingCopies, sc_info)

#undef LLAMACANCEL_EXPOSE

// Where the search for free cells begins, by stream.
inline auto & heads_of(llama_kv_cache & cache) { return cache.*expose(SearchHeads{}); }

inline const auto & layers_of(llama_kv_cache & cache) { return cache.*expose(LayersOfCache{}); }

// Whether a V holds a cell as a column.
inline bool is_transposed(llama_kv_cache & cache) { return cache.*expose(TransposedValues{}); }

// By stream.
inline llama_kv_cells_vec & cells_of(llama_kv_cache & cache) { return *(cache.*expose(CellsOfStreams{})); }

inline bool shares_cells(llama_kv_cache & cache) { return (cache.*expose(CacheBeside{})) != nullptr; }

inline bool slides(llama_kv_cache & cache) { return cache.*expose(WindowType{}) != LLAMA_SWA_TYPE_NONE; }

// True if no token from position `next` on looks at position `pos` any more.
inline bool has_left_window(llama_kv_cache & cache, llama_pos pos, llama_pos next) {
    return llama_hparams::is_masked_swa(cache.*expose(WindowWidth{}), cache.*expose(WindowType{}), pos, next);
}

// Has llama.cpp forget which streams it was going to copy as a whole.
inline void drop_pending_copies(llama_kv_cache & cache) { cache.*expose(PendingCopies{}) = {}; }

}  // namespace llamacancel
