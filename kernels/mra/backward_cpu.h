// The backward pass, with the weights computed again from their maximum and sum: the low-resolution part of each matrix,
// then its lists.  Where one thread has a whole matrix, rows alone: five products for each selected block, and the
// gradients of keys are summed as the rows come.  Else rows and columns apart: seven.  Both are the same chains of
// additions, so the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "call_cpu.h"

namespace farspan::mra {

// Gradients of all keys of a matrix, or of one block.
struct Totals {
    Array<float> k, v;
    Totals(int64_t blocks, const Room& room) : k(blocks * BLOCK * room.wide_d), v(blocks * BLOCK * room.wide_e) {}

    void zero(int64_t blocks, const Room& room) {
        k.fill(blocks * BLOCK * room.wide_d, 0);
        v.fill(blocks * BLOCK * room.wide_e, 0);
    }
};

struct Backward {
    const Call& call;
    const Lists lists;
    const void* y;
    const float *maximum, *sums;
    Tensor of_y;
    void *of_q, *of_k, *of_v;  // null: not asked for
    bool sparse;
    // δ = dY · Y [n · h, nb · BLOCK], and what each token has of its block's mean, [n · h, nb, ·].
    Array<float> delta{}, of_q_mean{}, of_k_mean{}, of_v_mean{};
    // The lists by column: rows, ascending.
    Array<int32_t> starts{}, rows{};

    // of_y of a block, divided by the sums.
    void read_upstream(int64_t matrix, int64_t i, Room& room) {
        read(call.rows(of_y, matrix, call.e), i, room.of_y, room.wide_e);
        const float* sum = sums + (matrix * lists.nb + i) * BLOCK;
        for (int64_t t = 0; t < BLOCK; ++t) {
            float* row = room.of_y + t * room.wide_e;
            const float inverse = 1 / sum[t];
            for (int64_t c = 0; c < room.e; ++c) row[c] *= inverse;
        }
    }

    void read_row(int64_t matrix, int64_t i, Room& room) {
        read_queries(call.problem(matrix), i, room);
        read_upstream(matrix, i, room);
        transpose(BLOCK, room.e, room.of_y, room.wide_e, room.of_y_t, BLOCK);
        const int64_t at = (matrix * lists.nb + i) * BLOCK;
        std::copy_n(maximum + at, BLOCK, room.maximum.data());
        std::copy_n(delta + at, BLOCK, room.delta.data());
    }

    // δ of a matrix, and for the low-resolution part of each row the gradient of its values (in ``values``), its δ and
    // an exponent that is none too high: the least maximum of its queries.
    void sum_queries(int64_t matrix, Room& room, float* values, float* of_delta, float* exponents) {
        const Rows result{static_cast<const char*>(y) + matrix * call.l * call.e * (call.dtype == FLOAT32 ? 4 : 2),
                          call.dtype, call.e, call.e, call.l, call.real(matrix), 1};
        for (int64_t i = 0; i < lists.nb; ++i) {
            const int64_t at = (matrix * lists.nb + i) * BLOCK;
            read_upstream(matrix, i, room);
            read(result, i, room.v, room.wide_e);
            float least = INFINITE;
            for (int64_t t = 0; t < BLOCK; ++t) {
                const float *a = room.of_y + t * room.wide_e, *b = room.v + t * room.wide_e;
                Vector<float> sum = {};
                for (int64_t c = 0; c < room.wide_e; c += LANES<float>) sum += load(a + c) * load(b + c);
                float total = 0;
                for (int lane = 0; lane < LANES<float>; ++lane) total += sum[lane];
                delta[at + t] = total;
                if (!result.padding(i * BLOCK + t)) least = std::min(least, maximum[at + t]);
            }
            if (values == nullptr) continue;
            exponents[i] = least == INFINITE ? 0 : least;
            for (int64_t t = 0; t < BLOCK; ++t) {
                if (result.padding(i * BLOCK + t)) continue;
                const float share = std::exp(exponents[i] - maximum[at + t]);
                of_delta[i] += share * delta[at + t];
                for (int64_t c = 0; c < room.e; ++c) values[i * room.e + c] += share * room.of_y[t * room.wide_e + c];
            }
        }
    }

