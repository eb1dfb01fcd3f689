// Vectors of `lanes` numbers, through the vector extensions that GCC and Clang share: the compiler maps
// them to SSE, AVX, AVX-512 or NEON registers, or to several of them (double).
//
// This file and every file that includes it is compiled once per instruction set, into a namespace of its
// own. The linker would keep a function that two builds share only once, perhaps with instructions that
// this CPU does not have. For the same reason nothing here comes from the C++ library, except index
// sequences, which generate no code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#include "acdc_kernels.h"

#ifdef __SSE__
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#define ACDC_UNROLL _Pragma("GCC unroll 16")

namespace ACDC_ISA {
namespace {

constexpr int lanes = ACDC_LANES;

template <class real> struct vector_of { typedef real type __attribute__((vector_size(lanes * sizeof(real)))); };
template <class real> using vec = typename vector_of<real>::type;
// The result of a comparison: all bits are set in the lanes where it is true.
template <class real> using mask = decltype(vec<real>() > vec<real>());
// The same vector at an address that is only aligned to one number.
template <class real> struct loose_of {
    typedef real type __attribute__((vector_size(lanes * sizeof(real)), aligned(alignof(real)), may_alias));
};

template <class real> inline vec<real> load(const real* p) { return *reinterpret_cast<const vec<real>*>(p); }
template <class real> inline void store(real* p, vec<real> v) { *reinterpret_cast<vec<real>*>(p) = v; }
// Stores around the caches. A later read then comes from memory. An ordinary store would first read a
// cache line that is not in the cache.
inline void stream(float* p, vec<float> v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
}
inline void stream(double* p, vec<double> v) { store(p, v); }
// Must run before other threads read the streamed memory.
inline void end_stream() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}
template <class real> inline vec<real> load_loose(const real* p) {
    return *reinterpret_cast<const typename loose_of<real>::type*>(p);
}
template <class real> inline void store_loose(real* p, vec<real> v) {
    *reinterpret_cast<typename loose_of<real>::type*>(p) = v;
}
// All lanes are written out, so that it compiles to one broadcast from memory. Adding a value to zero
// would cost an addition, too.
template <class real, std::size_t... i> inline vec<real> splat(real value, std::index_sequence<i...>) {
    return vec<real>{((void)i, value)...};
}
template <class real> inline vec<real> splat(real value) { return splat(value, std::make_index_sequence<lanes>()); }
template <class real> inline vec<real> keep(mask<real> m, vec<real> v) { return (vec<real>)(m & (mask<real>)v); }
template <class real> inline vec<real> select(mask<real> m, vec<real> yes, vec<real> no) {
    return (vec<real>)((m & (mask<real>)yes) | (~m & (mask<real>)no));
}

template <class number> inline number least(number a, number b) { return a < b ? a : b; }
template <class number> inline number most(number a, number b) { return a < b ? b : a; }

inline void prefetch_read(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// All ones in the first `count` lanes.
template <class real> inline mask<real> first_lanes(int count) {
    mask<real> m{};
    for (int lane = 0; lane < lanes; ++lane) m[lane] = lane < count ? -1 : 0;
    return m;
}

// ---- shuffles ----
// `halves<s>`: of every 2s numbers, the first (or last) s of a, then the first (or last) s of b.
template <int s, bool last, class real, std::size_t... i>
inline vec<real> halves(vec<real> a, vec<real> b, std::index_sequence<i...>) {
    return __builtin_shufflevector(
        a, b, (int(i) / (2 * s) * 2 * s + int(i) % s + (last ? s : 0) + (int(i) % (2 * s) < s ? 0 : lanes))...);
}
template <int s, bool last, class real> inline vec<real> halves(vec<real> a, vec<real> b) {
    return halves<s, last, real>(a, b, std::make_index_sequence<lanes>());
}
// `pairs`: in every 4 numbers, the first (or last) two of a and of b, interleaved: unpcklps, unpckhps.
template <bool last, class real, std::size_t... i>
inline vec<real> pairs(vec<real> a, vec<real> b, std::index_sequence<i...>) {
    return __builtin_shufflevector(
        a, b, (int(i) / 4 * 4 + int(i) % 4 / 2 + (last ? 2 : 0) + (int(i) % 2 ? lanes : 0))...);
}
template <bool last, class real> inline vec<real> pairs(vec<real> a, vec<real> b) {
    return pairs<last, real>(a, b, std::make_index_sequence<lanes>());
}

// p[0], p[2], p[4] and so on. Reads no number after the last of them.
template <class real, std::size_t... i> inline vec<real> every_second(const real* p, std::index_sequence<i...>) {
    return __builtin_shufflevector(load_loose(p), load_loose(p + lanes - 1),
                                   (2 * int(i) < lanes ? 2 * int(i) : 2 * int(i) + 1)...);
}
template <class real> inline vec<real> every_second(const real* p) {
    return every_second<real>(p, std::make_index_sequence<lanes>());
}

// Calls some(i) for vectors that begin at i and cover [0, count). The last one may overlap the one before it. Numbers
// that fill no vector get one(i) each.
template <class Some, class One> inline void over(int64_t count, Some some, One one) {
    if (count < lanes) {
        for (int64_t i = 0; i < count; ++i) one(i);
        return;
    }
    for (int64_t i = 0; i + lanes <= count; i += lanes) some(i);
    if (count % lanes) some(count - lanes);
}

// Transposes lanes x lanes numbers in place: exchange ever smaller blocks across the diagonal.
template <class real, int s = lanes / 2> inline void transpose(vec<real>* rows) {
    ACDC_UNROLL
    for (int i = 0; i < lanes; ++i) {
        if (i & s) continue;
        const vec<real> a = rows[i], b = rows[i + s];
        rows[i] = halves<s, false, real>(a, b);
        rows[i + s] = halves<s, true, real>(a, b);
    }
    if constexpr (s > 1) transpose<real, s / 2>(rows);
}

// Lane j of the result is the sum of the lanes of rows[j]. Every step halves the number of vectors by
// adding two halves of each. This costs a third of summing one vector after the other.
template <class real, int count = lanes> inline vec<real> sums_of(vec<real>* rows) {
    constexpr int half = count / 2;
    ACDC_UNROLL
    for (int i = 0; i < half; ++i) {
        const vec<real> a = rows[i], b = rows[i + half];
        if constexpr (half >= 4)
            rows[i] = halves<half, false, real>(a, b) + halves<half, true, real>(a, b);
        else
            rows[i] = pairs<false, real>(a, b) + pairs<true, real>(a, b);
    }
    if constexpr (half > 1) return sums_of<real, half>(rows);
    else return rows[0];
}

// ---- threads ----
// Runs body(thread, first, last) on `threads` threads, each with its own range of [0, total). The split
// depends on nothing else. So a thread finds the data of the previous kernel in its cache, and a sum over
// threads is bitwise the same every time.
template <class Body> inline void split(int64_t total, int threads, Body body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
            body(int(self), total * self / team, total * (self + 1) / team);
        }
        return;
    }
#endif
    (void)threads;
    body(0, int64_t(0), total);
}

