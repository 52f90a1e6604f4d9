// Arrays of attention, (B, H, T, D), and how blocks divide the rows of all samples and heads.
#pragma once

// x[b, h, t, :] of an array whose last dimension alone is contiguous.
struct Strides {
    i64 b, h, t;
};

__device__ inline i64 start_of(const Strides& s, i64 b, i64 h) { return b * s.b + h * s.h; }

// Of a block its sample, head, the number of both, and the first of its rows.
struct Part {
    i64 b, h, number, first;
};

// All blocks lie along x: in y and z a grid has no more than 65,535.
__device__ inline Part part_of(i64 heads, i64 rows, i64 each) {
    i64 parts = (rows + each - 1) / each, number = blockIdx.x / parts;
    return {number / heads, number % heads, number, blockIdx.x % parts * each};
}
