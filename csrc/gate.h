// The product with one number for each channel of each sample: squeeze-and-excitation.
#pragma once
#include "norm.h"

namespace ACDC_ISA {
namespace {

// out = x * gate, where gate has one pixel.
template <class real> void gate(const acdc_gate_args* args, const acdc_share* share) {
    each_plane(args->x, args->threads, share, [&](int thread, int64_t block, int channel) {
        const acdc_image in = of_thread<real>(args->x, thread), into = of_thread<real>(args->out, thread);
        const acdc_image gates = of_thread<real>(args->gate, thread);
        const vec<real> scale = load(plane<real>(gates, block, channel));
        for (int row = 0; row < in.height; ++row) {
            const real* x = row_of<real>(in, block, channel, row);
            real* out = row_of<real>(into, block, channel, row);
            for (int i = 0; i < in.width * lanes; i += lanes) store(out + i, load(x + i) * scale);
        }
    });
}

// The gradient of the gate: the sum of grad * x over the pixels of a channel.
template <class real> void gate_grad(const acdc_gate_grad_args* args, const acdc_share* share) {
    each_plane(args->x, args->threads, share, [&](int thread, int64_t block, int channel) {
        const acdc_image grads = of_thread<real>(args->grad, thread), in = of_thread<real>(args->x, thread);
        const acdc_image into = of_thread<real>(args->dgate, thread);
        vec<real> sum{};
        for (int row = 0; row < in.height; ++row) {
            const real* grad = row_of<real>(grads, block, channel, row);
            const real* x = row_of<real>(in, block, channel, row);
            for (int i = 0; i < in.width * lanes; i += lanes) sum += load(grad + i) * load(x + i);
        }
        store(plane<real>(into, block, channel), sum);
    });
}

}  // namespace
}  // namespace ACDC_ISA
