// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "As easy as 1, 2, 3", SC'11),
// word for word those of the CPU.
#include "common.cuh"
#include "philox.cuh"

// Word number start + i of a stream; each thread makes the words of whole blocks of four.
template <class F> __device__ inline void stream(u64 key, i64 start, i64 n, F f) {
    i64 first = start >> 2, blocks = ((start + n + 3) >> 2) - first;
    for (i64 k = first_thread(); k < blocks; k += all_threads()) {
        u64 block = u64(first + k);
        Words w = philox(key, u32(block), u32(block >> 32), 0, 0);
        for (int j = 0; j < 4; j++) {
            i64 i = 4 * (first + k) + j - start;
            if (i >= 0 && i < n) f(i, w, j);
        }
    }
}

KERNEL random_words(u64 key, i64 start, i64 n, u32* out) {
    stream(key, start, n, [&](i64 i, const Words& w, int j) { out[i] = w.v[j]; });
}

KERNEL random_uniform(u64 key, i64 start, i64 n, T* out) {
    stream(key, start, n, [&](i64 i, const Words& w, int j) {
        out[i] = narrow(Sum(w.v[j] >> 8) / Sum(16777216));
    });
}

// Box and Muller 1958. (word + 1) / 2^32 lies in (0, 1]: the logarithm is finite.
KERNEL random_normal(u64 key, i64 start, i64 n, T* out) {
    stream(key, start, n, [&](i64 i, const Words& w, int j) {
        double radius = sqrt(-2.0 * log((w.v[j & ~1] + 1.0) / 4294967296.0));
        double angle = 6.283185307179586 / 4294967296.0 * w.v[j | 1];
        out[i] = narrow(Sum(radius * (j % 2 ? sin(angle) : cos(angle))));
    });
}

// Row r is of global sample first + r. `runs` (count, 2): first element in the whole sample, and
// the neighbours after it; after the last run come the same ones `period` elements further on.
KERNEL dropout(
    const T* x, u64 key, u64 first, u32 threshold, const i64* runs, i64 count, i64 period, i64 n,
    T* out
) {
    i64 r = blockIdx.x, cycle = 0;  // along x there may be more than 65,535
    u64 sample = first + u64(r);
    Sum scale = Sum(1 / (1 - threshold / 4294967296.0));
    for (i64 k = 0; k < count; k++) cycle += runs[2 * k + 1];
    const T* row = x + r * n;
    T* y = out + r * n;
    i64 thread = i64(blockIdx.y) * blockDim.x + threadIdx.x, threads = i64(gridDim.y) * blockDim.x;
    along(n, thread, threads, common(row, y), [&](i64 i, auto some) {
        const int N = decltype(some)::n;
        i64 place = i / cycle * period, left = i % cycle, k = 0;
        while (left >= runs[2 * k + 1]) left -= runs[2 * k++ + 1];
        place += runs[2 * k] + left;
        Some<N> a = get<N>(row + i);
        Words w;
        i64 made = -1;
#pragma unroll
        for (int e = 0; e < N; e++) {
            i64 block = place >> 2;
            if (block != made) {
                u32 tile = u32(block >> 10), within = u32(block & 1023);  // tiles of 4096 elements
                w = philox(key, within, tile, u32(sample), u32(sample >> 32));
                made = block;
            }
            a.v[e] = w.at(int(place & 3)) >= threshold ? a.v[e] * scale : a.v[e] * Sum(0);
            place++;
            if (++left == runs[2 * k + 1]) {  // the next run, perhaps of the next period
                i64 base = place - runs[2 * k] - left;
                left = 0;
                do {
                    if (++k == count) {
                        k = 0;
                        base += period;
                    }
                } while (runs[2 * k + 1] == 0);
                place = base + runs[2 * k];
            }
        }
        put<N>(y + i, a);
    });
}
