"""The emulator that runs device sources on a CPU: it computes what a GPU would, and shows what a GPU would punish."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from farspan.kernels import forms

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
CPU = torch.device("cpu")

SOURCE = """
#include "mma.h"
using namespace farspan;

__global__ void collectives(const float* x, float* y) {
    float v = x[threadIdx.x];
    float* out = y + 8 * threadIdx.x;
    out[0] = shuffle(v, 3);
    out[1] = shuffle_xor(v, 5);
    out[2] = shuffle_up(v, 2);
    out[3] = shuffle_down(v, 2);
    out[4] = warp_sum(v);
    out[5] = warp_max(v);
    out[6] = static_cast<float>(__popc(ballot(v > 0)));
    out[7] = static_cast<float>(warp_index() * 1000 + lane_index());
}
FARSPAN_EXPORT int run_collectives(const void* x, void* y, int threads, void* stream) {
    return launch(collectives, dim3(1), dim3(threads), 0, stream, static_cast<const float*>(x), static_cast<float*>(y));
}

// D = A B, A [16, 16] and B [16, 8] row by row; the fragments by ldmatrix, as programs for tensor cores have it.
template <class T>
__global__ void product(const T* a, const T* b, float* d) {
    T* in_shared = reinterpret_cast<T*>(shared_memory());
    for (int i = lane_index(); i < 256; i += 32) in_shared[i] = a[i];
    for (int i = lane_index(); i < 128; i += 32) in_shared[256 + i] = b[i];
    sync_warp();
    uint32_t of_a[4], of_b[4];
    load_matrices(of_a, in_shared + (lane_index() % 16) * 16 + 8 * (lane_index() / 16));
    load_matrices_transposed(of_b, in_shared + 256 + (lane_index() % 16) * 8);
    float sum[4] = {0, 0, 0, 0};
    uint32_t both[2] = {of_b[0], of_b[1]};
    mma_16x8x16<T>(sum, of_a, both);
    for (int i = 0; i < 4; ++i) d[(lane_index() / 4 + 8 * (i / 2)) * 8 + 2 * (lane_index() % 4) + i % 2] = sum[i];
}
FARSPAN_EXPORT int run_product(const void* a, const void* b, void* d, int dtype, void* stream) {
    float* out = static_cast<float*>(d);
    if (dtype == BFLOAT16) {
        return launch(product<bf16>, dim3(1), dim3(32), 768, stream, static_cast<const bf16*>(a),
                      static_cast<const bf16*>(b), out);
    }
    return launch(product<fp16>, dim3(1), dim3(32), 768, stream, static_cast<const fp16*>(a),
                  static_cast<const fp16*>(b), out);
}

// D = A B, A [16, 8] and B [8, 8], in parts whose sum is nearly float32.
__global__ void product_tf32(const float* a, const float* b, float* d, int parts) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float of_a[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    const float of_b[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]};
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    for (int i = 0; i < 4; ++i) {
        high_a[i] = to_tf32(of_a[i]);
        low_a[i] = to_tf32(of_a[i] - __uint_as_float(high_a[i]));
    }
    for (int i = 0; i < 2; ++i) {
        high_b[i] = to_tf32(of_b[i]);
        low_b[i] = to_tf32(of_b[i] - __uint_as_float(high_b[i]));
    }
    float sum[4] = {0, 0, 0, 0};
    if (parts == 3) {
        mma_16x8x8_tf32(sum, low_a, high_b);
        mma_16x8x8_tf32(sum, high_a, low_b);
    }
    mma_16x8x8_tf32(sum, high_a, high_b);
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}
FARSPAN_EXPORT int run_product_tf32(const void* a, const void* b, void* d, int parts, void* stream) {
    return launch(product_tf32, dim3(1), dim3(32), 0, stream, static_cast<const float*>(a),
                  static_cast<const float*>(b), static_cast<float*>(d), parts);
}

template <class T>
__global__ void round_trip(const float* x, float* y, int n) {
    for (int i = threadIdx.x; i < n; i += 32) {
        y[i] = to_float(from_float<T>(x[i]));
        uint32_t two = pack<T>(0, x[i]);
        if (to_float(T{static_cast<uint16_t>(two >> 16)}) != y[i] && y[i] == y[i]) y[i] = -1;
    }
}
FARSPAN_EXPORT int run_round_trip(const void* x, void* y, int n, int dtype, void* stream) {
    const float* from = static_cast<const float*>(x);
    float* to = static_cast<float*>(y);
    return dtype == BFLOAT16 ? launch(round_trip<bf16>, dim3(1), dim3(32), 0, stream, from, to, n)
                             : launch(round_trip<fp16>, dim3(1), dim3(32), 0, stream, from, to, n);
}

