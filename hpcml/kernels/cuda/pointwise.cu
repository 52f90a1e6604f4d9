// Element-wise kernels: GELU, the update of optimizers, and sums of squares of blocks.
#include "common.cuh"

#define ROOT_2 Sum(1.4142135623730951)
#define INVERSE_ROOT_2PI Sum(0.3989422804014327)
#define ROOT_2_OVER_PI Sum(0.7978845608028654)
#define CUBIC Sum(0.044715)

template <class F> __device__ inline void map(const T* x, T* out, i64 n, F f) {
    along(n, first_thread(), all_threads(), common(x, out), [&](i64 i, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(x + i);
#pragma unroll
        for (int k = 0; k < N; k++) a.v[k] = f(a.v[k]);
        put<N>(out + i, a);
    });
}

template <class F> __device__ inline void map(const T* g, const T* x, T* out, i64 n, F f) {
    along(n, first_thread(), all_threads(), common(g, x, out), [&](i64 i, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(g + i), b = get<N>(x + i);
#pragma unroll
        for (int k = 0; k < N; k++) a.v[k] = f(a.v[k], b.v[k]);
        put<N>(out + i, a);
    });
}

// erfc keeps the small tail of large negative x.
__device__ inline Sum normal_cdf(Sum x) { return Sum(0.5) * erfc(-x / ROOT_2); }

KERNEL gelu(const T* x, T* out, i64 n) {
    map(x, out, n, [](Sum v) { return v * normal_cdf(v); });
}

KERNEL gelu_backward(const T* g, const T* x, T* out, i64 n) {
    map(g, x, out, n, [](Sum d, Sum v) {
        return d * (normal_cdf(v) + v * INVERSE_ROOT_2PI * exp(Sum(-0.5) * v * v));
    });
}

KERNEL gelu_tanh(const T* x, T* out, i64 n) {
    map(x, out, n, [](Sum v) {
        return Sum(0.5) * v * (1 + tanh(ROOT_2_OVER_PI * v * (1 + CUBIC * v * v)));
    });
}

KERNEL gelu_tanh_backward(const T* g, const T* x, T* out, i64 n) {
    map(g, x, out, n, [](Sum d, Sum v) {
        Sum t = tanh(ROOT_2_OVER_PI * v * (1 + CUBIC * v * v));
        Sum slope = ROOT_2_OVER_PI * (1 + 3 * CUBIC * v * v);
        return d * Sum(0.5) * (1 + t + v * (1 - t * t) * slope);
    });
}

KERNEL relu_backward(const T* g, const T* y, T* out, i64 n) {
    map(g, y, out, n, [](Sum d, Sum v) { return v <= 0 ? Sum(0) : d; });
}

// out[k] = sum of squares of x[k * block ..], a block of threads for each.
KERNEL block_squares(const T* x, i64 block, double* out) {
    const T* mine = x + blockIdx.x * block;
    double total = 0;
    along(block, threadIdx.x, blockDim.x, int(skew(mine)), [&](i64 i, auto count) {
        const int N = decltype(count)::n;
        Some<N> a = get<N>(mine + i);
#pragma unroll
        for (int k = 0; k < N; k++) total += double(a.v[k]) * double(a.v[k]);
    });
    total = block_sum(total);
    if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// Gradients are of type T, what is updated of type Sum: parameters, or float masters of 16 bits.
// Where these are of another size than T a pack of them takes two instructions.
__device__ inline int common_of(const Sum* p, const T* g, const Sum* m) {
    return skew(p) == 0 && skew(g) == 0 && skew(m) == 0 ? 0 : -1;
}

KERNEL adam_update(
    Sum* p, const T* g, Sum* m, Sum* v, i64 n, Sum scale, Sum lr, Sum beta1, Sum beta2, Sum eps,
    Sum decay, Sum correct1, Sum correct2, bool decoupled
) {
    Sum keep = decoupled ? 1 - lr * decay : Sum(1), couple = decoupled ? Sum(0) : decay;
    Sum step = lr / correct1, inverse2 = 1 / correct2;
    int skewed = skew(v) == 0 ? common_of(p, g, m) : -1;
    along(n, first_thread(), all_threads(), skewed, [&](i64 i, auto count) {
        const int N = decltype(count)::n;
        Some<N> gradient = get<N>(g + i);
        Some<N> parameter = get<N>(p + i), first = get<N>(m + i), second = get<N>(v + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            Sum d = gradient.v[k] * scale + couple * parameter.v[k];
            first.v[k] = beta1 * first.v[k] + (1 - beta1) * d;
            second.v[k] = beta2 * second.v[k] + (1 - beta2) * d * d;
            Sum change = step * first.v[k] / (sqrt(second.v[k]) * inverse2 + eps);
            parameter.v[k] = keep * parameter.v[k] - change;
        }
        put<N>(p + i, parameter);
        put<N>(m + i, first);
        put<N>(v + i, second);
    });
}

KERNEL sgd_update(
    Sum* p, const T* g, Sum* velocity, i64 n, Sum scale, Sum lr, Sum momentum, Sum rest, Sum decay,
    bool nesterov
) {
    along(n, first_thread(), all_threads(), common_of(p, g, velocity), [&](i64 i, auto count) {
        const int N = decltype(count)::n;
        Some<N> gradient = get<N>(g + i), parameter = get<N>(p + i), speed = get<N>(velocity + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            Sum d = gradient.v[k] * scale + decay * parameter.v[k];
            speed.v[k] = momentum * speed.v[k] + rest * d;
            parameter.v[k] -= lr * (nesterov ? d + momentum * speed.v[k] : speed.v[k]);
        }
        put<N>(p + i, parameter);
        put<N>(velocity + i, speed);
    });
}

KERNEL sgd_plain_update(Sum* p, const T* g, i64 n, Sum scale, Sum lr, Sum decay) {
    along(n, first_thread(), all_threads(), common_of(p, g, p), [&](i64 i, auto count) {
        const int N = decltype(count)::n;
        Some<N> gradient = get<N>(g + i), parameter = get<N>(p + i);
#pragma unroll
        for (int k = 0; k < N; k++)
            parameter.v[k] -= lr * (gradient.v[k] * scale + decay * parameter.v[k]);
        put<N>(p + i, parameter);
    });
}
