// The undo record of a cache of keys and values: the cells that were touched, and what those in use held.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "llama-kv-cache.h"
#include "memory/cells.hpp"
#include "memory/fields.hpp"
#include "memory/undo.hpp"

namespace llamacancel {

inline constexpr size_t kCellsBetweenLooks = 1024;  // are copied at once: on an RPC server each copy is a round trip

struct Undo::Cache {
    explicit Cache(llama_kv_cache & cache) : cache(cache), saved(cache.get_n_stream()) {
        for (auto & marks : saved) {
            marks.resize(cache.get_size(), Untouched);
        }
        for (uint32_t s = 0; s < cache.get_n_stream(); ++s) {
            data.push_back(data_of(cache, s));
        }
    }

    enum Mark : uint8_t { Untouched = 0, Described, Copied };  // what is saved of a cell: nothing, no K and V, all

    // Cells of one stream as they were: empty, or as `cells` has them, and the K and V of some.
    struct Group {
        uint32_t stream;
        std::vector<uint32_t> empty;
        std::vector<uint32_t> idxs;
        std::optional<llama_kv_cells> cells;  // of idxs; making one is not cheap, and mostly there is no need
        std::vector<uint32_t> copied;
        std::vector<uint8_t> bytes;
    };

    void begin() {
        forget();
        heads = heads_of(cache);
    }

    void forget() {
        for (const Group & group : groups) {
            for (const auto * touched : {&group.empty, &group.idxs}) {
                for (uint32_t idx : *touched) {
                    saved[group.stream][idx] = Untouched;
                }
            }
        }
        groups.clear();
    }

    bool save(const llama_ubatch & ubatch) {
        const auto slot = cache.find_slot(ubatch, false);
        if (slot.empty()) {
            return false;
        }
        for (size_t s = 0; s < slot.n_stream(); ++s) {
            save(slot.strm[s], slot.idxs[s]);
        }
        return true;
    }

    // `slot`: the cells that will be written. Those in use there are overwritten, and apply_ubatch() then
    // forgets every older position of the sequences that lost a cell.
    void save(uint32_t stream, const std::vector<uint32_t> & slot) {
        groups.emplace_back().stream = stream;
        try {
            note(groups.back(), slot);
            copy(groups.back());
        } catch (const std::bad_alloc &) {
            for (uint32_t idx : groups.back().copied) {
                saved[stream][idx] = Described;
            }
            for (const auto * touched : {&groups.back().empty, &groups.back().idxs}) {
                for (uint32_t idx : *touched) {
                    saved[stream][idx] = Untouched;
                }
            }
            groups.pop_back();
            throw;
        }
    }

    void note(Group & group, const std::vector<uint32_t> & slot) {
        const llama_kv_cells & cells = cells_of(cache)[group.stream];
        auto & marks = saved[group.stream];
        std::map<llama_seq_id, llama_pos> purged_to;
        for (uint32_t idx : slot) {
            if (!cells.is_empty(idx)) {
                llama_pos & to = purged_to.try_emplace(cells.seq_get(idx), -1).first->second;
                to = std::max(to, cells.pos_get(idx));
            }
            if (marks[idx] == Untouched && cells.is_empty(idx)) {
                group.empty.push_back(idx);
            } else if (marks[idx] == Untouched) {
                group.idxs.push_back(idx);
                group.copied.push_back(idx);
            } else if (marks[idx] == Described) {
                group.copied.push_back(idx);
            }
            marks[idx] = Copied;
        }
        if (!purged_to.empty()) {
            for (uint32_t idx = 0; idx < cells.size(); ++idx) {
                if (marks[idx] != Untouched || cells.is_empty(idx)) {
                    continue;
                }
                for (const auto & [seq, to] : purged_to) {
                    if (cells.pos_get(idx) <= to && cells.seq_has(idx, seq)) {
                        group.idxs.push_back(idx);
                        marks[idx] = Described;
                        break;
                    }
                }
            }
        }
    }

    // Cells that `seq` holds, and in a sliding window all, since a search for room may take any there.
    void save_sequence(llama_seq_id seq, const std::function<void()> & poll) {
        Group & group = groups.emplace_back();
        group.stream = cache.get_stream(seq);
        const llama_kv_cells & cells = cells_of(cache)[group.stream];
        for (uint32_t idx = 0; idx < cells.size(); ++idx) {
            if (cells.is_empty(idx)) {
                group.empty.push_back(idx);
            } else if (slides(cache) || cells.seq_has(idx, seq)) {
                group.idxs.push_back(idx);
            }
        }
        group.copied = group.idxs;
        copy(group, poll);
    }

