// Plain tensors of doubles, and buffers in the layout of the kernels. Buffers are filled and read number by number,
// without the kernels that convert.
#pragma once
#include "acdc_kernels.h"
#include "memory.h"

namespace check {

// [samples][channels][rows][columns]
struct Tensor {
    int samples, channels, height, width;
    std::vector<double> values;

    Tensor(int samples, int channels, int height, int width)
        : samples(samples), channels(channels), height(height), width(width),
          values(std::size_t(samples) * channels * height * width) {}

    double& at(int n, int c, int h, int w) {
        return values[((std::size_t(n) * channels + c) * height + h) * width + w];
    }
    double at(int n, int c, int h, int w) const { return const_cast<Tensor*>(this)->at(n, c, h, w); }
    Tensor like() const { return Tensor(samples, channels, height, width); }

    // Calls body(sample, channel, row, column) for every number.
    template <class Body> void each(Body body) const {
        for (int n = 0; n < samples; ++n)
            for (int c = 0; c < channels; ++c)
                for (int h = 0; h < height; ++h)
                    for (int w = 0; w < width; ++w) body(n, c, h, w);
    }
    // The sum over samples and pixels of term(sample, channel, row, column), for each channel.
    template <class Term> std::vector<double> sum_by_channel(Term term) const {
        std::vector<double> sums(static_cast<std::size_t>(channels));
        each([&](int n, int c, int h, int w) { sums[std::size_t(c)] += term(n, c, h, w); });
        return sums;
    }
    double norm_of_a_channel() const { return norm_of(values) / std::sqrt(double(channels)); }
};

inline Tensor random_tensor(Random& random, int samples, int channels, int height, int width) {
    Tensor made(samples, channels, height, width);
    made.values = random.normals(int64_t(made.values.size()));
    return made;
}

// As in engine/layout.py. The samples of tokens lie in 8 columns, and their tensors have one pixel.
struct Place {
    int lanes, halo;
    bool tokens;
};

template <class real> class Buffer {
    static constexpr int64_t per_line = 64 / sizeof(real);
    int samples, channels, height, width;
    Place place;
    int64_t row, channel, block;
    Memory<real> memory;

    static int64_t lines(int64_t count) { return (count + per_line - 1) / per_line; }
    int per_block() const { return place.lanes * (place.tokens ? width : 1); }
    int blocks_of_batch() const { return (samples + per_block() - 1) / per_block(); }
    int64_t channel_pitch() const {
        const int64_t count = row * (height + 2 * place.halo);
        return place.tokens ? count : (lines(count) | 1) * per_line;
    }
    real* origin() const { return memory.data + place.halo * (row + place.lanes); }

    real& at(int n, int c, int h, int w) const {
        const int b = n / per_block(), rest = n % per_block();
        const int column = place.tokens ? rest / place.lanes : w;
        return origin()[b * block + c * channel + h * row + int64_t(column) * place.lanes + rest % place.lanes];
    }

public:
    Buffer(int samples, int channels, int height, int width, Place place, int copies = 0)
        : samples(samples), channels(channels), height(height), width(place.tokens ? 8 : width), place(place),
          row(int64_t(this->width + 2 * place.halo) * place.lanes), channel(channel_pitch()),
          block(lines(channel * channels) * per_line),
          memory(block * (copies ? copies : blocks_of_batch()), Aligned::line) {
        memory.fill(real(0));
    }
    // Of the shape of a tensor.
    Buffer(const Tensor& like, Place place) : Buffer(like.samples, like.channels, like.height, like.width, place) {}

    int64_t blocks() const { return blocks_of_batch(); }
    int64_t row_pitch() const { return row; }
    int64_t pitch() const { return channel; }

    acdc_image image(bool per_thread = false) const {
        return {origin(), row, channel, block, blocks_of_batch(), channels, height, width, samples, per_block(),
                place.tokens ? place.lanes : 0, per_thread};
    }

    Buffer& put(const Tensor& tensor) {
        tensor.each([&](int n, int c, int h, int w) { at(n, c, h, w) = real(tensor.at(n, c, h, w)); });
        return *this;
    }
    Tensor get() const {
        Tensor tensor(samples, channels, height, place.tokens ? 1 : width);
        tensor.each([&](int n, int c, int h, int w) { tensor.at(n, c, h, w) = double(at(n, c, h, w)); });
        return tensor;
    }
    // A buffer that was used before holds anything in its pixels, dead lanes included.
    Buffer& dirty() {
        for (int b = 0; b < blocks_of_batch(); ++b)
            for (int c = 0; c < channels; ++c)
                for (int h = 0; h < height; ++h)
                    for (int64_t i = 0; i < int64_t(width) * place.lanes; ++i)
                        origin()[b * block + c * channel + h * row + i] = real(7);
        return *this;
    }
    // Everything but the numbers of the tensor must be zero: the halo, the lanes without a sample, and the padding.
    void check_rest(const char* what) {
        memory.check_front();
        const Tensor mine = get();
        mine.each([&](int n, int c, int h, int w) { at(n, c, h, w) = real(0); });
        for (int64_t i = 0; i < memory.count; ++i)
            if (memory.data[i] != real(0)) throw Failure(std::string(what) + ": the halo or a dead lane is not zero");
        put(mine);
    }
};

}  // namespace check
