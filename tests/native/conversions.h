// Conversions between plain tensors of any strides and the layout.
#pragma once
#include "kernels.h"

namespace check {

// How a plain tensor lies in memory. The numbers of the gaps are NaN, and stay NaN.
struct Strides {
    int64_t sample, channel, row, column;
};

inline Strides draw_strides(Random& random, const Tensor& t, bool dense_channels) {
    const int64_t spare = random.one_of({0, 0, 1, 5});
    if (dense_channels) {  // channels_last, perhaps a part of more channels
        const int64_t column = t.channels + spare;
        return {column * t.width * t.height, 1, column * t.width, column};
    }
    const int64_t channel = int64_t(t.height) * t.width + spare;
    if (random.chance(0.3)) return {channel, channel * t.samples, t.width, 1};  // channels first
    return {channel * t.channels, channel, t.width, 1};
}

template <class real> void check_conversions(const Kernels<real>& k, Random& random) {
    const bool tokens = random.chance(0.4), dense_channels = tokens || random.chance(0.5);
    const int lanes = k.lanes();
    const Tensor x = tokens ? random_tensor(random, random.between(1, 17 * lanes), random.between(1, 40), 1, 1)
                            : random_tensor(random, random.between(1, 2 * lanes + 3), random.between(1, 40),
                                            random.between(1, 7), random.between(1, 7));
    const Strides strides = draw_strides(random, x, dense_channels);
    auto index = [&](int n, int c, int h, int w) {
        return n * strides.sample + c * strides.channel + h * strides.row + w * strides.column;
    };
    Memory<real> plain(index(x.samples - 1, x.channels - 1, x.height - 1, x.width - 1) + 1);
    plain.fill(real(std::nan("")));
    x.each([&](int n, int c, int h, int w) { plain.data[index(n, c, h, w)] = real(x.at(n, c, h, w)); });

    Buffer<real> buffer(x, k.place(tokens ? 0 : random.between(0, 2), tokens));
    acdc_convert_args a{};
    a.image = buffer.dirty().image();
    a.plain.data = plain.data, a.plain.lane = strides.sample, a.plain.channel = strides.channel;
    a.plain.block = strides.sample * a.image.per_block;
    a.plain.row = tokens ? 0 : strides.row, a.plain.column = tokens ? strides.sample * lanes : strides.column;
    k.to_layout(a, buffer.blocks());
    close<real>("to the layout", buffer.get().values, x.values);
    buffer.check_rest("to the layout");

    x.each([&](int n, int c, int h, int w) { plain.data[index(n, c, h, w)] = real(0); });
    k.from_layout(a, buffer.blocks());
    std::vector<double> found;
    x.each([&](int n, int c, int h, int w) {
        real& number = plain.data[index(n, c, h, w)];
        found.push_back(double(number));
        number = real(std::nan(""));
    });
    close<real>("from the layout", found, x.values);
    for (double number : values_of(plain))
        if (!std::isnan(number)) throw Failure("from the layout: a number between those of the tensor was written");
}

}  // namespace check