    void copy(Group & group, const std::function<void()> & poll = {}) {
        const CellData & cell_data = data[group.stream];
        if (!group.idxs.empty()) {
            group.cells = cells_of(cache)[group.stream].cp(group.idxs);
        }
        group.bytes.resize(group.copied.size() * cell_data.bytes());
        for (size_t first = 0; first < group.copied.size(); first += kCellsBetweenLooks) {
            if (poll) {
                poll();
            }
            const size_t last = std::min(first + kCellsBetweenLooks, group.copied.size());
            cell_data.get({group.copied.begin() + first, group.copied.begin() + last},
                          group.bytes.data() + first * cell_data.bytes());
        }
    }

    void restore() {
        for (const Group & group : groups) {
            llama_kv_cells & cells = cells_of(cache)[group.stream];
            for (uint32_t idx : group.empty) {
                if (!cells.is_empty(idx)) {
                    cells.rm(idx);
                }
            }
            if (group.cells) {
                cells.set(group.idxs, *group.cells);
            }
            data[group.stream].set(group.copied, group.bytes.data());
        }
        heads_of(cache) = heads;
    }

    // Gives a sequence, whose new positions are gone, its saved cells back where they were, from the newest on. One
    // whose place another sequence has taken ends that: what is older is gone, too, since positions have no gaps.
    // False if a token at `next` would look at what is gone.
    bool restore_sequence(llama_seq_id seq, llama_pos next) {
        const uint32_t stream = cache.get_stream(seq);
        llama_kv_cells & cells = cells_of(cache)[stream];
        std::multimap<llama_pos, std::pair<const Group *, uint32_t>, std::greater<>> lost;
        for (const Group & group : groups) {
            for (uint32_t i = 0; i < group.idxs.size(); ++i) {
                if (group.stream == stream && group.cells->seq_has(i, seq)) {
                    lost.emplace(group.cells->pos_get(i), std::make_pair(&group, i));
                }
            }
        }
        bool whole = true;
        std::vector<bool> emptied(cells.size());
        for (const auto & [pos, where] : lost) {
            const auto & [group, i] = where;
            const uint32_t home = group->idxs[i];
            if (cells.is_empty(home)) {
                cells.pos_set(home, pos);
                cells.ext_set(home, group->cells->ext_get(i));
                emptied[home] = true;
            } else if (cells.pos_get(home) != pos || (cells.seq_get_all(home) & ~group->cells->seq_get_all(i)).any()) {
                cache.seq_rm(seq, -1, pos + 1);
                whole = has_left_window(cache, pos, next);
                break;
            }
            if (!cells.seq_has(home, seq)) {  // else it was never lost, or only by others that shared it
                cells.seq_add(home, seq);
            }
        }
        put_back(stream, emptied);
        return whole;
    }

    // Puts the K and V back of those cells of a stream that were overwritten.
    void put_back(uint32_t stream, const std::vector<bool> & wanted) {
        const size_t size = data[stream].bytes();
        for (const Group & group : groups) {
            std::vector<uint32_t> idxs;
            std::vector<uint8_t> bytes;
            for (size_t at = 0; group.stream == stream && at < group.copied.size(); ++at) {
                if (wanted[group.copied[at]]) {
                    idxs.push_back(group.copied[at]);
                    bytes.insert(bytes.end(), group.bytes.begin() + at * size, group.bytes.begin() + (at + 1) * size);
                }
            }
            data[stream].set(idxs, bytes.data());
        }
    }

    void scrub(bool written) {
        std::vector<uint32_t> emptied;
        for (const Group & group : groups) {
            const llama_kv_cells & cells = cells_of(cache)[group.stream];
            emptied.clear();
            for (const auto * touched : {&group.empty, &group.idxs}) {
                if (written || touched == &group.idxs) {
                    std::copy_if(touched->begin(), touched->end(), std::back_inserter(emptied),
                                 [&](uint32_t idx) { return cells.is_empty(idx); });
                }
            }
            data[group.stream].clear(emptied);
        }
    }

    size_t bytes() const noexcept {
        size_t total = 0;
        for (const Group & group : groups) {
            total += group.bytes.size();
        }
        return total;
    }

    llama_kv_cache & cache;
    std::vector<CellData> data;               // per stream
    std::vector<std::vector<uint8_t>> saved;  // per stream and cell: a Mark
    std::vector<uint32_t> heads;              // where the search for a slot began
    std::vector<Group> groups;
};

}  // namespace llamacancel
