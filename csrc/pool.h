// Max and average pooling. A window is clipped to the image, so a max never sees the halo's zeros.
// Global average pooling is the window that covers the image.
#pragma once
#include "norm.h"

namespace ACDC_ISA {
namespace {

struct Window { int top, bottom, left, right; };

inline Window window_at(const acdc_pool_args& a, int row, int column) {
    const int top = row * a.row_step - a.row_padding, left = column * a.column_step - a.column_padding;
    return {most(top, 0), least(top + a.window_rows, a.x.height), most(left, 0),
            least(left + a.window_columns, a.x.width)};
}

struct Pixel { int64_t block; int channel, row, column; };

template <class real> inline real* pixel(const acdc_image& image, const Pixel& p) {
    return plane<real>(image, p.block, p.channel) + p.row * image.row + p.column * lanes;
}

// Clears the pixels of a plane, not its halo.
template <class real> inline void clear_plane(const acdc_image& image, int64_t block, int channel) {
    for (int row = 0; row < image.height; ++row)
        clear(row_of<real>(image, block, channel, row), int64_t(image.width) * lanes);
}

// Calls body(arguments, pixel of y, window) for every output pixel, forward or backward. Windows may
// overlap, so one thread computes a whole plane. It clears the gradient before it adds to it.
template <class real, bool backward, class Body>
void each_window(const acdc_pool_args& args, const acdc_share* share, Body body) {
    each_plane(backward ? args.dy : args.y, args.threads, share, [&](int thread, int64_t block, int channel) {
        acdc_pool_args a = args;
        for (acdc_image* image : {&a.x, &a.y, &a.dx, &a.dy}) *image = of_thread<real>(*image, thread);
        if (backward) clear_plane<real>(a.dx, block, channel);
        const acdc_image& y = backward ? a.dy : a.y;
        for (int row = 0; row < y.height; ++row)
            for (int column = 0; column < y.width; ++column)
                body(a, Pixel{block, channel, row, column}, window_at(a, row, column));
    });
}

// Calls body(pixel of x) for every pixel of a window, in the order of PyTorch.
template <class Body> void each_tap(const Pixel& p, Window w, Body body) {
    for (int row = w.top; row < w.bottom; ++row)
        for (int column = w.left; column < w.right; ++column) body(Pixel{p.block, p.channel, row, column});
}

template <class real> void max_pool(const acdc_pool_args* args, const acdc_share* share) {
    each_window<real, false>(*args, share, [](const acdc_pool_args& a, Pixel p, Window w) {
        vec<real> best = load(pixel<real>(a.x, {p.block, p.channel, w.top, w.left}));
        each_tap(p, w, [&](Pixel tap) {
            const vec<real> x = load(pixel<real>(a.x, tap));
            best = select<real>((x > best) | (x != x), x, best);
        });
        store(pixel<real>(a.y, p), best);
    });
}

// The gradient goes to the first pixel that equals the maximum, as in PyTorch.
template <class real> void max_pool_grad(const acdc_pool_args* args, const acdc_share* share) {
    each_window<real, true>(*args, share, [](const acdc_pool_args& a, Pixel p, Window w) {
        const vec<real> best = load(pixel<real>(a.y, p)), grad = load(pixel<real>(a.dy, p));
        mask<real> open = ~mask<real>{};
        each_tap(p, w, [&](Pixel tap) {
            const vec<real> x = load(pixel<real>(a.x, tap));
            const mask<real> first_best = open & ((x == best) | (x != x));
            real* dx = pixel<real>(a.dx, tap);
            store(dx, load(dx) + keep<real>(first_best, grad));
            open &= ~first_best;
        });
    });
}

// One over the size of the window, clipped to the image or, with count_padding, to the padded image.
template <class real> inline real weight_of(const acdc_pool_args& a, const Pixel& p, Window w) {
    if (!a.count_padding) return real(1) / real((w.bottom - w.top) * (w.right - w.left));
    const int top = p.row * a.row_step - a.row_padding, left = p.column * a.column_step - a.column_padding;
    const int rows = least(top + a.window_rows, a.x.height + a.row_padding) - top;
    const int columns = least(left + a.window_columns, a.x.width + a.column_padding) - left;
    return real(1) / real(rows * columns);
}

template <class real> void avg_pool(const acdc_pool_args* args, const acdc_share* share) {
    each_window<real, false>(*args, share, [](const acdc_pool_args& a, Pixel p, Window w) {
        vec<real> sum{};
        each_tap(p, w, [&](Pixel tap) { sum += load(pixel<real>(a.x, tap)); });
        store(pixel<real>(a.y, p), sum * weight_of<real>(a, p, w));
    });
}

template <class real> void avg_pool_grad(const acdc_pool_args* args, const acdc_share* share) {
    each_window<real, true>(*args, share, [](const acdc_pool_args& a, Pixel p, Window w) {
        const vec<real> grad = load(pixel<real>(a.dy, p)) * weight_of<real>(a, p, w);
        each_tap(p, w, [&](Pixel tap) {
            real* dx = pixel<real>(a.dx, tap);
            store(dx, load(dx) + grad);
        });
    });
}

}  // namespace
}  // namespace ACDC_ISA
