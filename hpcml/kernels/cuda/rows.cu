// Kernels over the rows of a matrix: layer norm by a warp for each row, cross-entropy by a block,
// and the gradient of an embedding by a block for each row of the table that is used.
#include "common.cuh"

__device__ inline i64 warp_number() {
    return i64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
}

// The three reads of a row are one from memory: the others find it in the cache.
KERNEL layer_norm(
    const T* x, const T* weight, const T* bias, i64 rows, i64 n, bool weighted, bool biased,
    Sum eps, T* out, Sum* mean, Sum* inverse
) {
    i64 r = warp_number();
    int lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const T* row = x + r * n;
    T* y = out + r * n;
    Sum total = 0, squares = 0;
    along(n, lane, WARP, int(skew(row)), [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(row + j);
#pragma unroll
        for (int k = 0; k < N; k++) total += a.v[k];
    });
    Sum mu = warp_sum(total) / Sum(n);
    along(n, lane, WARP, int(skew(row)), [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(row + j);
#pragma unroll
        for (int k = 0; k < N; k++) squares += (a.v[k] - mu) * (a.v[k] - mu);
    });
    Sum rstd = 1 / sqrt(warp_sum(squares) / Sum(n) + eps);
    if (lane == 0) {
        mean[r] = mu;
        inverse[r] = rstd;
    }
    int both = common(weighted ? (const void*)weight : row, biased ? (const void*)bias : row);
    int skewed = common(row, y) == both ? both : -1;
    along(n, lane, WARP, skewed, [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(row + j);
#pragma unroll
        for (int k = 0; k < N; k++) a.v[k] = (a.v[k] - mu) * rstd;
        if (weighted) {
            Some<N> w = get<N>(weight + j);
#pragma unroll
            for (int k = 0; k < N; k++) a.v[k] *= w.v[k];
        }
        if (biased) {
            Some<N> b = get<N>(bias + j);
#pragma unroll
            for (int k = 0; k < N; k++) a.v[k] += b.v[k];
        }
        put<N>(y + j, a);
    });
}

KERNEL layer_norm_backward(
    const T* g, const T* x, const T* weight, const Sum* mean, const Sum* inverse, const T* pending,
    i64 rows, i64 n, bool weighted, bool more, T* out
) {
    i64 r = warp_number();
    int lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const T *gradient = g + r * n, *row = x + r * n, *base = more ? pending + r * n : row;
    T* y = out + r * n;
    Sum mu = mean[r], rstd = inverse[r], plain = 0, along_normal = 0;
    int read = common(gradient, row, weighted ? weight : row);
    along(n, lane, WARP, read, [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> d = get<N>(gradient + j), a = get<N>(row + j), w = {};
        if (weighted) w = get<N>(weight + j);
#pragma unroll
        for (int k = 0; k < N; k++) {
            Sum gw = weighted ? d.v[k] * w.v[k] : d.v[k];
            plain += gw;
            along_normal += gw * ((a.v[k] - mu) * rstd);
        }
    });
    plain = warp_sum(plain) / Sum(n);
    along_normal = warp_sum(along_normal) / Sum(n);
    int skewed = common(base, y) == read ? read : -1;
    along(n, lane, WARP, skewed, [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> d = get<N>(gradient + j), a = get<N>(row + j), w = {}, before = {};
        if (weighted) w = get<N>(weight + j);
        if (more) before = get<N>(base + j);
#pragma unroll
        for (int k = 0; k < N; k++) {
            Sum gw = weighted ? d.v[k] * w.v[k] : d.v[k];
            a.v[k] = rstd * (gw - plain - (a.v[k] - mu) * rstd * along_normal);
            if (more) a.v[k] += before.v[k];
        }
        put<N>(y + j, a);
    });
}

// The largest number so far, and the sum of exponentials relative to it.
struct Online {
    Sum most, sum;
};

__device__ inline Sum weight_of(Sum most, Sum all) {
    return most == -infinity(most) ? Sum(0) : exp(most - all);  // NaN times 0 stays NaN
}

