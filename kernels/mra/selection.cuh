// Which blocks are attended exactly: as selection.py, block for block.
//
//   block_means      [3 · matrices · nb] warps     sums of 32 rows; bound by reading q, k, v once
//   block_scores     [matrices · nb / 32] blocks   logits in float64 and their keys; bound by float64 products, 2 nb² d
//   select           [matrices] blocks             the k-th highest key digit by digit, from registers up to nb = 128,
//                                                  and the lists of each row's columns; bound by latency
//   select_digit, count_rows, list_rows            the same by many blocks for a large matrix; bound by reading the
//                                                  keys, 8 nb² bytes, for each of six digits and twice for the lists
//   turn_bits, list_columns                        the lists by columns, in the backward pass
//
// A key is a score's 64 bits, changed so that the higher score has the higher unsigned integer.  Integers alone are
// added out of order, so every run selects the same.
#pragma once

#include "tiles.cuh"

namespace farspan {
namespace mra {

constexpr int MEANS_WARPS = 4, SCORE_THREADS = 256, SCORE_COLUMNS = 64, SCORE_DEPTH = 32;
constexpr int SELECT_WARPS = 32, SELECT_KEPT = 16, LIST_WARPS = 8;
constexpr int DIGITS = 6, DIGIT_BITS = 11, DIGIT_VALUES = 1 << DIGIT_BITS;
constexpr double MEAN_EPSILON = 1e-6, EMPTY = 1e4, PRIOR = 5e3;

struct Sizes {
    int batch, heads, length, d, nb;
    int budget, first, diagonal;  // diagonal: blocks up to so many from it, −1 none
    bool whole;                   // every token of every block is real
    FARSPAN_HOST_DEVICE int64_t matrices() const { return static_cast<int64_t>(batch) * heads; }
    FARSPAN_HOST_DEVICE int words() const { return (nb + WARP - 1) / WARP; }  // of a row of bits
    FARSPAN_HOST_DEVICE int padded() const { return words() * WARP; }        // blocks, in whole tiles of blocks
};

// Lanes that share a row of `vectors` 16-byte vectors: a power of 2, the rest of the warp has other rows.
FARSPAN_DEVICE int lanes_of_row(int vectors) {
    int lanes = 1;
    while (lanes < vectors && lanes < WARP) lanes *= 2;
    return lanes;
}

// ---- means ----------------------------------------------------------------------------------------------------------

struct Means {
    double *q, *k;     // [matrices, nb, d], q̂ with the factor 1 / √d
    float* all;        // q̂, k̂, v̂: [3, matrices, nb, d], or null
    uint32_t* tokens;  // [batch, nb]: bit i of a block's is set where its token i is real
};

template <class T>
__global__ void __launch_bounds__(MEANS_WARPS * WARP)
block_means(
    const T* q, const T* k, const T* v, Strides strides, const uint8_t* mask, Means means, Sizes s, float scale
) {
    constexpr int EACH = 16 / sizeof(T);
    const int64_t task = static_cast<int64_t>(blockIdx.x) * MEANS_WARPS + warp_index(), number = s.matrices() * s.nb;
    if (task >= 3 * number) return;
    const int which = static_cast<int>(task / s.nb % 3);  // q, k, v of a matrix after one another
    const int64_t matrix = task / s.nb / 3, block = matrix * s.nb + task % s.nb;
    const int64_t batch = matrix / s.heads, head = matrix % s.heads, first = block % s.nb * BLOCK;
    const int lane = lane_index();

    const int64_t token = first + lane;
    const uint32_t real = ballot(token < s.length && (mask == nullptr || mask[batch * s.length + token] != 0));
    if (which == 0 && head == 0 && lane == 0) means.tokens[batch * s.nb + block % s.nb] = real;

    const Rows<const T> rows{which == 0 ? q : which == 1 ? k : v, strides};
    const T* from = rows.at(batch, head, first);
    const float factor = which == 0 ? scale : 1.0f;
    const double size = static_cast<double>(__popc(real)) + MEAN_EPSILON;
    const int vectors = s.d / EACH, lanes = lanes_of_row(vectors), column = lane % lanes, row_step = WARP / lanes;
    for (int start = 0; start < vectors; start += lanes) {
        const int at = (start + column) * EACH;
        const bool active = at < s.d;
        double sums[EACH] = {};
#pragma unroll 4
        for (int row = lane / lanes; row < BLOCK; row += row_step) {
            if (!active || !(real >> row & 1u)) continue;
            const Vector<T, EACH> x = load<T, EACH>(from + row * rows.strides.token + at);
#pragma unroll
            for (int i = 0; i < EACH; ++i) sums[i] += static_cast<double>(__fmul_rn(to_float(x[i]), factor));
        }
        for (int distance = lanes; distance < WARP; distance *= 2) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) sums[i] += shuffle_xor(sums[i], distance);
        }
        if (!active || lane >= lanes) continue;
        double* exact = which == 0 ? means.q : means.k;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const double mean = sums[i] / size;
            if (which < 2) exact[block * s.d + at + i] = mean;
            if (means.all != nullptr) means.all[(which * number + block) * s.d + at + i] = static_cast<float>(mean);
        }
    }
}

