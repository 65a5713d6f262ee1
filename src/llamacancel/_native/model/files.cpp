#include "model/files.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "ggml-cpu.h"
#include "gguf.h"
#include "llama.h"
#include "process/assertions.hpp"
#include "process/log.hpp"
#include "process/steps.hpp"

namespace llamacancel {

namespace {

constexpr int kSamples = 8;          // of a tensor's data go into the identity
constexpr size_t kSampleBytes = 64;  // each

using File = std::unique_ptr<std::FILE, decltype(&std::fclose)>;
using Gguf = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

// The value of an integer key, whatever its width; -1 if there is none (or it is an array).
int64_t int_value(const gguf_context * gguf, const std::string & key) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        return -1;
    }
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT8:
            return gguf_get_val_u8(gguf, id);
        case GGUF_TYPE_INT8:
            return gguf_get_val_i8(gguf, id);
        case GGUF_TYPE_UINT16:
            return gguf_get_val_u16(gguf, id);
        case GGUF_TYPE_INT16:
            return gguf_get_val_i16(gguf, id);
        case GGUF_TYPE_UINT32:
            return gguf_get_val_u32(gguf, id);
        case GGUF_TYPE_INT32:
            return gguf_get_val_i32(gguf, id);
        case GGUF_TYPE_UINT64:
            return static_cast<int64_t>(gguf_get_val_u64(gguf, id));
        case GGUF_TYPE_INT64:
            return gguf_get_val_i64(gguf, id);
        default:
            return -1;
    }
}

bool has_kernel(ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits_cpu(type)->vec_dot != nullptr; }

std::string check_tensors(const gguf_context * gguf, ggml_context * tensors, int64_t file_size) {
    const int64_t n = gguf_get_n_tensors(gguf);
    for (int64_t i = 0; i < n; ++i) {
        const std::string name = gguf_get_tensor_name(gguf, i);
        const ggml_type type = gguf_get_tensor_type(gguf, i);
        const int64_t end =
            gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i) + gguf_get_tensor_size(gguf, i);
        if (end > file_size) {
            return "the file is truncated: tensor '" + name + "' ends at byte " + std::to_string(end) + " of " +
                   std::to_string(file_size);
        }
        if (!has_kernel(type)) {
            return "tensor '" + name + "' has type " + ggml_type_name(type) +
                   ", which the CPU backend cannot compute with";
        }
        // Norms, biases and the like are operands of elementwise operations, whose kernels want F32.
        if (ggml_n_dims(ggml_get_tensor(tensors, name.c_str())) == 1 && type != GGML_TYPE_F32) {
            return "tensor '" + name + "' has one dimension and type " + ggml_type_name(type) +
                   "; such tensors are f32";
        }
    }
    return "";
}

// What llama.cpp divides by without looking, where the key is missing.
std::string check_divisors(const gguf_context * gguf, const std::string & arch) {
    const auto is_one_of = [&](std::initializer_list<const char *> names) {
        return std::find(names.begin(), names.end(), arch) != names.end();
    };
    const auto contains = [&](const char * part) { return arch.find(part) != std::string::npos; };
    const bool rwkv = contains("rwkv");
    const bool attends = !rwkv && !is_one_of({"mamba", "mamba2", "wavtokenizer-dec"});
    const bool grouped = is_one_of(
        {"mamba2", "falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe", "qwen3next", "qwen35", "qwen35moe"});
    const bool experts = contains("moe") || is_one_of({"qwen3next", "qwen4exp", "mellum", "rnd1"});
    const std::pair<const char *, bool> divisors[] = {
        {"attention.head_count", attends},
        {"wkv.head_size", rwkv},
        {"ssm.group_count", grouped},
        {"expert_used_count", experts},
    };
    for (const auto & [name, needed] : divisors) {
        const std::string key = arch + "." + name;
        const int64_t id = gguf_find_key(gguf, key.c_str());
        const bool is_array = id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY;
        if (needed && !is_array && int_value(gguf, key) < 1) {
            return "'" + key + "' is missing or 0";
        }
    }
    return "";
}

