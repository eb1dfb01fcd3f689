// BatchNorm, ReLU and the addition of a residual, in as few passes over memory as possible. The forward
// pass takes one, since the convolution before it computes the statistics. The backward pass takes two,
// since its sums must be complete before any gradient can be computed.
#pragma once
#include <cmath>

#include "simd.h"

namespace ACDC_ISA {
namespace {

// Calls body(thread, block, channel) for every plane of a range of them.
template <class Body>
inline void planes(const acdc_image& image, int thread, int64_t first, int64_t last, Body body) {
    for (int64_t i = first; i < last; ++i) body(thread, i / image.channels, int(i % image.channels));
}
template <class Body>
inline void each_plane(const acdc_image& image, int threads, const acdc_share* share, Body body) {
    auto work = [&](int thread, int64_t first, int64_t last) { planes(image, thread, first, last, body); };
    each(image.blocks, image.channels, threads, share, work);
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

template <class real> void norm(const acdc_norm_args* args, const acdc_share* share) {
    each_plane(args->y, args->threads, share, [&](int thread, int64_t block, int channel) {
        const acdc_norm_args& a = *args;
        const acdc_image in = of_thread<real>(a.y, thread), in2 = of_thread<real>(a.y2, thread);
        const acdc_image rest = of_thread<real>(a.residual, thread), into = of_thread<real>(a.out, thread);
        const mask<real> live = first_lanes<real>(live_lanes(a.y, block, 0));
        const vec<real> scale = at<real>(a.scale, channel), offset = at<real>(a.offset, channel);
        const vec<real> scale2 = at<real>(a.scale2, channel);
        for (int row = 0; row < a.y.height; ++row) {
            const real* y = row_of<real>(in, block, channel, row);
            const real* y2 = row_of<real>(in2, block, channel, row);
            const real* residual = row_of<real>(rest, block, channel, row);
            real* out = row_of<real>(into, block, channel, row);
            for (int i = 0; i < a.y.width * lanes; i += lanes) {
                vec<real> v = scale * load(y + i) + offset;
                if (y2) v += scale2 * load(y2 + i);
                if (residual) v += load(residual + i);
                if (a.relu) v = relu_of<real>(v);
                store(out + i, keep<real>(live, v));
            }
        }
    });
}

// Masks a gradient by the ReLU of a normalisation. The mask follows from the ReLU's output or its input.
template <class real> struct Passed {
    vec<real> scale, offset;
    vec<real> operator()(const real* out, const real* y, vec<real> grad) const {
        const vec<real> v = out ? load(out) : scale * load(y) + offset;
        return keep<real>(v > vec<real>{}, grad);
    }
};

template <class real> struct NormReduce {
    const acdc_norm_reduce_args& a;

    real* partial(int thread) const {
        return static_cast<real*>(a.workspace) + int64_t(thread) * a.y.channels * 3 * lanes;
    }

    void begin() const { clear(partial(0), int64_t(a.threads) * a.y.channels * 3 * lanes); }

    void work(int thread, int64_t first, int64_t last) const {
        const acdc_image grads = of_thread<real>(a.grad, thread), in = of_thread<real>(a.y, thread);
        const acdc_image outs = of_thread<real>(a.out, thread), in2 = of_thread<real>(a.y2, thread);
        const acdc_image into = of_thread<real>(a.dz, thread);
        planes(a.y, thread, first, last, [&](int, int64_t block, int channel) {
            const mask<real> live = first_lanes<real>(live_lanes(a.y, block, 0));
            const vec<real> mean = at<real>(a.mean, channel), mean2 = at<real>(a.mean2, channel);
            const Passed<real> passed{at<real>(a.scale, channel), at<real>(a.offset, channel)};
            real* sums = partial(thread) + channel * lanes;
            vec<real> sum{}, sum_y{}, sum_y2{};
            for (int row = 0; row < a.y.height; ++row) {
                const real* grad = row_of<real>(grads, block, channel, row);
                const real* y = row_of<real>(in, block, channel, row);
                const real* out = row_of<real>(outs, block, channel, row);
                const real* y2 = row_of<real>(in2, block, channel, row);
                real* dz = row_of<real>(into, block, channel, row);
                for (int i = 0; i < a.y.width * lanes; i += lanes) {
                    vec<real> d = keep<real>(live, load(grad + i));
                    if (a.relu) d = passed(out ? out + i : nullptr, y + i, d);
                    if (dz) store(dz + i, d);
                    sum += d;
                    sum_y += d * (load(y + i) - mean);
                    if (y2) sum_y2 += d * (load(y2 + i) - mean2);
                }
            }
            const int64_t next = int64_t(a.y.channels) * lanes;
            store(sums, load(sums) + sum);
            store(sums + next, load(sums + next) + sum_y);
            store(sums + 2 * next, load(sums + 2 * next) + sum_y2);
        });
    }

    void end() const { add_partial(partial(0), a.threads, int64_t(a.y.channels) * 3, a.sums); }
};

template <class real> void norm_reduce(const acdc_norm_reduce_args* a, const acdc_share* share) {
    NormReduce<real> kernel{*a};
    run(kernel, a->y.blocks, a->y.channels, a->threads, share);
}

template <class real> void norm_grad(const acdc_norm_grad_args* args, const acdc_share* share) {
    each_plane(args->y, args->threads, share, [&](int thread, int64_t block, int channel) {
        const acdc_norm_grad_args& a = *args;
        const acdc_image grads = of_thread<real>(a.grad, thread), in = of_thread<real>(a.y, thread);
        const acdc_image outs = of_thread<real>(a.out, thread), in2 = of_thread<real>(a.y2, thread);
        const acdc_image into = of_thread<real>(a.dy, thread), into2 = of_thread<real>(a.dy2, thread);
        const mask<real> live = first_lanes<real>(live_lanes(a.y, block, 0));
        const Passed<real> passed{at<real>(a.scale, channel), at<real>(a.offset, channel)};
        const vec<real> on_dz = at<real>(a.a, channel), on_y = at<real>(a.b, channel);
        const vec<real> on_dz2 = at<real>(a.a2, channel), on_y2 = at<real>(a.b2, channel);
        const vec<real> rest = at<real>(a.c, channel), rest2 = at<real>(a.c2, channel);
        for (int row = 0; row < a.y.height; ++row) {
            const real* grad = row_of<real>(grads, block, channel, row);
            const real* y = row_of<real>(in, block, channel, row);
            const real* out = row_of<real>(outs, block, channel, row);
            const real* y2 = row_of<real>(in2, block, channel, row);
            real* dy = row_of<real>(into, block, channel, row);
            real* dy2 = row_of<real>(into2, block, channel, row);
            for (int i = 0; i < a.y.width * lanes; i += lanes) {
                vec<real> d = load(grad + i);
                if (a.relu) d = passed(out ? out + i : nullptr, y + i, d);
                store(dy + i, keep<real>(live, on_dz * d + on_y * load(y + i) + rest));
                if (dy2) store(dy2 + i, keep<real>(live, on_dz2 * d + on_y2 * load(y2 + i) + rest2));
            }
        }
    });
}

template <class real> struct Statistics {
    const acdc_statistics_args& a;

    real* partial(int thread) const {
        return static_cast<real*>(a.workspace) + int64_t(thread) * a.x.channels * 2 * lanes;
    }

    void begin() const { clear(partial(0), int64_t(a.threads) * a.x.channels * 2 * lanes); }

    void work(int thread, int64_t first, int64_t last) const {
        const acdc_image image = of_thread<real>(a.x, thread);
        planes(image, thread, first, last, [&](int, int64_t block, int channel) {
            const mask<real> live = first_lanes<real>(live_lanes(a.x, block, 0));
            const vec<real> shift = at<real>(a.shift, channel);
            vec<real> sum{}, squares{};
            for (int row = 0; row < image.height; ++row) {
                const real* x = row_of<real>(image, block, channel, row);
                for (int i = 0; i < image.width * lanes; i += lanes) {
                    const vec<real> d = keep<real>(live, load(x + i) - shift);
                    sum += d;
                    squares += d * d;
                }
            }
            real *sums = partial(thread) + channel * lanes, *more = sums + int64_t(image.channels) * lanes;
            store(sums, load(sums) + sum);
            store(more, load(more) + squares);
        });
    }

    void end() const { add_partial(partial(0), a.threads, int64_t(a.x.channels) * 2, a.sums); }
};

template <class real> void statistics(const acdc_statistics_args* a, const acdc_share* share) {
    Statistics<real> kernel{*a};
    run(kernel, a->x.blocks, a->x.channels, a->threads, share);
}

template <class real> inline double number(const void* per_channel, int channel, double absent) {
    return per_channel ? double(static_cast<const real*>(per_channel)[channel]) : absent;
}
template <class real> inline void put(void* per_channel, int channel, double value) {
    if (per_channel) static_cast<real*>(per_channel)[channel] = real(value);
}

template <class real> void norm_fold(const acdc_norm_fold_args* a, const acdc_share*) {
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

template <class real> void norm_unfold(const acdc_norm_unfold_args* a, const acdc_share*) {
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
template <class real, class F>
void pointwise(const acdc_pointwise_args* args, const acdc_share* share, F f) {
    each_plane(args->out, args->threads, share, [&](int thread, int64_t block, int channel) {
        const acdc_image first = of_thread<real>(args->a, thread), second = of_thread<real>(args->b, thread);
        const acdc_image into = of_thread<real>(args->out, thread);
        for (int row = 0; row < into.height; ++row) {
            const real* a = row_of<real>(first, block, channel, row);
            const real* b = row_of<real>(second, block, channel, row);
            real* out = row_of<real>(into, block, channel, row);
            for (int i = 0; i < into.width * lanes; i += lanes)
                store(out + i, f(load(a + i), b ? load(b + i) : vec<real>{}));
        }
    });
}

template <class real> void relu(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> x, vec<real>) { return relu_of<real>(x); });
}
// a: the gradient; b: the ReLU's output.
template <class real> void relu_grad(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(
        a, share, [](vec<real> grad, vec<real> out) { return keep<real>(out > vec<real>{}, grad); });
}
template <class real> void add(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> x, vec<real> y) { return x + y; });
}
template <class real> void mul(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> x, vec<real> y) { return x * y; });
}
template <class real> void copy(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> x, vec<real>) { return x; });
}

}  // namespace
}  // namespace ACDC_ISA