// ---- scores ---------------------------------------------------------------------------------------------------------

FARSPAN_DEVICE uint64_t key_of_score(double score) {
    if (score != score) score = -static_cast<double>(__uint_as_float(0x7f800000u));
    uint64_t bits;
    memcpy(&bits, &score, 8);
    return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

inline size_t score_bytes() { return SCORE_DEPTH * (BLOCK + 1 + SCORE_COLUMNS + 1) * sizeof(double); }

// keys: [matrices of this launch, nb, nb], first logits.  Block: 32 rows, all columns; thread: 2 rows, 4 of 64 columns.
__global__ void __launch_bounds__(SCORE_THREADS)
block_scores(const double* q, const double* k, const uint32_t* tokens, uint64_t* keys, int64_t first_matrix, Sizes s) {
    double* rows = reinterpret_cast<double*>(shared_memory());    // [SCORE_DEPTH][BLOCK + 1]
    double* columns = rows + SCORE_DEPTH * (BLOCK + 1);           // [SCORE_DEPTH][SCORE_COLUMNS + 1]
    const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;
    const int64_t matrix = blockIdx.x / s.words(), nb = s.nb;
    const int top = static_cast<int>(blockIdx.x) % s.words() * BLOCK;
    q += (first_matrix + matrix) * nb * s.d;
    k += (first_matrix + matrix) * nb * s.d;
    tokens += (first_matrix + matrix) / s.heads * nb;
    keys += matrix * nb * nb;

    const double lowest = -static_cast<double>(__uint_as_float(0x7f800000u));
    double highest[2] = {lowest, lowest};
    for (int left = 0; left < s.nb; left += SCORE_COLUMNS) {
        double sums[2][4] = {};
        for (int depth = 0; depth < s.d; depth += SCORE_DEPTH) {
            sync_block();
            for (int i = thread; i < (BLOCK + SCORE_COLUMNS) * SCORE_DEPTH; i += SCORE_THREADS) {
                const int at = i % SCORE_DEPTH, j = i / SCORE_DEPTH;
                const bool of_rows = j < BLOCK;
                const int block = of_rows ? top + j : left + j - BLOCK;
                double* to = of_rows ? rows + at * (BLOCK + 1) + j : columns + at * (SCORE_COLUMNS + 1) + j - BLOCK;
                const bool exists = block < s.nb && depth + at < s.d;
                *to = exists ? (of_rows ? q : k)[static_cast<int64_t>(block) * s.d + depth + at] : 0.0;
            }
            sync_block();
#pragma unroll 4
            for (int at = 0; at < SCORE_DEPTH; ++at) {
                double a[2], b[4];
#pragma unroll
                for (int i = 0; i < 2; ++i) a[i] = rows[at * (BLOCK + 1) + 2 * ty + i];
#pragma unroll
                for (int j = 0; j < 4; ++j) b[j] = columns[at * (SCORE_COLUMNS + 1) + tx + 16 * j];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = top + 2 * ty + i, column = left + tx + 16 * j;
                if (row >= s.nb || column >= s.nb) continue;
                highest[i] = max(highest[i], sums[i][j]);
                memcpy(keys + row * nb + column, &sums[i][j], 8);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int distance = 8; distance > 0; distance /= 2) {
            highest[i] = max(highest[i], shuffle_xor(highest[i], distance));
        }
        const int row = top + 2 * ty + i;
        if (row >= s.nb) continue;
        const bool empty_row = tokens[row] == 0;
        for (int column = tx; column < s.nb; column += 16) {  // what this thread wrote
            double score;
            memcpy(&score, keys + row * nb + column, 8);
            score -= highest[i];
            if (empty_row || tokens[column] == 0) score -= EMPTY;
            const int distance = row > column ? row - column : column - row;
            if (distance <= s.diagonal) score += PRIOR;
            if (row < s.first) score += PRIOR;
            if (column < s.first) score += PRIOR;
            keys[row * nb + column] = key_of_score(score);
        }
    }
}

// ---- the k-th highest key -------------------------------------------------------------------------------------------

struct Threshold {
    uint64_t key;     // after p digits: those of the k-th highest key, other bits 0
    int64_t missing;  // so many of those with these digits are among the k highest
};

// Digits from the highest bits down; the last has 9 bits.
FARSPAN_HOST_DEVICE int digit_shift(int digit) {
    return digit == DIGITS - 1 ? 0 : 64 - DIGIT_BITS * (digit + 1);
}
FARSPAN_HOST_DEVICE int digit_bits(int digit) {
    return digit == DIGITS - 1 ? 64 - DIGIT_BITS * (DIGITS - 1) : DIGIT_BITS;
}

FARSPAN_DEVICE int sum_of_warp(int value) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Counts the next digit of keys in a histogram, int [DIGIT_VALUES] in shared memory.
struct Counter {
    int* histogram;
    uint64_t known, found;  // keys that agree so far: (key & known) == found
    int shift;
    uint32_t digit;

    // The whole block comes here.
    FARSPAN_DEVICE static Counter of(const Threshold& threshold, int digit, int* histogram) {
        const int threads = static_cast<int>(blockDim.x);
        for (int i = static_cast<int>(threadIdx.x); i < DIGIT_VALUES; i += threads) histogram[i] = 0;
        sync_block();
        const int shift = digit_shift(digit), bits = digit_bits(digit);
        const uint64_t known = digit == 0 ? 0 : ~uint64_t{0} << (shift + bits);
        return {histogram, known, threshold.key, shift, (1u << bits) - 1};
    }
    FARSPAN_DEVICE void count(uint64_t key) const {
        if ((key & known) == found) atomic_add(&histogram[key >> shift & digit], 1);
    }
};

// The digit of the k-th highest of what a histogram counts, joined to those before.  The whole block comes here;
// totals: int [SELECT_WARPS + 2] in shared memory.
FARSPAN_DEVICE Threshold find_digit(const int* histogram, Threshold found, int digit, int* totals) {
    constexpr int GROUP = DIGIT_VALUES / SELECT_WARPS, EACH = GROUP / WARP;
    const int warp = warp_index(), lane = lane_index();
    int sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += histogram[warp * GROUP + i * WARP + lane];
    sum = sum_of_warp(sum);
    if (lane == 0) totals[warp] = sum;
    sync_block();
    if (warp == 0) {
        int64_t missing = found.missing;
        int group = SELECT_WARPS - 1;
        while (group > 0 && totals[group] < missing) missing -= totals[group--];
        int own[EACH], after = 0;  // lane 31 has the group's highest values
#pragma unroll
        for (int i = 0; i < EACH; ++i) after += own[i] = histogram[group * GROUP + lane * EACH + i];
        sum = after;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int more = shuffle_down(after, distance);
            if (lane + distance < WARP) after += more;
        }
        const int above = after - sum;
        if (above < missing && missing <= after) {
            int value = EACH - 1;
            missing -= above;
            while (value > 0 && own[value] < missing) missing -= own[value--];
            totals[SELECT_WARPS] = group * GROUP + lane * EACH + value;
            totals[SELECT_WARPS + 1] = static_cast<int>(missing);
        }
    }
    sync_block();
    const Threshold next{
        found.key | static_cast<uint64_t>(totals[SELECT_WARPS]) << digit_shift(digit), totals[SELECT_WARPS + 1]
    };
    sync_block();
    return next;
}

inline size_t select_bytes() { return (DIGIT_VALUES + SELECT_WARPS + 2) * sizeof(int); }

// One digit, `parts` blocks for each matrix: the one before is found of all parts' sums.  With digit = DIGITS the last
// is found and that is all.  thresholds: [DIGITS, matrices], of which the last row is the result's; histograms:
// [DIGITS, matrices, DIGIT_VALUES], zeros at first.
__global__ void __launch_bounds__(SELECT_WARPS * WARP)
select_digit(
    const uint64_t* keys, Threshold* thresholds, int* histograms, int64_t number, int budget, int matrices, int parts,
    int digit
) {
    int* histogram = reinterpret_cast<int*>(shared_memory());
    const int matrix = static_cast<int>(blockIdx.x) / parts, part = static_cast<int>(blockIdx.x) % parts;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    Threshold found{0, budget};
    if (digit > 0) {
        if (digit > 1) found = thresholds[(digit - 2) * matrices + matrix];
        const int* before = histograms + (static_cast<int64_t>(digit - 1) * matrices + matrix) * DIGIT_VALUES;
        found = find_digit(before, found, digit - 1, histogram + DIGIT_VALUES);
        if (part == 0 && thread == 0) thresholds[(digit - 1) * matrices + matrix] = found;
        if (digit == DIGITS) return;
    }
    const Counter counter = Counter::of(found, digit, histogram);
    const int64_t size = (number + parts - 1) / parts, begin = part * size, end = min(begin + size, number);
#pragma unroll 4
    for (int64_t i = begin + thread; i < end; i += threads) counter.count(keys[matrix * number + i]);
    sync_block();
    int* sums = histograms + (static_cast<int64_t>(digit) * matrices + matrix) * DIGIT_VALUES;
    for (int i = thread; i < DIGIT_VALUES; i += threads) {
        if (histogram[i] != 0) atomic_add(&sums[i], histogram[i]);
    }
}

__global__ void clear_histograms(int* histograms, int64_t number) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < number) histograms[i] = 0;
}