std::string check_shape(const gguf_context * gguf, const std::string & arch) {
    struct Limit {
        const char * key;
        int64_t low, high;
        bool needed;
    };
    const Limit limits[] = {
        {"block_count", 1, 100'000, true},
        {"embedding_length", 1, 1 << 24, true},
        {"context_length", 1, int64_t(1) << 31, true},
        {"feed_forward_length", 0, 1 << 24, false},
        {"attention.head_count", 0, 1 << 16, false},
        {"attention.head_count_kv", 0, 1 << 16, false},
        {"attention.key_length", 1, 1 << 16, false},
        {"attention.value_length", 1, 1 << 16, false},
        {"attention.sliding_window", 0, int64_t(1) << 31, false},
        {"rope.dimension_count", 0, 1 << 16, false},
        {"expert_count", 0, 1 << 12, false},
        {"expert_used_count", 0, 1 << 12, false},
        {"ssm.conv_kernel", 1, 1 << 10, false},
        {"ssm.inner_size", 1, 1 << 24, false},
        {"ssm.state_size", 1, 1 << 16, false},
        {"ssm.time_step_rank", 1, 1 << 24, false},
        {"wkv.head_size", 1, 1 << 16, false},
        {"experts_per_group", 1, 1 << 16, false},
        {"expert_group_count", 0, 1 << 12, false},
        {"conv_group_size", 1, 1 << 24, false},
        {"interleave_moe_layer_step", arch == "llama4" ? 0 : 1, 1 << 16, false},
    };
    for (const Limit & limit : limits) {
        const std::string key = arch + "." + limit.key;
        if (gguf_find_key(gguf, key.c_str()) < 0) {
            if (limit.needed) {
                return "the file has no key '" + key + "'";
            }
            continue;
        }
        if (gguf_get_kv_type(gguf, gguf_find_key(gguf, key.c_str())) == GGUF_TYPE_ARRAY) {
            continue;  // a value for each layer
        }
        const int64_t value = int_value(gguf, key);
        if (value < limit.low || value > limit.high) {
            return "'" + key + "' is " + std::to_string(value) + ", outside of " + std::to_string(limit.low) + " to " +
                   std::to_string(limit.high);
        }
    }
    for (const char * name : {"layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"}) {
        const std::string key = arch + ".attention." + name;
        const int64_t id = gguf_find_key(gguf, key.c_str());
        if (id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_FLOAT32) {
            const float value = gguf_get_val_f32(gguf, id);
            if (!(value >= 0 && std::isfinite(value))) {
                return "'" + key + "' is " + std::to_string(value) + ", which is no epsilon";
            }
        }
    }
    const int64_t heads = int_value(gguf, arch + ".attention.head_count");
    const int64_t kv_heads = int_value(gguf, arch + ".attention.head_count_kv");
    if (heads > 0 && kv_heads > 0 && heads % kv_heads != 0) {
        return "'" + arch + ".attention.head_count' (" + std::to_string(heads) + ") is no multiple of head_count_kv (" +
               std::to_string(kv_heads) + ")";
    }
    const int64_t embd = int_value(gguf, arch + ".embedding_length");
    if (heads > 0 && embd % heads != 0 && int_value(gguf, arch + ".attention.key_length") < 0) {
        return "'" + arch + ".embedding_length' (" + std::to_string(embd) + ") is no multiple of head_count (" +
               std::to_string(heads) + ")";
    }
    const int64_t experts = int_value(gguf, arch + ".expert_count");
    const int64_t experts_used = int_value(gguf, arch + ".expert_used_count");
    if (experts > 0 && (experts_used < 1 || experts_used > experts)) {
        return "'" + arch + ".expert_used_count' is " + std::to_string(experts_used) + " of " + std::to_string(experts);
    }
    return check_divisors(gguf, arch);
}

// Reads a file for gguf_init_from_callback(), and looks at the call meanwhile.
struct Reader {
    std::FILE * file;
    Call & call;
    Digest & digest;
    uint64_t at = 0;
    bool stopped = false;
    uint64_t next_look = 0;

    static size_t read(void * self, void * to, uint64_t offset, size_t size) {
        Reader & reader = *static_cast<Reader *>(self);
        if (reader.at >= reader.next_look) {
            reader.stopped = reader.stopped || reader.call.should_stop();
            reader.next_look = reader.at + 64 * 1024;
        }
        if (reader.stopped || (offset != reader.at && fseeko(reader.file, off_t(offset), SEEK_SET) != 0)) {
            return 0;
        }
        const size_t n = std::fread(to, 1, size, reader.file);
        reader.digest.add(to, n);
        reader.at = offset + n;
        return n;
    }
};

}  // namespace

void Digest::add(const void * bytes, size_t size) noexcept {
    for (const uint8_t * byte = static_cast<const uint8_t *>(bytes); size > 0; ++byte, --size) {
        a_ = (a_ ^ *byte) * 0x100000001b3;
        b_ = (b_ << 23 | b_ >> 41) * 0x9e3779b97f4a7c15 + *byte;
    }
}

std::string Digest::text() const {
    char text[33];
    std::snprintf(text, sizeof(text), "%016llx%016llx", static_cast<unsigned long long>(a_),
                  static_cast<unsigned long long>(b_));
    return text;
}

