// Sums over the columns of a matrix, in two steps: over chunks of rows, and then over the chunks in
// order. The result has the same bits whatever the device.
#include "common.cuh"

#define LINES 8  // threads that share a column within a block

// parts[chunk, j] = sum over the rows of the chunk of value(r, j), for all columns of this block.
template <int N, class F>
__device__ inline void chunk_sums(i64 rows, i64 n, i64 chunk, Sum* parts, F value) {
    __shared__ Sum sums[LINES][WARP * PACK];
    int lane = threadIdx.x, line = threadIdx.y;
    i64 j = (i64(blockIdx.x) * WARP + lane) * N;
    i64 begin = blockIdx.y * chunk, end = begin + chunk < rows ? begin + chunk : rows;
    Some<N> total;
#pragma unroll
    for (int k = 0; k < N; k++) total.v[k] = 0;
    if (j < n) {
        for (i64 r = begin + line; r < end; r += LINES) {
            Some<N> a = value(r, j, Count<N>());
#pragma unroll
            for (int k = 0; k < N; k++) total.v[k] += a.v[k];
        }
    }
#pragma unroll
    for (int k = 0; k < N; k++) sums[line][lane * N + k] = total.v[k];
    __syncthreads();
    for (int i = line * WARP + lane; i < WARP * N; i += LINES * WARP) {
        i64 column = i64(blockIdx.x) * WARP * N + i;
        if (column >= n) continue;
        Sum sum = 0;
        for (int l = 0; l < LINES; l++) sum += sums[l][i];
        parts[blockIdx.y * n + column] = sum;
    }
}

// packed: rows and columns are such that all packs are aligned.
KERNEL column_parts(const T* x, i64 rows, i64 n, i64 chunk, bool packed, Sum* parts) {
    auto value = [&](i64 r, i64 j, auto count) { return get<decltype(count)::n>(x + r * n + j); };
    if (packed) chunk_sums<PACK>(rows, n, chunk, parts, value);
    else chunk_sums<1>(rows, n, chunk, parts, value);
}

// Of squares of the distance from `mean` of each column.
KERNEL deviation_parts(
    const T* x, const Sum* mean, i64 rows, i64 n, i64 chunk, bool packed, Sum* parts
) {
    auto value = [&](i64 r, i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(x + r * n + j);
#pragma unroll
        for (int k = 0; k < N; k++) a.v[k] = (a.v[k] - mean[j + k]) * (a.v[k] - mean[j + k]);
        return a;
    };
    if (packed) chunk_sums<PACK>(rows, n, chunk, parts, value);
    else chunk_sums<1>(rows, n, chunk, parts, value);
}

// Of g times the distance of x from the mean of its column, or (by_row) of its row, there times
// the row's `inverse`.
KERNEL product_parts(
    const T* g, const T* x, const Sum* mean, const Sum* inverse, bool by_row, i64 rows, i64 n,
    i64 chunk, bool packed, Sum* parts
) {
    auto value = [&](i64 r, i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> d = get<N>(g + r * n + j), a = get<N>(x + r * n + j);
        Sum mu = by_row ? mean[r] : Sum(0), rstd = by_row ? inverse[r] : Sum(1);
#pragma unroll
        for (int k = 0; k < N; k++) d.v[k] *= (a.v[k] - (by_row ? mu : mean[j + k])) * rstd;
        return d;
    };
    if (packed) chunk_sums<PACK>(rows, n, chunk, parts, value);
    else chunk_sums<1>(rows, n, chunk, parts, value);
}

__device__ inline Sum in_order(const Sum* parts, i64 chunks, i64 n, i64 j) {
    Sum total = 0;
    for (i64 c = 0; c < chunks; c++) total += parts[c * n + j];
    return total;
}

// out[j] = factor times the sum of all chunks: of the type of the elements, or of sums.
KERNEL column_finish(const Sum* parts, i64 chunks, i64 n, T* out) {
    i64 j = first_thread();
    if (j < n) out[j] = narrow(in_order(parts, chunks, n, j));
}

KERNEL column_finish_wide(const Sum* parts, i64 chunks, i64 n, Sum factor, Sum* out) {
    i64 j = first_thread();
    if (j < n) out[j] = in_order(parts, chunks, n, j) * factor;
}
