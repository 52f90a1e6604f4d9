// Exact attention in tiles, without storing the probabilities (Dao 2023, "FlashAttention-2").
//
// A block goes over the rows of the other side: queries over keys in forward and for dq, keys over
// queries for dk and dv, so that no two blocks add to the same number.
#include "tiles.cuh"
#include "heads.cuh"
#include "philox.cuh"

// Which rows of a batch and head there are, and what the mask of dropout depends on.
struct Shape {
    i64 heads, queries, keys, depth, causal, head, row0, key0;
    u64 key, first;
    i64 threshold;
};

// Of a block its sample, head, their number and the first of its rows; of a thread its row, and 8
// further on, and the first of its columns in each 8, halved.
struct Place {
    i64 b, h, number, first, row;
    int t;
};

__device__ inline Place place_of(i64 heads, i64 rows) {
    auto [b, h, number, first] = part_of(heads, rows, ROWS);
    int lane = threadIdx.x % WARP;
    return {b, h, number, first, first + threadIdx.x / WARP * 16 + lane / 4, lane % 4};
}

__device__ inline Sum kept_scale(const Shape& s) {
    return Sum(1 / (1 - double(s.threshold) / 4294967296.0));
}

// The mask of one sample and head; neighbouring keys share the words of a block.
struct Mask {
    u64 key;
    u32 head, sample, threshold;
    i64 row0, key0, made_row, made_block;
    Words words;

    __device__ Mask(const Shape& s, i64 b, i64 h) {
        u64 number = s.first + u64(b);
        key = s.key;
        head = u32(u64(s.head + h) ^ ((number >> 32) << 16));
        sample = u32(number);
        threshold = u32(s.threshold);
        row0 = s.row0;
        key0 = s.key0;
        made_row = made_block = -1;
    }
    __device__ bool keeps(i64 query, i64 k) {
        if (threshold == 0) return true;
        i64 row = row0 + query, column = key0 + k;
        if (row != made_row || column >> 2 != made_block) {
            made_row = row;
            made_block = column >> 2;
            words = philox(key, u32(made_block), u32(row), head, sample);
        }
        return words.at(int(column & 3)) >= threshold;
    }
};

KERNEL attention(
    const T* q, const T* k, const T* v, T* out, Sum* lse, Strides qs, Strides ks, Strides vs,
    Strides os, Shape s, Sum scale
) {
    DYNAMIC_SHARED(memory);
    T *q_tile = reinterpret_cast<T*>(memory), *k_tile = q_tile + ROWS * PITCH;
    T* v_tile = k_tile + COLUMNS * PITCH;
    auto [b, h, number, first, row, t] = place_of(s.heads, s.queries);
    i64 end = s.causal && first + ROWS < s.keys ? first + ROWS : s.keys;
    Mask mask(s, b, h);
    Sum most[2] = {-infinity(Sum(0)), -infinity(Sum(0))}, sum[2] = {0, 0};
    Sum total[DEPTH / 8][4] = {}, p[COLUMNS / 8][4];
    load_tile<ROWS>(q_tile, q + start_of(qs, b, h), qs.t, first, s.queries, s.depth);
    for (i64 start = 0; start < end; start += COLUMNS) {
        __syncthreads();
        load_tile<COLUMNS>(k_tile, k + start_of(ks, b, h), ks.t, start, s.keys, s.depth);
        load_tile<COLUMNS>(v_tile, v + start_of(vs, b, h), vs.t, start, s.keys, s.depth);
        __syncthreads();
        rows_by_rows(p, q_tile, k_tile);
        Sum now[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                i64 column = start + n * 8 + 2 * t + e % 2, r = row + e / 2 * 8;
                bool seen = column < s.keys && !(s.causal && column > r);
                p[n][e] = seen ? p[n][e] * scale : -infinity(Sum(0));
                now[e / 2] = p[n][e] > now[e / 2] ? p[n][e] : now[e / 2];
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                Sum other = shuffle_xor(now[i], lanes);
                now[i] = other > now[i] ? other : now[i];
            }
            Sum less = most[i] == -infinity(Sum(0)) ? Sum(0) : exp(most[i] - now[i]);
            most[i] = now[i];
            sum[i] *= less;
#pragma unroll
            for (int n = 0; n < DEPTH / 8; n++) {
                total[n][2 * i] *= less;
                total[n][2 * i + 1] *= less;
            }
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                bool seen = p[n][e] != -infinity(Sum(0));
                p[n][e] = seen ? exp(p[n][e] - most[e / 2]) : Sum(0);
                sum[e / 2] += p[n][e];
                i64 column = start + n * 8 + 2 * t + e % 2;
                if (!mask.keeps(row + e / 2 * 8, column)) p[n][e] *= 0;
            }
        }
        add_product(total, p, v_tile);
    }
    Sum factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        for (int lanes = 1; lanes < 4; lanes *= 2) sum[i] += shuffle_xor(sum[i], lanes);
        factor[i] = kept_scale(s) / sum[i];
        i64 r = row + 8 * i;
        if (t == 0 && r < s.queries) lse[number * s.queries + r] = most[i] + log(sum[i]);
    }
    T* place = out + start_of(os, b, h);
    store(place, os.t, first, s.queries, s.depth, total, factor[0], factor[1], false);
}