std::string Files::check(const std::string & path, bool adapter, Call & call) {
    int64_t n_parts = 1;
    std::string problem = check_part(path, adapter ? Kind::Adapter : Kind::Model, call, n_parts);
    if (!problem.empty() || n_parts <= 1) {
        return problem;
    }
    std::string name(path.size() + 64, '\0');
    name.resize(std::max(0, llama_split_prefix(name.data(), name.size(), path.c_str(), 0, n_parts)));
    if (name.empty()) {
        return "the first of " + std::to_string(n_parts) + " parts of a model, whose name does not say so";
    }
    const std::string prefix = name;
    for (int64_t part = 1; problem.empty() && part < n_parts; ++part) {
        name.assign(prefix.size() + 64, '\0');
        name.resize(std::max(0, llama_split_path(name.data(), name.size(), prefix.c_str(), part, n_parts)));
        int64_t ignored = 1;
        problem = check_part(name, Kind::Part, call, ignored);
        if (!problem.empty()) {
            problem =
                "part " + std::to_string(part + 1) + " of " + std::to_string(n_parts) + ", " + name + ": " + problem;
        }
    }
    return problem;
}

std::string Files::check_part(const std::string & path, Kind kind, Call & call, int64_t & n_parts) {
    if (call.should_stop()) {
        throw Stopped{};
    }
    struct stat info;
    if (stat(path.c_str(), &info) != 0) {
        return std::strerror(errno);
    }
    if (!S_ISREG(info.st_mode)) {
        return "not a file";
    }
    const File file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) {
        return std::strerror(errno);
    }
    char magic[4] = {};
    const size_t n_read = std::fread(magic, 1, sizeof(magic), file.get());
    if (n_read < sizeof(magic) || std::memcmp(magic, "GGUF", 4) != 0) {
        return "not a GGUF file (it does not begin with 'GGUF')";
    }
    std::rewind(file.get());
    clear_errors();
    try {
        AssertionsThrow net;
        Reader reader{file.get(), call, digest_};
        ggml_context * descriptions = nullptr;
        const Gguf gguf(gguf_init_from_callback(Reader::read, &reader, 1 << 20, info.st_size,
                                                {/*no_alloc=*/true, /*ctx=*/&descriptions}),
                        gguf_free);
        const std::unique_ptr<ggml_context, decltype(&ggml_free)> tensors(descriptions, ggml_free);
        if (reader.stopped) {
            throw Stopped{};
        }
        if (!gguf) {
            return "not a sound GGUF file: " + last_errors();
        }
        Part & part = parts_.emplace_back(Part{path, {}});
        for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); ++i) {
            part.tensors.push_back({gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), i),
                                    gguf_get_tensor_size(gguf.get(), i)});
        }
        std::string problem = check_tensors(gguf.get(), tensors.get(), info.st_size);
        if (!problem.empty() || kind == Kind::Part) {
            return problem;
        }
        n_parts = kind == Kind::Model ? int_value(gguf.get(), "split.count") : 1;
        if (const int64_t number = int_value(gguf.get(), "split.no"); n_parts > 1 && number != 0) {
            return "part " + std::to_string(number + 1) + " of " + std::to_string(n_parts) +
                   " of a model: load the first one";
        }
        const int64_t arch_id = gguf_find_key(gguf.get(), "general.architecture");
        if (arch_id < 0 || gguf_get_kv_type(gguf.get(), arch_id) != GGUF_TYPE_STRING) {
            return "the file has no key 'general.architecture'";
        }
        if (kind == Kind::Model) {
            problem = check_shape(gguf.get(), gguf_get_val_str(gguf.get(), arch_id));
        }
        return problem;
    } catch (const std::exception & error) {
        return std::string("not a sound GGUF file: ") + error.what();
    }
}

std::string Files::identity(Call & call) const {
    Digest digest = digest_;
    for (const Part & part : parts_) {
        const File file(std::fopen(part.path.c_str(), "rb"), std::fclose);
        if (file) {
            std::setvbuf(file.get(), nullptr, _IONBF, 0);  // else each sample would read a block
        }
        for (const Tensor & tensor : part.tensors) {
            if (call.should_stop()) {
                throw Stopped{};
            }
            const uint64_t size = std::min<uint64_t>(kSampleBytes, tensor.size);
            for (int i = 0; file && i < kSamples; ++i) {
                uint8_t sample[kSampleBytes];
                const uint64_t offset = tensor.offset + (tensor.size - size) / (kSamples - 1) * i;
                if (fseeko(file.get(), off_t(offset), SEEK_SET) == 0) {
                    digest.add(sample, std::fread(sample, 1, size, file.get()));
                }
            }
        }
    }
    return digest.text();
}

}  // namespace llamacancel
