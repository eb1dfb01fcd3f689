// Buffers of points, and what is applied to each number of a result. See acdc_points.h.
#pragma once
#include "acdc_points.h"
#include "activation.h"

namespace ACDC_ISA {
namespace {

template <class real> inline real* channel_of(const acdc_points& p, int64_t channel) {
    return static_cast<real*>(p.origin) + channel * p.channel;
}

// From the first pixel to the last one, with the gaps between.
inline int64_t points_of(const acdc_points& p) {
    return (p.samples - 1) * p.sample + (p.height - 1) * p.row + p.width;
}
inline int64_t vectors_of(const acdc_points& p) { return (points_of(p) + lanes - 1) / lanes; }

// The compiler makes one copy of the body for one thread and one for several, and may round differently in the two.
// So that the results do not depend on the number of threads, both call this function.
#if defined(__clang__)
#define ACDC_ONE_COPY __attribute__((noinline))
#else
#define ACDC_ONE_COPY __attribute__((noinline, noclone))
#endif
template <class Body> ACDC_ONE_COPY void items(Body& body, int thread, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(thread, i);
}

// Runs body(thread, item) for all items of [0, total).
template <class Body> inline void each_item(int64_t total, int threads, Body body) {
    split(total, threads, [&](int thread, int64_t first, int64_t last) { items(body, thread, first, last); });
}

// ---- activations ----
struct Nothing { template <class real> static vec<real> of(vec<real> v) { return v; } };
struct Relu { template <class real> static vec<real> of(vec<real> v) { return relu_of<real>(v); } };
struct Relu6 { template <class real> static vec<real> of(vec<real> v) { return between_0_and<real>(6, v); } };
template <class F> struct ShareOf { template <class real> static vec<real> of(vec<real> v) { return F::template share<real>(v).value; } };
template <class F> struct TimesShare {
    template <class real> static vec<real> of(vec<real> v) { return v * F::template share<real>(v).value; }
};

// Within two units in the last place. Near 0 it is a series, since 1 - exp(-2x) would lose digits there.
struct Tanh {
    template <class real> static vec<real> of(vec<real> v) {
        if constexpr (sizeof(real) == 8) {
            for (int lane = 0; lane < lanes; ++lane) v[lane] = __builtin_tanh(v[lane]);
            return v;
        } else {
            const vec<real> size = magnitude<real>(v), e = exp_of(size * real(-2)), far = (real(1) - e) / (real(1) + e);
            const real series[] = {2.18694885e-2f, -5.39682540e-2f, 1.33333333e-1f, -3.33333333e-1f, 1.0f};
            const vec<real> near = v * polynomial(v * v, series);
            return select<real>(size < splat(real(0.25)), near, select<real>(v < vec<real>{}, -far, far));
        }
    }
};

// Calls body(an object of the activation's class).
template <class Body> inline void with_activation(int activation, Body body) {
    switch (activation) {
        case ACDC_RELU: return body(Relu());
        case ACDC_RELU6: return body(Relu6());
        case ACDC_SIGMOID: return body(ShareOf<Logistic>());
        case ACDC_HARDSIGMOID: return body(ShareOf<Line>());
        case ACDC_HARDSWISH: return body(TimesShare<Line>());
        case ACDC_SILU: return body(TimesShare<Logistic>());
        case ACDC_GELU: return body(TimesShare<Normal>());
        case ACDC_GELU_TANH: return body(TimesShare<NearNormal>());
        case ACDC_TANH: return body(Tanh());
        default: return body(Nothing());
    }
}

// Clears the points that are no pixels. `live` is null if there are none.
template <class real> inline vec<real> only_live(const real* live, vec<real> v) {
    return live ? keep<real>((mask<real>)load(live), v) : v;
}

template <class real> void points_map(const acdc_points_map_args* args, const acdc_share*) {
    const acdc_points_map_args& a = *args;
    const real *scale = static_cast<const real*>(a.scale), *offset = static_cast<const real*>(a.offset);
    const real* live = static_cast<const real*>(a.out.live);
    const int64_t count = vectors_of(a.out) * lanes;
    with_activation(a.activation, [&](auto f) {
        each_item(a.out.channels, a.threads, [&](int, int64_t c) {
            const real *x = channel_of<real>(a.a, c), *y = a.b.origin ? channel_of<real>(a.b, c) : nullptr;
            real* out = channel_of<real>(a.out, c);
            const vec<real> factor = splat(scale ? scale[c] : real(1)), term = splat(offset ? offset[c] : real(0));
            for (int64_t i = 0; i < count; i += lanes) {
                vec<real> v = load(x + i);
                if (scale) v = v * factor + term;
                if (y) v = a.multiply ? v * load(y + i) : v + load(y + i);
                store(out + i, only_live(live ? live + i : nullptr, f.template of<real>(v)));
            }
        });
    });
}

template <class real> void points_gate(const acdc_points_gate_args* args, const acdc_share*) {
    const acdc_points_gate_args& a = *args;
    each_item(a.x.channels, a.threads, [&](int, int64_t c) {
        for (int n = 0; n < a.x.samples; ++n) {
            const real factor = channel_of<real>(a.gate, c)[n * a.gate.sample];
            for (int row = 0; row < a.x.height; ++row) {
                const int64_t at = n * a.x.sample + row * a.x.row;
                const real* x = channel_of<real>(a.x, c) + at;
                real* out = channel_of<real>(a.out, c) + at;
                for (int i = 0; i < a.x.width; ++i) out[i] = x[i] * factor;
            }
        }
    });
}

template <class real> void points_norm(const acdc_points_norm_args* args, const acdc_share*) {
    const acdc_points_norm_args& a = *args;
    const real *weight = static_cast<const real*>(a.weight), *bias = static_cast<const real*>(a.bias);
    const real share = real(1) / real(a.x.channels);
    const int channels = a.x.channels;
    each_item(vectors_of(a.x), a.threads, [&](int, int64_t i) {
        const real* x = channel_of<real>(a.x, 0) + i * lanes;
        real* out = channel_of<real>(a.out, 0) + i * lanes;
        vec<real> mean{}, square{};
        if (a.centered) {
            for (int c = 0; c < channels; ++c) mean += load(x + c * a.x.channel);
            mean *= splat(share);
        }
        for (int c = 0; c < channels; ++c) {
            const vec<real> d = load(x + c * a.x.channel) - mean;
            square += d * d;
        }
        vec<real> inverse = square * splat(share) + splat(real(a.eps));
        for (int lane = 0; lane < lanes; ++lane) inverse[lane] = real(1) / __builtin_sqrt(inverse[lane]);
        for (int c = 0; c < channels; ++c) {
            const vec<real> factor = inverse * splat(weight ? weight[c] : real(1));
            store(out + c * a.out.channel,
                  (load(x + c * a.x.channel) - mean) * factor + splat(bias ? bias[c] : real(0)));
        }
    });
}

}  // namespace
}  // namespace ACDC_ISA