// ---- lists ----------------------------------------------------------------------------------------------------------

struct Lists {
    uint32_t* bits;  // [matrices, nb, words]: which blocks of a row
    int* pointers;   // [matrices, nb + 1]
    int* columns;    // [matrices, budget]
};

// A warp's: the keys of a row above the threshold, and those equal to it.
FARSPAN_DEVICE void count_row(const uint64_t* keys, uint64_t limit, int nb, int* above, int* equal) {
    int more = 0, same = 0;
    for (int j = lane_index(); j < nb; j += WARP) {
        const uint64_t key = keys[j];
        more += key > limit;
        same += key == limit;
    }
    more = sum_of_warp(more);
    same = sum_of_warp(same);
    if (lane_index() == 0) {
        *above = more;
        *equal = same;
    }
}

// A warp's: the list of row `own` of a matrix whose rows are counted.  Of equal keys those of lower rows, then of lower
// columns are taken.
FARSPAN_DEVICE void list_row(
    const uint64_t* keys, const Threshold& limit, const int* above, const int* equal, const Lists& lists,
    int64_t matrix, int own, const Sizes& s
) {
    const int lane = lane_index(), nb = s.nb, missing = static_cast<int>(limit.missing);
    int more = 0, same = 0;  // in the rows before
    for (int i = lane; i < own; i += WARP) {
        more += above[i];
        same += equal[i];
    }
    more = sum_of_warp(more);
    same = sum_of_warp(same);
    int at = more + min(same, missing);
    if (lane == 0) {
        lists.pointers[matrix * (nb + 1) + own] = at;
        if (own == nb - 1) lists.pointers[matrix * (nb + 1) + nb] = s.budget;
    }
    const uint32_t before = (1u << lane) - 1;
    for (int word = 0; word < s.words(); ++word) {
        const int column = word * WARP + lane;
        const bool exists = column < nb;
        const uint64_t key = exists ? keys[column] : 0;
        const bool is_equal = exists && key == limit.key;
        const uint32_t equals = ballot(is_equal);
        const bool taken = (exists && key > limit.key) || (is_equal && same + __popc(equals & before) < missing);
        const uint32_t chosen = ballot(taken);
        if (taken) lists.columns[matrix * s.budget + at + __popc(chosen & before)] = column;
        if (lane == 0) lists.bits[(matrix * nb + own) * s.words() + word] = chosen;
        at += __popc(chosen);
        same += __popc(equals);
    }
}

