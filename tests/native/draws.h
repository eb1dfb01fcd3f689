// Random draws, against the Mersenne Twister of the C++ library.
#pragma once
#include <cmath>
#include <random>
#include <sstream>

#include "acdc_kernels.h"
#include "memory.h"

namespace check {

inline acdc_generator generator_of(const std::mt19937& engine) {
    std::stringstream text;
    text << engine;
    acdc_generator found{};
    for (uint64_t& word : found.state) text >> word;
    text >> found.next;
    found.left = int32_t(ACDC_GENERATOR_WORDS - found.next) + 1;
    return found;
}

template <class real> void check_draws(const acdc_table& table, Random& random) {
    std::mt19937 engine(uint32_t(random.next()));
    engine.discard(uint64_t(random.between(0, 1300)));
    acdc_generator drawn = generator_of(engine);
    const double p = random.one_of({0.0, 0.25, 0.5, 0.9, 1e-9, 1 - 1e-9, 1.0}), one = 1.25;
    const Memory<real> out(random.between(0, 3000));
    table.bernoulli(&drawn, p, one, out.data, out.count, sizeof(real) == 8);
    std::vector<double> want;
    for (int64_t i = 0; i < out.count; ++i) {
        const uint64_t high = engine(), low = engine();
        const uint64_t bits = (high << 32 | low) & ((uint64_t(1) << 53) - 1);
        want.push_back(std::ldexp(double(bits), -53) < p ? one : 0.0);
    }
    if (values_of(out) != want) throw Failure("bernoulli");
    const acdc_generator after = generator_of(engine);
    if (after.left != drawn.left || after.next != drawn.next) throw Failure("the place in the generator after draws");
    for (int i = 0; i < ACDC_GENERATOR_WORDS; ++i)
        if (after.state[i] != drawn.state[i]) throw Failure("the state of the generator after draws");
}

}  // namespace check
