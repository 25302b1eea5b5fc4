// Attention of a block of queries to blocks of keys, and its derivatives: what both resolutions are computed with.
//
// The vectors run along the 32 queries of a block.  With Qᵀ [d, 32] at hand
//     Sᵀ = K Qᵀ, Yᵀ += Vᵀ Pᵀ;   dPᵀ = V dYᵀ, dQᵀ += Kᵀ dSᵀ, dV += Pᵀ dY, dK += dSᵀ Q
// every product's left factor is read number by number, so that keys and values are taken as they lie, of any size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "cpu.h"
#include "vectors.h"

namespace farspan::mra {

constexpr int64_t BLOCK = 32;
constexpr int64_t CHUNK = 4;  // blocks of keys whose scores are held at once: they stay in the first cache
constexpr int GROUPS = BLOCK / LANES<float>;  // vectors of a number for each query
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Numbers that begin where a line of the cache does.
template <class T>
class Array {
  public:
    Array() = default;
    explicit Array(int64_t count) : data_(static_cast<T*>(::operator new(bytes(count), ALIGNMENT))) {}
    operator T*() const { return data_.get(); }
    T* data() const { return data_.get(); }
    void fill(int64_t count, T value) { std::fill_n(data_.get(), count, value); }

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
    static size_t bytes(int64_t count) { return std::max<size_t>(1, sizeof(T) * static_cast<size_t>(count)); }
    struct Free {
        void operator()(T* data) const { ::operator delete(data, ALIGNMENT); }
    };
    std::unique_ptr<T, Free> data_;
};

// Rows of a matrix [length, width] in memory, one for each token.
struct Rows {
    const void* data;
    int dtype;
    int64_t stride, width, length;
    const uint8_t* real;  // 0: padding; null: all are real
    float factor;

    // Of a block's tokens, those that are real.
    int64_t count(int64_t block) const {
        const int64_t first = block * BLOCK, last = std::min(first + BLOCK, length);
        return real == nullptr ? last - first : last - first - std::count(real + first, real + last, uint8_t{0});
    }
    bool padding(int64_t row) const { return row >= length || (real != nullptr && real[row] == 0); }
};

inline float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

inline uint16_t bfloat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A block [BLOCK, room] of it, zero at padding and beyond the width.
inline void read(const Rows& x, int64_t block, float* to, int64_t room) {
    for (int64_t t = 0; t < BLOCK; ++t, to += room) {
        const int64_t row = block * BLOCK + t;
        if (x.padding(row)) {
            std::fill(to, to + room, 0.0F);
            continue;
        }
        if (x.dtype == FLOAT32) {
            const float* from = static_cast<const float*>(x.data) + row * x.stride;
            for (int64_t c = 0; c < x.width; ++c) to[c] = from[c] * x.factor;
        } else {
            const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * x.stride;
            for (int64_t c = 0; c < x.width; ++c) to[c] = widened(from[c]) * x.factor;
        }
        std::fill(to + x.width, to + room, 0.0F);
    }
}

struct Output {
    void* data;  // [length, width]
    int dtype;
    int64_t width, length;
    const uint8_t* real;
};

// A block of it: (x + more) · factor, 0 at padding.  x: [BLOCK, room]; more: of all its tokens, null: nothing.
inline void write(
    const Output& to, int64_t block, const float* x, int64_t room, const float* more = nullptr, float factor = 1) {
    for (int64_t t = 0; t < BLOCK && block * BLOCK + t < to.length; ++t, x += room) {
        const int64_t row = block * BLOCK + t;
        const bool padding = to.real != nullptr && to.real[row] == 0;
        const auto value = [&](int64_t c) {
            return padding ? 0.0F : (more == nullptr ? x[c] : x[c] + more[c]) * factor;
        };
        if (to.dtype == FLOAT32) {
            float* at = static_cast<float*>(to.data) + row * to.width;
            for (int64_t c = 0; c < to.width; ++c) at[c] = value(c);
        } else {
            uint16_t* at = static_cast<uint16_t*>(to.data) + row * to.width;
            for (int64_t c = 0; c < to.width; ++c) at[c] = bfloat(value(c));
        }
    }
}

// Queries, keys and values of one matrix, with scores q · k (the queries' factor is 1 / √d).
struct Problem {
    Rows q, k, v;
    const float* counts;  // by key, whole blocks: what it counts as; null: each real one as 1
};

// What a thread works with.
struct Room {
    int64_t d, e, wide_d, wide_e;
    // Of a block of queries, [32, wide] and turned [·, 32]:
    Array<float> q, q_t, of_y, of_y_t, y_t, of_q_t, maximum, sums, delta;
    // Of the keys: copies of blocks that cannot be used as they lie, and scores or weights [keys, 32].
    Array<float> k, v, counts, scores, of_scores;

