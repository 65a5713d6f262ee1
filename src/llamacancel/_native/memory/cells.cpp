#include "memory/cells.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "ggml-backend.h"
#include "ggml.h"

namespace llamacancel {

namespace {

constexpr size_t kRowsAtOnce = 1024;

size_t column_bytes(const ggml_tensor * v) { return v->ne[0] * ggml_element_size(v); }

void move(uint8_t * saved, uint8_t * held, size_t size, bool set) {
    std::memcpy(set ? held : saved, set ? saved : held, size);
}

}  // namespace

// Cells that follow one another.
struct CellData::Stretch {
    size_t first;  // index into the list of cells
    uint32_t cell;
    size_t n;
};

CellData::CellData(std::vector<ggml_tensor *> k, std::vector<ggml_tensor *> v, bool transposed)
    : k_(std::move(k)), v_(std::move(v)), transposed_(transposed) {
    for (const ggml_tensor * tensor : k_) bytes_ += tensor->nb[1];
    for (const ggml_tensor * tensor : v_) bytes_ += transposed ? column_bytes(tensor) : tensor->nb[1];
}

std::vector<CellData::Stretch> CellData::stretches_of(const std::vector<uint32_t> & cells) {
    std::vector<Stretch> stretches;
    for (size_t i = 0; i < cells.size(); ++i) {
        if (i > 0 && cells[i] == cells[i - 1] + 1) {
            stretches.back().n += 1;
        } else {
            stretches.push_back({i, cells[i], 1});
        }
    }
    return stretches;
}

void CellData::clear(const std::vector<uint32_t> & cells) const {
    const auto is_host = [](const ggml_tensor * tensor) {
        return ggml_backend_buffer_is_host((tensor->view_src ? tensor->view_src : tensor)->buffer);
    };
    std::vector<uint8_t> zeros;  // for devices
    const auto clear_part = [&](ggml_tensor * tensor, size_t offset, size_t size, size_t n, size_t stride) {
        if (is_host(tensor)) {
            for (size_t i = 0; i < n; ++i) {
                std::memset(static_cast<uint8_t *>(tensor->data) + offset + i * stride, 0, size);
            }
            return;
        }
        zeros.resize(std::max(zeros.size(), n * size));
        ggml_backend_tensor_set_2d(tensor, zeros.data(), offset, size, n, stride, size);
    };
    for (const Stretch & stretch : stretches_of(cells)) {
        const auto clear_rows = [&](ggml_tensor * tensor) {
            for (size_t i = 0; i < stretch.n; i += kRowsAtOnce) {
                const size_t n = std::min(kRowsAtOnce, stretch.n - i);
                clear_part(tensor, (stretch.cell + i) * tensor->nb[1], n * tensor->nb[1], 1, 0);
            }
        };
        for (ggml_tensor * k : k_) clear_rows(k);
        for (ggml_tensor * v : v_) {
            if (transposed_) {
                const size_t size = ggml_element_size(v);
                clear_part(v, stretch.cell * size, stretch.n * size, v->ne[0], v->ne[1] * size);
            } else {
                clear_rows(v);
            }
        }
    }
}

void CellData::copy(const std::vector<uint32_t> & cells, uint8_t * bytes, bool set) const {
    if (cells.empty()) {
        return;
    }
    const std::vector<Stretch> stretches = stretches_of(cells);
    for (ggml_tensor * k : k_) {
        copy_rows(k, stretches, bytes, set);
        bytes += k->nb[1];
    }
    for (ggml_tensor * v : v_) {
        if (transposed_) {
            copy_columns(v, stretches, bytes, set);
            bytes += column_bytes(v);
        } else {
            copy_rows(v, stretches, bytes, set);
            bytes += v->nb[1];
        }
    }
}

// `bytes`: the tensor's part of the first saved cell; that of the next one lies bytes_ behind it.
void CellData::copy_rows(ggml_tensor * tensor, const std::vector<Stretch> & stretches, uint8_t * bytes,
                         bool set) const {
    const size_t size = tensor->nb[1];
    std::vector<uint8_t> held;
    for (const Stretch & stretch : stretches) {
        held.resize(stretch.n * size);
        if (!set) {
            ggml_backend_tensor_get(tensor, held.data(), stretch.cell * size, held.size());
        }
        for (size_t i = 0; i < stretch.n; ++i) {
            move(bytes + (stretch.first + i) * bytes_, held.data() + i * size, size, set);
        }
        if (set) {
            ggml_backend_tensor_set(tensor, held.data(), stretch.cell * size, held.size());
        }
    }
}

// Element j of cell i lies at j * n_cells + i. Where a copy is no mere memcpy(), the whole tensor goes there and back
// instead of each element.
void CellData::copy_columns(ggml_tensor * tensor, const std::vector<Stretch> & stretches, uint8_t * bytes,
                            bool set) const {
    const size_t size = ggml_element_size(tensor);
    const size_t n_cells = tensor->ne[1], n_elements = tensor->ne[0];
    const bool is_host = ggml_backend_buffer_is_host((tensor->view_src ? tensor->view_src : tensor)->buffer);
    std::vector<uint8_t> copied;
    uint8_t * held = static_cast<uint8_t *>(tensor->data);
    if (!is_host) {
        copied.resize(ggml_nbytes(tensor));
        held = copied.data();
        ggml_backend_tensor_get(tensor, held, 0, copied.size());
    }
    for (const Stretch & stretch : stretches) {
        for (size_t i = 0; i < stretch.n; ++i) {
            for (size_t j = 0; j < n_elements; ++j) {
                move(bytes + (stretch.first + i) * bytes_ + j * size, held + (j * n_cells + stretch.cell + i) * size,
                     size, set);
            }
        }
    }
    if (!is_host && set) {
        ggml_backend_tensor_set(tensor, held, 0, copied.size());
    }
}

}  // namespace llamacancel