    // What a thread works with; a part only where there is a low resolution to be differentiated.
    struct CoarseWork {
        Coarse part;
        Totals totals;
        Array<float> values, of_delta, exponents;
        CoarseWork(const Call& call, const Room& room)
            : part(call.nb(), call.d, call.e, false), totals(part.means.groups, room), values(part.padded() * call.e),
              of_delta(part.padded()), exponents(part.padded()) {}
    };
    struct Work {
        Room room;
        Totals totals;
        std::unique_ptr<CoarseWork> coarse;
        Work(const Call& call, int64_t blocks, bool has_coarse) : room(call.d, call.e), totals(blocks, room) {
            if (has_coarse) coarse = std::make_unique<CoarseWork>(call, room);
        }
    };

    void coarse(int64_t matrix, CoarseWork& work, Room& room) {
        Coarse& part = work.part;
        const int64_t nb = lists.nb, padded = part.padded();
        part.means.compute(call.problem(matrix), false);
        work.values.fill(padded * call.e, 0);
        work.of_delta.fill(padded, 0);
        work.exponents.fill(padded, 0);
        sum_queries(matrix, room, work.values, work.of_delta, work.exponents);
        const Problem x = part.problem();
        const Rows upstream = plain(work.values, call.e, padded);
        work.totals.zero(part.means.groups, room);
        for (int64_t group = 0; group < part.means.groups; ++group) {
            part.leave_out_selected(lists, matrix, group);
            read_queries(x, group, room);
            read(upstream, group, room.of_y, room.wide_e);
            transpose(BLOCK, room.e, room.of_y, room.wide_e, room.of_y_t, BLOCK);
            std::copy_n(work.exponents + group * BLOCK, BLOCK, room.maximum.data());
            std::copy_n(work.of_delta + group * BLOCK, BLOCK, room.delta.data());
            row(x, nullptr, part.means.groups, part.left_out, true, &work.totals, room);
            for (int64_t i = group * BLOCK; i < std::min((group + 1) * BLOCK, nb); ++i) {
                const float size = part.means.counts[i] + static_cast<float>(EPSILON);
                for (int64_t c = 0; c < room.d; ++c) {
                    of_q_mean[(matrix * nb + i) * room.d + c] = room.of_q_t[c * BLOCK + i % BLOCK] / size;
                }
            }
        }
        for (int64_t j = 0; j < nb; ++j) {
            const float size = part.means.counts[j] + static_cast<float>(EPSILON);
            const float *k = work.totals.k + j * room.wide_d, *v = work.totals.v + j * room.wide_e;
            for (int64_t c = 0; c < room.d; ++c) of_k_mean[(matrix * nb + j) * room.d + c] = k[c] / size;
            for (int64_t c = 0; c < room.e; ++c) of_v_mean[(matrix * nb + j) * room.e + c] = v[c] / size;
        }
    }

    // A block of queries, read before, against blocks of keys: to room.of_q_t where ``queries``, and to ``totals``.
    void row(const Problem& x, const int32_t* columns, int64_t number, const uint32_t* left_out, bool queries,
             Totals* totals, Room& room) {
        if (queries) room.of_q_t.fill(room.d * BLOCK, 0.0F);
        for (int64_t at = 0; at < number; ++at) {
            const int64_t j = columns == nullptr ? at : columns[at];
            const Gradients to{
                queries ? room.of_q_t.data() : nullptr,
                totals != nullptr && of_k != nullptr ? totals->k + j * BLOCK * room.wide_d : nullptr,
                totals != nullptr && of_v != nullptr ? totals->v + j * BLOCK * room.wide_e : nullptr,
            };
            differentiate(x, j, left_out, to, room);
        }
    }

    void fine_row(int64_t matrix, int64_t i, bool queries, Totals* totals, Room& room) {
        const Problem x = call.problem(matrix);
        const bool empty = x.q.count(i) == 0;
        if (!empty) read_row(matrix, i, room);
        row(x, lists.row(matrix, i), empty ? 0 : lists.count(matrix, i), nullptr, queries, totals, room);
        if (!queries) return;
        transpose(room.d, BLOCK, room.of_q_t, BLOCK, room.q, room.wide_d);
        const float* more = sparse ? nullptr : of_q_mean + (matrix * lists.nb + i) * room.d;
        write(call.output(of_q, matrix, room.d), i, room.q, room.wide_d, more, call.scale());
    }

