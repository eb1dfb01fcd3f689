// Sparse convolution, forward and input gradient: both are "y[out] += value * x[in + offset]".
//
// A tile of rows x columns output pixels of one output channel stays in registers. Each kept weight is
// one broadcast and rows*columns multiply-adds. These read x from the first-level cache, where
// neighbouring pixels share cache lines. The index list is read once per tile, in order.
#pragma once
#include "simd.h"

namespace ACDC_ISA {
namespace {

template <class real> struct entry_of { using type = acdc_entry_f32; };
template <> struct entry_of<double> { using type = acdc_entry_f64; };
template <class real> using Entry = typename entry_of<real>::type;

// Calls body(address) once for each cache line of a range of `bytes`, without the first partial line:
// the previous tile has fetched that one already.
template <int bytes, class Body> inline void each_line(const char* p, Body body) {
    ACDC_UNROLL
    for (int byte = 0; byte < bytes; byte += 64) body(p + least(byte + 60, bytes - 4));
}

// Prefetches the memory of the next tile, a part of it with every row of the index list. It uses few
// instructions and almost no branch: rows are short, and the branch predictor must learn their ends.
struct NextTile {
    int64_t y = 0;                // bytes from this tile's output to the next tile's; 0: do not fetch
    const char* x = nullptr;      // first input pixel, in the columns that this tile has not read
    int64_t x_row, x_channel;     // in bytes; x_channel: from the last row of a channel to the next channel
    int rows, row = 0;            // rows of the panel in each channel, and the present one
    int per_row = 0;              // rows of the panel to fetch with each row of the list
    int64_t left = 0;             // rows of the panel that are left to fetch

    // Prefetches TH rows of `bytes` of the next tile, at the position that is `output` in this tile.
    template <int TH, int bytes, class real, class Body>
    void fetch_y(const real* output, int64_t pitch, Body body) const {
        if (!y) return;
        const char* p = (const char*)output + y;
        ACDC_UNROLL
        for (int i = 0; i < TH; ++i, p += pitch * int64_t(sizeof(real))) each_line<bytes>(p, body);
    }

