// Which blocks are attended exactly: as selection.py, block for block.
//
//   block_means      [3 · matrices · nb] warps     sums of 32 rows; bound by reading q, k, v once
//   block_scores     [matrices · nb / 32] blocks   logits in float64 and their keys; bound by float64 products, 2 nb² d
//   select           [matrices] or [parts · matrices] blocks, the k-th highest key digit by digit; bound by reading the
//                    keys, 8 nb² bytes, once for each of six digits
//   count, list_rows [matrices · nb] warps         lists of each row's columns, a bit of each block
//   turn_bits, list_columns                        the same by columns
//
// A key is a score's 64 bits, changed so that the higher score has the higher unsigned integer.  Integers alone are added
// out of order, so every run selects the same.
#pragma once

#include "tiles.cuh"

namespace farspan {
namespace mra {

constexpr int MEANS_WARPS = 4, SCORE_THREADS = 256, SCORE_COLUMNS = 64, SCORE_DEPTH = 32;
constexpr int SELECT_WARPS = 16, DIGITS = 6, DIGIT_BITS = 11, DIGIT_VALUES = 1 << DIGIT_BITS, LIST_WARPS = 8;
constexpr double MEAN_EPSILON = 1e-6, EMPTY = 1e4, PRIOR = 5e3;

struct Sizes {
    int batch, heads, length, d, nb;
    int budget, first, diagonal;  // diagonal: blocks up to so many from it, −1 none
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
block_means(Rows<const T> q, Rows<const T> k, Rows<const T> v, const uint8_t* mask, Means means, Sizes s, float scale) {
    constexpr int EACH = 16 / sizeof(T);
    const int64_t task = static_cast<int64_t>(blockIdx.x) * MEANS_WARPS + warp_index(), number = s.matrices() * s.nb;
    if (task >= 3 * number) return;
    const int which = static_cast<int>(task / number);
    const int64_t block = task % number, matrix = block / s.nb;
    const int64_t batch = matrix / s.heads, head = matrix % s.heads, first = block % s.nb * BLOCK;
    const int lane = lane_index();

    const int64_t token = first + lane;
    const uint32_t real = ballot(token < s.length && (mask == nullptr || mask[batch * s.length + token] != 0));
    if (which == 0 && head == 0 && lane == 0) means.tokens[batch * s.nb + block % s.nb] = real;

    const Rows<const T>& rows = which == 0 ? q : which == 1 ? k : v;
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
    score += 0.0;  // −0 is 0
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

// histogram: int [DIGIT_VALUES] in shared memory.  Counts the next digit of keys[begin:end] that agree so far.
FARSPAN_DEVICE void count_digits(
    const uint64_t* keys, int64_t begin, int64_t end, const Threshold& found, int digit, int* histogram
) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < DIGIT_VALUES; i += threads) histogram[i] = 0;
    sync_block();
    const int shift = digit_shift(digit), bits = digit_bits(digit);
    const uint64_t known = digit == 0 ? 0 : ~uint64_t{0} << (shift + bits);
#pragma unroll 4
    for (int64_t i = begin + thread; i < end; i += threads) {
        const uint64_t key = keys[i];
        if ((key & known) == found.key) atomic_add(&histogram[key >> shift & ((1u << bits) - 1)], 1);
    }
    sync_block();
}

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

// All digits at once, a block for each matrix.
__global__ void __launch_bounds__(SELECT_WARPS * WARP)
select(const uint64_t* keys, Threshold* thresholds, int64_t number, int budget) {
    int* histogram = reinterpret_cast<int*>(shared_memory());
    Threshold found{0, budget};
    for (int digit = 0; digit < DIGITS; ++digit) {
        count_digits(keys + blockIdx.x * number, 0, number, found, digit, histogram);
        found = find_digit(histogram, found, digit, histogram + DIGIT_VALUES);
    }
    if (threadIdx.x == 0) thresholds[blockIdx.x] = found;
}

// One digit, `parts` blocks for each matrix: the one before is found of all parts' sums.  With digit = DIGITS the last is
// found and that is all.  thresholds: [DIGITS, matrices], of which the last row is the result's (as ``select``'s alone);
// histograms: [DIGITS, matrices, DIGIT_VALUES], zeros at first.
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
    const int64_t size = (number + parts - 1) / parts, begin = part * size;
    count_digits(keys + matrix * number, begin, min(begin + size, number), found, digit, histogram);
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

// [matrices of this launch, nb]: keys of each row above the threshold, and equal to it.
__global__ void __launch_bounds__(LIST_WARPS * WARP)
count_rows(const uint64_t* keys, const Threshold* thresholds, int* above, int* equal, int64_t rows, int nb) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + warp_index();
    if (row >= rows) return;
    const uint64_t limit = thresholds[row / nb].key;
    int more = 0, same = 0;
    for (int j = lane_index(); j < nb; j += WARP) {
        const uint64_t key = keys[row * nb + j];
        more += key > limit;
        same += key == limit;
    }
    more = sum_of_warp(more);
    same = sum_of_warp(same);
    if (lane_index() == 0) {
        above[row] = more;
        equal[row] = same;
    }
}

struct Lists {
    uint32_t* bits;  // [matrices, nb, words]: which blocks of a row
    int* pointers;   // [matrices, nb + 1]
    int* columns;    // [matrices, budget]
};

// Of `rows` rows of matrices from first_matrix on.  Of equal keys those of lower rows, then of lower columns are taken.
__global__ void __launch_bounds__(LIST_WARPS * WARP)
list_rows(
    const uint64_t* keys, const Threshold* thresholds, const int* above, const int* equal, Lists lists,
    int64_t first_matrix, int64_t rows, Sizes s
) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LIST_WARPS + warp_index();
    if (row >= rows) return;
    const int lane = lane_index(), nb = s.nb, own = static_cast<int>(row % nb);
    const int64_t start = row - own, matrix = first_matrix + row / nb;
    int more = 0, same = 0;  // in the rows before
    for (int i = lane; i < own; i += WARP) {
        more += above[start + i];
        same += equal[start + i];
    }
    more = sum_of_warp(more);
    same = sum_of_warp(same);
    const Threshold limit = thresholds[row / nb];
    const int missing = static_cast<int>(limit.missing);
    int at = more + min(same, missing);
    if (lane == 0) {
        lists.pointers[matrix * (nb + 1) + own] = at;
        if (own == nb - 1) lists.pointers[matrix * (nb + 1) + nb] = s.budget;
    }
    const uint32_t before = (1u << lane) - 1;
    for (int word = 0; word < s.words(); ++word) {
        const int column = word * WARP + lane;
        const uint64_t key = column < nb ? keys[row * nb + column] : 0;
        const uint32_t equals = ballot(column < nb && key == limit.key);
        const bool taken = column < nb && (key > limit.key || (key == limit.key && same + __popc(equals & before) < missing));
        const uint32_t chosen = ballot(taken);
        if (taken) lists.columns[matrix * s.budget + at + __popc(chosen & before)] = column;
        if (lane == 0) lists.bits[(matrix * nb + own) * s.words() + word] = chosen;
        at += __popc(chosen);
        same += __popc(equals);
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
