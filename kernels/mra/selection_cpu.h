// Block means and the blocks that are attended exactly, in float64: as selection.py, in which the reasons stand.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "attention_cpu.h"

namespace farspan::mra {

constexpr double EPSILON = 1e-6, EMPTY = 1e4, PRIOR = 5e3;  // those of selection.py

// What a thread needs for the means of one matrix, and to select its blocks.
struct Means {
    int64_t nb, d, e, wide_nb, groups;
    Array<double> of_q, of_k_t, sums, logits, sorted;  // [nb, d], [d, wide nb], [max(d, e)], [nb, wide nb], [nb · nb]
    // With zeros up to a whole number of groups of 32 blocks:
    Array<float> q, k, v, counts;  // [·, d], [·, d], [·, e], [·]
    Array<float> copy;             // of a block of tokens

    Means(int64_t nb, int64_t d, int64_t e, bool selects)
        : nb(nb), d(d), e(e), wide_nb(whole_vectors<double>(nb)), groups((nb + BLOCK - 1) / BLOCK),
          of_q(selects ? nb * d : 0), of_k_t(selects ? d * wide_nb : 0), sums(std::max(d, e)),
          logits(selects ? nb * wide_nb : 0), sorted(selects ? nb * nb : 0), q(groups * BLOCK * d),
          k(groups * BLOCK * d), v(groups * BLOCK * e), counts(groups * BLOCK), copy(BLOCK * std::max(d, e)) {}

    void compute(const Problem& x, bool selects) {
        q.fill(groups * BLOCK * d, 0.0F);
        k.fill(groups * BLOCK * d, 0.0F);
        v.fill(groups * BLOCK * e, 0.0F);
        counts.fill(groups * BLOCK, 0.0F);
        if (selects) of_k_t.fill(d * wide_nb, 0.0);
        for (int64_t i = 0; i < nb; ++i) {
            const int64_t real = x.q.count(i);
            counts[i] = static_cast<float>(real);
            mean(x.q, i, real, q + i * d);
            if (selects) std::copy_n(sums.data(), d, of_q + i * d);
            mean(x.k, i, real, k + i * d);
            if (selects) {
                for (int64_t c = 0; c < d; ++c) of_k_t[c * wide_nb + i] = sums[c];
            }
            mean(x.v, i, real, v + i * e);
        }
    }

    // pointers: [nb + 1]; columns: [budget], ascending in each row.  After ``compute``.
    void select(int64_t budget, int64_t first_blocks, int64_t diagonal_blocks, int32_t* pointers, int32_t* columns) {
        product<double, false, false>(nb, wide_nb, d, of_q, d, of_k_t, wide_nb, logits, wide_nb);
        for (int64_t i = 0; i < nb; ++i) score(i, first_blocks, diagonal_blocks);
        double lowest = -std::numeric_limits<double>::infinity();
        int64_t equal = budget;  // of the lowest score are selected, those that come first
        if (budget < nb * nb) {
            std::nth_element(sorted + 0, sorted + (budget - 1), sorted + nb * nb, std::greater<double>());
            lowest = sorted[budget - 1];
            for (int64_t at = 0; at < budget; ++at) equal -= sorted[at] > lowest;
        }
        int64_t number = 0;
        for (int64_t i = 0; i < nb; ++i) {
            pointers[i] = static_cast<int32_t>(number);
            for (int64_t j = 0; j < nb; ++j) {
                const double s = logits[i * wide_nb + j];
                if (s > lowest || (s == lowest && equal > 0)) {
                    equal -= s == lowest;
                    columns[number++] = static_cast<int32_t>(j);
                }
            }
        }
        pointers[nb] = static_cast<int32_t>(number);
    }

  private:
    // Into ``sums``, and rounded.
    void mean(const Rows& x, int64_t block, int64_t real, float* to) {
        double* const sum = sums;
        std::fill_n(sum, x.width, 0.0);
        read(x, block, copy, x.width);
        const float* row = copy;
        for (int64_t t = 0; t < BLOCK; ++t, row += x.width) {
            for (int64_t c = 0; c < x.width; ++c) sum[c] += static_cast<double>(row[c]);
        }
        for (int64_t c = 0; c < x.width; ++c) {
            sum[c] /= static_cast<double>(real) + EPSILON;
            to[c] = static_cast<float>(sum[c]);
        }
    }

    // A row's logits become scores; ``sorted`` gets a copy.
    void score(int64_t i, int64_t first_blocks, int64_t diagonal_blocks) {
        constexpr double LOWEST = -std::numeric_limits<double>::infinity();
        double* const row = logits + i * wide_nb;
        double highest = LOWEST;
        bool broken = false;
        for (int64_t j = 0; j < nb; ++j) {
            highest = std::max(highest, row[j]);
            broken |= row[j] != row[j];
        }
        for (int64_t j = 0; j < nb; ++j) {
            double s = row[j] - highest;
            if (counts[i] == 0 || counts[j] == 0) s -= EMPTY;
            if (diagonal_blocks != 0 && std::abs(i - j) <= diagonal_blocks / 2) s += PRIOR;
            if (i < first_blocks) s += PRIOR;
            if (j < first_blocks) s += PRIOR;
            row[j] = broken || s != s ? LOWEST : s;
            sorted[i * nb + j] = row[j];
        }
    }
};

}  // namespace farspan::mra
