// The common course of the kernels of attention: a block of threads has 32 rows and meets tiles of 32 others one after
// another, copied to shared memory while the ones before are worked on.
//
// A block of threads has `groups` groups, each with every groups-th tile and sums of its own, which are added at the
// end in the order of the groups; so a row with many blocks takes less time.  A group has 2 · chunks warps: warp w has
// rows 16 (w % 2) to + 15 and columns CHUNK · (w / 2) to + 63 of the results.
//
// The same kernels serve two resolutions.  FINE: rows are tokens, the tiles a row's list of selected blocks.  COARSE:
// rows are blocks' means in float32, the tiles all of them; blocks that are selected are left out (`bits`), the others
// count as often as they have tokens.
#pragma once

#include "selection.cuh"

namespace farspan {
namespace mra {

struct Shape {
    Sizes sizes;
    int width;      // d in whole 16s
    int groups, stages;
    float scale;    // of products of queries and keys
    FARSPAN_HOST_DEVICE int chunks() const { return (width + CHUNK - 1) / CHUNK; }
    FARSPAN_HOST_DEVICE int threads() const { return groups * 2 * chunks() * WARP; }
};

// D: the features where they are known, else 0.
template <int D>
FARSPAN_DEVICE int warps_of_group(const Shape& shape) {
    return D ? (D + CHUNK - 1) / CHUNK * 2 : 2 * shape.chunks();
}

template <bool COARSE>
FARSPAN_HOST_DEVICE int tiles_of_matrix(const Sizes& s) {
    return COARSE ? s.words() : s.nb;
}

// Where a thread is.
struct Place {
    int number, tile, batch, head, group, row, chunk, g, t;  // number: the matrix; row: the first of the warp's 16
    FARSPAN_DEVICE int64_t matrix() const { return number; }

    template <int D, bool COARSE>
    FARSPAN_DEVICE static Place of(const Shape& shape) {
        const int tiles = tiles_of_matrix<COARSE>(shape.sizes);
        const int warps = warps_of_group<D>(shape), lane = lane_index();
        Place p;
        // The last that ``block_means`` read comes first: some of it is in the L2 cache still.
        p.number = shape.sizes.batch * shape.sizes.heads - 1 - static_cast<int>(blockIdx.x) / tiles;
        p.tile = static_cast<int>(blockIdx.x) % tiles;
        p.batch = p.number / shape.sizes.heads;
        p.head = p.number % shape.sizes.heads;
        p.group = warp_index() / warps;
        p.row = warp_index() % 2 * 16;
        p.chunk = warp_index() % warps / 2;
        p.g = lane / 4;
        p.t = lane % 4;
        return p;
    }
};

// Which rows of a tile there are.
template <bool COARSE>
FARSPAN_DEVICE uint32_t rows_of_tile(const uint32_t* tokens, const Sizes& s, int batch, int tile) {
    if constexpr (COARSE) {
        const int rows = s.nb - tile * BLOCK;
        return rows >= BLOCK ? ~0u : (1u << rows) - 1;
    } else {
        return tokens[static_cast<int64_t>(batch) * s.nb + tile];
    }
}

// COARSE: the real tokens of a block, 0 beyond the last.
FARSPAN_DEVICE float tokens_of_block(const uint32_t* tokens, const Sizes& s, int batch, int block) {
    return block < s.nb ? static_cast<float>(__popc(tokens[static_cast<int64_t>(batch) * s.nb + block])) : 0.0f;
}

// The tiles that a group meets: of FINE, lanes hold the next 32 of the list, and their real tokens.
template <bool COARSE>
struct Tiles {
    const int* columns;
    const uint32_t* tokens;
    int count, groups, group, batch;
    Sizes sizes;
    int column = 0;
    uint32_t real = 0;

