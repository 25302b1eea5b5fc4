// What every device source is written with: CUDA under nvcc, the emulator (emulator.h) under a host compiler.
//
// A source keeps to these names, takes all shared memory from shared_memory(), and uses collectives with whole warps
// only; then its very text runs on a CPU too.  Launchers are functions declared
//     FARSPAN_EXPORT int name(const void* x, int64_t rows, float eps, int dtype, void* stream)
// on one line each, returning launch()'s error.  No header of torch is needed.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FARSPAN_DEVICE __device__ __forceinline__
#define FARSPAN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include "emulator.h"
#define FARSPAN_DEVICE inline
#define FARSPAN_HOST_DEVICE inline
#endif

#define FARSPAN_EXPORT extern "C" __attribute__((visibility("default")))

namespace farspan {

constexpr int WARP = 32;

// ---- numbers: stored as bits, computed in float32 -----------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

// The codes that launchers take for a dtype.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

FARSPAN_DEVICE float to_float(float x) { return x; }
FARSPAN_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FARSPAN_DEVICE float to_float(fp16 x) {
#if defined(__CUDACC__)
    return __half2float(__ushort_as_half(x.bits));
#else
    return emulator::float_of_half(x.bits);
#endif
}

// Rounded to nearest, ties to even.
template <class T>
FARSPAN_DEVICE T from_float(float x);
template <>
FARSPAN_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
FARSPAN_DEVICE bf16 from_float<bf16>(float x) {
#if defined(__CUDACC__)
    return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    return bf16{emulator::bfloat_of_float(x)};
#endif
}
template <>
FARSPAN_DEVICE fp16 from_float<fp16>(float x) {
#if defined(__CUDACC__)
    return fp16{__half_as_ushort(__float2half_rn(x))};
#else
    return fp16{emulator::half_of_float(x)};
#endif
}

// Two numbers in a register, the first in the low half: what fragments of matrix products hold.
template <class T>
FARSPAN_DEVICE uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
#if defined(__CUDACC__)
template <>
FARSPAN_DEVICE uint32_t pack<bf16>(float low, float high) {
    uint32_t packed;  // the instruction's first operand becomes the high half
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
template <>
FARSPAN_DEVICE uint32_t pack<fp16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
#endif

// N numbers moved at once: 16 bytes where N · sizeof(T) is 16.  Addresses must be multiples of the size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T values[N];
    FARSPAN_HOST_DEVICE T& operator[](int i) { return values[i]; }
    FARSPAN_HOST_DEVICE const T& operator[](int i) const { return values[i]; }
};

template <class T, int N>
FARSPAN_DEVICE Vector<T, N> load(const T* from) {
#if !defined(__CUDACC__)
    emulator::require_aligned(from, sizeof(T) * N, "load");
#endif
    return *reinterpret_cast<const Vector<T, N>*>(from);
}

// The same for 16 bytes that nothing reads again soon: they are the first to leave the caches.
template <class T, int N>
FARSPAN_DEVICE Vector<T, N> load_once(const T* from) {
#if defined(__CUDACC__)
    static_assert(sizeof(Vector<T, N>) == 16, "load_once moves 16 bytes");
    const int4 bits = __ldcs(reinterpret_cast<const int4*>(from));
    Vector<T, N> values;
    memcpy(&values, &bits, 16);
    return values;
#else
    return load<T, N>(from);
#endif
}

template <class T, int N>
FARSPAN_DEVICE void store(T* to, const Vector<T, N>& values) {
#if !defined(__CUDACC__)
    emulator::require_aligned(to, sizeof(T) * N, "store");
#endif
    *reinterpret_cast<Vector<T, N>*>(to) = values;
}

// 2 to the power of x, by the device's approximation: 2 units in the last place, numbers below 2^-126 are 0.
FARSPAN_DEVICE float power_of_2(float x) {
#if defined(__CUDACC__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

// ---- a block's threads ---------------------------------------------------------------------------------------------

FARSPAN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }
FARSPAN_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / WARP; }

