// What a call is given, and how its work is shared among threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "attention_cpu.h"
#include "cpu.h"
#include "selection_cpu.h"

namespace farspan::mra {

// f(item, work) of every item.  What a thread works with is made before any begins: they cannot report that there is no
// memory.
template <class Make, class F>
void for_each(int threads, int64_t items, const Make& make, const F& f) {
    std::vector<decltype(make())> free;
    for (int64_t i = std::min<int64_t>(threads, items); i > 0; --i) free.push_back(make());
    std::mutex mutex;
    parallel(threads, items, [&](int64_t item, int64_t) {
        decltype(make()) mine;
        {
            std::lock_guard<std::mutex> lock(mutex);
            mine = std::move(free.back());
            free.pop_back();
        }
        f(item, *mine);
        std::lock_guard<std::mutex> lock(mutex);
        free.push_back(std::move(mine));
    });
}

// A tensor [n, h, l, width] with any strides but the last, which is 1.
struct Tensor {
    const void* data;
    int64_t of_n, of_h, of_l;
};

struct Call {
    Tensor q, k, v;
    const uint8_t* mask;  // [n, l]
    int64_t n, h, l, d, e;
    int dtype, threads;

    int64_t nb() const { return (l + BLOCK - 1) / BLOCK; }
    int64_t matrices() const { return n * h; }
    const uint8_t* real(int64_t matrix) const { return mask == nullptr ? nullptr : mask + matrix / h * l; }

    Rows rows(const Tensor& x, int64_t matrix, int64_t width, float factor = 1) const {
        const int64_t size = dtype == FLOAT32 ? 4 : 2, at = matrix / h * x.of_n + matrix % h * x.of_h;
        return {static_cast<const char*>(x.data) + at * size, dtype, x.of_l, width, l, real(matrix), factor};
    }
    Problem problem(int64_t matrix) const {
        return {rows(q, matrix, d, scale()), rows(k, matrix, d), rows(v, matrix, e), nullptr};
    }
    Output output(void* data, int64_t matrix, int64_t width) const {
        const int64_t size = dtype == FLOAT32 ? 4 : 2;
        return {static_cast<char*>(data) + matrix * l * width * size, dtype, width, l, real(matrix)};
    }
    float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(d))); }
    // Whether threads should have whole matrices, though the last to begin may be waited for: that saves two of seven
    // products of a backward pass, and what is read stays in a thread's cache.
    bool by_matrix() const {
        const int64_t m = matrices(), rounds = (m + threads - 1) / threads;
        return 5 * rounds * threads <= 7 * m;
    }
};

// Selected blocks of each matrix; see ``Selection`` in selection.py.
struct Lists {
    const int32_t *pointers, *columns;
    int64_t nb, budget;

    const int32_t* row(int64_t matrix, int64_t i) const { return columns + matrix * budget + start(matrix, i); }
    int64_t count(int64_t matrix, int64_t i) const { return start(matrix, i + 1) - start(matrix, i); }
    int32_t start(int64_t matrix, int64_t i) const { return pointers[matrix * (nb + 1) + i]; }
};

Rows plain(const float* data, int64_t width, int64_t length) {
    return {data, FLOAT32, width, width, length, nullptr, 1};
}

// The low-resolution part of a matrix as attention: blocks are its tokens, 32 of them a block.
struct Coarse {
    Means means;
    Array<uint32_t> left_out;  // by column, of 32 rows

    Coarse(int64_t nb, int64_t d, int64_t e, bool selects)
        : means(nb, d, e, selects), left_out(means.groups * BLOCK) {}

    int64_t padded() const { return means.groups * BLOCK; }
    Problem problem() const {
        return {plain(means.q, means.d, padded()), plain(means.k, means.d, padded()), plain(means.v, means.e, padded()),
                means.counts};
    }
    // The selected blocks of the rows of a group.
    void leave_out_selected(const Lists& lists, int64_t matrix, int64_t group) {
        left_out.fill(padded(), 0);
        for (int64_t i = group * BLOCK; i < std::min((group + 1) * BLOCK, means.nb); ++i) {
            const int32_t* columns = lists.row(matrix, i);
            for (int64_t at = 0; at < lists.count(matrix, i); ++at) left_out[columns[at]] |= 1U << (i % BLOCK);
        }
    }
};

}  // namespace farspan::mra
