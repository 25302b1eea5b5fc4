// Positions of a block's features in shared memory, one feature's after another's, and their fragments.
//
// Positions come in chunks of 64, of a list that Python makes: a chunk is positions of one document.  A block has up to
// 16 · tiles chunks (a segment) of F features.  Global memory has a position's features side by side, products want a
// feature's positions: threads turn 8×8 numbers in registers, 16 bytes a position in and 16 bytes a feature out.
//
// Numbers lie as 1 to 3 bfloat16 pieces that add up to them (bf16 1, fp16 2, float32 3): products of pieces keep float32
// accuracy, and neither x nor a long average can leave their range.
#pragma once

#include "../native/mma.h"

namespace farspan {
namespace ema {

constexpr int POSITIONS = 64, UNITS = POSITIONS / 8;  // of a chunk; a unit is 8 positions, 16 bytes of a piece

struct alignas(16) Chunk {
    int position, row, length, flags;
};
enum Flags : int {
    FRESH_LEFT = 1,   // nothing comes from before it
    FRESH_RIGHT = 2,  // nothing comes from after it
    PADDING = 4,      // read as zeros
    BEGINS = 8,       // the first of a document, or of a row
    ENDS = 16,        // the last
};

// Pieces, the most tiles of 16 chunks in a segment; features of a block and its warps, of either kernel.
template <class T>
struct Form;
template <>
struct Form<bf16> {
    static constexpr int PIECES = 1, TILES = 4, FEATURES = 16, WARPS = 8, GRADIENT_FEATURES = 8, GRADIENT_WARPS = 8;
};
template <>
struct Form<fp16> {
    static constexpr int PIECES = 2, TILES = 2, FEATURES = 8, WARPS = 8, GRADIENT_FEATURES = 8, GRADIENT_WARPS = 8;
};
template <>
struct Form<float> {
    static constexpr int PIECES = 3, TILES = 2, FEATURES = 8, WARPS = 4, GRADIENT_FEATURES = 8, GRADIENT_WARPS = 4;
};

// x as PIECES bfloat16 numbers that add up to it, each in the low (of a) or high (of b) half of a register.
template <int PIECES>
FARSPAN_DEVICE void split(float a, float b, uint32_t (&pieces)[PIECES]) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        pieces[p] = pack<bf16>(a, b);
        a -= __uint_as_float(pieces[p] << 16);
        b -= __uint_as_float(pieces[p] & 0xffff0000u);
    }
}

// D += A B from pieces, without the products that are too small to count.
template <int OF_A, int OF_B>
FARSPAN_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[OF_A][4], const uint32_t (&b)[OF_B][2]) {
#pragma unroll
    for (int both = OF_B - 1; both >= 0; --both) {
#pragma unroll
        for (int p = 0; p <= both && p < OF_A; ++p) mma_16x8x16<bf16>(d, a[p], b[both - p]);
    }
}

// The segment that a block works on.
struct Segment {
    const Chunk* chunks;  // in shared memory
    int count, tiles;
    int64_t b, d, feature;  // the first feature
    bool vectors;           // features can be moved 16 bytes at a time
};

// Chunk c of a segment is in lane group g = c / (2 tiles) of the fragments, as its m-th = c % (2 tiles): rows g (even m)
// and g + 8 (odd) of tile m / 2.  So a lane has neighbours in time.  Units are permuted by g: the 8 rows that
// load_matrices takes at once, and the words that a warp stores at once, lie in different banks.
template <int PIECES, int F>
struct Slab {
    char* memory;
    int tiles;

    static FARSPAN_HOST_DEVICE int bytes(int tiles) { return PIECES * F * tiles * 16 * POSITIONS * 2; }

    FARSPAN_DEVICE char* at(int piece, int f, int g, int m, int unit) const {
        const int place = (unit ^ g ^ (f >> 3 << 2)) & (UNITS - 1);
        return memory + (((piece * F + f) * 16 + 2 * g) * tiles + m) * POSITIONS * 2 + place * 16;
    }

