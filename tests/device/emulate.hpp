// Runs CUDA kernels on the CPU: the threads of a block are fibers of one thread, which run one at a
// time until they wait for others. Put before a source; `EMULATED(kernel)` makes it callable.
//
// What it shows: indexing, arithmetic, barriers that are missing (in one of two orders of threads
// a read comes before the write) or not reached by all. What it cannot show: speed, and whatever
// concerns the real memory model beyond that.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::block().dynamic

struct dim3 {
    unsigned x, y, z;
};

namespace emulated {

enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    jmp_buf place;
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    int number = 0, parity = 0;
    bool started = false;
    State state = DONE;
};

struct Block {
    std::vector<Fiber*> fibers;
    Fiber* current = nullptr;
    jmp_buf home;
    void (*body)(void*) = nullptr;
    void* closure = nullptr;
    dim3 threads, blocks, index;
    int count = 0, at_block = 0, at_warp[64];
    unsigned long long slots[64][2][32];
    double fragments[64][2][32][12];
    unsigned char* dynamic = nullptr;
};

inline Block& block() {
    static thread_local Block* b = new Block();
    return *b;
}

inline void away() {
    Fiber* me = block().current;
    if (!_setjmp(me->place)) _longjmp(block().home, 1);
}

inline void live() {
    for (;;) {
        block().body(block().closure);
        block().current->state = DONE;
        away();
    }
}

inline void resume(Fiber* f) {
    block().current = f;
    if (_setjmp(block().home)) return;
    if (f->started) _longjmp(f->place, 1);
    f->started = true;
    f->stack.resize(256 << 10);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.data();
    f->context.uc_stack.ss_size = f->stack.size();
    makecontext(&f->context, live, 0);
    setcontext(&f->context);
}

inline int lanes(int warp) {
    int rest = block().count - 32 * warp;
    return rest < 32 ? rest : 32;
}

inline void wait(int& arrived, int expected, int first, State state) {
    Block& b = block();
    b.current->state = state;
    if (++arrived < expected) return away();
    arrived = 0;
    for (int i = first; i < first + expected; i++) b.fibers[i]->state = READY;
}

inline void warp_barrier() {
    Block& b = block();
    int warp = b.current->number / 32;
    wait(b.at_warp[warp], lanes(warp), 32 * warp, AT_WARP);
}

// All threads of one block, in the order 0 (upwards) or 1 (downwards); 1 if some wait for ever.
inline int run_block(int order) {
    Block& b = block();
    for (int i = 0; i < b.count; i++) {
        Fiber* f = b.fibers[i];
        f->number = i;
        f->parity = 0;
        f->state = READY;
        f->index = {i % b.threads.x, i / b.threads.x % b.threads.y,
                    i / (b.threads.x * b.threads.y)};
    }
    b.at_block = 0;
    memset(b.at_warp, 0, sizeof b.at_warp);
    for (int done = 0, ran = 1; done < b.count; ran = 0) {
        for (int k = 0; k < b.count; k++) {
            Fiber* f = b.fibers[order ? b.count - 1 - k : k];
            if (f->state != READY) continue;
            ran = 1;
            resume(f);
            done += f->state == DONE;
        }
        if (!ran && done < b.count) {  // stacks are left as they are: these fibers never go on
            for (int i = 0; i < b.count; i++) b.fibers[i] = new Fiber();
            return 1;
        }
        if (done == b.count) break;
    }
    return 0;
}

struct Call {
    dim3 blocks, threads;
    unsigned long long shared;
    int order;
    void** arguments;
};

template <class F> int run(const Call& c, F body) {
    Block& b = block();
    b.threads = c.threads;
    b.blocks = c.blocks;
    b.count = int(c.threads.x * c.threads.y * c.threads.z);
    while (int(b.fibers.size()) < b.count) b.fibers.push_back(new Fiber());
    // Behind the end lie bytes that must not change.
    std::vector<unsigned char> dynamic(c.shared + 64 + 16);
    b.dynamic = dynamic.data() + (16 - reinterpret_cast<size_t>(dynamic.data()) % 16);
    b.closure = &body;
    b.body = [](void* p) { (*static_cast<F*>(p))(); };
    unsigned long long all = 1ull * c.blocks.x * c.blocks.y * c.blocks.z;
    for (unsigned long long k = 0; k < all; k++) {
        unsigned long long i = c.order ? all - 1 - k : k;
        b.index = {unsigned(i % c.blocks.x), unsigned(i / c.blocks.x % c.blocks.y),
                   unsigned(i / c.blocks.x / c.blocks.y)};
        memset(b.dynamic, 0xff, c.shared + 48);  // not numbers
        if (run_block(c.order)) return 1;
        for (int j = 0; j < 48; j++)
            if (b.dynamic[c.shared + j] != 0xff) return 2;
    }
    return 0;
}

template <class... P, size_t... I>
int unpack(void (*kernel)(P...), const Call& c, std::index_sequence<I...>) {
    return run(c, [&] { kernel(*static_cast<P*>(c.arguments[I])...); });
}

