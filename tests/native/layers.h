// Sparse convolutions and linear layers: forward, input gradient, weight gradient, and sums by channel.
#pragma once
#include <algorithm>
#include <memory>

#include "kernels.h"

namespace check {

struct Size {
    int rows, columns;
};

struct Layer {
    int in, out, groups;
    Size kernel, stride, padding, dilation;
    bool tokens;

    int in_group() const { return in / groups; }
    int64_t weights() const { return int64_t(out) * in_group() * kernel.rows * kernel.columns; }
    static int out_size(int size, int kernel, int stride, int padding, int dilation) {
        return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    }
    Size out_of(Size x) const {
        return {out_size(x.rows, kernel.rows, stride.rows, padding.rows, dilation.rows),
                out_size(x.columns, kernel.columns, stride.columns, padding.columns, dilation.columns)};
    }
    int halo() const { return std::max(padding.rows, padding.columns); }
    // Input pixel i gets its gradient from the output pixels (i + padding - tap * dilation) / stride.
    static int grad_halo(int size, int out, int kernel, int stride, int padding, int dilation) {
        const int reach = dilation * (kernel - 1) - padding;
        const int before = reach > 0 ? (reach + stride - 1) / stride : 0;
        return std::max(before, (size - 1 + padding) / stride - (out - 1));
    }
    int grad_halo(Size x) const {
        const Size y = out_of(x);
        return std::max(grad_halo(x.rows, y.rows, kernel.rows, stride.rows, padding.rows, dilation.rows),
                        grad_halo(x.columns, y.columns, kernel.columns, stride.columns, padding.columns,
                                  dilation.columns));
    }
};

// A kept weight, and its place in the memory of the weight.
struct KeptWeight {
    int out, in, in_group, row, column;
    int64_t flat, source;
    double value;
};

inline Layer draw_layer(Random& random) {
    Layer l{};
    l.tokens = random.chance(0.3);
    l.groups = l.tokens ? 1 : random.one_of({1, 1, 1, 2, 3, 8});
    const int widest = l.tokens ? 60 : l.groups == 8 ? 2 : random.one_of({5, 5, 5, 20});
    l.in = l.groups * random.between(1, widest);
    l.out = l.groups * random.between(1, widest);
    l.kernel = l.stride = l.dilation = {1, 1};
    l.padding = {0, 0};
    if (l.tokens) return l;
    l.kernel = {random.between(1, 4), random.between(1, 4)};
    l.stride = {random.between(1, 3), random.between(1, 3)};
    l.padding = {random.between(0, 3), random.between(0, 3)};
    l.dilation = {random.between(1, 3), random.between(1, 3)};
    return l;
}

inline Size draw_image(Random& random, const Layer& l) {
    if (l.tokens) return {1, 1};
    auto size = [&](int kernel, int padding, int dilation) {
        return std::max(1, dilation * (kernel - 1) + 1 - 2 * padding) + random.between(0, 8);
    };
    return {size(l.kernel.rows, l.padding.rows, l.dilation.rows),
            size(l.kernel.columns, l.padding.columns, l.dilation.columns)};
}

// The weights of a layer: all of them in the order of memory, and the kept ones in the order of the support.
struct Weights {
    std::vector<double> memory;
    std::vector<KeptWeight> kept;
    int64_t out_stride, in_stride, row_stride, column_stride;
};

inline Weights draw_weights(Random& random, const Layer& l) {
    Weights w;
    const int rows = l.kernel.rows, columns = l.kernel.columns;
    const bool channels_last = random.chance(0.3);
    w.out_stride = int64_t(l.in_group()) * rows * columns;
    w.in_stride = channels_last ? 1 : int64_t(rows) * columns;
    w.column_stride = channels_last ? l.in_group() : 1;
    w.row_stride = columns * w.column_stride;
    w.memory = random.normals(l.weights());
    const double density = random.one_of({0.0, 0.05, 0.1, 0.3, 0.5, 1.0});
    const int empty = random.chance(0.3) ? random.between(0, l.out - 1) : -1;
    int64_t flat = 0;
    for (int o = 0; o < l.out; ++o)
        for (int i = 0; i < l.in_group(); ++i)
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < columns; ++c, ++flat) {
                    if (o == empty || !random.chance(density)) continue;
                    const int64_t source = o * w.out_stride + i * w.in_stride + r * w.row_stride + c * w.column_stride;
                    const int first_in = o / (l.out / l.groups) * l.in_group();
                    w.kept.push_back({o, first_in + i, i, r, c, flat, source, w.memory[std::size_t(source)]});
                }
    return w;
}

// Calls body(kept weight, sample, row and column of the input, row and column of the output) for every product.
template <class Body> void each_product(const Layer& l, const Weights& w, const Tensor& x, const Tensor& y, Body body) {
    for (const KeptWeight& k : w.kept)
        for (int n = 0; n < x.samples; ++n)
            for (int h = 0; h < y.height; ++h)
                for (int v = 0; v < y.width; ++v) {
                    const int row = h * l.stride.rows + k.row * l.dilation.rows - l.padding.rows;
                    const int column = v * l.stride.columns + k.column * l.dilation.columns - l.padding.columns;
                    if (row < 0 || row >= x.height || column < 0 || column >= x.width) continue;
                    body(k, n, row, column, h, v);
                }
}

