// Attention on points: the queries of a tile lie in the lanes of registers, so that softmax adds no lanes up.
//
// A tile is one head of one sample, and up to ACDC_QUERIES queries. Its scores lie as [key][query] in the workspace.
// Several keys, or several channels of the values, share each register that is read. The order of a sum depends on
// nothing but sizes.
#pragma once
#include "points.h"

namespace ACDC_ISA {
namespace {

template <class real> struct Attention {
    const real *queries, *keys, *values, *mask;  // of this tile; mask: null or a number for each key
    real *out, *scores;
    int64_t query_channel, key_channel, value_channel, out_channel;
    int size, value_size;  // channels of a head
    int count;             // of keys
    int first, left;       // the number of the first query, and how many there are from it on
    bool causal;
    real scale;
};

// Registers of queries in a tile, and how many keys or channels share each of them. The double kernels serve checks.
template <class real> constexpr int query_registers = sizeof(real) == 8 ? 1 : lanes == 16 ? 4 : 2;
template <class real> constexpr int sharing(int registers) {
    if (sizeof(real) == 8) return 4;
    if (lanes == 16) return registers >= 3 ? 6 : 8;  // more channels of values would need more addresses than there are
    return registers == 1 ? 8 : lanes == 8 ? 6 : 4;
}

template <class real> inline vec<real> lane_numbers() {
    vec<real> v{};
    for (int lane = 0; lane < lanes; ++lane) v[lane] = real(lane);
    return v;
}

// The scores of R keys, and the largest ones so far.
template <class real, int V, int R> inline void score_keys(const Attention<real>& t, int key, vec<real>* peak) {
    const real never = -real(__builtin_inff());
    const real *q = t.queries, *k = t.keys + key;
    vec<real> sum[R][V];
    ACDC_UNROLL
    for (int r = 0; r < R; ++r) {
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) sum[r][v] = vec<real>{};
    }
    for (int c = 0; c < t.size; ++c, q += t.query_channel, k += t.key_channel) {
        vec<real> x[V];
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) x[v] = load_loose(q + v * lanes);
        ACDC_UNROLL
        for (int r = 0; r < R; ++r) {
            ACDC_UNROLL
            for (int v = 0; v < V; ++v) sum[r][v] += splat(k[r]) * x[v];
        }
    }
    ACDC_UNROLL
    for (int r = 0; r < R; ++r) {
        const bool live = !t.mask || t.mask[key + r] != 0;
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) {
            vec<real> score = live ? sum[r][v] * splat(t.scale) : splat(never);
            const int ahead = key + r - t.first - v * lanes;  // lanes before this one must not look at the key
            if (t.causal && ahead > 0)
                score = select<real>(lane_numbers<real>() < splat(real(ahead)), splat(never), score);
            store_loose(t.scores + (int64_t(key + r) * V + v) * lanes, score);
            peak[v] = select<real>(score > peak[v], score, peak[v]);
        }
    }
}

// Makes exponentials of the scores, and returns one over their sums; 0 where a query attends to no key.
template <class real, int V> inline void soften(const Attention<real>& t, const vec<real>* peak, vec<real>* inverse) {
    const vec<real> never = splat(-real(__builtin_inff()));
    vec<real> top[V], sum[V];
    ACDC_UNROLL
    for (int v = 0; v < V; ++v) top[v] = select<real>(peak[v] == never, vec<real>{}, peak[v]), sum[v] = vec<real>{};
    real* score = t.scores;
    for (int key = 0; key < t.count; ++key, score += V * lanes) {
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) {
            const vec<real> e = exp_of(load_loose(score + v * lanes) - top[v]);
            store_loose(score + v * lanes, e);
            sum[v] += e;
        }
    }
    ACDC_UNROLL
    for (int v = 0; v < V; ++v) inverse[v] = select<real>(sum[v] == vec<real>{}, vec<real>{}, real(1) / sum[v]);
}