// What each number of `mistake` stands for is in the test.
__global__ void reversed(const float* x, float* y, int mistake) {
    float* in_shared = reinterpret_cast<float*>(shared_memory());
    const int i = threadIdx.x, n = blockDim.x;
    if (mistake == 5) {
        if (i % 4 == 0) copy_16(in_shared + i + 1, x + i);
    } else if (i % 4 == 0) {
        copy_16(in_shared + i, x + i);
    }
    copies_commit();
    if (mistake != 1) copies_wait<0>();
    if (mistake == 2 && i >= 32) return;
    if (mistake == 3 && lane_index() == 7) shuffle(1.0f, 0);
    if (mistake == 6) {
        if (lane_index() >= 16) {
            sync_warp();
        } else {
            shuffle(1.0f, 0);
        }
    }
    if (mistake != 4) sync_block();
    y[blockIdx.x * n + i] = in_shared[n - 1 - i];
}
FARSPAN_EXPORT int run_reversed(const void* x, void* y, int blocks, int threads, int mistake, void* stream) {
    return launch(reversed, dim3(blocks), dim3(threads), threads * 4 + 16, stream, static_cast<const float*>(x),
                  static_cast<float*>(y), mistake);
}
"""


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    source = tmp_path_factory.mktemp("emulated") / "primitives.cu"
    source.write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(forms.OPERATIONS, "primitives", forms.Operation((str(source),)))

        def call(function: str, *arguments: Tensor | int, order: int = 0) -> None:
            with forms.emulated(order):
                forms.library("primitives", CPU).call(function, *arguments)

        yield call


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_collectives(call: Callable[..., None], order: int) -> None:
    x, y = torch.randn(64), torch.empty(64, 8)
    call("run_collectives", x, y, 64, order=order)
    warps, lanes = x.view(2, 32), torch.arange(32)
    expected = torch.stack(
        [
            warps[:, 3:4].expand(2, 32),
            warps[:, lanes ^ 5],
            torch.cat((warps[:, :2], warps[:, :-2]), 1),
            torch.cat((warps[:, 2:], warps[:, -2:]), 1),
            warps.double().sum(1, keepdim=True).expand(2, 32).float(),
            warps.amax(1, keepdim=True).expand(2, 32),
            (warps > 0).sum(1, keepdim=True).expand(2, 32).float(),
            lanes + 1000.0 * torch.arange(2).unsqueeze(1),
        ],
        2,
    )
    torch.testing.assert_close(y.view(2, 32, 8), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits(call: Callable[..., None], dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.empty(16, 8)
    call("run_product", a, b, d, forms.dtype_code(dtype), order=5)
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def test_products_of_tf32(call: Callable[..., None]) -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    error = {}
    for parts in (1, 3):
        d = torch.empty(16, 8)
        call("run_product_tf32", a, b, d, parts)
        error[parts] = (d.double() - a.double() @ b.double()).abs().max().item()
    assert 1e-5 < error[1] < 1e-2 and error[3] < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(call: Callable[..., None], dtype: torch.dtype) -> None:
    """Every number of 16 bits, halfway between neighbours, just beside that, and what is not finite."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).div(2).float()
    x = torch.cat((every, halfway, halfway.nextafter(torch.tensor(1e30)), halfway.nextafter(torch.tensor(-1e30))))
    y = torch.empty_like(x)
    call("run_round_trip", x, y, len(x), forms.dtype_code(dtype))
    torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


class TestMistakes:
    """What may go well on a GPU, or hang it."""

    def run(self, call: Callable[..., None], mistake: int, order: int = 0) -> Tensor:
        y = torch.zeros(3, 64)
        call("run_reversed", torch.arange(64.0), y, 3, 64, mistake, order=order)
        return y

    def test_none(self, call: Callable[..., None]) -> None:
        for order in range(4):
            assert (self.run(call, 0, order) == torch.arange(63.0, -1, -1)).all()

    def test_a_background_copy_that_is_not_waited_for(self, call: Callable[..., None]) -> None:
        assert self.run(call, 1).isnan().all()

    def test_a_missing_barrier(self, call: Callable[..., None]) -> None:
        found = [self.run(call, 4, order) for order in (0, 1)]
        assert not torch.equal(*found) and all(y.isnan().any() for y in found)

    def test_a_barrier_that_not_all_threads_reach(self, call: Callable[..., None]) -> None:
        with pytest.raises(RuntimeError, match=r"threads wait for ever: block 0,0,0, thread 0 at sync_block, 32 of 64"):
            self.run(call, 2)
        assert self.run(call, 0)[0, 0] == 63, "and it works again"

    def test_lanes_in_different_collectives(self, call: Callable[..., None]) -> None:
        with pytest.raises(RuntimeError, match=r"thread \d+ in a collective of its warp"):
            self.run(call, 3)
        with pytest.raises(RuntimeError, match="different collectives: shuffle and sync_warp"):
            self.run(call, 6)

    def test_an_address_that_is_not_aligned(self, call: Callable[..., None]) -> None:
        with pytest.raises(RuntimeError, match="copy_16 of 16 bytes from an address that is no multiple of it"):
            self.run(call, 5)

    def test_a_launch_that_no_gpu_takes(self, call: Callable[..., None]) -> None:
        x, y = torch.zeros(2048), torch.zeros(2048)
        with pytest.raises(RuntimeError, match="a launch of 2048 threads"):
            call("run_reversed", x, y, 1, 2048, 0)
        call("run_reversed", x, y, 0, 64, 0)
