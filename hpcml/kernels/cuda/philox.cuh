// The generator of all random numbers: Philox4x32-10 (Salmon et al. 2011).
#pragma once

struct Words {
    u32 v[4];
    // By selections: an index that is not constant would move the words to local memory.
    __device__ u32 at(int i) const { return i < 2 ? (i == 0 ? v[0] : v[1]) : (i == 2 ? v[2] : v[3]); }
};

__device__ inline Words philox(u64 key, u32 c0, u32 c1, u32 c2, u32 c3) {
    u32 k0 = u32(key), k1 = u32(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 a = u64(0xD2511F53u) * c0, b = u64(0xCD9E8D57u) * c2;
        u32 n0 = u32(b >> 32) ^ c1 ^ k0, n2 = u32(a >> 32) ^ c3 ^ k1;
        c1 = u32(b);
        c3 = u32(a);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    Words w = {{c0, c1, c2, c3}};
    return w;
}
