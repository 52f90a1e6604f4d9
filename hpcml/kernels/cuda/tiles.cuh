// Tiles of matrices in shared memory, and their products: what attention is made of.
//
// A block has 64 rows, 16 for each of its four warps, and meets the rows of the other side in tiles
// of 32. Products are of 16 x 8 x 16 elements, on tensor cores for 16 bits. Rows have up to DEPTH
// elements; a source is compiled for each DEPTH. With fewer the rest is zero.
#pragma once
#include "common.cuh"

#define ROWS 64    // of a block
#define COLUMNS 32 // of a tile of the other side
#define PITCH (DEPTH + PACK)
#define THREADS 128

template <class E> struct alignas(2 * sizeof(E)) PairOf { E x, y; };
typedef PairOf<T> Pair;

// c += a b, of 16 x 16 and 16 x 8 elements that a warp holds as mma.m16n8k16 has them ("Parallel
// Thread Execution ISA", matrix fragments): with g = lane / 4 and t = lane % 4, a[0] has row g and
// columns 2t, 2t + 1; a[1] row g + 8; a[2], a[3] the same 8 columns further on; b[0] has rows 2t,
// 2t + 1 of column g, b[1] those 8 further on; c has row g, columns 2t, 2t + 1, then row g + 8.
#ifdef OWN_MULTIPLY  // of the tests on a CPU
OWN_MULTIPLY
#else
template <class P>
__device__ inline void multiply(Sum (&c)[4], const P (&a)[4], const P (&b)[2]) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        int half = k / 8, from = k % 8 / 2;
        Sum upper = shuffle(widen(k % 2 ? a[2 * half].y : a[2 * half].x), 4 * g + from);
        Sum lower = shuffle(widen(k % 2 ? a[2 * half + 1].y : a[2 * half + 1].x), 4 * g + from);
        Sum column = widen(k % 2 ? b[half].y : b[half].x);
        Sum left = shuffle(column, 4 * (2 * t) + from);
        Sum right = shuffle(column, 4 * (2 * t + 1) + from);
        c[0] += upper * left;
        c[1] += upper * right;
        c[2] += lower * left;
        c[3] += lower * right;
    }
}
#endif

#if defined(__CUDA_ARCH__)
#define TENSOR_CORES(kind)                                                                     \
    __device__ inline void multiply(                                                           \
        float (&c)[4], const PairOf<kind> (&a)[4], const PairOf<kind> (&b)[2]                  \
    ) {                                                                                        \
        const u32 *x = reinterpret_cast<const u32*>(a), *y = reinterpret_cast<const u32*>(b);  \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." #kind "." #kind ".f32 "          \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                   \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                          \
                     : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));      \
    }
TENSOR_CORES(bf16)
TENSOR_CORES(f16)
#endif

// tile = rows first .. first + COUNT - 1 of x, zero where there are none.
template <int COUNT>
__device__ inline void load_tile(T* tile, const T* x, i64 stride, i64 first, i64 rows, i64 depth) {
    bool packed = depth % PACK == 0 && stride % PACK == 0 && skew(x) == 0;
    if (packed) {
        for (int i = threadIdx.x; i < COUNT * (DEPTH / PACK); i += THREADS) {
            int r = i / (DEPTH / PACK), j = i % (DEPTH / PACK) * PACK;
            Pack<T, PACK> pack = {};
            if (first + r < rows && j < depth)
                pack = *reinterpret_cast<const Pack<T, PACK>*>(x + (first + r) * stride + j);
            *reinterpret_cast<Pack<T, PACK>*>(tile + r * PITCH + j) = pack;
        }
    } else {
        for (int i = threadIdx.x; i < COUNT * DEPTH; i += THREADS) {
            int r = i / DEPTH, j = i % DEPTH;
            bool there = first + r < rows && j < depth;
            tile[r * PITCH + j] = there ? x[(first + r) * stride + j] : narrow(Sum(0));
        }
    }
}

__device__ inline Pair pair_at(const T* p) { return *reinterpret_cast<const Pair*>(p); }

// c = a b^T: this warp's 16 rows of tile a times the COLUMNS rows of tile b.
__device__ inline void rows_by_rows(Sum (&c)[COLUMNS / 8][4], const T* a, const T* b) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const T* mine = a + (threadIdx.x / WARP * 16 + g) * PITCH + 2 * t;
    // Where lanes exchange numbers, the loop in full takes twice as long to compile.
    [[maybe_unused]] constexpr int unrolled = sizeof(T) == 2 ? DEPTH / 16 : 1;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
        for (int e = 0; e < 4; e++) c[n][e] = 0;
#pragma unroll unrolled
    for (int k = 0; k < DEPTH; k += 16) {
        Pair left[4] = {pair_at(mine + k), pair_at(mine + 8 * PITCH + k), pair_at(mine + k + 8),
                        pair_at(mine + 8 * PITCH + k + 8)};
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            const T* other = b + (n * 8 + g) * PITCH + k + 2 * t;
            Pair right[2] = {pair_at(other), pair_at(other + 8)};
            multiply(c[n], left, right);
        }
    }
}

// total += p x: this warp's 16 rows of p, as `multiply` left them, times the rows of tile x.
__device__ inline void add_product(
    Sum (&total)[DEPTH / 8][4], const Sum (&p)[COLUMNS / 8][4], const T* x
) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        Pair left[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            left[i].x = narrow(p[2 * k + i / 2][2 * (i % 2)]);
            left[i].y = narrow(p[2 * k + i / 2][2 * (i % 2) + 1]);
        }
#pragma unroll
        for (int n = 0; n < DEPTH / 8; n++) {
            const T* column = x + (k * 16 + 2 * t) * PITCH + n * 8 + g;
            Pair right[2] = {{column[0], column[PITCH]},
                             {column[8 * PITCH], column[9 * PITCH]}};
            multiply(total[n], left, right);
        }
    }
}

// Write (or add) 16 rows per warp of results to x.
__device__ inline void store(
    T* x, i64 stride, i64 first, i64 rows, i64 depth, const Sum (&c)[DEPTH / 8][4], Sum upper,
    Sum lower, bool more
) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < DEPTH / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            i64 r = first + threadIdx.x / WARP * 16 + g + e / 2 * 8, j = n * 8 + 2 * t + e % 2;
            if (r >= rows || j >= depth) continue;
            T* place = x + r * stride + j;
            Sum value = c[n][e] * (e < 2 ? upper : lower);
            *place = narrow(more ? widen(*place) + value : value);
        }
    }
}