    FARSPAN_DEVICE static Tiles of(
        const Shape& shape, const Place& place, const uint32_t* tokens, const int* pointers, const int* columns
    ) {
        const Sizes& s = shape.sizes;
        if constexpr (COARSE) return {nullptr, tokens, s.words(), shape.groups, place.group, place.batch, s};
        const int* range = pointers + place.matrix() * (s.nb + 1) + place.tile;
        const int* first = columns + place.matrix() * s.budget + range[0];
        return {first, tokens, range[1] - range[0], shape.groups, place.group, place.batch, s};
    }
    FARSPAN_DEVICE int steps() const { return (count + groups - 1) / groups; }
    FARSPAN_DEVICE bool has(int step) const { return step * groups + group < count; }
    // Steps are asked for in order, 0 first; the same of all lanes.
    FARSPAN_DEVICE void at(int step, int& tile, uint32_t& rows) {
        if constexpr (COARSE) {
            tile = step * groups + group;
            rows = rows_of_tile<true>(tokens, sizes, batch, tile);
        } else {
            if (step % WARP == 0) {
                const int mine = (step + lane_index()) * groups + group;
                column = mine < count ? columns[mine] : 0;
                real = sizes.whole ? ~0u : mine < count ? rows_of_tile<false>(tokens, sizes, batch, column) : 0;
            }
            tile = shuffle(column, step % WARP);
            rows = shuffle(real, step % WARP);
        }
    }
};

// Shared memory: `own` tiles of the block's rows, then for each stage and group two tiles and STATISTICS · 32 floats.
template <class T, int STATISTICS>
FARSPAN_HOST_DEVICE int stage_bytes(int width) {
    return 2 * tile_bytes<T>(width) + STATISTICS * BLOCK * static_cast<int>(sizeof(float));
}

// Two tensors met tile by tile, and numbers of their rows, [matrices, tiles, STATISTICS, 32].
template <class T>
struct Met {
    Rows<const T> first, second;
    const float* statistics;
};

// work(tile, real rows, first, second, statistics) for each tile of the group; ready() once, when what was copied
// before is there.  All threads of the block come here; after it shared memory is free.
template <class T, int D, bool COARSE, int STATISTICS, class Ready, class Work>
FARSPAN_DEVICE void meet(
    const Shape& shape, const Place& place, Tiles<COARSE> tiles, const Met<T>& met, char* stages, Ready ready,
    Work work
) {
    const int width = D ? D : shape.width, d = D ? D : shape.sizes.d;
    const int warps = warps_of_group<D>(shape), threads = warps * WARP;
    const int thread = warp_index() % warps * WARP + lane_index();
    const int tile_size = tile_bytes<T>(width), stage_size = stage_bytes<T, STATISTICS>(width);
    int next = 0;
    uint32_t next_rows = 0;
    auto stage = [&](int step) {
        return stages + ((step & (shape.stages - 1)) * shape.groups + place.group) * stage_size;
    };
    auto begin = [&](int step) {
        tiles.at(step, next, next_rows);
        if (tiles.has(step)) {
            char* to = stage(step);
            const int64_t token = static_cast<int64_t>(next) * BLOCK;
            copy_tile(
                reinterpret_cast<T*>(to), met.first.at(place.batch, place.head, token), met.first.strides.token,
                next_rows, d, width, thread, threads
            );
            copy_tile(
                reinterpret_cast<T*>(to + tile_size), met.second.at(place.batch, place.head, token),
                met.second.strides.token, next_rows, d, width, thread, threads
            );
            if constexpr (STATISTICS != 0) {
                if (thread < STATISTICS * 8) {
                    const int64_t of_tile = place.matrix() * tiles_of_matrix<COARSE>(shape.sizes) + next;
                    const float* from = met.statistics + of_tile * STATISTICS * BLOCK + thread * 4;
                    copy_16(to + 2 * tile_size + thread * 16, from);
                }
            }
        }
        copies_commit();
    };

    const int steps = tiles.steps();
    if (steps > 0) begin(0);
    else copies_commit();
    for (int step = 0; step < steps; ++step) {
        copies_wait<0>();
        sync_block();
        const int now = next;
        const uint32_t rows = next_rows;
        if (step == 0) ready();
        if (shape.stages == 2 && step + 1 < steps) begin(step + 1);
        if (tiles.has(step)) {
            const char* at = stage(step);
            work(
                now, rows, reinterpret_cast<const T*>(at), reinterpret_cast<const T*>(at + tile_size),
                reinterpret_cast<const float*>(at + 2 * tile_size)
            );
        }
        if (shape.stages == 1 && step + 1 < steps) {
            sync_block();
            begin(step + 1);
        }
    }
    copies_wait<0>();
    sync_block();
}

// What groups other than the first hand over: COUNT numbers of each thread, in shared memory that is free.
FARSPAN_DEVICE float* handed_over(char* shared, const Shape& shape, int group, int count) {
    const int warps = 2 * shape.chunks();
    const int warp = (group - 1) * warps + warp_index() % warps;
    return reinterpret_cast<float*>(shared) + static_cast<int64_t>(warp) * count * WARP + lane_index();
}

// Adds the sums of all groups into those of the first.
FARSPAN_DEVICE void gather_sums(char* shared, const Shape& shape, const Place& place, float (&sums)[CHUNK / 8][4]) {
    if (shape.groups == 1) return;
    if (place.group > 0) {
        float* to = handed_over(shared, shape, place.group, CHUNK / 2);
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) to[i * WARP] = sums[i / 4][i % 4];
    }
    sync_block();
    if (place.group == 0) {
        for (int group = 1; group < shape.groups; ++group) {
            const float* from = handed_over(shared, shape, group, CHUNK / 2);
#pragma unroll
            for (int i = 0; i < CHUNK / 2; ++i) sums[i / 4][i % 4] += from[i * WARP];
        }
    }
    sync_block();
}

}  // namespace mra
}  // namespace farspan
