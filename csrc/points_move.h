// What moves points: conversions from and to plain tensors, the planes of a stride, pooling.
#pragma once
#include "points.h"

namespace ACDC_ISA {
namespace {

// ---- conversions ----
// Copies `count` numbers between two strides.
template <class real> inline void copy_row(real* to, int64_t to_step, const real* from, int64_t from_step, int64_t count) {
    if (to_step == 1 && from_step == 1)
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    else
        for (int64_t i = 0; i < count; ++i) to[i * to_step] = from[i * from_step];
}

// Transposes rows x columns numbers. The rows of both are contiguous.
template <class real> void copy_transposed(real* to, int64_t to_row, const real* from, int64_t from_row, int rows, int columns) {
    int row = 0;
    for (; row + lanes <= rows; row += lanes) {
        int column = 0;
        for (; column + lanes <= columns; column += lanes) {
            vec<real> block[lanes];
            for (int i = 0; i < lanes; ++i) block[i] = load_loose(from + (row + i) * from_row + column);
            transpose<real>(block);
            for (int i = 0; i < lanes; ++i) store_loose(to + (column + i) * to_row + row, block[i]);
        }
        for (; column < columns; ++column) copy_row(to + column * to_row + row, 1, from + row * from_row + column, from_row, lanes);
    }
    for (; row < rows; ++row) copy_row(to + row, to_row, from + row * from_row, 1, columns);
}

// Tokens lie as [token][channel] in a plain tensor, `step` apart. A thread takes a share of the channels.
template <class real, bool into> void copy_tokens(const acdc_points_copy_args& a, int tokens, int64_t step) {
    constexpr int some = 64;
    const int channels = a.points.channels;
    each_item((channels + some - 1) / some, a.threads, [&](int, int64_t item) {
        const int first = int(item) * some, count = least(some, channels - first);
        real* points = channel_of<real>(a.points, first);
        real* plain = static_cast<real*>(a.data) + first;
        if (into) copy_transposed<real>(points, a.points.channel, plain, step, tokens, count);
        else copy_transposed<real>(plain, step, points, a.points.channel, count, tokens);
    });
}

template <class real, bool into> void copy_points(const acdc_points_copy_args& a) {
    const acdc_points& p = a.points;
    if (p.height == 1 && p.sample == p.width && a.channel == 1) {  // tokens without gaps
        if (p.width == 1) return copy_tokens<real, into>(a, p.samples, a.sample);
        if (p.samples == 1 || a.sample == p.width * a.column) return copy_tokens<real, into>(a, p.samples * p.width, a.column);
    }
    each_item(int64_t(p.samples) * p.channels, a.threads, [&](int, int64_t item) {
        const int64_t n = item / p.channels, c = item % p.channels;
        for (int row = 0; row < p.height; ++row) {
            real* points = channel_of<real>(p, c) + n * p.sample + row * p.row;
            real* plain = static_cast<real*>(a.data) + n * a.sample + c * a.channel + row * a.row;
            if (into) copy_row<real>(points, 1, plain, a.column, p.width);
            else copy_row<real>(plain, a.column, points, 1, p.width);
        }
    });
}

template <class real> void points_load(const acdc_points_copy_args* a, const acdc_share*) { copy_points<real, true>(*a); }
template <class real> void points_store(const acdc_points_copy_args* a, const acdc_share*) { copy_points<real, false>(*a); }

// ---- parts of values ----
// Copies `count` points to point `to` of a row-by-row image, from point `from` of another one, and adds `table`.
template <class real> inline void copy_part(real* y, int64_t to, const acdc_points& out, const real* x,
                                            const acdc_points_part& part, const real* table) {
    for (int64_t done = 0; done < part.points;) {
        const int64_t p = part.point + done, q = to + done;
        const int64_t run = least(least(part.width - p % part.width, out.width - q % out.width), part.points - done);
        const real* source = x + p / part.width * part.row + p % part.width;
        real* target = y + q / out.width * out.row + q % out.width;
        if (table)
            for (int64_t i = 0; i < run; ++i) target[i] = source[i] + table[q + i];
        else
            for (int64_t i = 0; i < run; ++i) target[i] = source[i];
        done += run;
    }
}

template <class real> void points_join(const acdc_points_join_args* args, const acdc_share*) {
    const acdc_points_join_args& a = *args;
    const acdc_points_part* parts = static_cast<const acdc_points_part*>(a.parts);
    const int64_t points = int64_t(a.out.height) * a.out.width;
    each_item(int64_t(a.out.channels) * a.out.samples, a.threads, [&](int, int64_t item) {
        const int64_t n = item % a.out.samples, c = item / a.out.samples;
        const real* table = a.table ? static_cast<const real*>(a.table) + c * points : nullptr;
        real* y = channel_of<real>(a.out, c) + n * a.out.sample;
        for (int row = 0; a.fill && row < a.out.height; ++row)
            for (int i = 0; i < a.out.width; ++i) y[row * a.out.row + i] = table ? table[row * a.out.width + i] : real(0);
        for (int i = 0; i < a.count; ++i) {
            const acdc_points_part& part = parts[i];
            const int64_t channel = c - part.to_channel;
            if (channel < 0 || channel >= part.channels) continue;
            const real* x = static_cast<const real*>(part.origin) + channel * part.channel + n * part.sample;
            copy_part<real>(y, part.to_point, a.out, x, part, table);
        }
    });
}

// ---- rows of a table ----
template <class real> void points_embed(const acdc_points_embed_args* args, const acdc_share*) {
    const acdc_points_embed_args& a = *args;
    const int64_t blocks = (a.out.width + lanes - 1) / lanes;
    each_item(a.out.samples * blocks, a.threads, [&](int, int64_t item) {
        const int64_t n = item / blocks, first = item % blocks * lanes;
        const int count = int(least<int64_t>(lanes, a.out.width - first)), channels = a.out.channels;
        const real* ids = channel_of<real>(a.ids, 0) + n * a.ids.sample + first;
        real* out = channel_of<real>(a.out, 0) + n * a.out.sample + first;
        const real* rows[lanes];
        for (int i = 0; i < count; ++i) {
            const real id = ids[i];
            const int64_t row = id > 0 ? int64_t(id < a.rows - 1 ? id : a.rows - 1) : 0;
            rows[i] = static_cast<const real*>(a.table) + row * channels;
        }
        int c = 0;
        for (; count == lanes && c + lanes <= channels; c += lanes) {
            vec<real> block[lanes];
            for (int i = 0; i < lanes; ++i) block[i] = load_loose(rows[i] + c);
            transpose<real>(block);
            for (int i = 0; i < lanes; ++i) store_loose(out + (c + i) * a.out.channel, block[i]);
        }
        for (; c < channels; ++c)
            for (int i = 0; i < count; ++i) out[c * a.out.channel + i] = rows[i][c];
    });
}

// ---- planes of a stride ----
// Columns [first, first + count) of one row of a plane. Column j is pixel step * j + phase of the row `x`, which is
// null outside of the image.
template <class real> inline void plane_row(real* to, const real* x, int width, int first, int count, int step, int phase) {
    const auto outside = [&](int j) { return !x || step * j + phase < 0 || step * j + phase >= width; };
    int j = first;
    const int end = first + count;
    for (; j < end && outside(j); ++j) to[j] = 0;
    if (x) {
        const int inside = most(j, least(end, (width - phase + step - 1) / step)), count = inside - j;
        const real* from = x + step * j + phase;
        real* const start = to + j;
        const auto one = [=](int64_t i) { start[i] = from[step * i]; };
        if (step == 2)
            over(count, [=](int64_t i) { store_loose(start + i, every_second(from + 2 * i)); }, one);
        else
            for (int i = 0; i < count; ++i) one(i);
        j = inside;
    }
    for (; j < end; ++j) to[j] = 0;
}

template <class real> void points_planes(const acdc_points_planes_args* args, const acdc_share*) {
    const acdc_points_planes_args& a = *args;
    // The planes of a channel follow one another, so that it is read from a cache after the first of them.
    each_item(int64_t(a.planes.channels) * a.x.samples, a.threads, [&](int, int64_t item) {
        const int phase = int(item % a.phases);
        const int64_t n = item / a.phases % a.x.samples, c = item / a.phases / a.x.samples;
        for (int i = a.first_row; i < a.first_row + a.rows; ++i) {
            const int row = i * a.row_step + a.phase_row[phase];
            const bool inside = row >= 0 && row < a.x.height;
            const real* x = channel_of<real>(a.x, c) + n * a.x.sample + row * a.x.row;
            real* to = channel_of<real>(a.planes, phase * int64_t(a.x.channels) + c) + n * a.planes.sample + i * a.planes.row;
            plane_row(to, inside ? x : nullptr, a.x.width, a.first_column, a.columns, a.column_step, a.phase_column[phase]);
        }
    });
}

// ---- pooling ----
// The larger one, or the sum. NaN is larger than everything, as in PyTorch.
template <bool maximum> struct Pooled {
    template <class real> static real of(real a, real b) { return !maximum ? a + b : b > a || b != b ? b : a; }
    template <class real> static vec<real> both(vec<real> a, vec<real> b) {
        return maximum ? select<real>((b > a) | (b != b), b, a) : a + b;
    }
};

// The first and the last + 1 pixel of a window along one axis.
struct Span { int first, last; };
inline Span span_at(int index, int step, int padding, int window, int size) {
    const int first = index * step - padding;
    return {most(first, 0), least(first + window, size)};
}

// How many pixels an average counts along one axis.
inline int counted(const acdc_points_pool_args& a, int index, int step, int padding, int window, int size) {
    const Span inside = span_at(index, step, padding, window, size);
    if (!a.count_padding) return inside.last - inside.first;
    const int first = index * step - padding;
    return least(first + window, size + padding) - first;
}

// Of `count` numbers, `step` apart.
template <class real, bool maximum> inline real pool_window(const real* p, int64_t step, int count) {
    real result = p[0];
    for (int i = 1; i < count; ++i) result = Pooled<maximum>::of(result, p[i * step]);
    return result;
}

// Each column of some rows.
template <class real, bool maximum> inline void pool_rows(real* to, const real* x, int64_t step, int count, int width) {
    over(width,
         [=](int64_t i) {
             vec<real> result = load_loose(x + i);
             for (int r = 1; r < count; ++r) result = Pooled<maximum>::template both<real>(result, load_loose(x + i + r * step));
             store_loose(to + i, result);
         },
         [=](int64_t i) { to[i] = pool_window<real, maximum>(x + i, step, count); });
}

// Each window of a row. `read` reads the numbers that are `step` apart.
template <class real, bool maximum, class Read>
inline void pool_columns(real* y, const real* row, int step, const acdc_points_pool_args& a, Read read) {
    const int count = a.window_columns;
    over(a.y.width,
         [=](int64_t i) {
             vec<real> result = read(row + i * step);
             for (int c = 1; c < count; ++c) result = Pooled<maximum>::template both<real>(result, read(row + i * step + c));
             store_loose(y + i, result);
         },
         [=](int64_t i) { y[i] = pool_window<real, maximum>(row + i * step, 1, count); });
}

// `row` has room for a row of x with its padding, which changes no maximum and no sum.
template <class real, bool maximum> void pool_plane(const acdc_points_pool_args& a, const real* x, real* y, real* row) {
    const real outside = maximum ? -real(__builtin_inff()) : real(0);
    const int room = a.x.width + 2 * a.column_padding;
    for (int i = 0; i < room; ++i) row[i] = outside;
    real* const inside = row + a.column_padding;
    for (int r = 0; r < a.y.height; ++r, y += a.y.row) {
        const Span rows = span_at(r, a.row_step, a.row_padding, a.window_rows, a.x.height);
        pool_rows<real, maximum>(inside, x + rows.first * a.x.row, a.x.row, rows.last - rows.first, a.x.width);
        if (a.column_step == 1)
            pool_columns<real, maximum>(y, row, 1, a, [](const real* p) { return load_loose(p); });
        else if (a.column_step == 2)
            pool_columns<real, maximum>(y, row, 2, a, [](const real* p) { return every_second(p); });
        else
            for (int i = 0; i < a.y.width; ++i) y[i] = pool_window<real, maximum>(row + i * a.column_step, 1, a.window_columns);
        if (maximum) continue;
        const int down = counted(a, r, a.row_step, a.row_padding, a.window_rows, a.x.height);
        for (int i = 0; i < a.y.width; ++i)
            y[i] /= real(down * counted(a, i, a.column_step, a.column_padding, a.window_columns, a.x.width));
    }
}

template <class real> void points_pool(const acdc_points_pool_args* args, const acdc_share*) {
    const acdc_points_pool_args& a = *args;
    each_item(int64_t(a.x.channels) * a.x.samples, a.threads, [&](int thread, int64_t item) {
        const int64_t n = item % a.x.samples, c = item / a.x.samples;
        const real* x = channel_of<real>(a.x, c) + n * a.x.sample;
        real* y = channel_of<real>(a.y, c) + n * a.y.sample;
        real* row = static_cast<real*>(a.workspace) + int64_t(thread) * (a.x.width + 2 * a.column_padding);
        if (a.maximum) pool_plane<real, true>(a, x, y, row);
        else pool_plane<real, false>(a, x, y, row);
    });
}

}  // namespace
}  // namespace ACDC_ISA
