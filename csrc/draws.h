// Bernoulli draws from a generator of PyTorch: the same numbers, many words at a time. PyTorch draws each with
// a call and a branch.
//
// The generator is the Mersenne Twister MT19937 of Matsumoto and Nishimura (1998). The loops here have no branches,
// so that a compiler makes vectors of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "acdc_kernels.h"

namespace ACDC_ISA {
namespace {

constexpr int WORDS = ACDC_GENERATOR_WORDS, AHEAD = 397;
constexpr int64_t PAIRS = 512;  // draws that are made at a time: their words stay in the first-level cache

uint32_t twisted(uint32_t first, uint32_t second, uint32_t ahead) {
    const uint32_t mixed = (first & 0x80000000u) | (second & 0x7fffffffu);
    return ahead ^ (mixed >> 1) ^ ((0u - (second & 1u)) & 0x9908b0dfu);
}

uint32_t tempered(uint32_t word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
}

class Generator {
public:
    explicit Generator(acdc_generator* held) : held_(held), left_(held->left - 1) {
        for (int i = 0; i < WORDS; ++i) state_[i] = uint32_t(held->state[i]);
    }
    ~Generator() {
        for (int i = 0; i < WORDS; ++i) held_->state[i] = state_[i];
        held_->left = left_ + 1;
        held_->next = uint64_t(WORDS - left_);
    }
    Generator(const Generator&) = delete;

    void draw(uint32_t* out, int64_t count) {
        while (count > 0) {
            if (left_ == 0) next_state();
            const int64_t now = std::min<int64_t>(count, left_);
            const uint32_t* const from = state_ + WORDS - left_;
            for (int64_t i = 0; i < now; ++i) out[i] = tempered(from[i]);
            left_ -= int32_t(now), count -= now, out += now;
        }
    }

private:
    void next_state() {
        uint32_t* const s = state_;
        for (int i = 0; i < WORDS - AHEAD; ++i) s[i] = twisted(s[i], s[i + 1], s[i + AHEAD]);
        for (int i = WORDS - AHEAD; i < WORDS - 1; ++i) s[i] = twisted(s[i], s[i + 1], s[i + AHEAD - WORDS]);
        s[WORDS - 1] = twisted(s[WORDS - 1], s[0], s[AHEAD - 1]);
        left_ = WORDS;
    }

    acdc_generator* const held_;
    int32_t left_;  // words of the state that were not drawn yet
    uint32_t state_[WORDS];
};

// A draw is one where 53 bits of two words are less than p * 2^53, as `at::bernoulli_distribution<double>` has it.
template <class T> void bernoulli(acdc_generator* held, double p, T one, T* out, int64_t count) {
    Generator generator(held);
    const uint64_t limit = uint64_t(std::ceil(std::ldexp(p, 53)));
    const uint32_t high_limit = uint32_t(limit >> 32), low_limit = uint32_t(limit);
    uint32_t words[2 * PAIRS];
    for (int64_t first = 0; first < count; first += PAIRS) {
        const int64_t now = std::min(PAIRS, count - first);
        generator.draw(words, 2 * now);
        for (int64_t i = 0; i < now; ++i) {
            const uint32_t high = words[2 * i] & 0x1fffffu, low = words[2 * i + 1];
            const bool is_one = (high < high_limit) | ((high == high_limit) & (low < low_limit));
            out[first + i] = is_one ? one : T(0);
        }
    }
}

void any_bernoulli(acdc_generator* generator, double p, double one, void* out, int64_t count, int32_t is_double) {
    if (is_double)
        bernoulli(generator, p, one, static_cast<double*>(out), count);
    else
        bernoulli(generator, p, float(one), static_cast<float*>(out), count);
}

}  // namespace
}  // namespace ACDC_ISA
