// Between plain tensors and the layout: transposes of lanes x lanes numbers, one per register.
#pragma once
#include "simd.h"

namespace ACDC_ISA {
namespace {

template <class real> inline const real* plain_at(const acdc_plain& p, int64_t block, int64_t channel) {
    return static_cast<const real*>(p.data) + block * p.block + channel * p.channel;
}

// Walks the pixels of a plane in the memory order of a dense plane.
template <class real> struct Walk {
    real* row;
    int64_t pitch;
    int width, column = 0;
    real* next() {
        real* pixel = row + int64_t(column) * lanes;
        if (++column == width) { column = 0; row += pitch; }
        return pixel;
    }
};

template <class real> void plane_to_layout(const acdc_convert_args& a, int64_t block, int64_t channel) {
    const int live = live_lanes(a.image, block, 0);
    const int64_t pixels = int64_t(a.image.height) * a.image.width;
    const real* in = plain_at<real>(a.plain, block, channel);
    Walk<real> out{plane<real>(a.image, block, channel), a.image.row, a.image.width};
    int64_t pixel = 0;
    for (; pixel + lanes <= pixels; pixel += lanes) {
        vec<real> rows[lanes];
        for (int lane = 0; lane < lanes; ++lane)
            rows[lane] = lane < live ? load_loose(in + lane * a.plain.lane + pixel) : vec<real>{};
        transpose<real>(rows);
        for (int i = 0; i < lanes; ++i) store(out.next(), rows[i]);
    }
    for (; pixel < pixels; ++pixel) {
        real* to = out.next();
        for (int lane = 0; lane < lanes; ++lane) to[lane] = lane < live ? in[lane * a.plain.lane + pixel] : real(0);
    }
}

template <class real> void plane_from_layout(const acdc_convert_args& a, int64_t block, int64_t channel) {
    const int live = live_lanes(a.image, block, 0);
    const int64_t pixels = int64_t(a.image.height) * a.image.width;
    real* out = const_cast<real*>(plain_at<real>(a.plain, block, channel));
    Walk<real> in{plane<real>(a.image, block, channel), a.image.row, a.image.width};
    int64_t pixel = 0;
    for (; pixel + lanes <= pixels; pixel += lanes) {
        vec<real> rows[lanes];
        for (int i = 0; i < lanes; ++i) rows[i] = load(in.next());
        transpose<real>(rows);
        for (int lane = 0; lane < live; ++lane) store_loose(out + lane * a.plain.lane + pixel, rows[lane]);
    }
    for (; pixel < pixels; ++pixel) {
        const real* from = in.next();
        for (int lane = 0; lane < live; ++lane) out[lane * a.plain.lane + pixel] = from[lane];
    }
}

// Channels are dense: one pixel of `lanes` samples and `lanes` channels is one transpose. A cache line of
// channels is converted at a time, so that every line of the plain tensor is used whole, even if its rows
// share one cache set.
constexpr int line = 16;

template <class real>
void pixel_to_layout(const acdc_convert_args& a, const real* in, real* out, int live, int channels) {
    int c = 0;
    for (; c + lanes <= channels; c += lanes) {
        vec<real> rows[lanes];
        for (int lane = 0; lane < lanes; ++lane)
            rows[lane] = lane < live ? load_loose(in + lane * a.plain.lane + c) : vec<real>{};
        transpose<real>(rows);
        for (int i = 0; i < lanes; ++i) store(out + (c + i) * a.image.channel, rows[i]);
    }
    for (; c < channels; ++c)
        for (int lane = 0; lane < lanes; ++lane)
            out[c * a.image.channel + lane] = lane < live ? in[lane * a.plain.lane + c] : real(0);
}

template <class real>
void pixel_from_layout(const acdc_convert_args& a, real* out, const real* in, int live, int channels) {
    int c = 0;
    for (; c + lanes <= channels; c += lanes) {
        vec<real> rows[lanes];
        for (int i = 0; i < lanes; ++i) rows[i] = load(in + (c + i) * a.image.channel);
        transpose<real>(rows);
        for (int lane = 0; lane < live; ++lane) store_loose(out + lane * a.plain.lane + c, rows[lane]);
    }
    for (; c < channels; ++c)
        for (int lane = 0; lane < live; ++lane) out[lane * a.plain.lane + c] = in[c * a.image.channel + lane];
}

// Calls body(plain, layout, live lanes, channels) for every pixel of one line of channels of one block.
template <class real, class Body>
void each_pixel(const acdc_convert_args& a, int64_t block, int first, Body body) {
    const int channels = least(line, a.image.channels - first);
    const real* plain = plain_at<real>(a.plain, block, first);
    real* layout = plane<real>(a.image, block, first);
    for (int row = 0; row < a.image.height; ++row)
        for (int column = 0; column < a.image.width; ++column)
            body(const_cast<real*>(plain) + row * a.plain.row + column * a.plain.column,
                 layout + row * a.image.row + int64_t(column) * lanes, live_lanes(a.image, block, column), channels);
}

// Splits the work by (block, channel) or by (block, line of channels).
template <class Body> void each_group(const acdc_convert_args& a, int group, const acdc_share* share, Body body) {
    const int64_t groups = (a.image.channels + group - 1) / group;
    auto work = [&](int, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) body(i / groups, int(i % groups) * group);
    };
    each(a.image.blocks, groups, a.threads, share, work);
}

inline bool plane_is_dense(const acdc_convert_args& a) {
    return a.plain.column == 1 && a.plain.row == a.image.width && a.image.per_column == 0;
}

template <class real> void to_layout(const acdc_convert_args* a, const acdc_share* share) {
    if (plane_is_dense(*a)) {
        each_group(*a, 1, share, [&](int64_t block, int channel) { plane_to_layout<real>(*a, block, channel); });
        return;
    }
    each_group(*a, line, share, [&](int64_t block, int first) {
        each_pixel<real>(*a, block, first, [&](real* plain, real* layout, int live, int channels) {
            pixel_to_layout<real>(*a, plain, layout, live, channels);
        });
    });
}

template <class real> void from_layout(const acdc_convert_args* a, const acdc_share* share) {
    if (plane_is_dense(*a)) {
        each_group(*a, 1, share, [&](int64_t block, int channel) { plane_from_layout<real>(*a, block, channel); });
        return;
    }
    each_group(*a, line, share, [&](int64_t block, int first) {
        each_pixel<real>(*a, block, first, [&](real* plain, real* layout, int live, int channels) {
            pixel_from_layout<real>(*a, plain, layout, live, channels);
        });
    });
}

}  // namespace
}  // namespace ACDC_ISA