__device__ inline Online joined(Online a, Online b) {
    Online c;
    c.most = a.most > b.most ? a.most : b.most;
    c.sum = a.sum * weight_of(a.most, c.most) + b.sum * weight_of(b.most, c.most);
    return c;
}

__device__ inline Online warp_joined(Online a) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        Online b;
        b.most = shuffle_xor(a.most, lanes);
        b.sum = shuffle_xor(a.sum, lanes);
        a = joined(a, b);
    }
    return a;
}

// Milakov and Gimelshein 2018, "Online normalizer calculation for softmax": one read of the row.
// The loss of a target that does not exist is not a number: the host need not look at targets.
KERNEL cross_entropy(const T* logits, const i64* target, i64 n, i64 ignore, Sum* loss, Sum* lse) {
    __shared__ Sum mosts[WARP], sums[WARP];
    const T* row = logits + i64(blockIdx.x) * n;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Online mine = {-infinity(Sum(0)), 0};
    along(n, threadIdx.x, blockDim.x, int(skew(row)), [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(row + j);
        Sum most = mine.most;
#pragma unroll
        for (int k = 0; k < N; k++) most = a.v[k] > most ? a.v[k] : most;
        Sum sum = mine.sum * weight_of(mine.most, most);
#pragma unroll
        for (int k = 0; k < N; k++)
            sum += a.v[k] == -infinity(most) ? Sum(0) : exp(a.v[k] - most);
        mine.most = most;
        mine.sum = sum;
    });
    mine = warp_joined(mine);
    if (lane == 0) {
        mosts[warp] = mine.most;
        sums[warp] = mine.sum;
    }
    __syncthreads();
    if (warp > 0) return;
    mine.most = lane < warps ? mosts[lane] : -infinity(Sum(0));
    mine.sum = lane < warps ? sums[lane] : Sum(0);
    mine = warp_joined(mine);
    if (lane > 0) return;
    Sum rest = log(mine.sum);
    i64 t = target[blockIdx.x];
    lse[blockIdx.x] = mine.most + rest;
    // Not lse - logit: of two large numbers, rounded, a small loss would not survive.
    Sum own = t >= 0 && t < n ? (mine.most - widen(row[t])) + rest : infinity(rest) * 0;
    loss[blockIdx.x] = t == ignore ? Sum(0) : own;
}

// A target beyond the classes has them on another rank, which subtracts its one there.
KERNEL cross_entropy_backward(
    const T* logits, const i64* target, i64 n, i64 ignore, const Sum* lse, const Sum* g, T* out
) {
    i64 r = blockIdx.x, t = target[r];
    const T* row = logits + r * n;
    T* y = out + r * n;
    Sum scale = t == ignore ? Sum(0) : g[r], shift = lse[r];
    along(n, threadIdx.x, blockDim.x, common(row, y), [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(row + j);
#pragma unroll
        for (int k = 0; k < N; k++)
            a.v[k] = scale * exp(a.v[k] - shift) - (j + k == t ? scale : Sum(0));
        put<N>(y + j, a);
    });
}

// table[index[r]] += g[r], row after row: `order` sorts the indices and keeps that of equal ones.
// A block has one place in that order; the first of equal indices adds all of their rows.
KERNEL embedding_backward(
    const T* g, const i64* index, const i64* order, i64 rows, i64 n, i64 size, T* table
) {
    i64 first = blockIdx.x, target = index[order[first]];
    if (target < 0 || target >= size) return;
    if (first > 0 && index[order[first - 1]] == target) return;
    T* sum = table + target * n;
    bool packed = n % PACK == 0 && skew(g) == 0 && skew(table) == 0;
    along(n, threadIdx.x, blockDim.x, packed ? 0 : -1, [&](i64 j, auto count) {
        const int N = decltype(count)::n;
        Some<N> total = get<N>(sum + j);
        for (i64 k = first; k < rows && index[order[k]] == target; k++) {
            Some<N> a = get<N>(g + order[k] * n + j);
#pragma unroll
            for (int i = 0; i < N; i++) total.v[i] += a.v[i];
        }
        put<N>(sum + j, total);
    });
}
