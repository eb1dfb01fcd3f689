// GELU, SiLU and hard-swish: x times a share between 0 and 1. Sigmoid and hard-sigmoid: the share itself. The
// backward pass needs x alone.
//
// The exponential is a polynomial, which compiles to vector code. So is the normal distribution in float. In
// double, which serves gradient checks, the C library computes the normal distribution lane by lane. It does not
// compute the exponential: every C library since glibc 2.29 has an exp of a new version, which older ones lack.
#pragma once
#include "norm.h"

namespace ACDC_ISA {
namespace {

// The polynomial with these coefficients, the highest power first.
template <class real, int count>
inline vec<real> polynomial(vec<real> x, const real (&coefficients)[count]) {
    vec<real> sum = splat(coefficients[0]);
    ACDC_UNROLL
    for (int i = 1; i < count; ++i) sum = sum * x + coefficients[i];
    return sum;
}

template <class real> inline vec<real> magnitude(vec<real> v) { return select<real>(v < vec<real>{}, -v, v); }

// exp(x) for x <= 0, to one unit in the last place; 0 where that would be denormal. NaN stays NaN.
inline vec<float> exp_of(vec<float> x) {
    // Adding 1.5 * 2^23 rounds to an integer n, and leaves it in the last bits.
    const vec<float> round = splat(12582912.0f), shifted = x * 1.44269504f + round;
    const vec<float> n = shifted - round;
    const vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log 2, in two parts
    const float taylor[] = {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
    const vec<float> power = (vec<float>)(((vec<uint32_t>)shifted << 23) + 0x3f800000u);  // 2^n
    return keep<float>(~(x < splat(-87.3f)), polynomial<float>(r, taylor) * power);
}

inline vec<double> exp_of(vec<double> x) {  // as above, with 1.5 * 2^52 and the powers of r up to 13
    const vec<double> round = splat(6755399441055744.0), shifted = x * 1.44269504088896340736 + round;
    const vec<double> n = shifted - round;
    const vec<double> r = x - n * 0.69314718036912381649 - n * 1.90821492927058770002e-10;
    const double taylor[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
                             1 / 40320.0,      1 / 5040.0,      1 / 720.0,      1 / 120.0,     1 / 24.0,
                             1 / 6.0,          0.5,             1.0,            1.0};
    const vec<double> power = (vec<double>)(((vec<uint64_t>)shifted << 52) + 0x3ff0000000000000u);
    return keep<double>(~(x < splat(-708.0)), polynomial<double>(r, taylor) * power);
}

// The share of one number in x, and its slope there.
template <class real> struct Share { vec<real> value, slope; };

// The tail of the normal distribution beyond z >= 0, given bell = exp(-z*z/2): bell times a polynomial in
// 1 / (1 + 0.35 z), fitted to a relative error of 3e-8.
inline vec<float> normal_tail(vec<float> z, vec<float> bell) {
    const vec<float> t = 1.0f / (1.0f + 0.35f * z);
    const float fitted[] = {-0.0291653162f, 0.144067707f, -0.255916449f, 0.159409978f, -0.0232758953f,
                            0.105580054f,   0.119814127f, 0.139864532f,  0.139621247f};
    return bell * t * polynomial<float>(t, fitted);
}

inline vec<double> normal_tail(vec<double> z, vec<double>) {
    for (int lane = 0; lane < lanes; ++lane) z[lane] = 0.5 * __builtin_erfc(z[lane] * 0.70710678118654752440);
    return z;
}

// The normal distribution: GELU.
struct Normal {
    template <class real> static Share<real> share(vec<real> x) {
        const vec<real> bell = exp_of(x * x * real(-0.5)), tail = normal_tail(magnitude<real>(x), bell);
        return {select<real>(x < vec<real>{}, tail, real(1) - tail), bell * real(0.39894228040143267794)};
    }
};

// The logistic function: SiLU.
struct Logistic {
    template <class real> static Share<real> share(vec<real> x) {
        const vec<real> e = exp_of(-magnitude<real>(x)), q = real(1) / (real(1) + e);
        return {select<real>(x < vec<real>{}, e * q, q), e * q * q};
    }
};

// (1 + tanh u) / 2 = logistic(2 u), where u is a cubic that comes close to the normal distribution.
struct NearNormal {
    template <class real> static Share<real> share(vec<real> x) {
        const real linear = real(1.59576912160573071176), cubic = real(0.044715);
        const vec<real> square = x * x;
        const Share<real> s = Logistic::share<real>(linear * x * (real(1) + cubic * square));
        return {s.value, s.slope * linear * (real(1) + 3 * cubic * square)};
    }
};

// min(max(v, 0), most). NaN stays NaN.
template <class real> inline vec<real> between_0_and(real most, vec<real> v) {
    return select<real>(v > splat(most), splat(most), relu_of<real>(v));
}

// A straight line from 0 at -3 to 1 at 3: hard-swish and hard-sigmoid.
struct Line {
    template <class real> static Share<real> share(vec<real> x) {
        const vec<real> sixth = splat(real(1) / real(6));
        const mask<real> inside = (x > splat(real(-3))) & (x < splat(real(3)));
        return {between_0_and<real>(6, x + real(3)) * sixth, keep<real>(inside, sixth)};
    }
};

template <class real, class F> void activation(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> x, vec<real>) { return x * F::template share<real>(x).value; });
}
// a: the gradient; b: the input.
template <class real, class F> void activation_grad(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> grad, vec<real> x) {
        const Share<real> s = F::template share<real>(x);
        return grad * (s.value + x * s.slope);
    });
}