// Of scores and of the gradient dp of probabilities: p, with the mask, and the gradient ds.
__device__ inline void differentiate(
    const Shape& s, Mask& mask, i64 query, i64 k, Sum scale, Sum lse, Sum delta, Sum& p, Sum& dp
) {
    bool seen = query < s.queries && k < s.keys && !(s.causal && k > query);
    Sum probability = seen ? exp(p * scale - lse) : Sum(0);
    Sum kept = seen && mask.keeps(query, k) ? kept_scale(s) : Sum(0);
    dp = seen ? probability * (dp * kept - delta) * scale : Sum(0);
    p = probability * kept;
}

KERNEL attention_queries(
    const T* q, const T* k, const T* v, const T* g, const Sum* lse, const Sum* delta, T* dq,
    Strides qs, Strides ks, Strides vs, Strides gs, Strides dqs, Shape s, Sum scale, bool more
) {
    DYNAMIC_SHARED(memory);
    T *q_tile = reinterpret_cast<T*>(memory), *g_tile = q_tile + ROWS * PITCH;
    T *k_tile = g_tile + ROWS * PITCH, *v_tile = k_tile + COLUMNS * PITCH;
    auto [b, h, number, first, row, t] = place_of(s.heads, s.queries);
    i64 end = s.causal && first + ROWS < s.keys ? first + ROWS : s.keys;
    Mask mask(s, b, h);
    Sum shift[2], mean[2], total[DEPTH / 8][4] = {}, p[COLUMNS / 8][4], dp[COLUMNS / 8][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        i64 r = row + 8 * i, place = number * s.queries + r;
        shift[i] = r < s.queries ? lse[place] : Sum(0);
        mean[i] = r < s.queries ? delta[place] : Sum(0);
    }
    load_tile<ROWS>(q_tile, q + start_of(qs, b, h), qs.t, first, s.queries, s.depth);
    load_tile<ROWS>(g_tile, g + start_of(gs, b, h), gs.t, first, s.queries, s.depth);
    for (i64 start = 0; start < end; start += COLUMNS) {
        __syncthreads();
        load_tile<COLUMNS>(k_tile, k + start_of(ks, b, h), ks.t, start, s.keys, s.depth);
        load_tile<COLUMNS>(v_tile, v + start_of(vs, b, h), vs.t, start, s.keys, s.depth);
        __syncthreads();
        rows_by_rows(p, q_tile, k_tile);
        rows_by_rows(dp, g_tile, v_tile);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                differentiate(
                    s, mask, row + e / 2 * 8, start + n * 8 + 2 * t + e % 2, scale, shift[e / 2],
                    mean[e / 2], p[n][e], dp[n][e]
                );
        }
        add_product(total, dp, k_tile);
    }
    store(dq + start_of(dqs, b, h), dqs.t, first, s.queries, s.depth, total, 1, 1, more);
}

KERNEL attention_keys(
    const T* q, const T* k, const T* v, const T* g, const Sum* lse, const Sum* delta, T* dk, T* dv,
    Strides qs, Strides ks, Strides vs, Strides gs, Strides dks, Strides dvs, Shape s, Sum scale,
    bool more
) {
    DYNAMIC_SHARED(memory);
    __shared__ Sum shift[COLUMNS], mean[COLUMNS];
    T *k_tile = reinterpret_cast<T*>(memory), *v_tile = k_tile + ROWS * PITCH;
    T *q_tile = v_tile + ROWS * PITCH, *g_tile = q_tile + COLUMNS * PITCH;
    auto [b, h, number, first, row, t] = place_of(s.heads, s.keys);  // rows are keys
    Mask mask(s, b, h);
    Sum of_k[DEPTH / 8][4] = {}, of_v[DEPTH / 8][4] = {};
    Sum p[COLUMNS / 8][4], dp[COLUMNS / 8][4];
    load_tile<ROWS>(k_tile, k + start_of(ks, b, h), ks.t, first, s.keys, s.depth);
    load_tile<ROWS>(v_tile, v + start_of(vs, b, h), vs.t, first, s.keys, s.depth);
    i64 begin = s.causal ? first / COLUMNS * COLUMNS : 0;  // no query before sees these keys
    for (i64 start = begin; start < s.queries; start += COLUMNS) {
        __syncthreads();
        load_tile<COLUMNS>(q_tile, q + start_of(qs, b, h), qs.t, start, s.queries, s.depth);
        load_tile<COLUMNS>(g_tile, g + start_of(gs, b, h), gs.t, start, s.queries, s.depth);
        if (threadIdx.x < COLUMNS) {
            i64 r = start + threadIdx.x, place = number * s.queries + r;
            shift[threadIdx.x] = r < s.queries ? lse[place] : Sum(0);
            mean[threadIdx.x] = r < s.queries ? delta[place] : Sum(0);
        }
        __syncthreads();
        rows_by_rows(p, k_tile, q_tile);
        rows_by_rows(dp, v_tile, g_tile);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int column = n * 8 + 2 * t + e % 2;
                differentiate(
                    s, mask, start + column, row + e / 2 * 8, scale, shift[column], mean[column],
                    p[n][e], dp[n][e]
                );
            }
        }
        add_product(of_v, p, g_tile);
        add_product(of_k, dp, q_tile);
    }
    store(dk + start_of(dks, b, h), dks.t, first, s.keys, s.depth, of_k, 1, 1, more);
    store(dv + start_of(dvs, b, h), dvs.t, first, s.keys, s.depth, of_v, 1, 1, more);
}