    template <class T>
    FARSPAN_DEVICE void fill(const Segment& segment, const T* x) const {
        for (int task = static_cast<int>(threadIdx.x); task < tiles * 16 * UNITS * (F / 8);
             task += static_cast<int>(blockDim.x)) {
            const int f = task % (F / 8) * 8, unit = task / (F / 8) % UNITS, c = task / (F / 8) / UNITS;
            T values[8][8];
            read(segment, x, f, unit, c, values);
            const int g = c / (2 * tiles), m = c % (2 * tiles);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                uint32_t pairs[4][PIECES];
#pragma unroll
                for (int j = 0; j < 4; ++j) split(to_float(values[2 * j][i]), to_float(values[2 * j + 1][i]), pairs[j]);
#pragma unroll
                for (int p = 0; p < PIECES; ++p) {
                    Vector<uint32_t, 4> words;
#pragma unroll
                    for (int j = 0; j < 4; ++j) words[j] = pairs[j][p];
                    store(reinterpret_cast<uint32_t*>(at(p, f + i, g, m, unit)), words);
                }
            }
        }
    }

    template <class T>
    static FARSPAN_DEVICE void read(const Segment& segment, const T* x, int f, int unit, int c, T (&values)[8][8]) {
        Chunk chunk{0, 0, 0, 0};
        if (c < segment.count) chunk = segment.chunks[c];
        const int length = chunk.flags & PADDING ? 0 : chunk.length - unit * 8;
        const int64_t feature = segment.feature + f, step = segment.b * segment.d;
        const T* from = x + (static_cast<int64_t>(chunk.position + unit * 8) * segment.b + chunk.row) * segment.d + feature;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            constexpr int N = 16 / sizeof(T);
            if (segment.vectors && r < length && feature < segment.d) {
#pragma unroll
                for (int i = 0; i < 8; i += N) {
                    const Vector<T, N> vector = load<T, N>(from + r * step + i);
#pragma unroll
                    for (int j = 0; j < N; ++j) values[r][i + j] = vector[j];
                }
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    values[r][i] = !segment.vectors && r < length && feature + i < segment.d ? from[r * step + i] : T{};
                }
            }
        }
    }

    template <class T>
    FARSPAN_DEVICE void empty(const Segment& segment, T* y) const {
        for (int task = static_cast<int>(threadIdx.x); task < segment.count * UNITS * (F / 8);
             task += static_cast<int>(blockDim.x)) {
            const int f = task % (F / 8) * 8, unit = task / (F / 8) % UNITS, c = task / (F / 8) / UNITS;
            const Chunk chunk = segment.chunks[c];
            const int length = chunk.length - unit * 8;
            const int64_t feature = segment.feature + f, step = segment.b * segment.d;
            if (length <= 0 || feature >= segment.d) continue;
            T values[8][8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float sums[8];
#pragma unroll
                for (int p = PIECES - 1; p >= 0; --p) {
                    const Vector<uint32_t, 4> words = load<uint32_t, 4>(
                        reinterpret_cast<const uint32_t*>(at(p, f + i, c / (2 * tiles), c % (2 * tiles), unit)));
#pragma unroll
                    for (int r = 0; r < 8; ++r) {
                        const float piece = __uint_as_float(r % 2 ? words[r / 2] & 0xffff0000u : words[r / 2] << 16);
                        sums[r] = p == PIECES - 1 ? piece : sums[r] + piece;
                    }
                }
#pragma unroll
                for (int r = 0; r < 8; ++r) values[r][i] = from_float<T>(sums[r]);
            }
            T* to = y + (static_cast<int64_t>(chunk.position + unit * 8) * segment.b + chunk.row) * segment.d + feature;
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                constexpr int N = 16 / sizeof(T);
                if (r >= length) continue;
                if (segment.vectors) {
#pragma unroll
                    for (int i = 0; i < 8; i += N) {
                        Vector<T, N> vector;
#pragma unroll
                        for (int j = 0; j < N; ++j) vector[j] = values[r][i + j];
                        store(to + r * step + i, vector);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        if (feature + i < segment.d) to[r * step + i] = values[r][i];
                    }
                }
            }
        }
    }

    // As A [16 chunks, positions 16 k ...] of tile j.
    FARSPAN_DEVICE void chunks_by_positions(int f, int j, int k, uint32_t (&a)[PIECES][4]) const {
        const int l = lane_index();
#pragma unroll
        for (int p = 0; p < PIECES; ++p) load_matrices(a[p], at(p, f, l % 8, 2 * j + (l / 8) % 2, 2 * k + l / 16));
    }

    // As A [16 positions from 16 i, the chunks of tile j].
    FARSPAN_DEVICE void positions_by_chunks(int f, int i, int j, uint32_t (&a)[PIECES][4]) const {
        const int l = lane_index();
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            load_matrices_transposed(a[p], at(p, f, l % 8, 2 * j + l / 16, 2 * i + (l / 8) % 2));
        }
    }

    // As two B [the chunks of tile j, 8 positions], those from 16 i and from 16 i + 8.
    FARSPAN_DEVICE void chunks_to_positions(int f, int i, int j, uint32_t (&b)[2][PIECES][2]) const {
        const int l = lane_index();
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            uint32_t r[4];
            load_matrices_transposed(r, at(p, f, l % 8, 2 * j + (l / 8) % 2, 2 * i + l / 16));
            b[0][p][0] = r[0], b[0][p][1] = r[1], b[1][p][0] = r[2], b[1][p][1] = r[3];
        }
    }

    // D [16 chunks, 8 positions] to tile j's unit.
    FARSPAN_DEVICE void put(int f, int j, int unit, const float (&d)[4]) const {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t pieces[PIECES];
            split(d[2 * h], d[2 * h + 1], pieces);
#pragma unroll
            for (int p = 0; p < PIECES; ++p) reinterpret_cast<uint32_t*>(at(p, f, g, 2 * j + h, unit))[t] = pieces[p];
        }
    }
};

}  // namespace ema
}  // namespace farspan