template <class... P> int launch(void (*kernel)(P...), const Call& c) {
    return unpack(kernel, c, std::index_sequence_for<P...>());
}

// The type of a parameter: of NumPy's character and size, after "*" for a pointer, or "c*" for one
// to what is only read.
template <class P> std::string type_of() {
    typedef std::remove_cv_t<std::remove_pointer_t<P>> V;
    const char* kind = std::is_same_v<V, bool>             ? "b"
                       : std::is_floating_point_v<V>       ? "f"
                       : std::is_integral_v<V>             ? (std::is_signed_v<V> ? "i" : "u")
                                                           : "V";
    const char* pointer = !std::is_pointer_v<P>                              ? ""
                          : std::is_const_v<std::remove_pointer_t<P>> ? "c*"
                                                                      : "*";
    return pointer + (kind + std::to_string(sizeof(V)));
}

template <class... P> std::string types(void (*)(P...)) {
    std::string all;
    ((all += type_of<P>() + " "), ...);
    return all;
}

template <class V> V exchange(V value, int from) {
    static_assert(sizeof(V) <= 8);
    Block& b = block();
    Fiber* me = b.current;
    int warp = me->number / 32, parity = me->parity;
    me->parity = 1 - parity;
    memcpy(&b.slots[warp][parity][me->number % 32], &value, sizeof(V));
    warp_barrier();
    memcpy(&value, &b.slots[warp][parity][from % 32], sizeof(V));
    return value;
}

// c += a b as "Parallel Thread Execution ISA", "Matrix Fragments for mma.m16n8k16", has it for 16
// bits: element i of a lies in row group (+ 8 where i is 2, 3, 6, 7) and column 2 member + i % 2
// (+ 8 from i = 4 on), of b in row 2 member + i % 2 (+ 8 from i = 2 on) and column group, of c in
// row group (+ 8 from i = 2 on) and column 2 member + i % 2, with lane = 4 group + member.
template <class S, class P, class W>
void multiply(S (&c)[4], const P (&a)[4], const P (&b)[2], W widen) {
    Block& b_ = block();
    Fiber* me = b_.current;
    int warp = me->number / 32, lane = me->number % 32, parity = me->parity;
    me->parity = 1 - parity;
    auto& all = b_.fragments[warp][parity];
    for (int i = 0; i < 4; i++) {
        all[lane][2 * i] = widen(a[i].x);
        all[lane][2 * i + 1] = widen(a[i].y);
    }
    for (int i = 0; i < 2; i++) {
        all[lane][8 + 2 * i] = widen(b[i].x);
        all[lane][8 + 2 * i + 1] = widen(b[i].y);
    }
    warp_barrier();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            int member = k % 8 / 2, element = k % 2 + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0);
            S left = S(all[4 * (row % 8) + member][element]);
            S right = S(all[4 * column + member][8 + k % 2 + (k >= 8 ? 2 : 0)]);
            c[i] += left * right;
        }
    }
}

}  // namespace emulated

#ifndef BY_SHUFFLES
#define OWN_MULTIPLY                                                                       \
    template <class P> inline void multiply(Sum (&c)[4], const P (&a)[4], const P (&b)[2]) { \
        emulated::multiply(c, a, b, [](auto x) { return widen(x); });                      \
    }
#endif

#define threadIdx (emulated::block().current->index)
#define blockIdx (emulated::block().index)
#define blockDim (emulated::block().threads)
#define gridDim (emulated::block().blocks)

inline void __syncthreads() {
    emulated::Block& b = emulated::block();
    emulated::wait(b.at_block, b.count, 0, emulated::AT_BLOCK);
}

template <class V> V __shfl_sync(unsigned, V value, int lane) {
    return emulated::exchange(value, lane);
}

template <class V> V __shfl_xor_sync(unsigned, V value, int lanes) {
    return emulated::exchange(value, emulated::block().current->number % 32 ^ lanes);
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// IEEE 754 binary16, to nearest, of two the even one.
inline float float_of_half(unsigned short half) {
    unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, rest = half & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | rest << 13);
    float size = exponent ? ldexpf(float(1024 + rest), int(exponent) - 25) : ldexpf(float(rest), -24);
    return __uint_as_float(sign | __float_as_uint(size));
}

inline unsigned short half_of_float(float x) {
    unsigned bits = __float_as_uint(x);
    unsigned short sign = bits >> 16 & 0x8000u;
    float size = fabsf(x);
    if (size == 0) return sign;
    if (x != x) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);
    int scale = exponent < -13 ? -24 : exponent - 11;  // of the last bit
    unsigned whole = unsigned(rintf(ldexpf(size, -scale)));
    if (scale == -24) return sign | whole;
    return sign | (unsigned((scale + 25) << 10) + (whole - 1024));
}

#define EMULATED(name)                                                                      \
    extern "C" int run_##name(const emulated::Call* call) {                                 \
        return emulated::launch(&name, *call);                                              \
    }                                                                                       \
    extern "C" const char* types_##name() {                                                 \
        static const std::string all = emulated::types(&name);                              \
        return all.c_str();                                                                 \
    }
