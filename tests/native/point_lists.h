// The index lists of the runtime's convolutions: what is in them, and what the kernels compute from them.
#pragma once
#include <algorithm>
#include <type_traits>

#include "acdc_points.h"
#include "memory.h"

namespace check {

// A convolution with stride 1 on images of `height` x `width` pixels. Rows have zeros after them as wide as the padding.
struct PointLayer {
    int outs, ins, groups, side, padding, samples, height, width, tile, cuts;
    std::vector<int32_t> index;
    std::vector<double> values;

    explicit PointLayer(Random& random) {
        groups = random.one_of({1, 1, 2, 5});
        outs = groups * random.between(1, 12), ins = groups * random.between(1, 12);
        side = random.one_of({1, 3});
        padding = side / 2;
        samples = random.between(1, 3), height = random.between(1, 9), width = random.between(1, 30);
        tile = random.between(1, ins + 3), cuts = random.between(1, outs);
        const double density = random.one_of({0.0, 0.05, 0.3, 1.0});
        for (int i = 0; i < outs * in_group() * taps(); ++i)
            if (random.chance(density)) index.push_back(i), values.push_back(random.normal());
    }
    int in_group() const { return ins / groups; }
    int taps() const { return side * side; }
    int tiles() const { return (ins + tile - 1) / tile; }
    int64_t row() const { return width + padding; }
    int64_t sample() const { return row() * (height + padding); }
    int64_t count() const { return (samples - 1) * sample() + (height - 1) * row() + width; }
    int64_t before() const { return (padding * row() + padding + 15) / 16 * 16; }
    int64_t channel() const { return before() + (count() + padding * row() + padding + 31) / 16 * 16; }
    int64_t offset(int tap) const { return (tap / side - padding) * row() + tap % side - padding; }
};

template <class real> using PointEntry = std::conditional_t<sizeof(real) == 4, acdc_entry_f32, acdc_entry_f64>;

template <class real> auto pointer_to_points_conv(const acdc_points_table& table) {
    if constexpr (sizeof(real) == 4) return table.points_conv_f32;
    else return table.points_conv_f64;
}

// The list of a layer, with guarded memory.
template <class real> struct PointList {
    Memory<int32_t> parts, channel, begin;
    Memory<PointEntry<real>> entries;
    int64_t rows;

    explicit PointList(const PointLayer& layer)
        : parts(layer.cuts * layer.tiles() + 1), channel(layer.tiles() * layer.outs), begin(layer.tiles() * layer.outs + 1),
          entries(int64_t(layer.index.size())) {
        Memory<int32_t> index(int64_t(layer.index.size()));
        std::copy(layer.index.begin(), layer.index.end(), index.data);
        const Memory<real> values = vector_of<real>(layer.values);
        std::vector<int64_t> tap;
        for (int i = 0; i < layer.taps(); ++i) tap.push_back(layer.offset(i));
        acdc_points_list_args a{};
        a.index = index.data, a.values = values.data, a.kept = index.count;
        a.out_channels = layer.outs, a.in_channels = layer.ins, a.groups = layer.groups, a.taps = layer.taps();
        a.tap = tap.data(), a.x_channel = layer.channel(), a.tile = layer.tile, a.cuts = layer.cuts;
        a.is_double = sizeof(real) == 8;
        a.parts = parts.data, a.channel = channel.data, a.begin = begin.data, a.entries = entries.data;
        rows = acdc_points_list(&a);
        if (rows < 0) throw Failure("a list was not made");
        a.x_channel = int64_t(1) << 31;
        if (layer.ins > 1 && acdc_points_list(&a) != -1) throw Failure("an offset of more than 32 bits was taken");
    }
};

// Each kept weight is in the row of its output channel, in the part of its input channel. Rows of a part are sorted.
template <class real> void check_list(const PointLayer& layer, const PointList<real>& list) {
    const int filter = layer.in_group() * layer.taps(), outs_of_group = layer.outs / layer.groups;
    std::vector<bool> seen(std::size_t(layer.outs) * std::size_t(layer.tiles()));
    std::size_t found = 0;
    int before = -1;  // the largest output channel of the groups before
    int largest = -1;
    for (int part = 0; part < layer.cuts * layer.tiles(); ++part) {
        const int tile = part % layer.tiles();
        if (tile == 0) before = largest;
        for (int row = list.parts.data[part]; row < list.parts.data[part + 1]; ++row) {
            const int out = list.channel.data[row], begin = list.begin.data[row], end = list.begin.data[row + 1];
            largest = std::max(largest, out);
            if (out <= before) throw Failure("a channel is in two groups");
            if (row > list.parts.data[part] && end - begin > begin - list.begin.data[row - 1])
                throw Failure("the rows of a part are not sorted");
            if (seen[std::size_t(out * layer.tiles() + tile)]) throw Failure("a row is there twice");
            seen[std::size_t(out * layer.tiles() + tile)] = true;
            std::size_t at = std::size_t(
                std::lower_bound(layer.index.begin(), layer.index.end(), out * filter) - layer.index.begin());
            for (int k = begin; k < end; ++k, ++at, ++found) {
                int in = 0;
                for (;; ++at) {  // the next weight of this row in the order of the layer
                    if (at >= layer.index.size() || layer.index[at] / filter != out) throw Failure("an entry of no weight");
                    in = layer.index[at] % filter / layer.taps() + out / outs_of_group * layer.in_group();
                    if (in / layer.tile == tile) break;
                }
                const int64_t offset = in * layer.channel() + layer.offset(layer.index[at] % layer.taps());
                if (list.entries.data[k].offset != offset || double(list.entries.data[k].value) != layer.values[at])
                    throw Failure("an entry has another offset or value");
            }
        }
    }
    if (found != layer.index.size() || list.parts.data[layer.cuts * layer.tiles()] != list.rows)
        throw Failure("a list has not as many entries as weights");
    for (int out = 0; out < layer.outs; ++out)
        if (!seen[std::size_t(out * layer.tiles())] || !seen[std::size_t((out + 1) * layer.tiles() - 1)])
            throw Failure("a channel has no first or no last row");
}

// [channel][point], with zeros at all points that are no pixels.
template <class real> struct PointBuffer {
    const PointLayer& layer;
    int channels;
    Memory<real> memory;

    PointBuffer(const PointLayer& layer, int channels)
        : layer(layer), channels(channels), memory(channels * layer.channel(), Aligned::line) { memory.fill(0); }
    acdc_points points(const void* live) const {
        return {memory.data + layer.before(), layer.channel(), layer.sample(), layer.row(), channels, layer.samples,
                layer.height, layer.width, live};
    }
    real& at(int channel, int64_t point) { return memory.data[channel * layer.channel() + layer.before() + point]; }
    template <class Body> void each_pixel(Body body) {
        for (int c = 0; c < channels; ++c)
            for (int n = 0; n < layer.samples; ++n)
                for (int row = 0; row < layer.height; ++row)
                    for (int column = 0; column < layer.width; ++column)
                        body(c, n * layer.sample() + row * layer.row() + column);
    }
};

// Every convolution of the layer equals plain loops, and writes zeros where there is no pixel.
template <class real> void check_point_layer(const PointLayer& layer, const acdc_points_table& table, Random& random) {
    const PointList<real> list(layer);
    PointBuffer<real> x(layer, layer.ins), residual(layer, layer.outs), y(layer, layer.outs);
    x.each_pixel([&](int c, int64_t point) { x.at(c, point) = real(random.normal()); });
    residual.each_pixel([&](int c, int64_t point) { residual.at(c, point) = real(random.normal()); });
    const Memory<real> bias = vector_of<real>(random.normals(layer.outs));
    Memory<std::conditional_t<sizeof(real) == 4, int32_t, int64_t>> live((layer.count() + 15) / 16 * 16, Aligned::line);
    live.fill(0);
    PointBuffer<real> one(layer, 1);
    one.each_pixel([&](int, int64_t point) { live.data[point] = -1; });

    acdc_points_conv_args a{};
    a.x = x.points(nullptr), a.y = y.points(live.data);
    if (random.chance(0.5)) a.residual = residual.points(nullptr);
    if (random.chance(0.5)) a.bias = bias.data;
    a.groups = layer.cuts, a.tiles = layer.tiles(), a.parts = list.parts.data, a.channel = list.channel.data;
    a.begin = list.begin.data, a.entries = list.entries.data, a.vectors = random.between(1, 16);
    a.tile_channels = layer.groups == 1 && random.chance(0.5) ? layer.tile : 0;
    a.activation = random.one_of({ACDC_NOTHING, ACDC_RELU, ACDC_HARDSIGMOID}), a.threads = random.between(1, 3);
    (*pointer_to_points_conv<real>(table))(&a, nullptr);

    std::vector<double> want(std::size_t(y.memory.count), 0.0), got = values_of(y.memory);
    const int filter = layer.in_group() * layer.taps(), outs_of_group = layer.outs / layer.groups;
    y.each_pixel([&](int out, int64_t point) {
        double sum = (a.bias ? double(bias.data[out]) : 0) + (a.residual.origin ? double(residual.at(out, point)) : 0);
        for (std::size_t i = 0; i < layer.index.size(); ++i) {
            if (layer.index[i] / filter != out) continue;
            const int in = layer.index[i] % filter / layer.taps() + out / outs_of_group * layer.in_group();
            sum += layer.values[i] * double(x.at(in, point + layer.offset(layer.index[i] % layer.taps())));
        }
        if (a.activation == ACDC_RELU) sum = std::fmax(sum, 0);
        if (a.activation == ACDC_HARDSIGMOID) sum = std::fmin(std::fmax(sum + 3, 0), 6) / 6;
        want[std::size_t(&y.at(out, point) - y.memory.data)] = sum;
    });
    close<real>("points_conv", got, want);
}

template <class real> auto pointer_to_points_dense(const acdc_points_table& table) {
    if constexpr (sizeof(real) == 4) return table.points_dense_f32;
    else return table.points_dense_f64;
}

// A linear layer without an index list equals plain loops. A sample computed alone gives the same bits.
template <class real> void check_dense(const acdc_points_table& table, Random& random) {
    const int outs = random.between(1, 14), ins = random.between(1, 70), samples = random.between(1, 16);
    const int64_t size = (ins + 15) / 16 * 16, step = random.between(1, 3), pitch = (samples * step + 15) / 16 * 16;
    Memory<real> x(ins * pitch, Aligned::line), y(outs * pitch, Aligned::line), residual(outs * pitch, Aligned::line);
    Memory<real> weight(outs * size), workspace(samples * size, Aligned::line);
    const Memory<real> bias = vector_of<real>(random.normals(outs));
    for (auto* memory : {&x, &y, &residual})
        for (int64_t i = 0; i < memory->count; ++i) memory->data[i] = real(random.normal());
    for (int64_t i = 0; i < weight.count; ++i) weight.data[i] = i % size < ins ? real(random.normal()) : real(0);

    acdc_points_dense_args a{};
    a.x = {x.data, pitch, step, 1, ins, samples, 1, 1, nullptr};
    a.y = {y.data, pitch, step, 1, outs, samples, 1, 1, nullptr};
    if (random.chance(0.5)) a.residual = {residual.data, pitch, step, 1, outs, samples, 1, 1, nullptr};
    if (random.chance(0.5)) a.bias = bias.data;
    a.weight = weight.data, a.size = size, a.workspace = workspace.data;
    a.activation = random.one_of({ACDC_NOTHING, ACDC_RELU}), a.threads = random.between(1, 3);

    std::vector<double> want = values_of(y);
    for (int out = 0; out < outs; ++out)
        for (int n = 0; n < samples; ++n) {
            const int64_t at = out * pitch + n * step;
            double sum = (a.bias ? double(bias.data[out]) : 0) + (a.residual.origin ? double(residual.data[at]) : 0);
            for (int in = 0; in < ins; ++in) sum += double(weight.data[out * size + in]) * double(x.data[in * pitch + n * step]);
            want[std::size_t(at)] = a.activation == ACDC_RELU ? std::fmax(sum, 0) : sum;
        }
    (*pointer_to_points_dense<real>(table))(&a, nullptr);
    close<real>("points_dense", values_of(y), want);

    const std::vector<double> together = values_of(y);
    const int alone = random.between(0, samples - 1);
    for (acdc_points* points : {&a.x, &a.y, &a.residual})
        if (points->origin) points->origin = static_cast<real*>(points->origin) + alone * step, points->samples = 1;
    (*pointer_to_points_dense<real>(table))(&a, nullptr);
    if (values_of(y) != together) throw Failure("points_dense: a sample depends on the others");
}

inline void check_positions(Random& random) {
    Memory<uint8_t> bits(random.between(1, 40));
    std::vector<int32_t> want;
    for (int64_t i = 0; i < bits.count; ++i) {
        bits.data[i] = uint8_t(random.chance(0.3) ? 0 : random.next());
        for (int bit = 0; bit < 8; ++bit)
            if (bits.data[i] >> bit & 1) want.push_back(int32_t(8 * i + bit));
    }
    const int64_t room = random.between(0, int(want.size()));
    Memory<int32_t> index(room);
    if (acdc_positions(bits.data, bits.count, index.data, room) != int64_t(want.size())) throw Failure("the number of bits");
    if (!std::equal(index.data, index.data + room, want.begin())) throw Failure("the positions of bits");
}

inline void check_point_lists(Random& random) {
    const PointLayer layer(random);
    check_list(layer, PointList<float>(layer));
    check_list(layer, PointList<double>(layer));
    check_positions(random);
    for (int i = 0; i < acdc_table_count(); ++i) {
        if (!acdc_table_at(i)->supported()) continue;
        check_point_layer<float>(layer, *acdc_points_table_at(i), random);
        check_point_layer<double>(layer, *acdc_points_table_at(i), random);
        check_dense<float>(*acdc_points_table_at(i), random);
        check_dense<double>(*acdc_points_table_at(i), random);
    }
}

}  // namespace check