    Room(int64_t d, int64_t e)
        : d(d), e(e), wide_d(whole_vectors<float>(d)), wide_e(whole_vectors<float>(e)), q(BLOCK * wide_d),
          q_t(BLOCK * d), of_y(BLOCK * wide_e), of_y_t(BLOCK * e), y_t(BLOCK * e), of_q_t(BLOCK * d), maximum(BLOCK),
          sums(BLOCK), delta(BLOCK), k(BLOCK * wide_d), v(BLOCK * wide_e), counts(BLOCK),
          scores(CHUNK * BLOCK * BLOCK), of_scores(BLOCK * BLOCK) {}
};

// Queries as they are and turned.
inline void read_queries(const Problem& x, int64_t block, Room& room) {
    read(x.q, block, room.q, room.wide_d);
    transpose(BLOCK, room.d, room.q, room.wide_d, room.q_t, BLOCK);
}

struct Block {
    const float* data;
    int64_t stride;
};

// A block of keys or values as it lies if it can be, else a copy, with zeros at padding.
inline Block block_of(const Rows& x, int64_t block, bool whole, float* copy, int64_t room) {
    if (whole && x.dtype == FLOAT32 && x.factor == 1) {
        return {static_cast<const float*>(x.data) + block * BLOCK * x.stride, x.stride};
    }
    read(x, block, copy, room);
    return {copy, room};
}

// What the keys of a block count as, into ``room``; null: 1 each.
inline const float* counts_of(const Problem& x, int64_t block, bool whole, float* room) {
    if (x.counts != nullptr) return x.counts + block * BLOCK;
    if (whole) return nullptr;
    for (int64_t u = 0; u < BLOCK; ++u) room[u] = x.k.padding(block * BLOCK + u) ? 0.0F : 1.0F;
    return room;
}

// −∞ for keys that do not count, and for the queries that leave a key out (a bit each).
inline void leave_out(float* scores, const float* counts, const uint32_t* left_out) {
    for (int64_t u = 0; u < BLOCK; ++u, scores += BLOCK) {
        if (counts != nullptr && counts[u] == 0) {
            std::fill(scores, scores + BLOCK, -INFINITE);
        } else if (left_out != nullptr && left_out[u] != 0) {
            for (int64_t t = 0; t < BLOCK; ++t) scores[t] = left_out[u] >> t & 1 ? -INFINITE : scores[t];
        }
    }
}

struct Groups {
    Vector<float> of[GROUPS];
};

inline Groups load_groups(const float* from) {
    Groups x;
    for (int g = 0; g < GROUPS; ++g) x.of[g] = load(from + g * LANES<float>);
    return x;
}

inline void store_groups(float* to, const Groups& x) {
    for (int g = 0; g < GROUPS; ++g) store(to + g * LANES<float>, x.of[g]);
}

// Adds blocks of keys to the maximum, sums and values (y_t) of a block of queries (q_t), in the order of ``columns``
// (null: 0, 1, …).  Sums and values are relative to the maximum, to 0 where it is −∞.
// left_out: by key of the matrix, see ``leave_out``; null: nobody leaves out any.
inline void attend(
    const Problem& x, const int32_t* columns, int64_t number, const uint32_t* left_out, Room& room) {
    for (int64_t first = 0; first < number; first += CHUNK) {
        const int64_t last = std::min(first + CHUNK, number);
        float counted[CHUNK][BLOCK];
        const float* counts[CHUNK];
        int64_t blocks[CHUNK], held = 0;
        Groups highest = load_groups(room.maximum);
        for (int64_t at = first; at < last; ++at) {
            const int64_t j = columns == nullptr ? at : columns[at], real = x.k.count(j);
            if (real == 0) continue;
            const Block k = block_of(x.k, j, real == BLOCK, room.k, room.wide_d);
            float* scores = room.scores + held * BLOCK * BLOCK;
            product<float, false, false>(BLOCK, BLOCK, room.d, k.data, k.stride, room.q_t, BLOCK, scores, BLOCK);
            counts[held] = counts_of(x, j, real == BLOCK, counted[held]);
            leave_out(scores, counts[held], left_out == nullptr ? nullptr : left_out + j * BLOCK);
            for (int64_t u = 0; u < BLOCK; ++u) {
                for (int g = 0; g < GROUPS; ++g) {
                    highest.of[g] = larger(load(scores + u * BLOCK + g * LANES<float>), highest.of[g]);
                }
            }
            blocks[held++] = j;
        }
        if (held == 0) continue;

        const Groups before = load_groups(room.maximum), sums_before = load_groups(room.sums);
        Groups sums = {}, base, share;
        for (int g = 0; g < GROUPS; ++g) {
            base.of[g] = highest.of[g] == Vector<float>{} - INFINITE ? Vector<float>{} : highest.of[g];
            share.of[g] = exp(before.of[g] - base.of[g]);
        }
        for (int64_t at = 0; at < held; ++at) {
            float* scores = room.scores + at * BLOCK * BLOCK;
            for (int64_t u = 0; u < BLOCK; ++u, scores += BLOCK) {
                const float count = counts[at] == nullptr ? 1.0F : counts[at][u];
                for (int g = 0; g < GROUPS; ++g) {
                    float* to = scores + g * LANES<float>;
                    const Vector<float> weight = exp(load(to) - base.of[g]) * count;
                    sums.of[g] += weight;
                    store(to, weight);
                }
            }
        }
        for (int g = 0; g < GROUPS; ++g) sums.of[g] += sums_before.of[g] * share.of[g];
        store_groups(room.maximum, highest);
        store_groups(room.sums, sums);
        for (int64_t c = 0; c < room.e; ++c) {
            for (int g = 0; g < GROUPS; ++g) {
                float* to = room.y_t + c * BLOCK + g * LANES<float>;
                store(to, load(to) * share.of[g]);
            }
        }
        for (int64_t at = 0; at < held; ++at) {
            const Block v = block_of(x.v, blocks[at], x.v.count(blocks[at]) == BLOCK, room.v, room.wide_e);
            const float* weights = room.scores + at * BLOCK * BLOCK;
            product<float, true, true>(room.e, BLOCK, BLOCK, v.data, v.stride, weights, BLOCK, room.y_t, BLOCK);
        }
    }
}

// Where the gradients of a pair of blocks are added; null: not asked for.
struct Gradients {
    float* q_t;  // [d, 32]
    float* k;    // [32, wide d]
    float* v;    // [32, wide e]
};

// Of the block of queries in ``room`` (q, q_t, of_y, of_y_t, maximum, delta; of_y divided by the sums) and one of keys.
__attribute__((noinline)) inline void differentiate(
    const Problem& x, int64_t j, const uint32_t* left_out, const Gradients& to, Room& room) {
    const int64_t real = x.k.count(j);
    if (real == 0) return;
    const bool whole = real == BLOCK;
    const Block k = block_of(x.k, j, whole, room.k, room.wide_d);
    float *const weights = room.scores, *const of_scores = room.of_scores;
    product<float, false, false>(BLOCK, BLOCK, room.d, k.data, k.stride, room.q_t, BLOCK, weights, BLOCK);
    const float* counts = counts_of(x, j, whole, room.counts);
    leave_out(weights, counts, left_out == nullptr ? nullptr : left_out + j * BLOCK);
    const bool scored = to.q_t != nullptr || to.k != nullptr;
    if (scored) {
        const Block v = block_of(x.v, j, whole, room.v, room.wide_e);
        product<float, false, false>(BLOCK, BLOCK, room.e, v.data, v.stride, room.of_y_t, BLOCK, of_scores, BLOCK);
    }
    const Groups maximum = load_groups(room.maximum), delta = load_groups(room.delta);
    for (int64_t u = 0; u < BLOCK; ++u) {
        const float count = counts == nullptr ? 1.0F : counts[u];
        for (int g = 0; g < GROUPS; ++g) {
            float *const weight = weights + u * BLOCK + g * LANES<float>;
            float *const of_score = of_scores + u * BLOCK + g * LANES<float>;
            const Vector<float> p = exp(load(weight) - maximum.of[g]) * count;
            store(weight, p);
            if (scored) store(of_score, p * (load(of_score) - delta.of[g]));
        }
    }
    if (to.v != nullptr) {
        product<float, false, true>(
            BLOCK, room.wide_e, BLOCK, weights, BLOCK, room.of_y, room.wide_e, to.v, room.wide_e);
    }
    if (to.k != nullptr) {
        product<float, false, true>(
            BLOCK, room.wide_d, BLOCK, of_scores, BLOCK, room.q, room.wide_d, to.k, room.wide_d);
    }
    if (to.q_t != nullptr) {
        product<float, true, true>(room.d, BLOCK, BLOCK, k.data, k.stride, of_scores, BLOCK, to.q_t, BLOCK);
    }
}

}  // namespace farspan::mra
