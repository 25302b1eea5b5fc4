// Gradients of x and of the coefficients from x and those of y, both in shared memory, a warp a feature.
//
// The gradient of x is y's run through the transposed matrices (the adjoint).  With V_c what gradients of chunk c send to
// the state before it, S_c that state, and W_c what is sent to the state after it by the chunks after, those of the
// coefficients a (inject), c (project) and log q of a hidden dimension need only, with R[l] = Σ ∂y_i x_{i−l} in chunks,
//   Σ q^l R[l] + Σ_c V_c S_c    and    Σ l q^l R[l] + Σ_c (V'_c S_c + W_c U'_c + 64 q^64 W_c S_c),
// a prime being the derivative by log q: two more products like U = A X.  R are the diagonals of ∂Y Xᵀ over all chunks,
// which blocks of 8×8 on a diagonal add up in the same registers.
//
// What bounds it (as in convolve.cuh): 201 MB take 47 µs, 352 multiplications an element 41 µs.  128 KiB of both slabs hold
// 8 features, 16 bytes of a sector of 32, so the second cache moves 400 MB: 75 to 95 µs are
// expected, and not measured yet.
#pragma once

#include "convolve.cuh"

namespace farspan {
namespace ema {

enum Sum : int { OF_PROJECT, OF_INJECT, OF_LOG_Q, SUMS };
constexpr int TILE = 16 * 9;  // of ∂Y Xᵀ, with a stride against bank conflicts
constexpr int GRADIENT_SCRATCH = Table::SIZE + 2 * LINE + TILE + SUMS * STATES;

template <class T>
int gradient_bytes(int tiles) {
    constexpr int F = Form<T>::GRADIENT_FEATURES;
    return 2 * Slab<Form<T>::PIECES, F>::bytes(tiles) + 16 * tiles * static_cast<int>(sizeof(Chunk)) +
           Form<T>::GRADIENT_WARPS * GRADIENT_SCRATCH * 4;
}

// Of a tile: sums += s · u, over a lane's chunks.
FARSPAN_DEVICE void dot(float (&sums)[2][2], const float (&s)[2][4], const float (&u)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[half][i % 2] = fmaf(s[half][i], u[half][i], sums[half][i % 2]);
    }
}

template <int TILES>
FARSPAN_DEVICE void dot_all(float (&sums)[2][2], const States<TILES>& s, const States<TILES>& u) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) dot(sums, s[j], u[j]);
}

// values times (their state's number in the table times `by`, plus `more`).
FARSPAN_DEVICE void times(float (&values)[2][2], Table table, int direction, int column, float more, float by) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            values[half][i] *= fmaf(by, table.get(direction, 8 * half + 2 * (lane_index() % 4) + i, column), more);
        }
    }
}

// Over the lanes with the same hidden dimensions, to shared memory.
FARSPAN_DEVICE void add_up(const float (&values)[2][2], float* to) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = values[half][i];
#pragma unroll
            for (int mask = 4; mask < WARP; mask *= 2) sum += shuffle_xor(sum, mask);
            if (lane_index() < 4) to[8 * half + 2 * lane_index() + i] = sum;
        }
    }
}

// sums += Σ over a lane's chunks of s · (chunks · powers derived by log q, or as they are), for its hidden dimensions.
template <int TILES, int PIECES, int F>
FARSPAN_DEVICE void dot_states(
    float (&sums)[2][2], const States<TILES>& s, const Slab<PIECES, F>& slab, int f, const ToStates& powers, bool derived
) {
    sync_warp();  // or the compiler would load for several calls at once, and run out of registers
    uint32_t b[POSITIONS / 16][2][PIECES][2];
#pragma unroll
    for (int k = 0; k < POSITIONS / 16; ++k) {
        powers.fragment(k, 0, derived, b[k][0]);
        powers.fragment(k, 1, derived, b[k][1]);
    }
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (j >= slab.tiles) break;
        float u[2][4] = {};
#pragma unroll
        for (int k = 0; k < POSITIONS / 16; ++k) {
            uint32_t a[PIECES][4];
            slab.chunks_by_positions(f, j, k, a);
            multiply(u[0], a, b[k][0]);
            multiply(u[1], a, b[k][1]);
        }
        dot(sums, s[j], u);
    }
}

