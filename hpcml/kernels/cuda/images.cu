// Kernels for images that lie channels last, (N, *S, C), with three spatial dimensions (fewer have
// sizes of 1): what convolutions by products need, pooling, batch normalisation, resampling.
#include "common.cuh"

struct Windows {
    i64 sizes[3], counts[3], kernel[3], stride[3], before[3], dilation[3];
};

__device__ inline i64 product(const i64 (&x)[3]) { return x[0] * x[1] * x[2]; }

__device__ inline void split(i64 i, const i64 (&sizes)[3], i64 (&at)[3]) {
    at[2] = i % sizes[2];
    at[1] = i / sizes[2] % sizes[1];
    at[0] = i / (sizes[2] * sizes[1]);
}

// Where tap k of window p looks, as one number; -1 beyond the edge.
__device__ inline i64 seen(const Windows& w, const i64 (&p)[3], const i64 (&k)[3]) {
    i64 place = 0;
#pragma unroll
    for (int d = 0; d < 3; d++) {
        i64 s = p[d] * w.stride[d] - w.before[d] + k[d] * w.dilation[d];
        if (s < 0 || s >= w.sizes[d]) return -1;
        place = place * w.sizes[d] + s;
    }
    return place;
}

// The window that sees place s by its tap k, as one number; -1 if there is none.
__device__ inline i64 seen_by(const Windows& w, const i64 (&s)[3], const i64 (&k)[3]) {
    i64 window = 0;
#pragma unroll
    for (int d = 0; d < 3; d++) {
        i64 p = s[d] + w.before[d] - k[d] * w.dilation[d];
        if (p < 0 || p % w.stride[d] != 0 || p / w.stride[d] >= w.counts[d]) return -1;
        window = window * w.counts[d] + p / w.stride[d];
    }
    return window;
}

// columns (rows, taps, some) = what the taps of each window see of channels first .. first + some.
template <int N>
__device__ inline void gather(
    const T* x, i64 samples, i64 channels, i64 first, i64 some, const Windows& w, T* columns
) {
    i64 windows = product(w.counts), taps = product(w.kernel), packs = some / N;
    i64 all = samples * windows * taps * packs, places = product(w.sizes);
    for (i64 i = first_thread(); i < all; i += all_threads()) {
        i64 c = i % packs * N, tap = i / packs % taps, row = i / packs / taps, p[3], k[3];
        split(row % windows, w.counts, p);
        split(tap, w.kernel, k);
        i64 place = seen(w, p, k);
        Some<N> a = {};
        if (place >= 0) a = get<N>(x + ((row / windows) * places + place) * channels + first + c);
        put<N>(columns + (row * taps + tap) * some + c, a);
    }
}

KERNEL gather_columns(
    const T* x, i64 samples, i64 channels, i64 first, i64 some, Windows w, bool packed, T* columns
) {
    if (packed) gather<PACK>(x, samples, channels, first, some, w, columns);
    else gather<1>(x, samples, channels, first, some, w, columns);
}

// The adjoint, and `start` added: none (0), one for each channel (1), or one for each element (2).
template <int N>
__device__ inline void collect(
    const T* columns, i64 samples, i64 channels, i64 first, i64 some, const Windows& w,
    const T* start, int kind, T* out
) {
    i64 windows = product(w.counts), taps = product(w.kernel), packs = some / N;
    i64 places = product(w.sizes), all = samples * places * packs;
    for (i64 i = first_thread(); i < all; i += all_threads()) {
        i64 c = i % packs * N, place = i / packs % places, n = i / packs / places, s[3], k[3];
        split(place, w.sizes, s);
        T* result = out + (n * places + place) * channels + first + c;
        Some<N> total = {};
        if (kind == 1) total = get<N>(start + first + c);
        if (kind == 2) total = get<N>(start + (result - out));
        for (i64 tap = 0; tap < taps; tap++) {
            split(tap, w.kernel, k);
            i64 window = seen_by(w, s, k);
            if (window < 0) continue;
            Some<N> a = get<N>(columns + ((n * windows + window) * taps + tap) * some + c);
#pragma unroll
            for (int e = 0; e < N; e++) total.v[e] += a.v[e];
        }
        put<N>(result, total);
    }
}

KERNEL collect_columns(
    const T* columns, i64 samples, i64 channels, i64 first, i64 some, Windows w, const T* start,
    int kind, bool packed, T* out
) {
    if (packed) collect<PACK>(columns, samples, channels, first, some, w, start, kind, out);
    else collect<1>(columns, samples, channels, first, some, w, start, kind, out);
}

