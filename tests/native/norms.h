// BatchNorm with ReLU and a residual, and the norms over channels. The references are the formulas of acdc_kernels.h.
#pragma once
#include "kernels.h"

namespace check {

struct Images {
    int samples, channels, height, width;
};

inline Images draw_images(Random& random, int lanes) {
    return {random.between(1, 2 * lanes + 3), random.between(1, 9), random.between(1, 6), random.between(1, 6)};
}

template <class real> class NormCheck {
    const Kernels<real>& k;
    Random& random;
    const Images size;
    const Tensor y, y2, residual, grad;
    const bool two, has_residual, relu;
    const std::vector<double> mean, mean2, scale, scale2, offset;
    const Memory<real> m_scale, m_scale2, m_offset;
    Buffer<real> b_y, b_y2, b_residual, b_grad, b_out, b_dz;

    Tensor tensor() { return random_tensor(random, size.samples, size.channels, size.height, size.width); }
    Buffer<real> buffer() { return Buffer<real>(y, k.place(random.between(0, 2))); }
    int64_t blocks() const { return b_y.blocks(); }

    Tensor output() const {
        Tensor want = y.like();
        want.each([&](int n, int c, int h, int w) {
            const std::size_t i = std::size_t(c);
            double v = scale[i] * y.at(n, c, h, w) + offset[i];
            if (two) v += scale2[i] * y2.at(n, c, h, w);
            if (has_residual) v += residual.at(n, c, h, w);
            want.at(n, c, h, w) = relu && v < 0 ? 0 : v;
        });
        return want;
    }

    void forward(const Tensor& want) {


        acdc_norm_args a{};
        a.y = b_y.image(), a.out = b_out.dirty().image();
        if (two) a.y2 = b_y2.image();
        if (has_residual) a.residual = b_residual.image();
        a.scale = m_scale.data, a.offset = m_offset.data, a.scale2 = m_scale2.data, a.relu = relu;
        k.norm(a, blocks());
        close<real>("norm", b_out.get().values, want.values);
        b_out.check_rest("norm");
    }

    // The gradient before the ReLU. Its mask comes from the output as the kernel reads it: an output whose sign
    // rounding changes is no fault.
    Tensor masked(const Tensor& out) const {
        Tensor dz = grad;
        if (relu)
            dz.each([&](int n, int c, int h, int w) {
                if (!(out.at(n, c, h, w) > 0)) dz.at(n, c, h, w) = 0;
            });
        return dz;
    }

    // The kernels read the mask of a ReLU from its output, or compute it again from y.
    template <class Args> void set_gate(Args& a) const {
        a.relu = relu;
        if (relu && !two && !has_residual) a.scale = m_scale.data, a.offset = m_offset.data;
        else a.out = b_out.image();
    }

    void reduce(const Tensor& dz) {
        const auto m_mean = vector_of<real>(mean), m_mean2 = vector_of<real>(mean2);
        const Memory<double> sums(3 * size.channels);
        const Memory<real> workspace = k.workspace(int64_t(size.channels) * 3 * k.lanes());
        acdc_norm_reduce_args a{};
        a.grad = b_grad.image(), a.y = b_y.image(), a.dz = b_dz.dirty().image();
        if (two) a.y2 = b_y2.image();
        a.mean = m_mean.data, a.mean2 = m_mean2.data;
        set_gate(a);
        a.sums = sums.data, a.workspace = workspace.data;
        k.norm_reduce(a, blocks());
        close<real>("dz", b_dz.get().values, dz.values);
        b_dz.check_rest("dz");
        std::vector<double> want, found = values_of(sums);
        for (int row = 0; row < 3; ++row) {
            const std::vector<double> sum = dz.sum_by_channel([&](int n, int c, int h, int w) {
                const std::size_t i = std::size_t(c);
                const double factor[] = {1, y.at(n, c, h, w) - mean[i], two ? y2.at(n, c, h, w) - mean2[i] : 0};
                return dz.at(n, c, h, w) * factor[row];
            });
            want.insert(want.end(), sum.begin(), sum.end());
        }
        close<real>("the sums of a norm's gradient", found, want, 4 * dz.norm_of_a_channel());
    }

    void backward(const Tensor& dz) {
        std::vector<std::vector<double>> on;
        std::vector<Memory<real>> memory;
        for (int i = 0; i < 6; ++i) {
            on.push_back(random.normals(size.channels));
            memory.push_back(vector_of<real>(on.back()));
        }
        Buffer<real> dy = buffer(), dy2 = buffer();
        acdc_norm_grad_args a{};
        a.grad = b_grad.image(), a.y = b_y.image(), a.dy = dy.dirty().image();
        if (two) a.y2 = b_y2.image(), a.dy2 = dy2.dirty().image();
        a.a = memory[0].data, a.b = memory[1].data, a.c = memory[2].data;
        a.a2 = memory[3].data, a.b2 = memory[4].data, a.c2 = memory[5].data;
        set_gate(a);
        k.norm_grad(a, blocks());
        Tensor want = y.like(), want2 = y.like();
        want.each([&](int n, int c, int h, int w) {
            const std::size_t i = std::size_t(c);
            want.at(n, c, h, w) = on[0][i] * dz.at(n, c, h, w) + on[1][i] * y.at(n, c, h, w) + on[2][i];
            want2.at(n, c, h, w) = on[3][i] * dz.at(n, c, h, w) + on[4][i] * y2.at(n, c, h, w) + on[5][i];
        });
        close<real>("dy of a norm", dy.get().values, want.values);
        dy.check_rest("dy of a norm");
        if (!two) return;
        close<real>("dy2 of a norm", dy2.get().values, want2.values);
        dy2.check_rest("dy2 of a norm");
    }

    void statistics() {
        const auto shift = vector_of<real>(mean);
        const Memory<double> sums(2 * size.channels);
        const Memory<real> workspace = k.workspace(int64_t(size.channels) * 2 * k.lanes());
        acdc_statistics_args a{};
        a.x = b_y.image(), a.shift = shift.data, a.sums = sums.data, a.workspace = workspace.data;
        k.statistics(a, blocks());
        std::vector<double> want = y.sum_by_channel(
            [&](int n, int c, int h, int w) { return y.at(n, c, h, w) - mean[std::size_t(c)]; });
        const std::vector<double> squares = y.sum_by_channel([&](int n, int c, int h, int w) {
            const double d = y.at(n, c, h, w) - mean[std::size_t(c)];
            return d * d;
        });
        want.insert(want.end(), squares.begin(), squares.end());
        close<real>("statistics", values_of(sums), want, y.norm_of_a_channel());
    }

public:
    NormCheck(const Kernels<real>& k, Random& random)
        : k(k), random(random), size(draw_images(random, k.lanes())), y(tensor()), y2(tensor()), residual(tensor()),
          grad(tensor()), two(random.chance(0.5)), has_residual(random.chance(0.5)), relu(random.chance(0.5)),
          mean(random.normals(size.channels)), mean2(random.normals(size.channels)),
          scale(random.normals(size.channels)), scale2(random.normals(size.channels)),
          offset(random.normals(size.channels)), m_scale(vector_of<real>(scale)), m_scale2(vector_of<real>(scale2)),
          m_offset(vector_of<real>(offset)), b_y(buffer()), b_y2(buffer()), b_residual(buffer()),
          b_grad(buffer()), b_out(buffer()), b_dz(buffer()) {
        b_y.put(y), b_y2.put(y2), b_residual.put(residual), b_grad.put(grad);
    }

    void run() {
        const Tensor want = output();
        forward(want);
        const Tensor dz = masked(b_out.get());
        reduce(dz);
        backward(dz);
        statistics();
    }
};

template <class real> void check_norms(const Kernels<real>& k, Random& random) { NormCheck<real>(k, random).run(); }

// The coefficients of a BatchNorm in training and in evaluation, and those of its gradient.
template <class real> void check_folds(const Kernels<real>& k, Random& random) {
    const int channels = random.between(1, 9);
    const double count = random.between(2, 50), eps = 1e-2;
    const bool training = random.chance(0.5), averages = random.chance(0.5);
    auto per_channel = [&] { return random.normals(channels); };
    const std::vector<double> sum = per_channel(), weight = per_channel(), bias = per_channel(), other = per_channel();
    std::vector<double> shift = per_channel(), variance(sum.size()), squares(sum.size());
    for (std::size_t i = 0; i < sum.size(); ++i) {
        variance[i] = float(0.5 + random.uniform());
        squares[i] = sum[i] * sum[i] / count + count * (0.5 + random.uniform());
    }
    Memory<double> sums(2 * channels);
    for (int c = 0; c < channels; ++c)
        sums.data[c] = sum[std::size_t(c)], sums.data[channels + c] = squares[std::size_t(c)];

    const auto m_weight = vector_of<real>(weight), m_bias = vector_of<real>(bias), m_other = vector_of<real>(other);
    const auto running_mean = vector_of<real>(shift), running_var = vector_of<real>(variance);
    const Memory<real> mean(channels), inverse(channels), scale(channels), offset(channels);
    int64_t batches = 3;
    acdc_norm_fold_args a{};
    a.channels = channels, a.count = count, a.eps = eps, a.momentum = averages ? -1 : 0.25;
    if (training) a.sums = sums.data, a.shift = running_mean.data, a.batches = &batches;
    a.weight = m_weight.data, a.bias = m_bias.data, a.other_offset = m_other.data;
    a.running_mean = running_mean.data, a.running_var = running_var.data;
    a.mean = mean.data, a.inverse = inverse.data, a.scale = scale.data, a.offset = offset.data;
    k.norm_fold(a, 0);

    const double rate = averages ? 1.0 / 4 : 0.25;
    std::vector<double> want_mean(sum.size()), want_inverse(sum.size()), want_scale(sum.size()), want_offset(sum.size());
    for (std::size_t i = 0; i < sum.size(); ++i) {
        double m = shift[i], v = variance[i];
        if (training) {
            m += sum[i] / count;
            v = squares[i] / count - sum[i] / count * (sum[i] / count);
            shift[i] = (1 - rate) * shift[i] + rate * m;
            variance[i] = (1 - rate) * variance[i] + rate * v * count / (count - 1);
        }
        want_mean[i] = m, want_inverse[i] = 1 / std::sqrt(v + eps);
        want_scale[i] = weight[i] * want_inverse[i];
        want_offset[i] = bias[i] - m * want_scale[i] + other[i];
    }
    close<real>("the mean of a fold", values_of(mean), want_mean);
    close<real>("the inverse of a fold", values_of(inverse), want_inverse);
    close<real>("the scale of a fold", values_of(scale), want_scale);
    close<real>("the offset of a fold", values_of(offset), want_offset);
    close<real>("the running mean", values_of(running_mean), shift);
    close<real>("the running variance", values_of(running_var), variance);
    if (batches != (training ? 4 : 3)) throw Failure("the number of batches is wrong");

    const Memory<real> on_dz(channels), on_y(channels), rest(channels), weight_grad(channels), bias_grad(channels);
    acdc_norm_unfold_args u{};
    u.channels = channels, u.training = training, u.count = count;
    u.sums = sums.data, u.sums_y = sums.data + channels;
    u.weight = m_weight.data, u.mean = mean.data, u.inverse = inverse.data;
    u.a = on_dz.data, u.b = on_y.data, u.c = rest.data;
    u.weight_grad = weight_grad.data, u.bias_grad = bias_grad.data;
    k.norm_unfold(u, 0);
    std::vector<double> want_b(sum.size()), want_c(sum.size()), want_weight(sum.size());
    for (std::size_t i = 0; i < sum.size(); ++i) {
        want_weight[i] = squares[i] * want_inverse[i];
        if (!training) continue;
        want_b[i] = -want_scale[i] * want_weight[i] * want_inverse[i] / count;
        want_c[i] = -want_scale[i] * sum[i] / count - want_b[i] * want_mean[i];
    }
    close<real>("a", values_of(on_dz), want_scale);
    close<real>("b", values_of(on_y), want_b);
    close<real>("c", values_of(rest), want_c, 1);
    close<real>("the weight gradient of a norm", values_of(weight_grad), want_weight);
    close<real>("the bias gradient of a norm", values_of(bias_grad), sum);
}

// LayerNorm and RMSNorm, of images or of tokens.
template <class real> void check_layer_norms(const Kernels<real>& k, Random& random) {
    const bool tokens = random.chance(0.5), centered = random.chance(0.5), affine = random.chance(0.7);
    Images size = draw_images(random, k.lanes());
    if (tokens) size = {random.between(1, 17 * k.lanes()), random.between(1, 150), 1, 1};
    const double eps = 0.1;
    const Tensor x = random_tensor(random, size.samples, size.channels, size.height, size.width);
    const Tensor grad = random_tensor(random, size.samples, size.channels, size.height, size.width);
    const std::vector<double> ones(std::size_t(size.channels), 1.0), zeros(std::size_t(size.channels), 0.0);
    const std::vector<double> weight = affine ? random.normals(size.channels) : ones;
    const std::vector<double> bias = affine ? random.normals(size.channels) : zeros;

    // The statistics of each pixel, then the output and the gradients.
    Tensor stats(size.samples, 2, size.height, size.width), h = x.like(), want = x.like(), want_dx = x.like();
    stats.each([&](int n, int which, int row, int column) {
        if (which) return;
        double mean = 0, variance = 0;
        for (int c = 0; c < size.channels && centered; ++c) mean += x.at(n, c, row, column) / size.channels;
        for (int c = 0; c < size.channels; ++c)
            variance += (x.at(n, c, row, column) - mean) * (x.at(n, c, row, column) - mean) / size.channels;
        const double inverse = 1 / std::sqrt(variance + eps);
        stats.at(n, 0, row, column) = mean, stats.at(n, 1, row, column) = inverse;
        double sum = 0, product = 0;
        for (int c = 0; c < size.channels; ++c) {
            const double normalised = h.at(n, c, row, column) = (x.at(n, c, row, column) - mean) * inverse;
            want.at(n, c, row, column) = normalised * weight[std::size_t(c)] + bias[std::size_t(c)];
            const double g = grad.at(n, c, row, column) * weight[std::size_t(c)];
            sum += g / size.channels, product += g * normalised / size.channels;
        }
        for (int c = 0; c < size.channels; ++c) {
            const double g = grad.at(n, c, row, column) * weight[std::size_t(c)];
            want_dx.at(n, c, row, column) = (g - (centered ? sum : 0) - h.at(n, c, row, column) * product) * inverse;
        }
    });

    const Place place = k.place(tokens ? 0 : random.between(0, 2), tokens);
    Buffer<real> b_x(x, place), b_grad(x, place), b_out(x, place), b_dx(x, place), b_stats(stats, k.place(0, tokens));
    b_x.put(x), b_grad.put(grad);
    const auto m_weight = vector_of<real>(weight), m_bias = vector_of<real>(bias);
    acdc_layer_norm_args a{};
    a.x = b_x.image(), a.stats = b_stats.image(), a.eps = eps, a.centered = centered;
    if (affine) a.weight = m_weight.data, a.bias = m_bias.data;
    for (a.known = 0; a.known < 2; ++a.known) {
        a.out = b_out.dirty().image();
        k.layer_norm(a, b_x.blocks());
        close<real>("the norm over channels", b_out.get().values, want.values);
        b_out.check_rest("the norm over channels");
        close<real>("the statistics of the norm over channels", b_stats.get().values, stats.values);
    }

    const Memory<double> sums(2 * size.channels);
    const Memory<real> workspace = k.workspace(int64_t(size.channels) * 2 * k.lanes());
    acdc_layer_norm_grad_args g{};
    g.grad = b_grad.image(), g.x = b_x.image(), g.stats = b_stats.image(), g.dx = b_dx.dirty().image();
    g.centered = centered, g.sums = sums.data, g.workspace = workspace.data;
    if (affine) g.weight = m_weight.data;
    std::vector<double> want_sums =
        x.sum_by_channel([&](int n, int c, int row, int column) { return grad.at(n, c, row, column); });
    const std::vector<double> on_weight = x.sum_by_channel(
        [&](int n, int c, int row, int column) { return grad.at(n, c, row, column) * h.at(n, c, row, column); });
    want_sums.insert(want_sums.end(), on_weight.begin(), on_weight.end());
    for (g.accumulate = 0; g.accumulate < 2; ++g.accumulate) {
        k.layer_norm_grad(g, b_x.blocks());
        close<real>("dx of the norm over channels", b_dx.get().values, want_dx.values, 1);
        b_dx.check_rest("dx of the norm over channels");
        close<real>("the sums of the norm over channels", values_of(sums), want_sums, 4 * grad.norm_of_a_channel());
        for (double& value : want_dx.values) value *= 2;
    }
}

}  // namespace check