inline Tensor twice_without(const Tensor& y, const std::vector<double>& bias) {
    Tensor sum = y;
    sum.each([&](int n, int c, int h, int v) { sum.at(n, c, h, v) = 2 * y.at(n, c, h, v) - bias[std::size_t(c)]; });
    return sum;
}

template <class real> class LayerCheck {
    using Plan = std::unique_ptr<acdc_plan, void (*)(acdc_plan*)>;

    const Kernels<real>& k;
    Random& random;
    const Layer l;
    const Tensor x, dy;
    const Weights weights;
    const std::vector<double> bias;
    Buffer<real> x_buffer, y_buffer, dx_buffer, dy_buffer;
    Plan plan;

    static Tensor draw_x(Random& random, const Layer& l, int lanes) {
        const int most = lanes * (l.tokens ? 18 : 2) + 3;
        const Size size = draw_image(random, l);
        return random_tensor(random, random.between(1, most), l.in, size.rows, size.columns);
    }
    Tensor draw_dy() const {
        const Size size = l.out_of({x.height, x.width});
        return random_tensor(random, x.samples, l.out, size.rows, size.columns);
    }
    Place x_place() const { return k.place(l.halo(), l.tokens); }
    Place dy_place() const { return k.place(l.tokens ? 0 : l.grad_halo({x.height, x.width}), l.tokens); }

    Plan make_plan() const {
        std::vector<int64_t> support;
        for (const KeptWeight& w : weights.kept) support.push_back(w.flat);
        acdc_plan_args a{};
        a.out_channels = l.out, a.in_channels = l.in, a.groups = l.groups;
        a.kernel_rows = l.kernel.rows, a.kernel_columns = l.kernel.columns;
        a.row_step = l.stride.rows, a.column_step = l.stride.columns;
        a.row_padding = l.padding.rows, a.column_padding = l.padding.columns;
        a.row_dilation = l.dilation.rows, a.column_dilation = l.dilation.columns;
        a.nnz = int64_t(support.size()), a.support = support.data();
        a.out_stride = weights.out_stride, a.in_stride = weights.in_stride;
        a.row_stride = weights.row_stride, a.column_stride = weights.column_stride;
        a.lanes = k.lanes(), a.is_double = sizeof(real) == 8;
        a.x_row = x_buffer.row_pitch(), a.x_channel = x_buffer.pitch();
        a.dy_row = dy_buffer.row_pitch(), a.dy_channel = dy_buffer.pitch();
        a.in_tile = random.one_of({1, 3, 8, 32, 1024}), a.out_tile = random.one_of({1, 3, 8, 32, 1024});
        Plan made(acdc_plan_create(&a), acdc_plan_destroy);
        if (!made) throw Failure("no plan was made");
        const Memory<real> memory = vector_of<real>(weights.memory);
        acdc_plan_refresh(made.get(), memory.data, 0, k.threads);
        acdc_plan_refresh(made.get(), memory.data, 1, k.threads);
        return made;
    }

    acdc_conv_args conv_args(const Buffer<real>& in, const Buffer<real>& out) const {
        acdc_conv_args a{};
        a.x = in.image(), a.y = out.image();
        a.in_row_step = a.in_column_step = a.out_row_step = a.out_column_step = 1;
        a.tile_rows = random.between(1, 4), a.tile_columns = random.between(1, 8);
        a.stream_bytes = random.one_of({int64_t(0), int64_t(1) << 40});
        return a;
    }

    void forward() {
        Tensor want = dy.like();
        want.each([&](int n, int c, int h, int v) { want.at(n, c, h, v) = bias[std::size_t(c)]; });
        each_product(l, weights, x, want, [&](const KeptWeight& w, int n, int row, int column, int h, int v) {
            want.at(n, w.out, h, v) += w.value * x.at(n, w.in, row, column);
        });
        const Memory<real> per_channel = vector_of<real>(bias);
        const Memory<double> sums(2 * l.out);
        const Memory<real> workspace = k.workspace(int64_t(l.out) * 2 * k.lanes());
        acdc_conv_args a = conv_args(x_buffer, y_buffer.dirty());
        a.lists = acdc_plan_forward(plan.get()), a.phases = 1;
        a.in_row_step = l.stride.rows, a.in_column_step = l.stride.columns;
        a.bias = per_channel.data;
        if (!l.tokens) a.shift = per_channel.data, a.sums = sums.data, a.workspace = workspace.data;
        k.conv(a, y_buffer.blocks());
        close<real>("y", y_buffer.get().values, want.values);
        y_buffer.check_rest("y");
        if (!l.tokens) check_sums(want, values_of(sums));

        a.bias = a.shift = nullptr, a.sums = nullptr, a.accumulate = 1;
        k.conv(a, y_buffer.blocks());
        close<real>("y that was added to", y_buffer.get().values, twice_without(want, bias).values);
        y_buffer.check_rest("y");
    }

    void check_sums(const Tensor& y, const std::vector<double>& sums) const {
        auto shifted = [&](int n, int c, int h, int v) { return y.at(n, c, h, v) - bias[std::size_t(c)]; };
        const std::vector<double> sum = y.sum_by_channel(shifted);
        const std::vector<double> squares = y.sum_by_channel([&](int n, int c, int h, int v) {
            return shifted(n, c, h, v) * shifted(n, c, h, v);
        });
        const auto middle = sums.begin() + l.out;
        close<real>("sums", {sums.begin(), middle}, sum, y.norm_of_a_channel());
        close<real>("sums of squares", {middle, sums.end()}, squares);
    }

    void input_grad() {
        Tensor want = x.like();
        each_product(l, weights, x, dy, [&](const KeptWeight& w, int n, int row, int column, int h, int v) {
            want.at(n, w.in, row, column) += w.value * dy.at(n, w.out, h, v);
        });
        acdc_conv_args a = conv_args(dy_buffer, dx_buffer.dirty());
        a.lists = acdc_plan_input_grad(plan.get(), &a.phases);
        a.out_row_step = l.stride.rows, a.out_column_step = l.stride.columns;
        for (int times = 1; times <= 2; ++times) {
            k.conv(a, dx_buffer.blocks());
            close<real>("dx", dx_buffer.get().values, want.values);
            dx_buffer.check_rest("dx");
            a.accumulate = 1;
            for (double& value : want.values) value *= 2;
        }
    }

    void weight_grad() {
        std::vector<double> sums(weights.memory.size());
        each_product(l, weights, x, dy, [&](const KeptWeight& w, int n, int row, int column, int h, int v) {
            sums[std::size_t(w.source)] += x.at(n, w.in, row, column) * dy.at(n, w.out, h, v);
        });
        Memory<real> target(int64_t(sums.size()));
        target.fill(real(7));
        const Memory<real> workspace = k.workspace(acdc_grad_pitch(int64_t(weights.kept.size())));
        acdc_weight_grad_args a{};
        a.x = x_buffer.image(), a.dy = dy_buffer.image(), a.list = acdc_plan_forward(plan.get());
        a.in_row_step = l.stride.rows, a.in_column_step = l.stride.columns;
        a.tile_rows = random.between(1, 4), a.tile_columns = random.between(1, 8);
        a.target = target.data, a.workspace = workspace.data;
        for (int times = 1; times <= 2; ++times) {
            k.weight_grad(a, dy_buffer.blocks());
            std::vector<double> want(sums.size(), 7.0);  // only the support is written
            for (const KeptWeight& w : weights.kept) want[std::size_t(w.source)] = times * sums[std::size_t(w.source)];
            close<real>("the weight gradient", values_of(target), want, times * dy.norm_of_a_channel());
            a.accumulate = 1;
        }
        target.fill(std::numeric_limits<real>::quiet_NaN());
        a.size = target.count, a.row = random.chance(0.7) ? weights.out_stride : 0;
        k.weight_grad(a, dy_buffer.blocks());
        std::vector<double> want(sums.size(), 0.0);
        for (const KeptWeight& w : weights.kept) want[std::size_t(w.source)] = sums[std::size_t(w.source)];
        close<real>("the weight gradient beside zeros", values_of(target), want, dy.norm_of_a_channel());
    }

    void bias_grad() {
        const Memory<double> sums(l.out);
        const Memory<real> workspace = k.workspace(int64_t(l.out) * k.lanes());
        acdc_channel_sums_args a{};
        a.x = dy_buffer.image(), a.sums = sums.data, a.workspace = workspace.data;
        k.channel_sums(a, dy_buffer.blocks());
        const std::vector<double> want =
            dy.sum_by_channel([&](int n, int c, int h, int v) { return dy.at(n, c, h, v); });
        close<real>("the bias gradient", values_of(sums), want, dy.norm_of_a_channel());
    }

public:
    LayerCheck(const Kernels<real>& k, Random& random)
        : k(k), random(random), l(draw_layer(random)), x(draw_x(random, l, k.lanes())), dy(draw_dy()),
          weights(draw_weights(random, l)), bias(random.normals(l.out)), x_buffer(x, x_place()),
          y_buffer(dy, dy_place()), dx_buffer(x, x_place()), dy_buffer(dy, dy_place()), plan(make_plan()) {
        x_buffer.put(x);
        dy_buffer.put(dy);
    }

    void run() {
        forward();
        input_grad();
        weight_grad();
        bias_grad();
    }
};

template <class real> void check_layers(const Kernels<real>& k, Random& random) { LayerCheck<real>(k, random).run(); }

}  // namespace check