#if defined(__CUDACC__)
FARSPAN_DEVICE void sync_block() { __syncthreads(); }
FARSPAN_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
FARSPAN_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
FARSPAN_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// From `distance` lanes before (up) or after (down); lanes without such a neighbour keep their own.
template <class T>
FARSPAN_DEVICE T shuffle_up(T value, int distance) {
    return __shfl_up_sync(0xffffffffu, value, distance);
}
template <class T>
FARSPAN_DEVICE T shuffle_down(T value, int distance) {
    return __shfl_down_sync(0xffffffffu, value, distance);
}
FARSPAN_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// The block's dynamic shared memory, aligned to 128 bytes.
FARSPAN_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char farspan_shared[];
    return farspan_shared;
}
// Makes this thread's writes to global memory visible before its later ones.
FARSPAN_DEVICE void fence() { __threadfence(); }
// The value before.
FARSPAN_DEVICE int atomic_add(int* to, int value) { return atomicAdd(to, value); }
#else
FARSPAN_DEVICE void sync_block() { emulator::sync_block(); }
FARSPAN_DEVICE void sync_warp() { emulator::sync_warp(); }
template <class T>
FARSPAN_DEVICE T shuffle(T value, int lane) {
    return emulator::gather(value, emulator::SHUFFLE)[lane & (WARP - 1)];
}
template <class T>
FARSPAN_DEVICE T shuffle_xor(T value, int mask) {
    return emulator::gather(value, emulator::SHUFFLE_XOR)[(lane_index() ^ mask) & (WARP - 1)];
}
template <class T>
FARSPAN_DEVICE T shuffle_up(T value, int distance) {
    int from = lane_index() - distance;
    const T* all = emulator::gather(value, emulator::SHUFFLE_UP);
    return from < 0 ? value : all[from];
}
template <class T>
FARSPAN_DEVICE T shuffle_down(T value, int distance) {
    int from = lane_index() + distance;
    const T* all = emulator::gather(value, emulator::SHUFFLE_DOWN);
    return from >= WARP ? value : all[from];
}
FARSPAN_DEVICE uint32_t ballot(bool predicate) {
    const int* all = emulator::gather(static_cast<int>(predicate), emulator::BALLOT);
    uint32_t bits = 0;
    for (int i = 0; i < WARP; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
    return bits;
}
FARSPAN_DEVICE char* shared_memory() { return emulator::shared_memory(); }
FARSPAN_DEVICE void fence() {}
FARSPAN_DEVICE int atomic_add(int* to, int value) {
    int before = *to;
    *to += value;
    return before;
}
#endif

// Sums and maxima over a warp, the same bits in every lane.
FARSPAN_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}
FARSPAN_DEVICE float warp_max(float value) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// ---- copies from global to shared memory that go on in the background (sm_80) ---------------------------------------

// 16 bytes, zeros instead where not `valid` (nothing is read then).  Visible to this thread after copies_wait, to others
// after a barrier too.
FARSPAN_DEVICE void copy_16(void* to_shared, const void* from_global, bool valid = true) {
#if defined(__CUDACC__)
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from_global), "r"(bytes) : "memory");
#else
    emulator::copy_16(to_shared, from_global, valid);
#endif
}
// Ends a group of copies.
FARSPAN_DEVICE void copies_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
    emulator::copies_commit();
#endif
}
// Until at most `Pending` of this thread's latest groups are unfinished.
template <int Pending>
FARSPAN_DEVICE void copies_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#else
    emulator::copies_wait(Pending);
#endif
}

// ---- launching -------------------------------------------------------------------------------------------------------

// Calls `function` with a value of the type that the code stands for; 1 (CUDA's "invalid value") for an unknown one.
template <class F>
int with_dtype(int dtype, F function) {
    switch (dtype) {
        case FLOAT32:
            return function(float{});
        case BFLOAT16:
            return function(bf16{});
        case FLOAT16:
            return function(fp16{});
        default:
            return 1;
    }
}

// Bytes of shared memory that a block of the current device may have.
inline size_t shared_limit() {
#if defined(__CUDACC__)
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return static_cast<size_t>(bytes);
#else
    return 227 * 1024;
#endif
}

// Returns 0, or the error's code: see farspan_error.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#if defined(__CUDACC__)
    if (shared > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)
        );
        if (error != cudaSuccess) {
            cudaGetLastError();  // taken back, or the next launch would report it
            return static_cast<int>(error);
        }
    }
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
#else
    (void)stream;
    return emulator::launch(grid, block, shared, [&] { kernel(arguments...); });
#endif
}

}  // namespace farspan

#if defined(__CUDACC__)
namespace farspan {
static __global__ void nothing() {}
}  // namespace farspan
#endif

// 0, or why kernels cannot run: a driver older than the compiler, code for another GPU.
extern "C" inline __attribute__((used, visibility("default"))) int farspan_probe() {
#if defined(__CUDACC__)
    farspan::nothing<<<1, 1>>>();
    const cudaError_t error = cudaGetLastError();
    return static_cast<int>(error == cudaSuccess ? cudaDeviceSynchronize() : error);
#else
    return 0;
#endif
}

extern "C" inline __attribute__((used, visibility("default"))) const char* farspan_error(int code) {
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return farspan::emulator::message(code);
#endif
}