// The first of equal maxima; the last NaN counts as the largest. Padding is never chosen.
KERNEL max_pool(const T* x, i64 samples, i64 channels, Windows w, T* out, u16* index) {
    i64 windows = product(w.counts), taps = product(w.kernel), places = product(w.sizes);
    i64 all = samples * windows * channels;
    for (i64 i = first_thread(); i < all; i += all_threads()) {
        i64 c = i % channels, window = i / channels % windows, n = i / channels / windows;
        i64 p[3], k[3], best = 0;
        bool found = false;
        Sum most = -infinity(Sum(0));
        split(window, w.counts, p);
        for (i64 tap = 0; tap < taps; tap++) {
            split(tap, w.kernel, k);
            i64 place = seen(w, p, k);
            if (place < 0) continue;
            Sum value = widen(x[(n * places + place) * channels + c]);
            if (!found || value > most || value != value) {
                most = value;
                best = tap;
            }
            found = true;
        }
        out[i] = narrow(most);
        index[i] = u16(best);
    }
}

KERNEL max_pool_backward(
    const T* g, const u16* index, i64 samples, i64 channels, Windows w, T* out
) {
    i64 windows = product(w.counts), taps = product(w.kernel), places = product(w.sizes);
    i64 all = samples * places * channels;
    for (i64 i = first_thread(); i < all; i += all_threads()) {
        i64 c = i % channels, place = i / channels % places, n = i / channels / places, s[3], k[3];
        Sum total = 0;
        split(place, w.sizes, s);
        for (i64 tap = 0; tap < taps; tap++) {
            split(tap, w.kernel, k);
            i64 window = seen_by(w, s, k);
            if (window < 0) continue;
            i64 from = (n * windows + window) * channels + c;
            if (index[from] == tap) total += widen(g[from]);
        }
        out[i] = narrow(total);
    }
}

// out[a, j, b] = sum over k < count[j] of weights[j, k] x[a, first[j] + k, b].
KERNEL resample(
    const T* x, const i64* first, const i64* count, const Sum* weights, i64 before, i64 n, i64 m,
    i64 after, i64 most, T* out
) {
    i64 all = before * m * after;
    for (i64 i = first_thread(); i < all; i += all_threads()) {
        i64 b = i % after, j = i / after % m, a = i / after / m;
        Sum total = 0;
        for (i64 k = 0; k < count[j]; k++)
            total += weights[j * most + k] * widen(x[(a * n + first[j] + k) * after + b]);
        out[i] = narrow(total);
    }
}

// out[n, j, i] = x[n, i, j], by tiles: both sides are read and written along rows. All tiles lie
// along x: in y and z a grid has no more than 65,535.
KERNEL transpose(const T* x, i64 rows, i64 columns, T* out) {
    __shared__ T tile[WARP][WARP + 1];
    i64 across = (columns + WARP - 1) / WARP, down = (rows + WARP - 1) / WARP;
    i64 n = blockIdx.x / (across * down);
    i64 left = blockIdx.x % across * WARP, top = blockIdx.x / across % down * WARP;
    const T* from = x + n * rows * columns;
    T* to = out + n * rows * columns;
    for (int k = threadIdx.y; k < WARP; k += blockDim.y) {
        i64 i = top + k, j = left + threadIdx.x;
        if (i < rows && j < columns) tile[k][threadIdx.x] = from[i * columns + j];
    }
    __syncthreads();
    for (int k = threadIdx.y; k < WARP; k += blockDim.y) {
        i64 j = left + k, i = top + threadIdx.x;
        if (i < rows && j < columns) to[j * rows + i] = tile[threadIdx.x][k];
    }
}

// Calls f(i, column, Count<N>) for the elements of a matrix with `channels` columns.
template <class F> __device__ inline void by_column(i64 n, i64 channels, bool packed, F f) {
    i64 step = packed ? PACK : 1;
    for (i64 i = first_thread() * step; i < n; i += all_threads() * step) {
        if (packed) f(i, i % channels, Count<PACK>());
        else f(i, i % channels, Count<1>());
    }
}

KERNEL batch_norm(
    const T* x, const Sum* mean, const Sum* scale, const Sum* shift, i64 n, i64 channels,
    bool packed, T* out
) {
    by_column(n, channels, packed, [&](i64 i, i64 c, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(x + i);
#pragma unroll
        for (int k = 0; k < N; k++) a.v[k] = (a.v[k] - mean[c + k]) * scale[c + k] + shift[c + k];
        put<N>(out + i, a);
    });
}

KERNEL batch_norm_backward(
    const T* g, const T* x, const Sum* mean, const Sum* scale, const Sum* slopes, const T* pending,
    bool more, i64 n, i64 channels, bool packed, T* out
) {
    by_column(n, channels, packed, [&](i64 i, i64 c, auto count) {
        const int N = decltype(count)::n;
        Some<N> d = get<N>(g + i), a = get<N>(x + i), before = {};
        if (more) before = get<N>(pending + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            Sum away = a.v[k] - mean[c + k];
            d.v[k] -= slopes[c + k] + slopes[channels + c + k] * away;
            d.v[k] = before.v[k] + scale[c + k] * d.v[k];
        }
        put<N>(out + i, d);
    });
}
