// What all kernels share: types and their conversion, packs of 16 bytes, sums over a warp or block.
//
// A source is compiled once for each type of elements, named by ELEMENT (f32, f64, bf16, f16). It
// needs no header of CUDA's, so that NVRTC finds all it asks for. `Sum` is the type of arithmetic:
// float, and double for f64. A warp has 32 threads (a wavefront of AMD's CDNA has 64: there the
// full mask, `WARP` and the layout in `multiply` would have to change, and nothing else).
#pragma once

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

typedef float f32;
typedef double f64;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

typedef ELEMENT T;

template <class E> struct SumOf { typedef float type; };
template <> struct SumOf<double> { typedef double type; };
typedef SumOf<T>::type Sum;

#define KERNEL extern "C" __global__ void
#ifndef DYNAMIC_SHARED  // the tests on a CPU have their own
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
#define WARP 32
#define ALL 0xffffffffu

// --- numbers -----------------------------------------------------------------------------------

__device__ inline u32 bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(u32 bits) { return __uint_as_float(bits); }

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bf16 x) { return float_of(u32(x.bits) << 16); }

template <class E> struct Narrow;
template <> struct Narrow<float> { __device__ static float from(float x) { return x; } };
template <> struct Narrow<double> { __device__ static double from(double x) { return x; } };
template <> struct Narrow<bf16> {
    // To nearest, of two the even one; NaN stays NaN.
    __device__ static bf16 from(float x) {
        u32 bits = bits_of(x);
        bf16 y;
        y.bits = x != x ? u16(0x7fc0) : u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
        return y;
    }
};

#if defined(__CUDA_ARCH__)
__device__ inline float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
template <> struct Narrow<f16> {
    __device__ static f16 from(float x) {
        f16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
};
#else  // HIP, and compilers of the host
__device__ inline float widen(f16 x) { return float_of_half(x.bits); }
template <> struct Narrow<f16> {
    __device__ static f16 from(float x) {
        f16 y;
        y.bits = half_of_float(x);
        return y;
    }
};
#endif

__device__ inline T narrow(Sum x) { return Narrow<T>::from(x); }

__device__ inline float infinity(float) { return float_of(0x7f800000u); }
__device__ inline double infinity(double) { return double(float_of(0x7f800000u)); }

// --- packs -------------------------------------------------------------------------------------

// Elements that are loaded and stored by one instruction of 16 bytes.
#define PACK int(16 / sizeof(T))

template <class E, int N> struct alignas(N * sizeof(E) > 16 ? 16 : N * sizeof(E)) Pack { E v[N]; };
template <int N> struct Count { static const int n = N; };
template <int N> struct Some { Sum v[N]; };

template <int N, class E> __device__ inline Some<N> get(const E* p) {
    Pack<E, N> x = *reinterpret_cast<const Pack<E, N>*>(p);
    Some<N> y;
#pragma unroll
    for (int i = 0; i < N; i++) y.v[i] = widen(x.v[i]);
    return y;
}

template <int N, class E> __device__ inline void put(E* p, const Some<N>& x) {
    Pack<E, N> y;
#pragma unroll
    for (int i = 0; i < N; i++) y.v[i] = Narrow<E>::from(x.v[i]);
    *reinterpret_cast<Pack<E, N>*>(p) = y;
}

__device__ inline u32 skew(const void* p) { return u32(reinterpret_cast<size_t>(p) & 15u); }

// Calls f(j, Count<N>) for the elements j .. j + N - 1 of n, divided among `threads`, of which this
// is `thread`. N is PACK wherever all arrays are aligned there, as they are if `skew` is that of
// all; -1 for arrays that never are at once.
template <class F>
__device__ inline void along(i64 n, i64 thread, i64 threads, int skew, F f) {
    i64 head = skew < 0 ? n : i64((16 - skew) % 16 / int(sizeof(T)));
    if (head > n) head = n;
    i64 packs = (n - head) / PACK;
    for (i64 j = thread; j < head; j += threads) f(j, Count<1>());
    for (i64 k = thread; k < packs; k += threads) f(head + k * PACK, Count<PACK>());
    for (i64 j = head + packs * PACK + thread; j < n; j += threads) f(j, Count<1>());
}

// The skew that all these have, or -1. Arrays of another size of elements must have 16-byte rows.
__device__ inline int common(const void* a, const void* b) {
    return skew(a) == skew(b) ? int(skew(a)) : -1;
}
__device__ inline int common(const void* a, const void* b, const void* c) {
    return skew(a) == skew(b) && skew(b) == skew(c) ? int(skew(a)) : -1;
}

__device__ inline i64 first_thread() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline i64 all_threads() { return i64(gridDim.x) * blockDim.x; }

// --- sums --------------------------------------------------------------------------------------

template <class S> __device__ inline S shuffle_xor(S x, int lanes) {
#if defined(__HIP_PLATFORM_AMD__)
    return __shfl_xor(x, lanes, WARP);
#else
    return __shfl_xor_sync(ALL, x, lanes);
#endif
}

template <class S> __device__ inline S shuffle(S x, int lane) {
#if defined(__HIP_PLATFORM_AMD__)
    return __shfl(x, lane, WARP);
#else
    return __shfl_sync(ALL, x, lane);
#endif
}

// The sum over all lanes of a warp, in all of them and with the same bits.
template <class S> __device__ inline S warp_sum(S x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}

// The sum over a block of whole warps (blockDim.x threads), in all of its threads.
template <class S> __device__ inline S block_sum(S x) {
    __shared__ S parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();  // those of a call before have been read
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : S(0));
}
