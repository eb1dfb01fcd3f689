// Linear layers that keep all weights, at few points: the weight is read once, in order, without an index list. The
// lanes hold neighbouring input channels.
#pragma once
#include "points.h"

namespace ACDC_ISA {
namespace {

constexpr int dense_rows = 4, dense_points = lanes == 16 ? 4 : 2;  // they fill the registers

// sums[r][p] = the sum over i of weight[r][i] * x[p][i]. Each sum is one chain, so that it does not depend on how many
// points are computed together. `size` is a whole number of registers.
template <class real, int R, int P> inline void dense_sums(const real* weight, const real* x, int64_t size, real* sums) {
    vec<real> sum[R][P] = {};
    for (int64_t i = 0; i < size; i += lanes) {
        vec<real> points[P];
        ACDC_UNROLL
        for (int p = 0; p < P; ++p) points[p] = load(x + p * size + i);
        ACDC_UNROLL
        for (int j = 0; j < R * P; ++j) sum[j / P][j % P] += load_loose(weight + j / P * size + i) * points[j % P];
    }
    for (int j = 0; j < R * P; ++j)
        for (int lane = 0; lane < lanes; ++lane) sums[j] += sum[j / P][j % P][lane];
}

template <class real, int R, int P> inline void dense_block(const acdc_points_dense_args& a, int64_t out, int64_t point) {
    const int64_t size = a.size;
    real sums[R * P] = {};
    dense_sums<real, R, P>(static_cast<const real*>(a.weight) + out * size,
                           static_cast<const real*>(a.workspace) + point * size, size, sums);
    for (int j = 0; j < R * P; ++j) {
        const int64_t channel = out + j / P, n = point + j % P;
        real v = sums[j];
        if (a.bias) v += static_cast<const real*>(a.bias)[channel];
        if (a.residual.origin) v += channel_of<real>(a.residual, channel)[n * a.residual.sample];
        with_activation(a.activation, [&](auto f) { v = f.template of<real>(splat(v))[0]; });
        channel_of<real>(a.y, channel)[n * a.y.sample] = v;
    }
}

template <class real, int R> inline void dense_row(const acdc_points_dense_args& a, int64_t out) {
    int64_t point = 0;
    for (; point + dense_points <= a.x.samples; point += dense_points) dense_block<real, R, dense_points>(a, out, point);
    for (; point < a.x.samples; ++point) dense_block<real, R, 1>(a, out, point);
}

// Pixels of the images, which have one each, as [point][channel], zeros behind the channels.
template <class real> inline void gather_points(const acdc_points_dense_args& a, int64_t n) {
    real* to = static_cast<real*>(a.workspace) + n * a.size;
    const real* x = channel_of<real>(a.x, 0) + n * a.x.sample;
    for (int64_t c = 0; c < a.size; ++c) to[c] = c < a.x.channels ? x[c * a.x.channel] : real(0);
}

template <class real> void points_dense(const acdc_points_dense_args* args, const acdc_share*) {
    const acdc_points_dense_args& a = *args;
    each_item(a.x.samples, a.threads, [&](int, int64_t n) { gather_points<real>(a, n); });
    const int64_t blocks = (a.y.channels + dense_rows - 1) / dense_rows;
    each_item(blocks, a.threads, [&](int, int64_t block) {
        const int64_t first = block * dense_rows;
        if (first + dense_rows <= a.y.channels) return dense_row<real, dense_rows>(a, first);
        for (int64_t out = first; out < a.y.channels; ++out) dense_row<real, 1>(a, out);
    });
}

}  // namespace
}  // namespace ACDC_ISA