// counts: above and equal, [matrices of this launch, nb] each.
__global__ void __launch_bounds__(LIST_WARPS * WARP)
count_rows(const uint64_t* keys, const Threshold* thresholds, int* counts, int64_t rows, int nb) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + warp_index();
    if (row < rows) count_row(keys + row * nb, thresholds[row / nb].key, nb, counts + row, counts + rows + row);
}

__global__ void __launch_bounds__(LIST_WARPS * WARP)
list_rows(
    const uint64_t* keys, const Threshold* thresholds, const int* counts, Lists lists, int64_t first_matrix,
    int64_t rows, Sizes s
) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + warp_index();
    if (row >= rows) return;
    const int own = static_cast<int>(row % s.nb);
    const int *above = counts + row - own, *equal = above + rows;
    list_row(keys + row * s.nb, thresholds[row / s.nb], above, equal, lists, first_matrix + row / s.nb, own, s);
}

// All of a matrix, whose keys are read once if they are at most SELECT_KEPT for each thread.  counts as ``count_rows``.
__global__ void __launch_bounds__(SELECT_WARPS * WARP)
select(const uint64_t* keys, int* counts, Lists lists, int64_t first_matrix, int64_t matrices, Sizes s) {
    constexpr int THREADS = SELECT_WARPS * WARP;
    int* histogram = reinterpret_cast<int*>(shared_memory());
    const int number = s.nb * s.nb, thread = static_cast<int>(threadIdx.x);
    keys += static_cast<int64_t>(blockIdx.x) * number;
    uint64_t kept[SELECT_KEPT];
#pragma unroll
    for (int i = 0; i < SELECT_KEPT; ++i) kept[i] = i * THREADS + thread < number ? keys[i * THREADS + thread] : 0;
    Threshold found{0, s.budget};
    for (int digit = 0; digit < DIGITS; ++digit) {
        const Counter counter = Counter::of(found, digit, histogram);
#pragma unroll
        for (int i = 0; i < SELECT_KEPT; ++i) {
            if (i * THREADS + thread < number) counter.count(kept[i]);
        }
#pragma unroll 4
        for (int i = SELECT_KEPT * THREADS + thread; i < number; i += THREADS) counter.count(keys[i]);
        sync_block();
        found = find_digit(histogram, found, digit, histogram + DIGIT_VALUES);
    }
    int *above = counts + static_cast<int64_t>(blockIdx.x) * s.nb, *equal = above + matrices * s.nb;
    for (int row = warp_index(); row < s.nb; row += SELECT_WARPS) {
        count_row(keys + static_cast<int64_t>(row) * s.nb, found.key, s.nb, above + row, equal + row);
    }
    sync_block();
    for (int row = warp_index(); row < s.nb; row += SELECT_WARPS) {
        list_row(
            keys + static_cast<int64_t>(row) * s.nb, found, above, equal, lists, first_matrix + blockIdx.x, row, s
        );
    }
}