#define ACDC_ACTIVATION(name, F)                                                              \
    template <class real> void name(const acdc_pointwise_args* a, const acdc_share* share) {        \
        activation<real, F>(a, share);                                                        \
    }                                                                                         \
    template <class real> void name##_grad(const acdc_pointwise_args* a, const acdc_share* share) { \
        activation_grad<real, F>(a, share);                                                   \
    }
ACDC_ACTIVATION(gelu, Normal)
ACDC_ACTIVATION(gelu_tanh, NearNormal)
ACDC_ACTIVATION(silu, Logistic)
#undef ACDC_ACTIVATION

// The share of 0 is not 0, so the dead lanes are cleared.
template <class real, class F> void share_alone(const acdc_pointwise_args* args, const acdc_share* share) {
    each_plane(args->out, args->threads, share, [&](int thread, int64_t block, int channel) {
        const acdc_image in = of_thread<real>(args->a, thread), into = of_thread<real>(args->out, thread);
        const bool whole = live_lanes(into, block, into.width - 1) == lanes;
        for (int row = 0; row < into.height; ++row) {
            const real* x = row_of<real>(in, block, channel, row);
            real* out = row_of<real>(into, block, channel, row);
            for (int i = 0; i < into.width * lanes; i += lanes) {
                const vec<real> v = F::template share<real>(load(x + i)).value;
                store(out + i, whole ? v : keep<real>(first_lanes<real>(live_lanes(into, block, i / lanes)), v));
            }
        }
    });
}

#define ACDC_SHARE(name, F)                                                                            \
    template <class real> void name(const acdc_pointwise_args* a, const acdc_share* share) {           \
        share_alone<real, F>(a, share);                                                                \
    }                                                                                                  \
    template <class real> void name##_grad(const acdc_pointwise_args* a, const acdc_share* share) {    \
        pointwise<real>(a, share, [](vec<real> grad, vec<real> x) {                                    \
            return grad * F::share<real>(x).slope;                                                     \
        });                                                                                            \
    }
ACDC_SHARE(sigmoid, Logistic)
ACDC_SHARE(hardsigmoid, Line)
#undef ACDC_SHARE

template <class real> void hardswish(const acdc_pointwise_args* a, const acdc_share* share) {
    activation<real, Line>(a, share);
}
// a: the gradient; b: the input. The slope is that of a parabola between two lines.
template <class real> void hardswish_grad(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> grad, vec<real> x) {
        const vec<real> inside = grad * (x * (real(1) / real(3)) + real(0.5));
        return keep<real>(x > splat(real(-3)), select<real>(x < splat(real(3)), inside, grad));
    });
}

template <class real> void relu6(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> x, vec<real>) { return between_0_and<real>(6, x); });
}
// a: the gradient; b: the input.
template <class real> void relu6_grad(const acdc_pointwise_args* a, const acdc_share* share) {
    pointwise<real>(a, share, [](vec<real> grad, vec<real> x) {
        return keep<real>((x > vec<real>{}) & (x < splat(real(6))), grad);
    });
}

}  // namespace
}  // namespace ACDC_ISA
