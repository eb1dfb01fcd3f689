// The gradient of the kept weights: for each, the dot product of dy with x shifted by its offset.
//
// A tile of dy of one output channel stays in registers while all kept weights of that channel pass by.
// Each leaves a vector of partial sums; `lanes` of them are reduced together and added, as one vector,
// to this thread's list of gradients, which lies in the order of the entries.
#pragma once
#include "conv.h"

namespace ACDC_ISA {
namespace {

template <class real> struct GradTile {
    const real *x, *dy;
    int64_t x_row, dy_row, dy_channel, x_column;
    const int32_t *channel, *begin;
    int rows;
    const Entry<real>* entries;
    real* grads;
    NextTile* next;
};

// Two entries at once, each in two chains of multiply-adds: four chains hide their latency.
template <class real, int TH, int TW>
inline void dot_pair(const vec<real>* dy, const real* p, const real* q, int64_t row, int64_t column, vec<real>* out) {
    vec<real> a[2] = {}, b[2] = {};
    ACDC_UNROLL
    for (int i = 0; i < TH * TW; ++i) {
        a[i % 2] += dy[i] * load(p + i % TW * column);
        b[i % 2] += dy[i] * load(q + i % TW * column);
        if (i % TW == TW - 1) { p += row; q += row; }
    }
    out[0] = a[0] + a[1];
    out[1] = b[0] + b[1];
}

template <class real, int TH, int TW, int IN> void grad_tile(const GradTile<real>& t) {
    const int64_t column = IN ? IN * lanes : t.x_column;
    const int64_t x_row = t.x_row;
    vec<real> products[lanes] = {};
    for (int row = 0; row < t.rows; ++row) {
        const int channel = t.channel[row];
        if (t.next) t.next->fetch(channel);
        vec<real> dy[TH * TW];
        ACDC_UNROLL
        for (int i = 0; i < TH * TW; ++i)
            dy[i] = load(t.dy + channel * t.dy_channel + i / TW * t.dy_row + i % TW * lanes);

        const int end = t.begin[row + 1];
        for (int k = t.begin[row]; k < end; k += lanes) {
            const int count = least(lanes, end - k);
            const Entry<real>* entry = t.entries + k;
            // An odd last pair computes one product too many, of an entry of the next row or of the
            // padding of the list: its offset is valid for every tile, and its sum is dropped below.
            for (int j = 0; j < count; j += 2)
                dot_pair<real, TH, TW>(dy, t.x + entry[j].offset, t.x + entry[j + 1].offset, x_row, column, products + j);
            vec<real> copy[lanes];
            for (int j = 0; j < lanes; ++j) copy[j] = products[j];
            vec<real> sums = sums_of<real>(copy);
            if (count < lanes) sums = keep<real>(first_lanes<real>(count), sums);
            store_loose(t.grads + k, load_loose(t.grads + k) + sums);
        }
    }
}

template <class real> using GradTileKernel = void (*)(const GradTile<real>&);
template <class real> constexpr int grad_tile_limit = sizeof(real) == 4 ? ACDC_GRAD_TILE : 4;

template <class real, int TH, int TW, int IN> constexpr GradTileKernel<real> grad_tile_or_null() {
    if constexpr (TH * TW <= grad_tile_limit<real> && (IN != 0 || TH == 1)) return grad_tile<real, TH, TW, IN>;
    else return nullptr;
}

template <class real, int IN> GradTileKernel<real> grad_tile_of(int rows, int columns) {
#define ACDC_TILES(TH)                                                               \
    {                                                                                \
        grad_tile_or_null<real, TH, 1, IN>(), grad_tile_or_null<real, TH, 2, IN>(),   \
        grad_tile_or_null<real, TH, 3, IN>(), grad_tile_or_null<real, TH, 4, IN>(),   \
        grad_tile_or_null<real, TH, 5, IN>(), grad_tile_or_null<real, TH, 6, IN>(),   \
        grad_tile_or_null<real, TH, 7, IN>(), grad_tile_or_null<real, TH, 8, IN>()    \
    }
    static constexpr GradTileKernel<real> table[3][8] = {ACDC_TILES(1), ACDC_TILES(2), ACDC_TILES(3)};
#undef ACDC_TILES
    return table[rows - 1][columns - 1];
}

template <class real> GradTileKernel<real> grad_tile_for(int in, int rows, int columns) {
    if (in == 1) return grad_tile_of<real, 1>(rows, columns);
    if (in == 2) return grad_tile_of<real, 2>(rows, columns);
    return grad_tile_of<real, 0>(rows, columns);
}

template <class real> struct WeightGrad {
    acdc_weight_grad_args a;
    Grid grid;

    NextTile next_tile(const Place& p) const {
        const acdc_list& list = *a.list;
        NextTile next;
        next.x = (const char*)(plane<real>(a.x, p.block, 0) + (p.row * a.in_row_step + list.top) * a.x.row +
                               (int64_t(p.column - 1) * a.in_column_step + list.right + 1) * lanes);
        next.y = (const char*)(plane<real>(a.dy, p.block, 0) + p.row * a.dy.row + int64_t(p.column) * lanes);
        next.x_channel = a.x.channel * sizeof(real);
        next.x_row = a.x.row * sizeof(real);
        next.y_channel = a.dy.channel * sizeof(real);
        next.y_row = a.dy.row * sizeof(real);
        next.x_rows = (grid.tile.rows - 1) * a.in_row_step + list.bottom - list.top + 1;
        next.x_bytes = grid.tile.columns * a.in_column_step * lanes * int(sizeof(real));
        next.y_rows = grid.tile.rows;
        next.y_bytes = grid.tile.columns * lanes * int(sizeof(real));
        next.start(list);
        return next;
    }

    void run_tile(const Place& p, real* grads, NextTile* next) const {
        const acdc_list& list = *a.list;
        const int rows = least(grid.tile.rows, a.dy.height - p.row);
        const int columns = least(grid.tile.columns, a.dy.width - p.column);
        const GradTileKernel<real> kernel = grad_tile_for<real>(a.in_column_step, rows, columns);
        GradTile<real> t;
        t.x = plane<real>(a.x, p.block, 0) + int64_t(p.row) * a.in_row_step * a.x.row +
              int64_t(p.column) * a.in_column_step * lanes;
        t.dy = plane<real>(a.dy, p.block, 0) + p.row * a.dy.row + int64_t(p.column) * lanes;
        t.x_row = a.x.row * a.in_row_step;
        t.dy_row = a.dy.row;
        t.dy_channel = a.dy.channel;
        t.x_column = int64_t(a.in_column_step) * lanes;
        t.entries = static_cast<const Entry<real>*>(list.entries);
        t.grads = grads;
        t.next = next;
        for (int tile = 0; tile < list.tiles; ++tile) {
            const int first = list.tile_rows[tile];
            t.channel = list.channel + first;
            t.begin = list.begin + first;
            t.rows = list.tile_rows[tile + 1] - first;
            kernel(t);
            if (next) next->y = nullptr;
        }
    }

    void run(real* grads, int64_t first, int64_t last) const {
        for (int64_t i = first; i < last; ++i) {
            NextTile next;
            if (i + 1 < last) next = next_tile(grid.at(i + 1));
            run_tile(grid.at(i), grads, i + 1 < last ? &next : nullptr);
        }
    }
};

template <class real> struct WeightGradKernel {
    const acdc_weight_grad_args& a;
    const Grid& grid;

    int64_t pitch() const { return acdc_grad_pitch(a.list->nnz); }
    real* grads(int thread) const { return static_cast<real*>(a.workspace) + thread * pitch(); }

    void begin() const { clear(grads(0), a.threads * pitch()); }

    void work(int thread, int64_t first, int64_t last) const {
        WeightGrad<real> mine{a, grid};
        mine.a.x = of_thread<real>(a.x, thread);
        mine.a.dy = of_thread<real>(a.dy, thread);
        mine.run(grads(thread), first, last);
    }

    void end() const {
        real* target = static_cast<real*>(a.target);
        const int32_t* source = a.list->source;
        split(a.list->nnz, a.threads, [&](int, int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) {
                real sum = grads(0)[k];
                for (int thread = 1; thread < a.threads; ++thread) sum += grads(thread)[k];
                target[source[k]] = a.accumulate ? target[source[k]] + sum : sum;
            }
        });
    }
};

template <class real> void weight_grad(const acdc_weight_grad_args* a, const acdc_share* share) {
    const bool known = a->in_column_step <= 2;
    const TileShape tile = tile_within(a->tile_rows, a->tile_columns, grad_tile_limit<real>, known);
    const Grid grid(tile, a->dy.height, a->dy.width);
    WeightGradKernel<real> kernel{*a, grid};
    run(kernel, a->dy.blocks, grid.tiles(1), a->threads, share);
}

template <class real> struct ChannelSums {
    const acdc_channel_sums_args& a;

    real* partial(int thread) const {
        return static_cast<real*>(a.workspace) + int64_t(thread) * a.x.channels * lanes;
    }

    void begin() const { clear(partial(0), int64_t(a.threads) * a.x.channels * lanes); }

    void work(int thread, int64_t first, int64_t last) const {
        const acdc_image image = of_thread<real>(a.x, thread);
        for (int64_t i = first; i < last; ++i) {
            const int64_t channel = i % image.channels;
            const real* x = plane<real>(image, i / image.channels, channel);
            vec<real> sum{};
            for (int row = 0; row < image.height; ++row, x += image.row)
                for (int column = 0; column < image.width; ++column) sum += load(x + column * lanes);
            real* p = partial(thread) + channel * lanes;
            store(p, load(p) + sum);
        }
    }

    void end() const { add_partial(partial(0), a.threads, a.x.channels, a.sums); }
};

template <class real> void channel_sums(const acdc_channel_sums_args* a, const acdc_share* share) {
    ChannelSums<real> kernel{*a};
    run(kernel, a->x.blocks, a->x.channels, a->threads, share);
}

}  // namespace
}  // namespace ACDC_ISA