// A kernel consists of `begin`, `work` on numbered items, and `end`. Every block has `items` items. Runs
// everything at once, or only the share that a caller going block by block asks for.
template <class Kernel>
inline void run(Kernel& kernel, int64_t blocks, int64_t items, int threads, const acdc_share* share) {
    if (!share) {
        kernel.begin();
        split(blocks * items, threads, [&](int thread, int64_t first, int64_t last) {
            kernel.work(thread, first, last);
        });
        kernel.end();
    } else if (share->stage == ACDC_BEGIN) {
        kernel.begin();
    } else if (share->stage == ACDC_WORK) {
        kernel.work(share->thread, share->first_block * items, share->last_block * items);
    } else {
        kernel.end();
    }
}

// A kernel that has nothing to do in `begin` and `end`.
template <class Work>
inline void each(int64_t blocks, int64_t items, int threads, const acdc_share* share, Work body) {
    struct {
        Work& body;
        void begin() const {}
        void work(int thread, int64_t first, int64_t last) const { body(thread, first, last); }
        void end() const {}
    } kernel{body};
    run(kernel, blocks, items, threads, share);
}

// ---- buffers ----
// The image as one thread sees it.
template <class real> inline acdc_image of_thread(acdc_image image, int thread) {
    if (image.per_thread && image.origin) {
        image.origin = static_cast<real*>(image.origin) + thread * image.block;
        image.block = 0;
    }
    return image;
}

template <class real> inline real* plane(const acdc_image& image, int64_t block, int64_t channel) {
    return static_cast<real*>(image.origin) + block * image.block + channel * image.channel;
}

// How many lanes of this block and column hold a sample.
inline int live_lanes(const acdc_image& image, int64_t block, int64_t column) {
    const int64_t left = image.samples - block * image.per_block - column * image.per_column;
    return int(most<int64_t>(0, least<int64_t>(left, lanes)));
}

// Adds up the partial sums of all threads: partial[thread][count][lanes] -> sums[count].
template <class real> inline void add_partial(const real* partial, int threads, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; ++i) {
        double sum = 0;
        for (int thread = 0; thread < threads; ++thread)
            for (int lane = 0; lane < lanes; ++lane) sum += partial[(thread * count + i) * lanes + lane];
        sums[i] = sum;
    }
}

template <class real> inline void clear(real* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

}  // namespace
}  // namespace ACDC_ISA
