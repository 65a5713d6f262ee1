// The K and V of single cells of a cache, copied out of its tensors and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct ggml_tensor;

namespace llamacancel {

// Copies cells between a cache's tensors and a byte buffer, in which they lie cell by cell. Cells that follow one
// another are copied at once: on a device each copy is a submission, on an RPC server a round trip.
class CellData {
public:
    // `transposed`: a V holds a cell as a column.
    CellData(std::vector<ggml_tensor *> k, std::vector<ggml_tensor *> v, bool transposed);

    size_t bytes() const { return bytes_; }  // of one cell, over all layers

    void get(const std::vector<uint32_t> & cells, uint8_t * to) const { copy(cells, to, false); }
    void set(const std::vector<uint32_t> & cells, const uint8_t * from) const {
        copy(cells, const_cast<uint8_t *>(from), true);
    }

    // Zeroes cells, whatever they held.
    void clear(const std::vector<uint32_t> & cells) const;

private:
    struct Stretch;
    static std::vector<Stretch> stretches_of(const std::vector<uint32_t> & cells);
    void copy(const std::vector<uint32_t> & cells, uint8_t * bytes, bool set) const;
    void copy_rows(ggml_tensor * tensor, const std::vector<Stretch> & stretches, uint8_t * bytes, bool set) const;
    void copy_columns(ggml_tensor * tensor, const std::vector<Stretch> & stretches, uint8_t * bytes, bool set) const;

    std::vector<ggml_tensor *> k_, v_;
    bool transposed_;
    size_t bytes_ = 0;
};

}  // namespace llamacancel