// correlation[lag + 63] = Σ ∂y_i x_{i−lag} over the chunks, lags −63 to 63 (of one direction: from −8 on).
template <int PIECES, int F>
FARSPAN_DEVICE void correlate(
    const Slab<PIECES, F>& of_y, const Slab<PIECES, F>& x, int f, bool causal, float* tile, float* correlation
) {
    float sums[14][4];  // of block rows 2 i and columns c: [2 i − c + 7]
#pragma unroll
    for (int i = 0; i < 14; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
#pragma unroll 1
    for (int j = 0; j < x.tiles; ++j) {
        uint32_t a[POSITIONS / 16][PIECES][4];
#pragma unroll
        for (int i = 0; i < POSITIONS / 16; ++i) of_y.positions_by_chunks(f, i, j, a[i]);
#pragma unroll
        for (int c = 0; c < POSITIONS / 16; ++c) {
            uint32_t b[2][PIECES][2];
            x.chunks_to_positions(f, c, j, b);
#pragma unroll
            for (int i = 0; i < POSITIONS / 16; ++i) {
                if (causal && i < c) continue;
                multiply(sums[2 * i - 2 * c + 7], a[i], b[0]);
                multiply(sums[2 * i - 2 * c + 6], a[i], b[1]);
            }
        }
    }
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = lane_index(); i < LINE; i += WARP) correlation[i] = 0.0f;
#pragma unroll
    for (int block = 0; block < 14; ++block) {
        tile[9 * g + 2 * t] = sums[block][0], tile[9 * g + 2 * t + 1] = sums[block][1];
        tile[9 * (g + 8) + 2 * t] = sums[block][2], tile[9 * (g + 8) + 2 * t + 1] = sums[block][3];
        sync_warp();
        const int diagonal = lane_index() - 7;  // row − column, up to 15
        if (diagonal < 16) {
            float sum = 0.0f;
#pragma unroll
            for (int column = 0; column < 8; ++column) {
                const int row = column + diagonal;
                if (row >= 0 && row < 16) sum += tile[9 * row + column];
            }
            correlation[8 * (block - 7) + diagonal + 63] += sum;
        }
        sync_warp();
    }
}

// The sums of a feature to `partial`: lane l has state l.
FARSPAN_DEVICE void finish_feature(
    const Problem& problem, Table table, const float* correlation, const float* sums, int64_t segment, int64_t feature,
    float* partial, int64_t segments
) {
    sync_warp();
    const Parameters& of = problem.parameters;
    const int k = lane_index() / HIDDEN, n = lane_index() % HIDDEN;
    float powers[8], whole = 0.0f, derived = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) powers[i] = table.get(k, n, Table::POWER + i);
    for (int unit = 0; unit < UNITS; ++unit) {
        float sum = 0.0f, by_lag = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int lag = 8 * unit + i;
            const float value = powers[i] * correlation[k ? 63 - lag : 63 + lag];
            sum += value;
            by_lag = fmaf(static_cast<float>(lag), value, by_lag);
        }
        const float power = table.get(k, n, Table::POWER_OF_8 + unit);
        whole = fmaf(power, sum, whole);
        derived = fmaf(power, by_lag, derived);
    }
    if (k >= of.directions || n >= of.n) return;
    const float inject = table.get(k, n, Table::INJECT), project = table.get(k, n, Table::PROJECT);
    float of_project = sums[OF_PROJECT * STATES + lane_index()], of_inject = sums[OF_INJECT * STATES + lane_index()];
    float of_log_q = sums[OF_LOG_Q * STATES + lane_index()];
    if (problem.normalised) {
        of_project = fmaf(inject, whole, of_project);
        of_inject = fmaf(project, whole, of_inject);
        of_log_q = fmaf(inject * project, derived, of_log_q);
    } else {
        const float all = whole + of_project;
        of_project = inject * all;
        of_inject = project * all;
        of_log_q = inject * project * (derived + of_log_q);
    }
    const int64_t size = segments * of.directions * of.d * of.n;
    float* to = partial + ((segment * of.directions + k) * of.d + feature) * of.n + n;
    to[OF_PROJECT * size] = of_project, to[OF_INJECT * size] = of_inject, to[OF_LOG_Q * size] = of_log_q;
}

