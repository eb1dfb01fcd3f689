// Sparse convolutions and linear layers on points: "y[point] += value * x[point + offset]".
//
// A tile of neighbouring points of one output channel stays in registers. Each kept weight is one broadcast and a
// multiply-add for each register, which reads x from the first-level cache at an address of any alignment.
#pragma once
#include "conv.h"
#include "points.h"

namespace ACDC_ISA {
namespace {

// The points that the next tile reads. They are fetched while the rows of this one are computed, some channels with
// each row, since channels lie so far apart that no CPU foresees them.
struct NextPoints {
    const char* at = nullptr;
    int64_t channel = 0;  // pitch in bytes
    int left = 0, per_row = 0;

    template <int bytes> void fetch() {
        if (left <= 0) return;
        for (int n = least(per_row, left); n > 0; --n, at += channel) each_line<bytes>(at, [](const char* p) { prefetch_read(p); });
        left -= per_row;
    }
};

// A part of the list at one tile of points.
template <class real> struct PointsTile {
    const real* x;
    real* y;
    int64_t y_channel, residual_channel;
    const real *residual, *bias, *live;
    const int32_t *channel, *begin;
    int rows;
    const Entry<real>* entries;
    bool first, last;  // of the tiles of channels: starts the sums, ends them
    int activation;
    NextPoints next;
};

// With few registers, each point has several sums, so that a multiply-add need not wait for the one before it.
constexpr int chains_of(int vectors) { return vectors >= 6 ? 1 : vectors >= 3 ? 2 : 8 / vectors; }

// Activations other than ReLU follow in a second pass over a row that is in the first-level cache: one loop for all
// sizes of tiles.
template <class real> __attribute__((noinline)) void activate(real* y, int vectors, int activation, const real* live) {
    with_activation(activation, [&](auto f) {
        for (int i = 0; i < vectors * lanes; i += lanes)
            store(y + i, only_live(live ? live + i : nullptr, f.template of<real>(load(y + i))));
    });
}

template <class real, int V> inline void start_row(const PointsTile<real>& t, int channel, const real* y, vec<real>* sum) {
    const vec<real> bias = splat(t.first && t.bias ? t.bias[channel] : real(0));
    const real* start = t.first ? t.residual : y;
    if (t.first && start) start += channel * t.residual_channel;
    ACDC_UNROLL
    for (int v = 0; v < V; ++v) sum[v] = start ? bias + load(start + v * lanes) : bias;
}

template <class real, int V> inline void end_row(const PointsTile<real>& t, real* y, const vec<real>* sum) {
    const bool simple = t.activation <= ACDC_RELU;
    const real* live = t.last && simple ? t.live : nullptr;
    ACDC_UNROLL
    for (int v = 0; v < V; ++v) {
        const vec<real> result = t.last && t.activation == ACDC_RELU ? relu_of<real>(sum[v]) : sum[v];
        store(y + v * lanes, only_live(live ? live + v * lanes : nullptr, result));
    }
    if (t.last && !simple) activate(y, V, t.activation, t.live);
}

// The result of a row that is computed soon and what it is added to are fetched, too.
constexpr int rows_ahead = 4;

template <class real, int V> inline void fetch_row(const PointsTile<real>& t, int row) {
    if (!t.first || row >= t.rows) return;
    const int64_t channel = t.channel[row];
    each_line<V * lanes * int(sizeof(real))>((const char*)(t.y + channel * t.y_channel), [](const char* p) { prefetch_write(p); });
    if (t.residual)
        each_line<V * lanes * int(sizeof(real))>((const char*)(t.residual + channel * t.residual_channel),
                                                 [](const char* p) { prefetch_read(p); });
}

template <class real, int V> void points_tile(const PointsTile<real>& t) {
    constexpr int chains = chains_of(V);
    NextPoints next = t.next;
    for (int row = 0; row < t.rows; ++row) {
        const int channel = t.channel[row];
        real* y = t.y + channel * t.y_channel;
        fetch_row<real, V>(t, row + rows_ahead);
        next.fetch<V * lanes * int(sizeof(real))>();
        vec<real> sum[chains][V];
        start_row<real, V>(t, channel, y, sum[0]);
        ACDC_UNROLL
        for (int i = V; i < chains * V; ++i) sum[i / V][i % V] = vec<real>{};

        const Entry<real>*k = t.entries + t.begin[row], *end = t.entries + t.begin[row + 1];
        for (; k + chains <= end; k += chains) {
            ACDC_UNROLL
            for (int c = 0; c < chains; ++c) {
                const vec<real> weight = splat(k[c].value);
                const real* x = t.x + k[c].offset;
                ACDC_UNROLL
                for (int v = 0; v < V; ++v) sum[c][v] += weight * load_loose(x + v * lanes);
            }
        }
        for (; chains > 1 && k < end; ++k) {
            const vec<real> weight = splat(k->value);
            ACDC_UNROLL
            for (int v = 0; v < V; ++v) sum[0][v] += weight * load_loose(t.x + k->offset + v * lanes);
        }
        ACDC_UNROLL
        for (int i = V; i < chains * V; ++i) sum[0][i % V] += sum[i / V][i % V];
        end_row<real, V>(t, y, sum[0]);
    }
}

// R rows whose entries have the same offsets: each register of x is read once for all of them.
template <class real, int V, int R> inline void points_rows(const PointsTile<real>& t, int row) {
    vec<real> sum[R][V];
    const Entry<real>* k[R];
    ACDC_UNROLL
    for (int r = 0; r < R; ++r) {
        const int channel = t.channel[row + r];
        start_row<real, V>(t, channel, t.y + channel * t.y_channel, sum[r]);
        k[r] = t.entries + t.begin[row + r];
    }
    const int count = t.begin[row + 1] - t.begin[row];
    for (int i = 0; i < count; ++i) {
        const real* x = t.x + k[0][i].offset;
        vec<real> points[V];
        ACDC_UNROLL
        for (int v = 0; v < V; ++v) points[v] = load_loose(x + v * lanes);
        ACDC_UNROLL
        for (int j = 0; j < R * V; ++j) sum[j / V][j % V] += splat(k[j / V][i].value) * points[j % V];
    }
    ACDC_UNROLL
    for (int r = 0; r < R; ++r) end_row<real, V>(t, t.y + t.channel[row + r] * t.y_channel, sum[r]);
}

// All rows of the part have the same offsets, as in a layer that keeps all weights. A sum has one order, whether
// its row is computed alone or with others.
template <class real, int V> void points_block(const PointsTile<real>& t) {
    constexpr int some = V == 1 ? 8 : 4;  // with one register of points, the sums of more rows hide the latency
    int row = 0;
    for (; row + some <= t.rows; row += some) points_rows<real, V, some>(t, row);
    for (; row < t.rows; ++row) points_rows<real, V, 1>(t, row);
}

template <class real> using PointsTileKernel = void (*)(const PointsTile<real>&);

// The double kernels serve checks, so they have fewer tiles and compile fast.
template <class real> constexpr int points_limit = sizeof(real) == 8 ? 4 : lanes == 16 ? 16 : 14;
template <class real> constexpr int block_limit = sizeof(real) == 8 ? 1 : lanes == 16 ? 4 : 3;

template <class real, std::size_t... i> PointsTileKernel<real> points_block_of(int vectors, std::index_sequence<i...>) {
    static constexpr PointsTileKernel<real> table[] = {points_block<real, int(i) + 1>...};
    return table[vectors - 1];
}

template <class real, std::size_t... i> PointsTileKernel<real> points_tile_of(int vectors, std::index_sequence<i...>) {
    static constexpr PointsTileKernel<real> table[] = {points_tile<real, int(i) + 1>...};
    return table[vectors - 1];
}

// The points of a tile of channels, `right` of the point `at`.
template <class real>
inline NextPoints next_points(const acdc_points_conv_args& a, int64_t at, int tile, int64_t right, int rows) {
    NextPoints next;
    if (!a.tile_channels || !rows) return next;
    next.at = (const char*)(channel_of<real>(a.x, int64_t(tile) * a.tile_channels) + at + right);
    next.channel = a.x.channel * int64_t(sizeof(real));
    next.left = least(a.tile_channels, a.x.channels - tile * a.tile_channels);
    next.per_row = (next.left + rows - 1) / rows;
    return next;
}

template <class real> void points_conv(const acdc_points_conv_args* args, const acdc_share*) {
    const acdc_points_conv_args& a = *args;
    const int64_t total = vectors_of(a.y), limit = a.uniform ? block_limit<real> : points_limit<real>;
    const int64_t wide = most<int64_t>(1, least<int64_t>(a.vectors, limit));
    const int64_t across = (total + wide - 1) / wide;
    each_item(a.groups * across, a.threads, [&](int, int64_t item) {
        const int64_t group = item / across, vector = item % across * wide, at = vector * lanes;
        const int count = int(least(wide, total - vector));
        const auto kernel = a.uniform ? points_block_of<real>(count, std::make_index_sequence<block_limit<real>>())
                                      : points_tile_of<real>(count, std::make_index_sequence<points_limit<real>>());
        PointsTile<real> t;
        t.x = channel_of<real>(a.x, 0) + at;
        t.y = channel_of<real>(a.y, 0) + at;
        t.y_channel = a.y.channel;
        t.residual = a.residual.origin ? channel_of<real>(a.residual, 0) + at : nullptr;
        t.residual_channel = a.residual.channel;
        t.bias = static_cast<const real*>(a.bias);
        t.live = a.y.live ? static_cast<const real*>(a.y.live) + at : nullptr;
        t.entries = static_cast<const Entry<real>*>(a.entries);
        t.activation = a.activation;
        for (int tile = 0; tile < a.tiles; ++tile) {
            const int32_t* part = a.parts + group * a.tiles + tile;
            t.channel = a.channel + part[0];
            t.begin = a.begin + part[0];
            t.rows = part[1] - part[0];
            t.first = tile == 0;
            t.last = tile == a.tiles - 1;
            t.next = next_points<real>(a, at, t.last ? 0 : tile + 1, t.last ? wide * lanes : 0, t.rows);
            kernel(t);
        }
    });
}

}  // namespace
}  // namespace ACDC_ISA
