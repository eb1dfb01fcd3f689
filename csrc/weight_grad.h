// The gradient of the kept weights: for each, the dot product of dy with x shifted by its offset.
//
// A tile of dy of one output channel stays in registers for all kept weights of that channel. Each kept
// weight gives a vector of partial sums. `lanes` of these vectors are reduced together and added, as one
// vector, to this thread's list of gradients, which has the order of the entries.
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

// Loads the tile of one output channel, and prefetches a part of the next tile.
template <class real, int TH, int TW, int IN> inline void load_dy(const GradTile<real>& t, int channel, vec<real>* dy) {
    constexpr int pixel = lanes * sizeof(real);
    const real* first = t.dy + channel * t.dy_channel;
    if (IN && t.next) {
        t.next->template fetch_y<TH, TW * pixel>(first, t.dy_row, [](const char* p) { prefetch_read(p); });
        t.next->template fetch_x<TW * IN * pixel>();
    }
    each_pixel_of<TH, TW>(first, t.dy_row, lanes, [&](int i, const real* p) { dy[i] = load(p); });
}

// Computes two entries at once, each in two chains of multiply-adds. Four chains hide the latency.
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

// Collects vectors of partial sums until there are `lanes` of them. They belong to consecutive entries of
// the list, from one row or from several short rows.
template <class real> struct Products {
    vec<real> waiting[lanes + 1] = {};
    int count = 0;
    real* grads;  // the gradient of the first entry

    explicit Products(real* first) : grads(first) {}

    // Counts one or two vectors that were written behind the last one.
    void add(int more) {
        count += more;
        if (count < lanes) return;
        store_loose(grads, load_loose(grads) + sums());
        grads += lanes;
        count -= lanes;
        waiting[0] = waiting[lanes];
    }

    void flush() const {
        if (count) store_loose(grads, load_loose(grads) + keep<real>(first_lanes<real>(count), sums()));
    }

    vec<real> sums() const {
        vec<real> copy[lanes];
        ACDC_UNROLL
        for (int j = 0; j < lanes; ++j) copy[j] = waiting[j];
        return sums_of<real>(copy);
    }
};

template <class real, int TH, int TW, int IN> void grad_tile(const GradTile<real>& t) {
    const int64_t column = IN ? IN * lanes : t.x_column;
    const int64_t x_row = t.x_row;
    Products<real> products(t.grads + t.begin[0]);
    for (int row = 0; row < t.rows; ++row) {
        const int channel = t.channel[row];
        vec<real> dy[TH * TW];
        load_dy<real, TH, TW, IN>(t, channel, dy);

        const Entry<real>*k = t.entries + t.begin[row], *end = t.entries + t.begin[row + 1];
        // With an odd number of entries, the last pair computes one product too many: of an entry of the
        // next row, or of the list's padding. Its offset is valid, and the next product overwrites it.
        for (; k < end; k += 2) {
            dot_pair<real, TH, TW>(dy, t.x + k[0].offset, t.x + k[1].offset, x_row, column, products.waiting + products.count);
            products.add(k + 1 < end ? 2 : 1);
        }
    }
    products.flush();
}

template <class real> using GradTileKernel = void (*)(const GradTile<real>&);
template <class real> constexpr int grad_tile_limit = sizeof(real) == 8 ? 4 : lanes == 16 ? 16 : 12;

template <class real, int TH, int TW, int IN> constexpr GradTileKernel<real> grad_tile_or_null() {
    if constexpr (TH * TW <= grad_tile_limit<real> && (IN != 0 || TH == 1))
        return grad_tile<real, TH, TW, IN>;
    else return nullptr;
}

template <class real, int IN> GradTileKernel<real> grad_tile_of(int rows, int columns) {
    static constexpr GradTileKernel<real> table[4][8] = ACDC_TILE_TABLE(grad_tile_or_null, IN);
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

    NextTile next_tile(const TileOrigin& current, const TileOrigin& p) const {
        NextTile next = next_panel<real>(*a.list, a.x, grid.tile, p, a.in_row_step, a.in_column_step);
        next.y = (plane<real>(a.dy, p.block, 0) - plane<real>(a.dy, current.block, 0) +
                  (p.row - current.row) * a.dy.row +
                  int64_t(p.column - current.column) * lanes) * int64_t(sizeof(real));
        return next;
    }

    void run_tile(const TileOrigin& p, real* grads, NextTile* next) const {
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
            if (next) next->y = 0;
        }
    }

    void run(real* grads, int64_t first, int64_t last) const {
        TileOrigin current = grid.at(first);
        for (int64_t i = first; i < last; ++i) {
            const TileOrigin following = grid.after(current);
            NextTile next = next_tile(current, following);
            run_tile(current, grads, i + 1 < last ? &next : nullptr);
            current = following;
        }
    }
};

template <class real> struct WeightGradKernel {
    const acdc_weight_grad_args& a;
    const Grid& grid;

    int64_t pitch() const { return acdc_grad_pitch(a.list->nnz); }
    real* grads(int thread) const { return static_cast<real*>(a.workspace) + thread * pitch(); }

    void begin() const {
        split(a.threads * pitch(), a.threads, [&](int, int64_t first, int64_t last) {
            clear(grads(0) + first, last - first);
        });
    }

    void work(int thread, int64_t first, int64_t last) const {
        WeightGrad<real> mine{a, grid};
        mine.a.x = of_thread<real>(a.x, thread);
        mine.a.dy = of_thread<real>(a.dy, thread);
        mine.run(grads(thread), first, last);
    }

    void write(int64_t first, int64_t last) const {
        real* target = static_cast<real*>(a.target);
        const int32_t* source = a.list->source;
        for (int64_t k = first; k < last; ++k) {
            real sum = 0;
            for (int thread = 0; thread < a.threads; ++thread) sum += grads(thread)[k];
            target[source[k]] = a.accumulate ? target[source[k]] + sum : sum;
        }
    }

    // Clears an output channel of the target and writes its gradients while it is in the cache. The first tile
    // has a row for every output channel. Returns the number of gradients that are written.
    int64_t write_first_tile() const {
        const acdc_list& list = *a.list;
        split(list.tile_rows[1], a.threads, [&](int, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                clear(static_cast<real*>(a.target) + list.channel[row] * a.row, a.row);
                write(list.begin[row], list.begin[row + 1]);
            }
        });
        return list.begin[list.tile_rows[1]];
    }

    void end() const {
        int64_t done = 0;
        if (a.size && a.row)
            done = write_first_tile();
        else if (a.size)
            split(a.size, a.threads, [&](int, int64_t first, int64_t last) {
                clear(static_cast<real*>(a.target) + first, last - first);
            });
        if (const int64_t left = a.list->nnz - done)
            split(left, a.threads, [&](int, int64_t first, int64_t last) { write(done + first, done + last); });
    }
};

template <class real> void weight_grad(const acdc_weight_grad_args* a, const acdc_share* share) {
    const bool fixed_step = a->in_column_step <= 2;
    const TileShape tile = tile_within(a->tile_rows, a->tile_columns, grad_tile_limit<real>, fixed_step);
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