    void write_keys(int64_t matrix, int64_t j, const float* k, const float* v, const Room& room) {
        const int64_t at = matrix * lists.nb + j;
        if (of_k != nullptr) {
            write(call.output(of_k, matrix, room.d), j, k, room.wide_d, sparse ? nullptr : of_k_mean + at * room.d);
        }
        if (of_v != nullptr) {
            write(call.output(of_v, matrix, room.e), j, v, room.wide_e, sparse ? nullptr : of_v_mean + at * room.e);
        }
    }

    void list_columns(int64_t matrix) {
        const int64_t nb = lists.nb;
        int32_t *const start = starts + matrix * (nb + 1), *const row = rows + matrix * lists.budget;
        const int32_t* columns = lists.row(matrix, 0);
        std::fill_n(start, nb + 1, 0);
        for (int64_t at = 0; at < lists.budget; ++at) ++start[columns[at] + 1];
        for (int64_t j = 0; j < nb; ++j) start[j + 1] += start[j];
        for (int64_t i = 0; i < nb; ++i) {
            const int32_t here = static_cast<int32_t>(i);
            for (int64_t left = lists.count(matrix, i); left > 0; --left) row[start[*columns++]++] = here;
        }
        for (int64_t j = nb; j > 0; --j) start[j] = start[j - 1];  // each is where the next began
        start[0] = 0;
    }

    void column(int64_t matrix, int64_t j, Totals& totals, Room& room) {
        const Problem x = call.problem(matrix);
        totals.zero(1, room);
        const int32_t *const start = starts + matrix * (lists.nb + 1) + j, *const row = rows + matrix * lists.budget;
        const Gradients to{
            nullptr, of_k == nullptr ? nullptr : totals.k.data(), of_v == nullptr ? nullptr : totals.v.data()};
        for (int64_t at = start[0]; at < start[1]; ++at) {
            if (x.q.count(row[at]) == 0) continue;
            read_row(matrix, row[at], room);
            differentiate(x, j, nullptr, to, room);
        }
        write_keys(matrix, j, totals.k, totals.v, room);
    }

    void prepare(int64_t matrix, Work& work) {
        if (sparse) {
            sum_queries(matrix, work.room, nullptr, nullptr, nullptr);
        } else {
            coarse(matrix, *work.coarse, work.room);
        }
    }

    void whole_matrix(int64_t matrix, Work& work) {
        const int64_t nb = lists.nb;
        prepare(matrix, work);
        work.totals.zero(nb, work.room);
        for (int64_t i = 0; i < nb; ++i) fine_row(matrix, i, of_q != nullptr, &work.totals, work.room);
        for (int64_t j = 0; j < nb; ++j) {
            const float *k = work.totals.k + j * BLOCK * work.room.wide_d,
                        *v = work.totals.v + j * BLOCK * work.room.wide_e;
            write_keys(matrix, j, k, v, work.room);
        }
    }

    void run() {
        const int64_t m = call.matrices(), nb = lists.nb;
        const bool keys = of_k != nullptr || of_v != nullptr;
        delta = Array<float>(m * nb * BLOCK);
        if (!sparse) {
            of_q_mean = Array<float>(m * nb * call.d);
            of_k_mean = Array<float>(m * nb * call.d);
            of_v_mean = Array<float>(m * nb * call.e);
        }
        if (keys && call.by_matrix()) {
            const auto make = [&] { return std::make_unique<Work>(call, nb, !sparse); };
            return for_each(call.threads, m, make, [&](int64_t matrix, Work& work) { whole_matrix(matrix, work); });
        }
        if (keys) {
            starts = Array<int32_t>(m * (nb + 1));
            rows = Array<int32_t>(m * lists.budget);
        }
        const auto make = [&] { return std::make_unique<Work>(call, 0, !sparse); };
        for_each(call.threads, m, make, [&](int64_t matrix, Work& work) {
            prepare(matrix, work);
            if (keys) list_columns(matrix);
        });
        const auto make_small = [&] { return std::make_unique<Work>(call, 1, false); };
        for_each(call.threads, m * nb, make_small, [&](int64_t at, Work& work) {
            if (of_q != nullptr) fine_row(at / nb, at % nb, true, nullptr, work.room);
            if (keys) column(at / nb, at % nb, work.totals, work.room);
        });
    }
};

}  // namespace farspan::mra
