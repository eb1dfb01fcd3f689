// The kernels between the layers: pointwise operations, gates, pooling.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>

#include "norms.h"

namespace check {

using Function = double (*)(double);

inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }
inline double bell(double x) { return std::exp(-x * x / 2) * 0.39894228040143267794; }
inline double normal_cdf(double x) { return std::erfc(-x * 0.70710678118654752440) / 2; }
inline double cubic(double x) { return 1.59576912160573071176 * x * (1 + 0.044715 * x * x); }
inline double cubic_slope(double x) { return 1.59576912160573071176 * (1 + 3 * 0.044715 * x * x); }
inline double clamped(double x) { return std::fmin(std::fmax(x, 0), 6); }

// An activation and its derivative.
template <class real> struct Activation {
    using Kernel = void (Kernels<real>::*)(acdc_pointwise_args, int64_t) const;
    const char* name;
    Kernel forward, backward;
    Function f, slope;
};

template <class real> std::vector<Activation<real>> activations() {
#define ACDC_ROW(name) #name, &Kernels<real>::name, &Kernels<real>::name##_grad
    return {
        {ACDC_ROW(gelu), [](double x) { return x * normal_cdf(x); }, [](double x) { return normal_cdf(x) + x * bell(x); }},
        {ACDC_ROW(gelu_tanh), [](double x) { return x * logistic(cubic(x)); },
         [](double x) {
             const double s = logistic(cubic(x));
             return s + x * s * logistic(-cubic(x)) * cubic_slope(x);
         }},
        {ACDC_ROW(silu), [](double x) { return x * logistic(x); },
         [](double x) { return logistic(x) + x * logistic(x) * logistic(-x); }},
        {ACDC_ROW(sigmoid), logistic, [](double x) { return logistic(x) * logistic(-x); }},
        {ACDC_ROW(relu6), clamped, [](double x) { return double(x > 0 && x < 6); }},
        {ACDC_ROW(hardsigmoid), [](double x) { return clamped(x + 3) / 6; },
         [](double x) { return x > -3 && x < 3 ? 1.0 / 6 : 0.0; }},
        {ACDC_ROW(hardswish), [](double x) { return x * clamped(x + 3) / 6; },
         [](double x) { return x <= -3 ? 0.0 : x < 3 ? x / 3 + 0.5 : 1.0; }},
    };
#undef ACDC_ROW
}

// Number by number, relative to the number itself, down to a tenth: below, its terms cancel.
template <class real> void close_each(const std::string& what, const Tensor& x, const Tensor& got, const Tensor& want) {
    const double limit = sizeof(real) == 4 ? 1e-6 : 1e-12;
    for (std::size_t i = 0; i < want.values.size(); ++i) {
        const double error = std::fabs(got.values[i] - want.values[i]);
        if (!(error <= limit * std::fmax(std::fabs(want.values[i]), 0.1)))
            throw Failure(what + " of " + text_of(x.values[i]) + " is " + text_of(got.values[i]) +
                          " instead of " + text_of(want.values[i]));
    }
}

template <class real> void check_activations(const Kernels<real>& k, Random& random) {
    const bool tokens = random.chance(0.5);
    Tensor x(random.between(1, 17 * k.lanes()), random.between(1, 9), 1, 1);
    for (double& value : x.values) value = float(28 * random.uniform() - 14);
    x.values[0] = random.one_of({0.0, 90.0, -90.0, double(-1e-30f)});
    Tensor ones = x.like();
    for (double& value : ones.values) value = 1;
    const Place place = k.place(0, tokens);
    Buffer<real> b_x(x, place), b_out(x, place), b_grad(x, place);
    b_x.put(x);
    acdc_pointwise_args forward{}, backward{};
    forward.a = b_x.image(), forward.out = b_out.image();
    backward.a = backward.out = b_grad.image(), backward.b = b_x.image();  // in place
    for (const Activation<real>& activation : activations<real>()) {
        Tensor want = x, slope = x;
        for (double& value : want.values) value = activation.f(value);
        for (double& value : slope.values) value = activation.slope(value);
        b_out.dirty();
        (k.*activation.forward)(forward, b_x.blocks());
        close_each<real>(activation.name, x, b_out.get(), want);
        b_out.check_rest(activation.name);
        b_grad.put(ones);
        (k.*activation.backward)(backward, b_x.blocks());
        close_each<real>(std::string("the slope of ") + activation.name, x, b_grad.get(), slope);
        b_grad.check_rest(activation.name);
    }
}

inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }
inline void equal(const char* what, const Tensor& got, const Tensor& want) {
    for (std::size_t i = 0; i < want.values.size(); ++i)
        if (!same(got.values[i], want.values[i])) throw Failure(std::string(what) + ": a number differs");
}

// Operations that round at most once. NaN and infinity come through.
template <class real> void check_pointwise(const Kernels<real>& k, Random& random) {
    using Kernel = void (Kernels<real>::*)(acdc_pointwise_args, int64_t) const;
    using Operation = std::function<real(real, real)>;
    const Images size = draw_images(random, k.lanes());
    Tensor x = random_tensor(random, size.samples, size.channels, size.height, size.width);
    const Tensor y = random_tensor(random, size.samples, size.channels, size.height, size.width);
    const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
    x.values[0] = random.one_of({nan, infinity, -infinity, 0.0, -0.0});
    auto buffer = [&] { return Buffer<real>(x, k.place(random.between(0, 2))); };
    Buffer<real> b_x = buffer(), b_y = buffer(), out = buffer();
    b_x.put(x), b_y.put(y);
    auto check = [&](const char* name, Kernel kernel, bool binary, Operation f) {
        Tensor want = x;
        for (std::size_t i = 0; i < x.values.size(); ++i)
            want.values[i] = double(f(real(x.values[i]), real(y.values[i])));
        acdc_pointwise_args a{};
        a.a = b_x.image(), a.out = out.dirty().image();
        if (binary) a.b = b_y.image();
        (k.*kernel)(a, b_x.blocks());
        equal(name, out.get(), want);
        out.check_rest(name);
    };
    check("relu", &Kernels<real>::relu, false, [](real a, real) { return a < 0 ? real(0) : a; });
    check("relu_grad", &Kernels<real>::relu_grad, true, [](real a, real b) { return b > 0 ? a : real(0); });
    check("add", &Kernels<real>::add, true, [](real a, real b) { return a + b; });
    check("mul", &Kernels<real>::mul, true, [](real a, real b) { return a * b; });
    check("copy", &Kernels<real>::copy, false, [](real a, real) { return a; });
}

template <class real> void check_gates(const Kernels<real>& k, Random& random) {
    const Images size = draw_images(random, k.lanes());
    const Tensor x = random_tensor(random, size.samples, size.channels, size.height, size.width);
    const Tensor grad = random_tensor(random, size.samples, size.channels, size.height, size.width);
    const Tensor gate = random_tensor(random, size.samples, size.channels, 1, 1);
    auto place = [&] { return k.place(random.between(0, 2)); };
    Buffer<real> b_x(x, place()), b_grad(x, place()), b_out(x, place()), b_gate(gate, place()), b_dgate(gate, place());
    b_x.put(x), b_grad.put(grad), b_gate.put(gate);
    Tensor want = x.like(), want_dgate = gate.like();
    x.each([&](int n, int c, int h, int w) {
        want.at(n, c, h, w) = x.at(n, c, h, w) * gate.at(n, c, 0, 0);
        want_dgate.at(n, c, 0, 0) += x.at(n, c, h, w) * grad.at(n, c, h, w);
    });
    acdc_gate_args a{};
    a.x = b_x.image(), a.gate = b_gate.image(), a.out = b_out.dirty().image();
    k.gate(a, b_x.blocks());
    close<real>("a gate", b_out.get().values, want.values);
    b_out.check_rest("a gate");
    acdc_gate_grad_args g{};
    g.grad = b_grad.image(), g.x = b_x.image(), g.dgate = b_dgate.dirty().image();
    k.gate_grad(g, b_x.blocks());
    close<real>("the gradient of a gate", b_dgate.get().values, want_dgate.values, 4);
    b_dgate.check_rest("the gradient of a gate");
}

// ---- pooling ----

struct Window {
    int top, bottom, left, right;
};

