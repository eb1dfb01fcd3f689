// BatchNorm with the statistics of the batch, ReLU and the addition of a residual: what lies between two
// convolutions, in as few passes over memory as the arithmetic allows: one forward (the statistics come
// out of the convolution), two backward (its sums must be complete before anything can be computed).
#pragma once
#include "simd.h"

namespace ACDC_ISA {
namespace {

// Calls body(thread, block, channel) for every plane.
template <class Body> inline void each_plane(const acdc_image& image, int threads, Body body) {
    split(int64_t(image.blocks) * image.channels, threads, [&](int thread, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) body(thread, i / image.channels, int(i % image.channels));
    });
}

template <class real> inline vec<real> at(const void* per_channel, int channel) {
    return splat(per_channel ? static_cast<const real*>(per_channel)[channel] : real(0));
}

inline bool present(const acdc_image& image) { return image.origin != nullptr; }

// A row of an optional operand, or null.
template <class real> inline real* row_of(const acdc_image& image, int64_t block, int channel, int row) {
    return present(image) ? plane<real>(image, block, channel) + row * image.row : nullptr;
}

// max(0, v) that keeps NaN, as PyTorch does.
template <class real> inline vec<real> relu_of(vec<real> v) { return keep<real>(~(v < vec<real>{}), v); }

template <class real> void norm(const acdc_norm_args* a) {
    each_plane(a->y, a->threads, [&](int, int64_t block, int channel) {
        const mask<real> live = first_lanes<real>(live_lanes(a->y, block, 0));
        const vec<real> scale = at<real>(a->scale, channel), offset = at<real>(a->offset, channel);
        const vec<real> scale2 = at<real>(a->scale2, channel);
        for (int row = 0; row < a->y.height; ++row) {
            const real* y = row_of<real>(a->y, block, channel, row);
            const real* y2 = row_of<real>(a->y2, block, channel, row);
            const real* residual = row_of<real>(a->residual, block, channel, row);
            real* out = row_of<real>(a->out, block, channel, row);
            for (int i = 0; i < a->y.width * lanes; i += lanes) {
                vec<real> v = scale * load(y + i) + offset;
                if (y2) v += scale2 * load(y2 + i);
                if (residual) v += load(residual + i);
                if (a->relu) v = relu_of<real>(v);
                store(out + i, keep<real>(live, v));
            }
        }
    });
}

template <class real> void norm_reduce(const acdc_norm_reduce_args* a) {
    real* workspace = static_cast<real*>(a->workspace);
    const int64_t channels = a->y.channels;
    clear(workspace, a->threads * channels * 3 * lanes);
    each_plane(a->y, a->threads, [&](int thread, int64_t block, int channel) {
        const mask<real> live = first_lanes<real>(live_lanes(a->y, block, 0));
        const vec<real> mean = at<real>(a->mean, channel), mean2 = at<real>(a->mean2, channel);
        real* partial = workspace + thread * channels * 3 * lanes + channel * lanes;
        vec<real> sum{}, sum_y{}, sum_y2{};
        for (int row = 0; row < a->y.height; ++row) {
            const real* grad = row_of<real>(a->grad, block, channel, row);
            const real* y = row_of<real>(a->y, block, channel, row);
            const real* out = a->relu ? row_of<real>(a->out, block, channel, row) : nullptr;
            const real* y2 = row_of<real>(a->y2, block, channel, row);
            real* dz = row_of<real>(a->dz, block, channel, row);
            for (int i = 0; i < a->y.width * lanes; i += lanes) {
                vec<real> d = keep<real>(live, load(grad + i));
                if (out) d = keep<real>(load(out + i) > vec<real>{}, d);
                if (dz) store(dz + i, d);
                sum += d;
                sum_y += d * (load(y + i) - mean);
                if (y2) sum_y2 += d * (load(y2 + i) - mean2);
            }
        }
        store(partial, load(partial) + sum);
        store(partial + channels * lanes, load(partial + channels * lanes) + sum_y);
        store(partial + channels * 2 * lanes, load(partial + channels * 2 * lanes) + sum_y2);
    });
    add_partial(workspace, a->threads, channels * 3, a->sums);
}

template <class real> void norm_grad(const acdc_norm_grad_args* a) {
    each_plane(a->y, a->threads, [&](int, int64_t block, int channel) {
        const mask<real> live = first_lanes<real>(live_lanes(a->y, block, 0));
        const vec<real> on_dz = at<real>(a->a, channel), on_y = at<real>(a->b, channel), rest = at<real>(a->c, channel);
        const vec<real> on_dz2 = at<real>(a->a2, channel), on_y2 = at<real>(a->b2, channel);
        const vec<real> rest2 = at<real>(a->c2, channel);
        for (int row = 0; row < a->y.height; ++row) {
            const real* grad = row_of<real>(a->grad, block, channel, row);
            const real* y = row_of<real>(a->y, block, channel, row);
            const real* out = a->relu ? row_of<real>(a->out, block, channel, row) : nullptr;
            const real* y2 = row_of<real>(a->y2, block, channel, row);
            real* dy = row_of<real>(a->dy, block, channel, row);
            real* dy2 = row_of<real>(a->dy2, block, channel, row);
            for (int i = 0; i < a->y.width * lanes; i += lanes) {
                vec<real> d = load(grad + i);
                if (out) d = keep<real>(load(out + i) > vec<real>{}, d);
                store(dy + i, keep<real>(live, on_dz * d + on_y * load(y + i) + rest));
                if (dy2) store(dy2 + i, keep<real>(live, on_dz2 * d + on_y2 * load(y2 + i) + rest2));
            }
        }
    });
}

// out = f(a, b) for every pixel; b may be absent.
template <class real, class F> void pointwise(const acdc_pointwise_args* args, F f) {
    each_plane(args->out, args->threads, [&](int, int64_t block, int channel) {
        for (int row = 0; row < args->out.height; ++row) {
            const real* a = row_of<real>(args->a, block, channel, row);
            const real* b = row_of<real>(args->b, block, channel, row);
            real* out = row_of<real>(args->out, block, channel, row);
            for (int i = 0; i < args->out.width * lanes; i += lanes)
                store(out + i, f(load(a + i), b ? load(b + i) : vec<real>{}));
        }
    });
}

template <class real> void relu(const acdc_pointwise_args* a) {
    pointwise<real>(a, [](vec<real> x, vec<real>) { return relu_of<real>(x); });
}
// a: the gradient; b: the ReLU's output.
template <class real> void relu_grad(const acdc_pointwise_args* a) {
    pointwise<real>(a, [](vec<real> grad, vec<real> out) { return keep<real>(out > vec<real>{}, grad); });
}
template <class real> void add(const acdc_pointwise_args* a) {
    pointwise<real>(a, [](vec<real> x, vec<real> y) { return x + y; });
}

}  // namespace
}  // namespace ACDC_ISA