// R channels of the result.
template <class real, int V, int R> inline void add_values(const Attention<real>& t, int channel, const vec<real>* inverse) {
    const real *p = t.scores, *x = t.values + channel * t.value_channel;
    vec<real> sum[R][V];
    ACDC_UNROLL
    for (int r = 0; r < R; ++r) {
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) sum[r][v] = vec<real>{};
    }
    for (int key = 0; key < t.count; ++key, p += V * lanes, ++x) {
        vec<real> share[V];
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) share[v] = load_loose(p + v * lanes);
        ACDC_UNROLL
        for (int r = 0; r < R; ++r) {
            ACDC_UNROLL
            for (int v = 0; v < V; ++v) sum[r][v] += splat(x[r * t.value_channel]) * share[v];
        }
    }
    ACDC_UNROLL
    for (int r = 0; r < R; ++r) {
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) {
            const vec<real> result = sum[r][v] * inverse[v];
            real* out = t.out + (channel + r) * t.out_channel + v * lanes;
            if (t.left >= (v + 1) * lanes) store_loose(out, result);
            else
                for (int lane = 0; lane < t.left - v * lanes; ++lane) out[lane] = result[lane];
        }
    }
}

// Calls body(first of so many, a number as a type) for [0, count). The last group overlaps the one before it.
template <int some, class Body> inline void each_group(int count, Body body) {
    int i = 0;
    for (; i + some <= count; i += some) body(i, std::integral_constant<int, some>());
    if (i == count) return;
    if (count >= some) return body(count - some, std::integral_constant<int, some>());
    for (; i < count; ++i) body(i, std::integral_constant<int, 1>());
}

template <class real, int V> void attend(Attention<real> t) {
    constexpr int some = sharing<real>(V);
    if (t.causal) t.count = least(t.count, t.first + least(t.left, V * lanes));
    vec<real> peak[V], inverse[V];
    for (int v = 0; v < V; ++v) peak[v] = splat(-real(__builtin_inff()));
    each_group<some>(t.count, [&](int key, auto keys) { score_keys<real, V, keys()>(t, key, peak); });
    soften<real, V>(t, peak, inverse);
    each_group<some>(t.value_size, [&](int c, auto channels) { add_values<real, V, channels()>(t, c, inverse); });
}

template <class real, std::size_t... i> auto attend_of(int registers, std::index_sequence<i...>) {
    static constexpr void (*table[])(Attention<real>) = {attend<real, int(i) + 1>...};
    return table[registers - 1];
}

template <class real> void points_attention(const acdc_points_attention_args* args, const acdc_share*) {
    const acdc_points_attention_args& a = *args;
    constexpr int most_registers = query_registers<real>;
    const int registers = (a.queries.width + lanes - 1) / lanes;
    const int tiles = (registers + most_registers - 1) / most_registers, wide = (registers + tiles - 1) / tiles;
    const int64_t room = int64_t(ACDC_QUERIES) * a.keys.width;
    each_item(int64_t(a.queries.samples) * a.heads * tiles, a.threads, [&](int thread, int64_t item) {
        const int tile = int(item % tiles), first = tile * wide * lanes;
        const int64_t head = item / tiles % a.heads, n = item / tiles / a.heads;
        Attention<real> t;
        t.size = a.queries.channels / a.heads;
        t.value_size = a.values.channels / a.heads;
        t.queries = channel_of<real>(a.queries, head * t.size) + n * a.queries.sample + first;
        t.keys = channel_of<real>(a.keys, head * t.size) + n * a.keys.sample;
        t.values = channel_of<real>(a.values, head * t.value_size) + n * a.values.sample;
        t.out = channel_of<real>(a.out, head * t.value_size) + n * a.out.sample + first;
        t.mask = a.mask.origin ? channel_of<real>(a.mask, 0) + n * a.mask.sample : nullptr;
        t.scores = static_cast<real*>(a.workspace) + thread * room;
        t.query_channel = a.queries.channel;
        t.key_channel = a.keys.channel;
        t.value_channel = a.values.channel;
        t.out_channel = a.out.channel;
        t.count = a.keys.width;
        t.first = first;
        t.left = a.queries.width - first;
        t.causal = a.causal;
        t.scale = real(a.scale);
        attend_of<real>(least(wide, registers - tile * wide), std::make_index_sequence<most_registers>())(t);
    });
}

}  // namespace
}  // namespace ACDC_ISA
