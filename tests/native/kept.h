// The kept elements of dense tensors, and optimizer steps on them. These functions are compiled once, for the
// baseline, so they have no table.
#pragma once
#include "acdc_kernels.h"
#include "memory.h"

namespace check {

struct KeptElements {
    int64_t size;
    std::vector<int32_t> places;

    explicit KeptElements(Random& random) : size(random.between(1, 5000)) {
        const double density = random.one_of({0.0, 0.05, 0.5, 1.0});
        for (int64_t i = 0; i < size; ++i)
            if (random.chance(density)) places.push_back(int32_t(i));
    }
    int64_t count() const { return int64_t(places.size()); }
    Memory<int32_t> index() const {
        Memory<int32_t> memory(count());
        for (int64_t i = 0; i < count(); ++i) memory.data[i] = places[std::size_t(i)];
        return memory;
    }
};

template <class T> void check_copies(Random& random, int threads) {
    const KeptElements kept(random);
    const Memory<int32_t> index = kept.index();
    Memory<T> dense(kept.size), vector(kept.count());
    Memory<uint8_t> dropped(kept.size);
    dropped.fill(1);
    for (int64_t i = 0; i < kept.size; ++i) dense.data[i] = T(1 + random.next() % 30000);
    std::vector<double> want_vector, want_dense(std::size_t(kept.size), 0.0);
    for (int32_t i : kept.places) {
        dropped.data[i] = 0;
        want_vector.push_back(double(dense.data[i]));
        want_dense[std::size_t(i)] = double(dense.data[i]);
    }
    acdc_gather(dense.data, index.data, kept.count(), vector.data, sizeof(T), threads);
    if (values_of(vector) != want_vector) throw Failure("gather");
    const std::vector<double> all = values_of(dense);
    acdc_clear(dropped.data, 1, dense.data, kept.size, sizeof(T), threads);
    if (values_of(dense) != want_dense) throw Failure("clear");
    for (int64_t i = 0; i < kept.size; ++i) {
        dense.data[i] = T(all[std::size_t(i)]);
        dropped.data[i] = !dropped.data[i];
    }
    acdc_clear(dropped.data, 0, dense.data, kept.size, sizeof(T), threads);
    if (values_of(dense) != want_dense) throw Failure("clear where a mask is false");
    dense.fill(T(7));
    acdc_expand(vector.data, index.data, kept.count(), dense.data, kept.size, sizeof(T), threads);
    if (values_of(dense) != want_dense) throw Failure("expand");
}

inline void check_optimizers(Random& random, int threads) {
    const KeptElements kept(random);
    const Memory<int32_t> index = kept.index();
    const std::vector<double> grad = random.normals(kept.size);
    std::vector<double> weight = random.normals(kept.size);
    std::vector<double> momentum = random.normals(kept.count()), average = random.normals(kept.count());
    std::vector<double> squares = random.normals(kept.count());
    for (double& value : squares) value = float(value * value);
    const Memory<float> m_weight = vector_of<float>(weight), m_grad = vector_of<float>(grad);
    const Memory<float> m_momentum = vector_of<float>(momentum), m_average = vector_of<float>(average);
    const Memory<float> m_squares = vector_of<float>(squares);
    const acdc_kept elements{m_weight.data, m_grad.data, index.data, kept.count(), kept.size};

    // Steps every kept element: step(weight, gradient, number of the element). The others become zero.
    auto compare = [&](const char* what, float sign, auto step) {
        std::vector<double> want(weight.size(), 0.0);
        for (std::size_t i = 0; i < kept.places.size(); ++i) {
            const std::size_t at = std::size_t(kept.places[i]);
            want[at] = weight[at];
            step(want[at], sign * grad[at], i);
        }
        weight = want;
        close<float>(what, values_of(m_weight), weight);
    };

    acdc_sgd_args sgd{};
    const bool has_momentum = random.chance(0.7);
    sgd.momentum_buffer = has_momentum ? m_momentum.data : nullptr;
    sgd.lr = 0.125f, sgd.momentum = 0.875f, sgd.share = 0.75f, sgd.weight_decay = 0.25f;
    sgd.sign = random.one_of({1.0f, -1.0f}), sgd.nesterov = has_momentum && random.chance(0.5);
    acdc_sgd(&elements, &sgd, threads);
    compare("a step of SGD", sgd.sign, [&](double& w, double g, std::size_t i) {
        g += sgd.weight_decay * w;
        if (has_momentum) {
            momentum[i] = sgd.momentum * momentum[i] + sgd.share * g;
            g = sgd.nesterov ? g + sgd.momentum * momentum[i] : momentum[i];
        }
        w -= sgd.lr * g;
    });
    close<float>("the momentum", values_of(m_momentum), momentum);

    acdc_adam_args adam{};
    adam.exp_avg = m_average.data, adam.exp_avg_sq = m_squares.data;
    adam.step_size = 0.125f, adam.share1 = 0.25f, adam.beta2 = 0.75f, adam.share2 = 0.25f, adam.eps = 0.0625f;
    adam.root = 0.5f, adam.weight_decay = 0.25f, adam.shrink = 0.875f, adam.sign = random.one_of({1.0f, -1.0f});
    acdc_adam(&elements, &adam, threads);
    compare("a step of Adam", adam.sign, [&](double& w, double g, std::size_t i) {
        g += adam.weight_decay * w;
        average[i] += adam.share1 * (g - average[i]);
        squares[i] = adam.beta2 * squares[i] + adam.share2 * g * g;
        w = adam.shrink * w - adam.step_size * (average[i] / (std::sqrt(squares[i]) / adam.root + adam.eps));
    });
    close<float>("the average of the gradients", values_of(m_average), average);
    close<float>("the average of their squares", values_of(m_squares), squares);
}

inline void check_kept(Random& random) {
    const int threads = random.between(1, 3);
    check_copies<uint16_t>(random, threads);
    check_copies<float>(random, threads);
    check_copies<double>(random, threads);
    check_optimizers(random, threads);
}

}  // namespace check
