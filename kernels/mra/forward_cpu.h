// The forward pass: of each matrix its means, its lists and the low-resolution part, then each row of blocks, which
// begins with the maximum, sum and values of that part and goes on through its list.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "call_cpu.h"

namespace farspan::mra {

struct Forward {
    const Call& call;
    void* y;
    float *maximum, *sums;  // [n · h, nb · BLOCK]
    int32_t *pointers, *columns;  // the lists are written there
    bool sparse;
    int64_t budget, first_blocks, diagonal_blocks;
    const Lists lists{pointers, columns, call.nb(), budget};
    // Of the low-resolution part, [n · h, nb, ·]:
    Array<float> rest_maximum{}, rest_sums{}, rest_values{};

    void coarse(int64_t matrix, Coarse& part, Room& room) {
        const Problem x = part.problem();
        const int64_t nb = part.means.nb, e = call.e;
        for (int64_t group = 0; group < part.means.groups; ++group) {
            part.leave_out_selected(lists, matrix, group);
            read_queries(x, group, room);
            room.maximum.fill(BLOCK, -INFINITE);
            room.sums.fill(BLOCK, 0.0F);
            room.y_t.fill(e * BLOCK, 0.0F);
            attend(x, nullptr, part.means.groups, part.left_out, room);
            const int64_t first = matrix * nb + group * BLOCK, number = std::min(BLOCK, nb - group * BLOCK);
            std::copy_n(room.maximum.data(), number, rest_maximum + first);
            std::copy_n(room.sums.data(), number, rest_sums + first);
            transpose(e, number, room.y_t, BLOCK, rest_values + first * e, e);
        }
    }

    void row(int64_t matrix, int64_t i, Room& room) {
        const Problem x = call.problem(matrix);
        const int64_t at = matrix * lists.nb + i, e = call.e;
        room.maximum.fill(BLOCK, sparse ? -INFINITE : rest_maximum[at]);
        room.sums.fill(BLOCK, sparse ? 0.0F : rest_sums[at]);
        for (int64_t c = 0; c < e; ++c) {
            std::fill_n(room.y_t + c * BLOCK, BLOCK, sparse ? 0.0F : rest_values[at * e + c]);
        }
        read_queries(x, i, room);
        if (x.q.count(i) != 0) attend(x, lists.row(matrix, i), lists.count(matrix, i), nullptr, room);
        for (int64_t t = 0; t < BLOCK; ++t) {
            if (room.maximum[t] == -INFINITE) room.maximum[t] = 0;
            room.sums[t] += static_cast<float>(EPSILON);
        }
        const Groups total = load_groups(room.sums);
        for (int64_t c = 0; c < e; ++c) {
            for (int g = 0; g < GROUPS; ++g) {
                float* value = room.y_t + c * BLOCK + g * LANES<float>;
                store(value, load(value) / total.of[g]);
            }
        }
        transpose(e, BLOCK, room.y_t, BLOCK, room.of_y, room.wide_e);
        write(call.output(y, matrix, e), i, room.of_y, room.wide_e);
        std::copy_n(room.maximum.data(), BLOCK, maximum + at * BLOCK);
        std::copy_n(room.sums.data(), BLOCK, sums + at * BLOCK);
    }

    struct Work {
        Coarse part;
        Room room;
        Work(const Call& call) : part(call.nb(), call.d, call.e, true), room(call.d, call.e) {}
    };

    void prepare(int64_t matrix, Work& work) {
        const int64_t nb = lists.nb;
        work.part.means.compute(call.problem(matrix), true);
        work.part.means.select(
            budget, first_blocks, diagonal_blocks, pointers + matrix * (nb + 1), columns + matrix * budget);
        if (!sparse) coarse(matrix, work.part, work.room);
    }

    void run() {
        const int64_t nb = lists.nb, m = call.matrices();
        if (!sparse) {
            rest_maximum = Array<float>(m * nb);
            rest_sums = Array<float>(m * nb);
            rest_values = Array<float>(m * nb * call.e);
        }
        const bool by_matrix = call.by_matrix();
        const auto make = [&] { return std::make_unique<Work>(call); };
        for_each(call.threads, m, make, [&](int64_t matrix, Work& work) {
            prepare(matrix, work);
            for (int64_t i = 0; by_matrix && i < nb; ++i) row(matrix, i, work.room);
        });
        if (by_matrix) return;
        const auto make_room = [&] { return std::make_unique<Room>(call.d, call.e); };
        for_each(call.threads, m * nb, make_room, [&](int64_t at, Room& room) { row(at / nb, at % nb, room); });
    }
};

}  // namespace farspan::mra