// partial: [SUMS, segments, directions, d, n]; of_start: what is sent to the states before segments, may be null.
template <class T>
__global__ __launch_bounds__(Form<T>::GRADIENT_WARPS * WARP, 1) void differentiate(
    Problem problem, const T* x, const T* of_y, T* of_x, const float* entering, const float* of_y_entering, float* of_start,
    float* partial, int64_t segments
) {
    constexpr int F = Form<T>::GRADIENT_FEATURES, PIECES = Form<T>::PIECES, TILES = Form<T>::TILES;
    using Both = Slab<PIECES, F>;
    char* memory = shared_memory();
    const Both slab{memory, problem.tiles}, of_slab{memory + slab.bytes(problem.tiles), problem.tiles};
    memory += 2 * slab.bytes(problem.tiles);
    int64_t index;
    const Segment segment = segment_of_block<F>(problem, memory, index);
    memory += 16 * problem.tiles * sizeof(Chunk);
    float* numbers = reinterpret_cast<float*>(memory) + warp_index() * GRADIENT_SCRATCH;
    const Table table{numbers};
    float *line = numbers + Table::SIZE, *correlation = line + LINE, *tile = correlation + LINE, *sums = tile + TILE;

    slab.fill(segment, x);
    of_slab.fill(segment, of_y);
    sync_block();
    const LaneChunks lane(segment);
    const int directions = problem.parameters.directions;
    for (int f = warp_index(); f < F && segment.feature + f < segment.d; f += Form<T>::GRADIENT_WARPS) {
        const int64_t feature = segment.feature + f;
        sync_warp();
        table.fill(problem.parameters, feature, problem.tiles);
        table.kernel(line);
        correlate(of_slab, slab, f, directions == 1, tile, correlation);
        Outgoing<TILES, PIECES> states;
        states.clear();
#pragma unroll 1  // one after the other in time: together they would not fit into registers
        for (int k = 0; k < directions; ++k) {
            const ToStates to_s(table, k, k == 0, false), to_w(table, k, k == 1, true);
            float before[2][2], after[2][2];
            States<TILES> s, w;
            clear<TILES>(s);
            add_states<TILES>(s, slab, f, to_s);
            if (problem.normalised) weigh<TILES>(s, table, k, Table::INJECT);
            read_states(entering, problem.parameters, index, k, feature, before);
            if (k == 0) {
                scan<TILES, false>(s, lane, table, k, before, after);
            } else {
                scan<TILES, true>(s, lane, table, k, before, after);
            }

            clear<TILES>(w);
            add_states<TILES>(w, of_slab, f, to_w);
            float of_project[2][2] = {};
            dot_all<TILES>(of_project, w, s);
            add_up(of_project, sums + OF_PROJECT * STATES + k * HIDDEN);
            if (problem.normalised) weigh<TILES>(w, table, k, Table::PROJECT);
            read_states(of_y_entering, problem.parameters, index, k, feature, before);
            if (k == 0) {
                scan<TILES, true>(w, lane, table, k, before, after);
            } else {
                scan<TILES, false>(w, lane, table, k, before, after);
            }
            write_states(of_start, problem.parameters, index, k, feature, after);

            float of_log_q[2][2] = {}, of_w[2][2] = {}, of_s[2][2] = {};
            dot_all<TILES>(of_log_q, w, s);
            times(of_log_q, table, k, Table::CHANGE, POSITIONS, POSITIONS);
            dot_states<TILES>(of_w, w, slab, f, to_s, true);
            if (problem.normalised) times(of_w, table, k, Table::INJECT, 0.0f, 1.0f);
            dot_states<TILES>(of_s, s, of_slab, f, to_w, true);
            if (problem.normalised) times(of_s, table, k, Table::PROJECT, 0.0f, 1.0f);
#pragma unroll
            for (int i = 0; i < 4; ++i) of_log_q[i / 2][i % 2] += of_w[i / 2][i % 2] + of_s[i / 2][i % 2];
            add_up(of_log_q, sums + OF_LOG_Q * STATES + k * HIDDEN);
            float of_inject[2][2] = {};
            if (problem.normalised) dot_states<TILES>(of_inject, w, slab, f, to_s, false);
            add_up(of_inject, sums + OF_INJECT * STATES + k * HIDDEN);
            weigh_outgoing<TILES>(problem, true, w, table, k);
            states.keep(w, k);
        }
        finish_feature(problem, table, correlation, sums, index, feature, partial, segments);
        if (of_x != nullptr) replace<2>(problem, true, of_slab, f, table, line, states);
    }
    if (of_x == nullptr) return;
    sync_block();
    of_slab.empty(segment, of_x);
}

// The sums over segments, and from the coefficients to the parameters; a thread a state.
__global__ __launch_bounds__(128) void to_parameters(
    Parameters of, int segments, const float* partial, float* of_damping, float* of_decay, float* of_expansion,
    float* of_projection
) {
    const int64_t states = of.directions * of.d * of.n, at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= states) return;
    float sums[SUMS] = {};
    for (int64_t segment = 0; segment < segments; ++segment) {
#pragma unroll
        for (int sum = 0; sum < SUMS; ++sum) sums[sum] += partial[(sum * segments + segment) * states + at];
    }
    const Coefficients c = coefficients(of, at);
    const float of_loss = c.saturated ? 0.0f : -sums[OF_LOG_Q] / (1.0f - c.loss), decay = sigmoid(of.decay[at]);
    of_expansion[at] = sums[OF_INJECT] * c.p;
    of_projection[at] = sums[OF_PROJECT] * of.scale;
    of_damping[at] = (sums[OF_INJECT] * of.expansion[at] + of_loss * decay) * c.p * sigmoid(-of.damping[at]);
    of_decay[at] = of_loss * c.p * decay * sigmoid(-of.decay[at]);
}

}  // namespace ema
}  // namespace farspan
