// What attention needs for each query, by a warp: apart from the tiles, whose size it does not know.
#include "common.cuh"
#include "heads.cuh"

// delta = sum of g * out for each query, by a warp.
KERNEL attention_delta(
    const T* g, const T* out, Sum* delta, Strides gs, Strides os, i64 heads, i64 queries, i64 depth
) {
    auto [b, h, number, first] = part_of(heads, queries, blockDim.x / WARP);
    i64 r = first + threadIdx.x / WARP;
    if (r >= queries) return;
    const T *x = g + start_of(gs, b, h) + r * gs.t, *y = out + start_of(os, b, h) + r * os.t;
    Sum sum = 0;
    for (i64 j = threadIdx.x % WARP; j < depth; j += WARP) sum += widen(x[j]) * widen(y[j]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[number * queries + r] = sum;
}

// Of attention to some keys (out, lse) that to these and others (other, total): a mean weighted by
// the sums of exponentials (Milakov and Gimelshein 2018), by a warp for each query.
KERNEL join_attention(
    T* out, Sum* lse, const T* other, const Sum* total, Strides os, Strides rs, i64 heads,
    i64 queries, i64 depth
) {
    auto [b, h, number, first] = part_of(heads, queries, blockDim.x / WARP);
    i64 r = first + threadIdx.x / WARP, place = number * queries + r;
    if (r >= queries) return;
    Sum x = shuffle(lse[place], 0), y = total[place], most = x > y ? x : y;  // read by all by then
    Sum mine = exp(x - most), others = exp(y - most), both = mine + others;
    T* row = out + start_of(os, b, h) + r * os.t;
    const T* more = other + start_of(rs, b, h) + r * rs.t;
    for (i64 j = threadIdx.x % WARP; j < depth; j += WARP)
        row[j] = narrow((mine * widen(row[j]) + others * widen(more[j])) / both);
    if (threadIdx.x % WARP == 0) lse[place] = most + log(both);
}
