// The kept elements of a tensor of dense size: as a vector, and one step of an optimizer on them. All of it moves
// memory and does little arithmetic, so this file is compiled for the baseline only.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "acdc_kernels.h"

namespace {

constexpr int64_t CHUNK = 1024;  // elements of a dense tensor that are made in the first-level cache
constexpr int64_t STREAMS = 4;   // places of a dense tensor that one thread reads in turn: more bandwidth than one

// The part of [0, count) that belongs to one of the threads.
struct Part {
    int64_t begin, end;
    Part(int64_t count, int thread, int threads)
        : begin(count * thread / threads), end(count * (thread + 1) / threads) {}
};

template <class T>
void gather(const T* dense, const int32_t* index, int64_t count, T* vector, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        const Part part(count, t, threads);
        const int64_t length = (part.end - part.begin) / STREAMS;
        for (int64_t i = part.begin; i < part.begin + length; ++i)
            for (int64_t s = 0; s < STREAMS; ++s) vector[i + s * length] = dense[index[i + s * length]];
        for (int64_t i = part.begin + STREAMS * length; i < part.end; ++i) vector[i] = dense[index[i]];
    }
}

// Calls make(kept elements of the chunk, first of them, its first element) -> their new values, for each chunk
// of a dense tensor, and writes these values and zeros. Every chunk is written once: a fill of zeros and a
// scatter would go through most cache lines twice.
template <class T, class Make>
void each_chunk(const int32_t* index, int64_t count, T* dense, int64_t size, int threads, Make make) {
    const int64_t chunks = (size + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        const Part part(chunks, t, threads);
        alignas(64) T chunk[CHUNK], values[CHUNK];
        const int32_t* const end = index + count;
        const int32_t* at = std::lower_bound(index, end, part.begin * CHUNK);
        for (int64_t c = part.begin; c < part.end; ++c) {
            const int64_t begin = c * CHUNK, length = std::min(CHUNK, size - begin);
            int64_t kept = 0;
            while (at + kept < end && at[kept] < begin + length) ++kept;
            make(kept, at - index, dense + begin, begin, values);
            std::memset(chunk, 0, std::size_t(length) * sizeof(T));
            for (int64_t i = 0; i < kept; ++i) chunk[at[i] - begin] = values[i];
            std::memcpy(dense + begin, chunk, std::size_t(length) * sizeof(T));
            at += kept;
        }
    }
}

template <class T>
void expand(const T* vector, const int32_t* index, int64_t count, T* dense, int64_t size, int threads) {
    each_chunk(index, count, dense, size, threads, [=](int64_t kept, int64_t first, const T*, int64_t, T* values) {
        std::memcpy(values, vector + first, std::size_t(kept) * sizeof(T));
    });
}

template <bool WHERE, class T> void clear(const uint8_t* mask, T* dense, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        const Part part(size, t, threads);
        for (int64_t i = part.begin; i < part.end; ++i) dense[i] = (mask[i] != 0) == WHERE ? T(0) : dense[i];
    }
}

template <class T> void clear(const uint8_t* mask, bool where, void* dense, int64_t size, int threads) {
    if (where)
        clear<true>(mask, static_cast<T*>(dense), size, threads);
    else
        clear<false>(mask, static_cast<T*>(dense), size, threads);
}

// One step of the kept elements: update(weights, gradients, first, kept) changes the weights of a chunk.
template <class Update> void step(const acdc_kept* k, int threads, Update update) {
    const int32_t* index = k->index;
    const float* grad = k->grad;
    each_chunk(index, k->count, k->weight, k->size, threads,
               [=](int64_t kept, int64_t first, const float* weight, int64_t begin, float* w) {
                   alignas(64) float g[CHUNK];
                   for (int64_t i = 0; i < kept; ++i) {
                       const int32_t at = index[first + i];
                       w[i] = weight[at - begin];
                       g[i] = grad[at];
                   }
                   update(w, g, first, kept);
               });
}

}  // namespace

extern "C" {

void acdc_gather(const void* dense, const int32_t* index, int64_t count, void* vector, int32_t bytes,
                 int32_t threads) {
    if (bytes == 2) gather(static_cast<const uint16_t*>(dense), index, count, static_cast<uint16_t*>(vector), threads);
    if (bytes == 4) gather(static_cast<const uint32_t*>(dense), index, count, static_cast<uint32_t*>(vector), threads);
    if (bytes == 8) gather(static_cast<const uint64_t*>(dense), index, count, static_cast<uint64_t*>(vector), threads);
}

void acdc_expand(const void* vector, const int32_t* index, int64_t count, void* dense, int64_t size, int32_t bytes,
                 int32_t threads) {
    if (bytes == 2)
        expand(static_cast<const uint16_t*>(vector), index, count, static_cast<uint16_t*>(dense), size, threads);
    if (bytes == 4)
        expand(static_cast<const uint32_t*>(vector), index, count, static_cast<uint32_t*>(dense), size, threads);
    if (bytes == 8)
        expand(static_cast<const uint64_t*>(vector), index, count, static_cast<uint64_t*>(dense), size, threads);
}

void acdc_clear(const uint8_t* mask, int32_t where, void* dense, int64_t size, int32_t bytes, int32_t threads) {
    if (bytes == 2) clear<uint16_t>(mask, where != 0, dense, size, threads);
    if (bytes == 4) clear<uint32_t>(mask, where != 0, dense, size, threads);
    if (bytes == 8) clear<uint64_t>(mask, where != 0, dense, size, threads);
}

void acdc_sgd(const acdc_kept* k, const acdc_sgd_args* a, int32_t threads) {
    const acdc_sgd_args o = *a;
    step(k, threads, [=](float* w, float* g, int64_t first, int64_t kept) {
        for (int64_t i = 0; i < kept; ++i) g[i] = o.sign * g[i] + o.weight_decay * w[i];
        if (float* const m = o.momentum_buffer ? o.momentum_buffer + first : nullptr)
            for (int64_t i = 0; i < kept; ++i) {
                m[i] = o.momentum * m[i] + o.share * g[i];
                g[i] = o.nesterov ? g[i] + o.momentum * m[i] : m[i];
            }
        for (int64_t i = 0; i < kept; ++i) w[i] -= o.lr * g[i];
    });
}

void acdc_adam(const acdc_kept* k, const acdc_adam_args* a, int32_t threads) {
    const acdc_adam_args o = *a;
    step(k, threads, [=](float* w, float* g, int64_t first, int64_t kept) {
        float *const m = o.exp_avg + first, *const v = o.exp_avg_sq + first;
        for (int64_t i = 0; i < kept; ++i) {
            const float grad = o.sign * g[i] + o.weight_decay * w[i];
            m[i] += o.share1 * (grad - m[i]);
            v[i] = o.beta2 * v[i] + o.share2 * grad * grad;
            w[i] = o.shrink * w[i] - o.step_size * (m[i] / (std::sqrt(v[i]) / o.root + o.eps));
        }
    });
}
}