template <class real> class PoolCheck {
    const Kernels<real>& k;
    Random& random;
    acdc_pool_args sizes{};
    const Images size;
    Tensor x, dy;
    Place x_place, y_place;

    static Tensor rounded(Tensor tensor) {  // so that a window holds its maximum more than once
        for (double& value : tensor.values) value = std::round(2 * value) / 2;
        return tensor;
    }
    static int out_size(int size, int window, int step, int padding) { return (size + 2 * padding - window) / step + 1; }

    Window window(int h, int w) const {
        const int top = h * sizes.row_step - sizes.row_padding, left = w * sizes.column_step - sizes.column_padding;
        return {std::max(top, 0), std::min(top + sizes.window_rows, x.height), std::max(left, 0),
                std::min(left + sizes.window_columns, x.width)};
    }
    double weight(int h, int w) const {
        Window v = window(h, w);
        if (sizes.count_padding) {
            v.top = h * sizes.row_step - sizes.row_padding, v.left = w * sizes.column_step - sizes.column_padding;
            v.bottom = std::min(v.top + sizes.window_rows, x.height + sizes.row_padding);
            v.right = std::min(v.left + sizes.window_columns, x.width + sizes.column_padding);
        }
        return 1.0 / ((v.bottom - v.top) * (v.right - v.left));
    }
    template <class Body> void each_tap(int h, int w, Body body) const {
        const Window v = window(h, w);
        for (int row = v.top; row < v.bottom; ++row)
            for (int column = v.left; column < v.right; ++column) body(row, column);
    }

    void draw_sizes() {
        acdc_pool_args& a = sizes;
        a.window_rows = random.between(1, 3), a.window_columns = random.between(1, 3);
        a.row_step = random.between(1, 3), a.column_step = random.between(1, 3);
        a.row_padding = random.between(0, a.window_rows / 2), a.column_padding = random.between(0, a.window_columns / 2);
        if (random.chance(0.2)) {  // the whole image
            a.window_rows = a.row_step = size.height, a.window_columns = a.column_step = size.width;
            a.row_padding = a.column_padding = 0;
        }
        a.window_rows = std::min(a.window_rows, size.height + 2 * a.row_padding);
        a.window_columns = std::min(a.window_columns, size.width + 2 * a.column_padding);
        a.row_padding = std::min(a.row_padding, a.window_rows / 2);
        a.column_padding = std::min(a.column_padding, a.window_columns / 2);
        a.count_padding = random.chance(0.5);
    }

    void max() {
        Tensor want = dy.like(), want_dx = x.like();
        dy.each([&](int n, int c, int h, int w) {
            double best = -1e9;
            int best_row = 0, best_column = 0;
            each_tap(h, w, [&](int row, int column) {
                if (x.at(n, c, row, column) > best)
                    best = x.at(n, c, row, column), best_row = row, best_column = column;
            });
            want.at(n, c, h, w) = best;
            want_dx.at(n, c, best_row, best_column) += dy.at(n, c, h, w);
        });
        compare("max pooling", want, want_dx, &Kernels<real>::max_pool, &Kernels<real>::max_pool_grad);
    }

    void average() {
        Tensor want = dy.like(), want_dx = x.like();
        dy.each([&](int n, int c, int h, int w) {
            each_tap(h, w, [&](int row, int column) {
                want.at(n, c, h, w) += x.at(n, c, row, column) * weight(h, w);
                want_dx.at(n, c, row, column) += dy.at(n, c, h, w) * weight(h, w);
            });
        });
        compare("average pooling", want, want_dx, &Kernels<real>::avg_pool, &Kernels<real>::avg_pool_grad);
    }

    void compare(const std::string& what, const Tensor& want, const Tensor& want_dx,
                 void (Kernels<real>::*forward)(acdc_pool_args, int64_t) const,
                 void (Kernels<real>::*backward)(acdc_pool_args, int64_t) const) {
        Buffer<real> b_x(x, x_place), b_dx(x, x_place), b_y(dy, y_place), b_dy(dy, y_place);
        b_x.put(x), b_dy.put(dy);
        acdc_pool_args a = sizes;
        a.x = b_x.image(), a.y = b_y.dirty().image(), a.dx = b_dx.dirty().image(), a.dy = b_dy.image();
        (k.*forward)(a, b_x.blocks());
        close<real>(what.c_str(), b_y.get().values, want.values);
        b_y.check_rest(what.c_str());
        (k.*backward)(a, b_x.blocks());
        close<real>((what + ", the gradient").c_str(), b_dx.get().values, want_dx.values);
        b_dx.check_rest(what.c_str());
    }

public:
    PoolCheck(const Kernels<real>& k, Random& random)
        : k(k), random(random), size(draw_images(random, k.lanes())),
          x(rounded(random_tensor(random, size.samples, size.channels, size.height, size.width))), dy(1, 1, 1, 1),
          x_place(k.place(random.between(0, 2))), y_place(k.place(random.between(0, 2))) {
        draw_sizes();
        dy = random_tensor(random, size.samples, size.channels,
                           out_size(size.height, sizes.window_rows, sizes.row_step, sizes.row_padding),
                           out_size(size.width, sizes.window_columns, sizes.column_step, sizes.column_padding));
    }

    void run() {
        max();
        average();
    }
};

template <class real> void check_pools(const Kernels<real>& k, Random& random) { PoolCheck<real>(k, random).run(); }

}  // namespace check
