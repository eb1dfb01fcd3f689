// BatchNorm with the statistics of the batch, ReLU and the addition of a residual: what lies between two
// convolutions, in as few passes over memory as the arithmetic allows: one forward (the statistics come
// out of the convolution), two backward (its sums must be complete before anything can be computed).
#pragma once
#include <cmath>

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

template <class real> void statistics(const acdc_statistics_args* a) {
    real* workspace = static_cast<real*>(a->workspace);
    const int64_t channels = a->x.channels;
    clear(workspace, a->threads * channels * 2 * lanes);
    each_plane(a->x, a->threads, [&](int thread, int64_t block, int channel) {
        const mask<real> live = first_lanes<real>(live_lanes(a->x, block, 0));
        const vec<real> shift = at<real>(a->shift, channel);
        real* partial = workspace + thread * channels * 2 * lanes + channel * lanes;
        vec<real> sum{}, squares{};
        for (int row = 0; row < a->x.height; ++row) {
            const real* x = row_of<real>(a->x, block, channel, row);
            for (int i = 0; i < a->x.width * lanes; i += lanes) {
                const vec<real> d = keep<real>(live, load(x + i) - shift);
                sum += d;
                squares += d * d;
            }
        }
        store(partial, load(partial) + sum);
        store(partial + channels * lanes, load(partial + channels * lanes) + squares);
    });
    add_partial(workspace, a->threads, channels * 2, a->sums);
}

template <class real> inline double number(const void* per_channel, int channel, double absent) {
    return per_channel ? double(static_cast<const real*>(per_channel)[channel]) : absent;
}
template <class real> inline void put(void* per_channel, int channel, double value) {
    if (per_channel) static_cast<real*>(per_channel)[channel] = real(value);
}

template <class real> void norm_fold(const acdc_norm_fold_args* a) {
    if (a->sums && a->batches) ++*a->batches;
    const double rate = a->momentum >= 0 || !a->batches ? a->momentum : 1.0 / double(*a->batches);
    for (int c = 0; c < a->channels; ++c) {
        double mean = number<real>(a->running_mean, c, 0), variance = number<real>(a->running_var, c, 1);
        if (a->sums) {
            const double shifted = a->sums[c] / a->count;
            const double old_mean = mean, old_variance = variance;
            mean = number<real>(a->shift, c, 0) + shifted;
            variance = a->sums[a->channels + c] / a->count - shifted * shifted;
            if (variance < 0) variance = 0;  // rounding; NaN stays
            put<real>(a->running_mean, c, (1 - rate) * old_mean + rate * mean);
            put<real>(a->running_var, c, (1 - rate) * old_variance + rate * variance * a->count / (a->count - 1));
        }
        const double inverse = 1 / std::sqrt(variance + a->eps);
        const double scale = number<real>(a->weight, c, 1) * inverse;
        put<real>(a->mean, c, mean);
        put<real>(a->inverse, c, inverse);
        put<real>(a->scale, c, scale);
        put<real>(a->offset, c, number<real>(a->bias, c, 0) - mean * scale + number<real>(a->other_offset, c, 0));
    }
}

template <class real> void norm_unfold(const acdc_norm_unfold_args* a) {
    for (int c = 0; c < a->channels; ++c) {
        const double inverse = number<real>(a->inverse, c, 1), scale = number<real>(a->weight, c, 1) * inverse;
        const double on_weight = a->sums_y[c] * inverse;
        const double on_y = a->training ? -scale * on_weight * inverse / a->count : 0;
        put<real>(a->a, c, scale);
        put<real>(a->b, c, on_y);
        put<real>(a->c, c, a->training ? -scale * a->sums[c] / a->count - on_y * number<real>(a->mean, c, 0) : 0);
        put<real>(a->weight_grad, c, on_weight);
        put<real>(a->bias_grad, c, a->sums[c]);
    }
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