    // Prefetches `bytes` of the next `per_row` rows of the panel.
    template <int bytes> void fetch_x() {
        if (left <= 0) return;
        left -= per_row;
        for (int n = per_row; n > 0; --n) {
            each_line<bytes>(x, [](const char* p) { prefetch_read(p); });
            const bool last = ++row == rows;
            x += last ? x_channel : x_row;
            row = last ? 0 : row;
        }
    }
};

// One tile of channels of one list, at one tile of pixels.
template <class real> struct ConvTile {
    const real* x;
    real* y;
    int64_t x_row, y_row, y_channel;
    int64_t x_column, y_column;  // used if the step is not known at compile time
    const int32_t *channel, *begin;
    int rows;
    const Entry<real>* entries;
    bool accumulate;
    bool stream;                 // write around the caches
    const real *bias, *live;     // live: 1 for each lane that holds a sample, else 0; one vector for
                                 // each column, `live_column` apart
    int64_t live_column;
    const real* shift;
    real* sums;                  // [channels][2][lanes] or null
    NextTile* next;
};

// Calls body(pixel number, its address) for the pixels of a tile.
template <int TH, int TW, class pointer, class Body>
inline void each_pixel_of(pointer p, int64_t row, int64_t column, Body body) {
    ACDC_UNROLL
    for (int i = 0; i < TH * TW; ++i) {
        body(i, p + i % TW * column);
        if (i % TW == TW - 1) p += row;
    }
}

// Adds y - shift and its square to the partial sums, in two chains each to hide some latency.
template <class real, int COUNT> inline void add_statistics(const vec<real>* y, vec<real> shift, real* partial) {
    vec<real> s[2] = {}, q[2] = {};
    ACDC_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        const vec<real> d = y[i] - shift;
        s[i % 2] += d;
        q[i % 2] += d * d;
    }
    store(partial, load(partial) + (s[0] + s[1]));
    store(partial + lanes, load(partial + lanes) + (q[0] + q[1]));
}

template <class real, int TH, int TW, int IN, int OUT> void conv_tile(const ConvTile<real>& t) {
    const int64_t in = IN ? IN * lanes : t.x_column, out = OUT ? OUT * lanes : t.y_column;
    constexpr int pixel = lanes * sizeof(real);
    const int64_t x_row = t.x_row, y_row = t.y_row;
    for (int row = 0; row < t.rows; ++row) {
        const int channel = t.channel[row];
        real* y = t.y + channel * t.y_channel;
        if (IN && t.next) {
            t.next->template fetch_y<TH, TW * OUT * pixel>(y, y_row, [](const char* p) { prefetch_write(p); });
            t.next->template fetch_x<TW * IN * pixel>();
        }

        vec<real> sum[TH * TW];
        if (t.accumulate) {
            each_pixel_of<TH, TW>(y, y_row, out, [&](int i, real* p) { sum[i] = load(p); });
        } else if (t.bias) {
            ACDC_UNROLL
            for (int i = 0; i < TH * TW; ++i) sum[i] = t.bias[channel] * load(t.live + i % TW * t.live_column);
        } else {
            ACDC_UNROLL
            for (int i = 0; i < TH * TW; ++i) sum[i] = vec<real>{};
        }

        const Entry<real>*k = t.entries + t.begin[row], *end = t.entries + t.begin[row + 1];
        for (; k < end; ++k) {
            const vec<real> weight = splat(k->value);
            each_pixel_of<TH, TW>(t.x + k->offset, x_row, in, [&](int i, const real* p) { sum[i] += weight * load(p); });
        }
        if (t.stream)
            each_pixel_of<TH, TW>(y, y_row, out, [&](int i, real* p) { stream(p, sum[i]); });
        else
            each_pixel_of<TH, TW>(y, y_row, out, [&](int i, real* p) { store(p, sum[i]); });
        if (t.sums) {
            const vec<real> shift = t.shift ? t.shift[channel] * load(t.live) : vec<real>{};
            add_statistics<real, TH * TW>(sum, shift, t.sums + channel * 2 * lanes);
        }
    }
}

template <class real> using ConvTileKernel = void (*)(const ConvTile<real>&);

// How many vectors a tile may keep in registers. AVX-512 has 32 registers, the others have 16. The double
// kernels serve gradient checks, so they have fewer tiles and compile fast.
template <class real> constexpr int conv_tile_limit = sizeof(real) == 8 ? 4 : lanes == 16 ? 16 : 14;
template <class real, int TH, int TW, int IN, int OUT> constexpr ConvTileKernel<real> conv_tile_or_null() {
    constexpr bool known_step = IN != 0;
    if constexpr (TH * TW <= conv_tile_limit<real> && (known_step || TH == 1)) return conv_tile<real, TH, TW, IN, OUT>;
    else return nullptr;
}

// kernel<real, rows, columns, ...>() for 1 to 4 rows and 1 to 8 columns.
#define ACDC_TILE_ROW(kernel, TH, ...)                                                          \
    {                                                                                           \
        kernel<real, TH, 1, __VA_ARGS__>(), kernel<real, TH, 2, __VA_ARGS__>(),                 \
        kernel<real, TH, 3, __VA_ARGS__>(), kernel<real, TH, 4, __VA_ARGS__>(),                 \
        kernel<real, TH, 5, __VA_ARGS__>(), kernel<real, TH, 6, __VA_ARGS__>(),                 \
        kernel<real, TH, 7, __VA_ARGS__>(), kernel<real, TH, 8, __VA_ARGS__>()                  \
    }
#define ACDC_TILE_TABLE(kernel, ...)                                                            \
    {                                                                                           \
        ACDC_TILE_ROW(kernel, 1, __VA_ARGS__), ACDC_TILE_ROW(kernel, 2, __VA_ARGS__),           \
        ACDC_TILE_ROW(kernel, 3, __VA_ARGS__), ACDC_TILE_ROW(kernel, 4, __VA_ARGS__)            \
    }

template <class real, int IN, int OUT> ConvTileKernel<real> conv_tile_of(int rows, int columns) {
    static constexpr ConvTileKernel<real> table[4][8] = ACDC_TILE_TABLE(conv_tile_or_null, IN, OUT);
    return table[rows - 1][columns - 1];
}

template <class real> ConvTileKernel<real> conv_tile_for(int in, int out, int rows, int columns) {
    if (in == 1 && out == 1) return conv_tile_of<real, 1, 1>(rows, columns);
    if (in == 2 && out == 1) return conv_tile_of<real, 2, 1>(rows, columns);
    if (in == 1 && out == 2) return conv_tile_of<real, 1, 2>(rows, columns);
    return conv_tile_of<real, 0, 0>(rows, columns);
}

struct TileShape { int rows, columns; };

// The largest existing tile within the one asked for.
inline TileShape tile_within(int rows, int columns, int limit, bool known_step) {
    columns = least(least(columns, 8), limit);
    rows = known_step ? least(least(rows, 4), limit / columns) : 1;
    return {rows, columns};
}

// The first pixel of a tile. Tiles are numbered along a row, then down, then from block to block.
struct TileOrigin { int64_t block; int row, column; };
struct Grid {
    TileShape tile;
    int height, width, down, across;
    Grid(TileShape t, int height, int width)
        : tile(t), height(height), width(width), down((height + t.rows - 1) / t.rows),
          across((width + t.columns - 1) / t.columns) {}
    int64_t tiles(int64_t blocks) const { return blocks * down * across; }
    TileOrigin at(int64_t i) const {
        return {i / (down * across), int(i / across % down) * tile.rows, int(i % across) * tile.columns};
    }
    TileOrigin after(TileOrigin p) const {
        p.column += tile.columns;
        if (p.column < width) return p;
        p.column = 0;
        p.row += tile.rows;
        return p.row < height ? p : TileOrigin{p.block + 1, 0, 0};
    }
};

// Prefetching of the panel of the tile `p`: the pixels of x that it reads. Without the output.
template <class real>
inline NextTile next_panel(const acdc_list& list, const acdc_image& x, const TileShape& tile, const TileOrigin& p,
                           int row_step, int column_step) {
    NextTile next;
    next.x = (const char*)(plane<real>(x, p.block, 0) + (p.row * row_step + list.top) * x.row +
                           (int64_t(p.column - 1) * column_step + list.right + 1) * lanes);
    next.rows = (tile.rows - 1) * row_step + list.bottom - list.top + 1;
    next.x_row = x.row * int64_t(sizeof(real));
    next.x_channel = (x.channel - (next.rows - 1) * x.row) * int64_t(sizeof(real));
    next.left = int64_t(next.rows) * list.in_channels;
    const int list_rows = list.tile_rows[list.tiles];
    next.per_row = int((next.left + list_rows - 1) / list_rows);
    return next;
}

inline int phase_size(int size, int first, int step) { return (size - first + step - 1) / step; }

template <class real> struct Conv {
    acdc_conv_args a;
    Grid grid;
    const real *all_live, *last_live;

    // What to prefetch while the tile `current` is computed: the memory of the next tile `p`.
    NextTile next_tile(const TileOrigin& current, const TileOrigin& p) const {
        NextTile next = next_panel<real>(a.lists[0], a.x, grid.tile, p, a.in_row_step, a.in_column_step);
        if (!streams())
            next.y = (plane<real>(a.y, p.block, 0) - plane<real>(a.y, current.block, 0) +
                      int64_t(p.row - current.row) * a.out_row_step * a.y.row +
                      int64_t(p.column - current.column) * a.out_column_step * lanes) * int64_t(sizeof(real));
        return next;
    }

    void run_list(const acdc_list& list, const TileOrigin& p, real* sums, NextTile* next) const {
        const int height = phase_size(a.y.height, list.out_row, a.out_row_step);
        const int width = phase_size(a.y.width, list.out_column, a.out_column_step);
        const int rows = least(grid.tile.rows, height - p.row), columns = least(grid.tile.columns, width - p.column);
        if (rows <= 0 || columns <= 0) return;
        const ConvTileKernel<real> kernel = conv_tile_for<real>(a.in_column_step, a.out_column_step, rows, columns);

        ConvTile<real> t;
        t.x = plane<real>(a.x, p.block, 0) + int64_t(p.row) * a.in_row_step * a.x.row +
              int64_t(p.column) * a.in_column_step * lanes;
        t.y = plane<real>(a.y, p.block, 0) + (int64_t(p.row) * a.out_row_step + list.out_row) * a.y.row +
              (int64_t(p.column) * a.out_column_step + list.out_column) * lanes;
        t.x_row = a.x.row * a.in_row_step;
        t.y_row = a.y.row * a.out_row_step;
        t.y_channel = a.y.channel;
        t.x_column = int64_t(a.in_column_step) * lanes;
        t.y_column = int64_t(a.out_column_step) * lanes;
        t.entries = static_cast<const Entry<real>*>(list.entries);
        t.bias = static_cast<const real*>(a.bias);
        t.live_column = a.y.per_column ? lanes : 0;
        t.live = (p.block == a.y.blocks - 1 ? last_live : all_live) + p.column * t.live_column;
        t.shift = static_cast<const real*>(a.shift);
        t.next = next;
        t.stream = streams();
        for (int tile = 0; tile < list.tiles; ++tile) {
            const int first = list.tile_rows[tile];
            t.channel = list.channel + first;
            t.begin = list.begin + first;
            t.rows = list.tile_rows[tile + 1] - first;
            t.accumulate = a.accumulate || tile > 0;
            t.sums = tile == list.tiles - 1 ? sums : nullptr;
            kernel(t);
            if (next) next->y = 0;  // the output was prefetched with the first tile of channels
        }
    }

    // An output that is written once and does not fit into the caches is written around them. The double kernels
    // never do this.
    bool streams() const {
        const int64_t bytes = a.y.block * a.y.blocks * int64_t(sizeof(real));
        return bytes > a.stream_bytes && !a.y.per_thread && !a.accumulate && a.phases == 1 && a.lists[0].tiles == 1;
    }

    void run(int thread, int64_t first, int64_t last) const {
        real* sums = a.sums ? static_cast<real*>(a.workspace) + int64_t(thread) * a.y.channels * 2 * lanes : nullptr;
        TileOrigin current = grid.at(first);
        for (int64_t i = first; i < last; ++i) {
            const TileOrigin following = grid.after(current);
            NextTile next = next_tile(current, following);
            for (int phase = 0; phase < a.phases; ++phase)
                run_list(a.lists[phase], current, sums, phase == 0 && i + 1 < last ? &next : nullptr);
            current = following;
        }
        if (streams()) end_stream();
    }
};

template <class real> struct ConvKernel {
    const acdc_conv_args& a;
    const Grid& grid;
    const real *all_live, *last_live;

    int64_t partial() const { return int64_t(a.y.channels) * 2; }

    void begin() const {
        if (a.sums) clear(static_cast<real*>(a.workspace), a.threads * partial() * lanes);
    }

    void work(int thread, int64_t first, int64_t last) const {
        Conv<real> mine{a, grid, all_live, last_live};
        mine.a.x = of_thread<real>(a.x, thread);
        mine.a.y = of_thread<real>(a.y, thread);
        mine.run(thread, first, last);
    }

    // The workspace is [thread][channel][sum, squares]; the result [sum, squares][channel].
    void end() const {
        if (!a.sums) return;
        const real* workspace = static_cast<const real*>(a.workspace);
        for (int c = 0; c < a.y.channels; ++c)
            for (int which = 0; which < 2; ++which) {
                double sum = 0;
                for (int thread = 0; thread < a.threads; ++thread)
                    for (int lane = 0; lane < lanes; ++lane)
                        sum += workspace[(thread * partial() + c * 2 + which) * lanes + lane];
                a.sums[int64_t(which) * a.y.channels + c] = sum;
            }
    }
};

template <class real> void conv(const acdc_conv_args* a, const acdc_share* share) {
    // All lanes hold samples, except in the last block, which may have fewer samples than lanes.
    constexpr int widest = 64;
    alignas(64) real all_live[widest * lanes], last_live[widest * lanes];
    const int columns = a->y.per_column ? least<int>(a->y.width, widest) : 1;
    for (int column = 0; column < columns; ++column)
        for (int lane = 0; lane < lanes; ++lane) {
            all_live[column * lanes + lane] = 1;
            last_live[column * lanes + lane] = lane < live_lanes(a->y, a->y.blocks - 1, column);
        }
    const bool fixed_step = (a->in_column_step == 1 && a->out_column_step <= 2) ||
                            (a->in_column_step == 2 && a->out_column_step == 1);
    const Grid grid(tile_within(a->tile_rows, a->tile_columns, conv_tile_limit<real>, fixed_step),
                    phase_size(a->y.height, 0, a->out_row_step), phase_size(a->y.width, 0, a->out_column_step));
    ConvKernel<real> kernel{*a, grid, all_live, last_live};
    run(kernel, a->y.blocks, grid.tiles(1), a->threads, share);
}

}  // namespace
}  // namespace ACDC_ISA
