// The files of a model or an adapter: checked before llama.cpp reads them, and told from those of others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cancel/call.hpp"

namespace llamacancel {

// 128 bits that tell files apart which differ by accident. No defence against somebody who makes them alike.
class Digest {
public:
    void add(const void * bytes, size_t size) noexcept;
    std::string text() const;

private:
    uint64_t a_ = 0xcbf29ce484222325, b_ = 0x9e3779b97f4a7c15;
};

class Files {
public:
    // Looks at a GGUF file, and at all parts of a split model, before llama.cpp does: what would end the process there
    // is said here. "" if they are sound. Throws Stopped once `call` is to stop.
    std::string check(const std::string & path, bool adapter, Call & call);

    // Of everything that the files say of their tensors, and of samples of what is in them: the same for a copy under
    // another name. To be asked when they were read anyhow. Throws Stopped.
    std::string identity(Call & call) const;

private:
    enum class Kind : uint8_t { Model, Adapter, Part };
    struct Tensor {
        uint64_t offset, size;
    };
    struct Part {
        std::string path;
        std::vector<Tensor> tensors;
    };

    std::string check_part(const std::string & path, Kind kind, Call & call, int64_t & n_parts);

    std::vector<Part> parts_;
    Digest digest_;  // of their descriptions
};

}  // namespace llamacancel
