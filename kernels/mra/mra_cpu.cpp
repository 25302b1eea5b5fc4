// MRA-2 attention on a CPU: as blocks.py, without a tensor between the steps.
//
// What bounds it: the products, 131,072 floating-point operations each for a selected block at 64 features, two forward
// and five backward; then reading the tensors, several times each.  The low-resolution part is attention too, of blocks'
// means in groups of 32 that leave out what is selected.  How many threads there are changes no bit.
#include <cstdint>
#include <new>

#include "backward_cpu.h"
#include "cpu.h"
#include "forward_cpu.h"

namespace farspan::mra {

constexpr int NO_MEMORY = 2;

Call call_of(const void* q, const void* k, const void* v, const void* mask, const int64_t* strides,
             const int64_t* sizes, int dtype, int threads) {
    const auto tensor = [&](const void* data, int i) {
        return Tensor{data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    };
    return {tensor(q, 0), tensor(k, 1), tensor(v, 2), static_cast<const uint8_t*>(mask),
            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], dtype, std::max(threads, 1)};
}

template <class F>
int guarded(int dtype, const F& f) {
    if (dtype != FLOAT32 && dtype != BFLOAT16) return INVALID;
    try {
        f();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    return 0;
}

}  // namespace farspan::mra

using namespace farspan::mra;

// sizes: n, h, l, d, e.  strides: of q, k, v (backward: and of_y), three each; results lie without gaps.  mask: [n, l]
// bytes, or null.  maximum, sums: [n · h, nb · 32] float32.  pointers: [n · h, nb + 1] and columns: [n · h, budget]
// int32, budget at most nb².
// clang-format off
FARSPAN_EXPORT int mra_forward(const void* q, const void* k, const void* v, const void* mask, const void* sizes, const void* strides, void* y, void* maximum, void* sums, void* pointers, void* columns, int64_t budget, int sparse, int64_t first_blocks, int64_t diagonal_blocks, int dtype, int threads) {
    // clang-format on
    return guarded(dtype, [&] {
        const Call call = call_of(q, k, v, mask, static_cast<const int64_t*>(strides),
                                  static_cast<const int64_t*>(sizes), dtype, threads);
        Forward pass{call, y, static_cast<float*>(maximum), static_cast<float*>(sums), static_cast<int32_t*>(pointers),
                     static_cast<int32_t*>(columns), sparse != 0, budget, first_blocks, diagonal_blocks};
        pass.run();
    });
}

// of_q, of_k, of_v: null where not asked for.
// clang-format off
FARSPAN_EXPORT int mra_backward(const void* q, const void* k, const void* v, const void* mask, const void* sizes, const void* strides, const void* y, const void* maximum, const void* sums, const void* pointers, const void* columns, const void* of_y, void* of_q, void* of_k, void* of_v, int64_t budget, int sparse, int dtype, int threads) {
    // clang-format on
    return guarded(dtype, [&] {
        const int64_t* const all = static_cast<const int64_t*>(strides);
        const Call call = call_of(q, k, v, mask, all, static_cast<const int64_t*>(sizes), dtype, threads);
        const Lists lists{
            static_cast<const int32_t*>(pointers), static_cast<const int32_t*>(columns), call.nb(), budget};
        Backward pass{call, lists, y, static_cast<const float*>(maximum), static_cast<const float*>(sums),
                      {of_y, all[9], all[10], all[11]}, of_q, of_k, of_v, sparse != 0};
        pass.run();
    });
}
