// A sequence of kernels that acdc_run takes block by block: a convolution into a buffer of one block per thread, a
// ReLU, the sums by channel of its result, and twice its result. If the sums stand alone, the last kernel is a group
// of its own, which goes through the blocks backwards.
#pragma once
#include "layers.h"

namespace check {

template <class Args> void call_of(void (*kernel)(), const void* args, const acdc_share* share) {
    using Kernel = void (*)(const Args*, const acdc_share*);
    reinterpret_cast<Kernel>(kernel)(static_cast<const Args*>(args), share);
}
template <class Args> acdc_call call(void (*kernel)(const Args*, const acdc_share*), const Args& args, bool alone) {
    return {&call_of<Args>, reinterpret_cast<void (*)()>(kernel), &args, alone};
}

template <class real> void check_sequences(const Kernels<real>& k, Random& random) {
    const int channels = random.between(1, 9), samples = random.between(1, 7 * k.lanes());
    const Tensor x = random_tensor(random, samples, channels, random.between(1, 5), random.between(1, 5));
    const std::vector<double> weight = random.normals(int64_t(channels) * channels);
    Buffer<real> b_x(x, k.place()), transient(samples, channels, x.height, x.width, k.place(), k.threads);
    Buffer<real> b_y(x, k.place(1)), b_twice(x, k.place());
    b_x.put(x);

    std::vector<int64_t> support;
    for (std::size_t i = 0; i < weight.size(); ++i) support.push_back(int64_t(i));
    acdc_plan_args p{};
    p.out_channels = p.in_channels = channels;
    p.kernel_rows = p.kernel_columns = p.groups = p.row_step = p.column_step = p.row_dilation = p.column_dilation = 1;
    p.nnz = int64_t(support.size()), p.support = support.data();
    p.out_stride = channels, p.in_stride = p.row_stride = p.column_stride = 1;
    p.lanes = k.lanes(), p.is_double = sizeof(real) == 8;
    p.x_row = b_x.row_pitch(), p.x_channel = b_x.pitch();
    p.dy_row = transient.row_pitch(), p.dy_channel = transient.pitch();
    p.in_tile = p.out_tile = 4;
    std::unique_ptr<acdc_plan, void (*)(acdc_plan*)> plan(acdc_plan_create(&p), acdc_plan_destroy);
    const Memory<real> values = vector_of<real>(weight);
    acdc_plan_refresh(plan.get(), values.data, 0, 1);

    acdc_conv_args conv{};
    conv.x = b_x.image(), conv.y = transient.image(true);
    conv.lists = acdc_plan_forward(plan.get()), conv.phases = 1;
    conv.in_row_step = conv.in_column_step = conv.out_row_step = conv.out_column_step = 1;
    conv.tile_rows = 2, conv.tile_columns = 4, conv.threads = k.threads;
    acdc_pointwise_args relu{};
    relu.a = transient.image(true), relu.out = b_y.dirty().image(), relu.threads = k.threads;
    const Memory<double> sums(channels);
    const Memory<real> workspace = k.workspace(int64_t(channels) * k.lanes());
    acdc_channel_sums_args sum{};
    sum.x = b_y.image(), sum.sums = sums.data, sum.workspace = workspace.data, sum.threads = k.threads;

    acdc_pointwise_args twice{};
    twice.a = twice.b = b_y.image(), twice.out = b_twice.dirty().image(), twice.threads = k.threads;

    const acdc_call calls[] = {call(k.pointer_to_conv(), conv, false), call(k.pointer_to_relu(), relu, false),
                               call(k.pointer_to_channel_sums(), sum, random.chance(0.5)),
                               call(k.pointer_to_add(), twice, false)};
    const Memory<double> seconds((1 + k.threads) * 4);
    acdc_run(calls, 4, b_x.blocks(), k.threads, random.chance(0.5) ? seconds.data : nullptr);

    Tensor want = x.like();
    want.each([&](int n, int c, int h, int w) {
        double total = 0;
        for (int i = 0; i < channels; ++i) total += weight[std::size_t(c) * channels + i] * x.at(n, i, h, w);
        want.at(n, c, h, w) = total > 0 ? total : 0;
    });
    close<real>("a sequence of kernels", b_y.get().values, want.values);
    b_y.check_rest("a sequence of kernels");
    close<real>("the sums of a sequence", values_of(sums),
                want.sum_by_channel([&](int n, int c, int h, int w) { return want.at(n, c, h, w); }));
    for (double& value : want.values) value *= 2;
    close<real>("twice the result of a sequence", b_twice.get().values, want.values);
}

}  // namespace check
