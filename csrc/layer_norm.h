// LayerNorm and RMSNorm: every pixel, or token, is normalised over its channels. A token is a lane, so a sum
// over channels adds registers, and nothing is summed over lanes. Each block is complete in itself, so these
// kernels can run block by block.
#pragma once
#include "norm.h"

namespace ACDC_ISA {
namespace {

constexpr int channels_at_once = 64;  // are summed before they are added to the rest: less rounding

// The pixels [column, column + width) of one row, in all channels.
template <class real> struct Columns {
    const acdc_image& image;
    int64_t block;
    int row, column;
    real* at(int channel, int i) const {
        return plane<real>(image, block, channel) + row * image.row + (column + i) * lanes;
    }
};

template <class real> inline real weight_of_channel(const void* weight, int channel) {
    return weight ? static_cast<const real*>(weight)[channel] : real(1);
}

// sums[i] = the sum of term(channel, i) over all channels.
template <class real, int width, class Term>
inline void sum_channels(int channels, vec<real> (&sums)[width], Term term) {
    for (vec<real>& sum : sums) sum = vec<real>{};
    for (int first = 0; first < channels; first += channels_at_once) {
        vec<real> part[width]{};
        for (int channel = first; channel < least(first + channels_at_once, channels); ++channel) {
            ACDC_UNROLL
            for (int i = 0; i < width; ++i) part[i] += term(channel, i);
        }
        ACDC_UNROLL
        for (int i = 0; i < width; ++i) sums[i] += part[i];
    }
}

template <class real> inline vec<real> root(vec<real> v) {
    for (int lane = 0; lane < lanes; ++lane) v[lane] = std::sqrt(v[lane]);
    return v;
}

// Calls body(columns of a row, their number as a type) for a whole row.
template <class Body> inline void each_columns(int width, Body body) {
    int column = 0;
    for (; column + 4 <= width; column += 4) body(column, std::integral_constant<int, 4>());
    for (; column < width; ++column) body(column, std::integral_constant<int, 1>());
}

template <class real, int width>
inline void layer_norm_columns(const acdc_layer_norm_args& a, const Columns<real>& in, const Columns<real>& out,
                               const Columns<real>& stats) {
    const real count = real(a.x.channels);
    vec<real> mean[width]{}, inverse[width];
    if (a.known) {
        for (int i = 0; i < width; ++i) mean[i] = load(stats.at(0, i)), inverse[i] = load(stats.at(1, i));
    } else {
        if (a.centered) {
            sum_channels<real, width>(a.x.channels, mean, [&](int c, int i) { return load(in.at(c, i)); });
            for (int i = 0; i < width; ++i) mean[i] /= count;
        }
        sum_channels<real, width>(a.x.channels, inverse, [&](int c, int i) {
            const vec<real> d = load(in.at(c, i)) - mean[i];
            return d * d;
        });
        for (int i = 0; i < width; ++i) {
            inverse[i] = real(1) / root<real>(inverse[i] / count + real(a.eps));
            store(stats.at(0, i), mean[i]), store(stats.at(1, i), inverse[i]);
        }
    }
    mask<real> live[width];
    for (int i = 0; i < width; ++i) live[i] = first_lanes<real>(live_lanes(a.x, in.block, in.column + i));
    for (int channel = 0; channel < a.x.channels; ++channel) {
        const real weight = weight_of_channel<real>(a.weight, channel);
        const vec<real> bias = at<real>(a.bias, channel);
        ACDC_UNROLL
        for (int i = 0; i < width; ++i) {
            const vec<real> v = (load(in.at(channel, i)) - mean[i]) * inverse[i] * weight + bias;
            store(out.at(channel, i), keep<real>(live[i], v));
        }
    }
}

template <class real> void layer_norm(const acdc_layer_norm_args* args, const acdc_share* share) {
    each(args->x.blocks, args->x.height, args->threads, share, [&](int thread, int64_t first, int64_t last) {
        const acdc_layer_norm_args& a = *args;
        const acdc_image in = of_thread<real>(a.x, thread), into = of_thread<real>(a.out, thread);
        const acdc_image stats = of_thread<real>(a.stats, thread);
        for (int64_t item = first; item < last; ++item) {
            const int64_t block = item / a.x.height;
            const int row = int(item % a.x.height);
            each_columns(a.x.width, [&](int column, auto width) {
                layer_norm_columns<real, width()>(a, {in, block, row, column}, {into, block, row, column},
                                                  {stats, block, row, column});
            });
        }
    });
}

template <class real> struct LayerNormGrad {
    const acdc_layer_norm_grad_args& a;

    real* partial(int thread) const {
        return static_cast<real*>(a.workspace) + int64_t(thread) * a.x.channels * 2 * lanes;
    }

    void begin() const {
        if (a.sums) clear(partial(0), int64_t(a.threads) * a.x.channels * 2 * lanes);
    }

    // One pass sums, for each token, weight * grad and its product with the normalised x, and for each channel
    // the gradients of bias and weight. A second pass writes dx.
    template <int width>
    void columns(real* partial, const Columns<real>& grad, const Columns<real>& in, const Columns<real>& stats,
                 const Columns<real>& into) const {
        vec<real> mean[width], inverse[width], sum[width]{}, product[width]{};
        for (int i = 0; i < width; ++i) mean[i] = load(stats.at(0, i)), inverse[i] = load(stats.at(1, i));
        for (int first = 0; first < a.x.channels; first += channels_at_once) {
            vec<real> part[width]{}, part_of_product[width]{};
            for (int c = first; c < least(first + channels_at_once, a.x.channels); ++c) {
                const real weight = weight_of_channel<real>(a.weight, c);
                vec<real> on_bias{}, on_weight{};
                ACDC_UNROLL
                for (int i = 0; i < width; ++i) {
                    const vec<real> g = load(grad.at(c, i)), h = (load(in.at(c, i)) - mean[i]) * inverse[i];
                    on_bias += g;
                    on_weight += g * h;
                    part[i] += g * weight;
                    part_of_product[i] += g * h * weight;
                }
                if (a.sums) {
                    real *bias_sum = partial + c * lanes, *weight_sum = bias_sum + int64_t(a.x.channels) * lanes;
                    store(bias_sum, load(bias_sum) + on_bias);
                    store(weight_sum, load(weight_sum) + on_weight);
                }
            }
            ACDC_UNROLL
            for (int i = 0; i < width; ++i) sum[i] += part[i], product[i] += part_of_product[i];
        }
        if (!present(a.dx)) return;
        const real count = real(a.x.channels);
        for (int i = 0; i < width; ++i) {
            sum[i] = a.centered ? sum[i] / count : vec<real>{};
            product[i] /= count;
        }
        for (int c = 0; c < a.x.channels; ++c) {
            const real weight = weight_of_channel<real>(a.weight, c);
            ACDC_UNROLL
            for (int i = 0; i < width; ++i) {
                const vec<real> g = load(grad.at(c, i)) * weight, h = (load(in.at(c, i)) - mean[i]) * inverse[i];
                const vec<real> d = (g - sum[i] - h * product[i]) * inverse[i];
                real* dx = into.at(c, i);
                store(dx, a.accumulate ? load(dx) + d : d);
            }
        }
    }

    void work(int thread, int64_t first, int64_t last) const {
        const acdc_image grad = of_thread<real>(a.grad, thread), in = of_thread<real>(a.x, thread);
        const acdc_image stats = of_thread<real>(a.stats, thread), into = of_thread<real>(a.dx, thread);
        real* sums = a.sums ? partial(thread) : nullptr;
        for (int64_t item = first; item < last; ++item) {
            const int64_t block = item / a.x.height;
            const int row = int(item % a.x.height);
            each_columns(a.x.width, [&](int column, auto width) {
                columns<width()>(sums, {grad, block, row, column}, {in, block, row, column},
                                 {stats, block, row, column}, {into, block, row, column});
            });
        }
    }

    void end() const {
        if (a.sums) add_partial(partial(0), a.threads, int64_t(a.x.channels) * 2, a.sums);
    }
};

template <class real> void layer_norm_grad(const acdc_layer_norm_grad_args* a, const acdc_share* share) {
    LayerNormGrad<real> kernel{*a};
    run(kernel, a->x.blocks, a->x.height, a->threads, share);
}

}  // namespace
}  // namespace ACDC_ISA