// turned: [matrices, nb, words], the bits by columns; counts: [matrices, nb] of each column.  A warp has 32 columns.
__global__ void __launch_bounds__(LIST_WARPS * WARP)
turn_bits(const uint32_t* bits, uint32_t* turned, int* counts, Sizes s) {
    const int64_t task = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + warp_index();
    const int words = s.words(), lane = lane_index();
    if (task >= s.matrices() * words) return;
    const int64_t matrix = task / words;
    const int word = static_cast<int>(task % words), column = word * WARP + lane;
    int count = 0;
    for (int tile = 0; tile < words; ++tile) {
        const int row = tile * WARP + lane;
        const uint32_t of_row = row < s.nb ? bits[(matrix * s.nb + row) * words + word] : 0;
        uint32_t own = 0;
        for (int i = 0; i < WARP; ++i) {
            const uint32_t of_column = ballot(of_row >> i & 1u);
            if (lane == i) own = of_column;
        }
        if (column < s.nb) turned[(matrix * s.nb + column) * words + tile] = own;
        count += __popc(own);
    }
    if (column < s.nb) counts[matrix * s.nb + column] = count;
}

// Lists (whose bits are there) of matrices by columns: the rows of each, ascending.
__global__ void __launch_bounds__(LIST_WARPS * WARP) list_columns(const int* counts, Lists lists, Sizes s) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + warp_index();
    if (row >= s.matrices() * s.nb) return;
    const int lane = lane_index(), nb = s.nb, own = static_cast<int>(row % nb);
    const int64_t matrix = row / nb;
    int at = 0;
    for (int i = lane; i < own; i += WARP) at += counts[row - own + i];
    at = sum_of_warp(at);
    if (lane == 0) {
        lists.pointers[matrix * (nb + 1) + own] = at;
        if (own == nb - 1) lists.pointers[matrix * (nb + 1) + nb] = s.budget;
    }
    for (int word = 0; word < s.words(); ++word) {
        const uint32_t chosen = lists.bits[row * s.words() + word];
        if (chosen >> lane & 1u) {
            lists.columns[matrix * s.budget + at + __popc(chosen & ((1u << lane) - 1))] = word * WARP + lane;
        }
        at += __popc(chosen);
    }
}

}  // namespace mra
}  // namespace farspan
