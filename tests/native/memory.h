// What all checks share: random numbers, guarded memory, and the comparison of results.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

// A kernel computed something wrong. main.cpp adds the example and prints it.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// SplitMix64. The distributions of the C++ library differ from machine to machine.
class Random {
    uint64_t state;

public:
    explicit Random(uint64_t seed) : state(seed) {}

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    double uniform() { return double(next() >> 11) * 0x1p-53; }
    // Of mean 0 and variance 1, between -3.5 and 3.5. A float holds it exactly, so that float kernels get the
    // numbers of the reference.
    double normal() {
        const double sum = uniform() + uniform() + uniform() + uniform();
        return float((sum - 2) * 1.7320508);
    }
    int between(int least, int most) { return least + int(next() % uint64_t(most - least + 1)); }
    bool chance(double probability) { return uniform() < probability; }
    template <class T> T one_of(std::initializer_list<T> values) {
        return values.begin()[between(0, int(values.size()) - 1)];
    }
    std::vector<double> normals(int64_t count) {
        std::vector<double> values(static_cast<std::size_t>(count));
        for (double& value : values) value = normal();
        return values;
    }
};

enum class Aligned { number, line };

// Numbers that end at a page which cannot be read or written: an access behind them ends the program. With
// Aligned::line they begin at a cache line, and up to 63 bytes may lie behind them. A pattern lies before them.
template <class T> class Memory {
    static constexpr unsigned char pattern = 0xa5;
    static constexpr int64_t before = 64;
    unsigned char* pages;
    std::size_t mapped;

public:
    T* data;
    int64_t count;

    explicit Memory(int64_t count, Aligned aligned = Aligned::number) : count(count) {
        const int64_t page = sysconf(_SC_PAGESIZE), used = count * int64_t(sizeof(T));
        const int64_t bytes = aligned == Aligned::line ? (used + 63) / 64 * 64 : used;
        mapped = std::size_t((bytes + before + page - 1) / page * page + page);
        void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory");
        pages = static_cast<unsigned char*>(memory);
        unsigned char* const end = pages + mapped - page;
        mprotect(end, std::size_t(page), PROT_NONE);
        data = reinterpret_cast<T*>(end - bytes);
        std::memset(front(), pattern, std::size_t(before));
    }
    Memory(Memory&& other) noexcept
        : pages(other.pages), mapped(other.mapped), data(other.data), count(other.count) {
        other.pages = nullptr;
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() {
        if (pages) munmap(pages, mapped);
    }

    void fill(T value) {
        for (int64_t i = 0; i < count; ++i) data[i] = value;
    }
    void check_front() const {
        for (int64_t i = 0; i < before; ++i)
            if (front()[i] != pattern) throw Failure("wrote before the first number");
    }

private:
    unsigned char* front() const { return reinterpret_cast<unsigned char*>(data) - before; }
};

// The numbers as a kernel reads them.
template <class real> Memory<real> vector_of(const std::vector<double>& values) {
    Memory<real> memory{int64_t(values.size())};
    for (std::size_t i = 0; i < values.size(); ++i) memory.data[i] = real(values[i]);
    return memory;
}
template <class T> std::vector<double> values_of(const Memory<T>& memory) {
    memory.check_front();
    return std::vector<double>(memory.data, memory.data + memory.count);
}

template <class real> constexpr double tolerance = sizeof(real) == 4 ? 1e-5 : 1e-12;

inline std::string text_of(double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.9g", value);
    return text;
}

inline double largest(const std::vector<double>& values) {
    double most = 0;
    for (double value : values) most = std::fmax(most, std::fabs(value));
    return most;
}
inline double norm_of(const std::vector<double>& values) {
    double sum = 0;
    for (double value : values) sum += value * value;
    return std::sqrt(sum);
}

// Compares relative to the largest number wanted, or to `scale` if that is larger: the usual size of a sum whose
// terms cancel.
template <class real>
void close(const char* what, const std::vector<double>& got, const std::vector<double>& want, double scale = 0) {
    if (got.size() != want.size()) throw Failure(std::string(what) + ": another size");
    scale = std::fmax(std::fmax(scale, 1e-3), largest(want));
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double error = std::fabs(got[i] - want[i]) / scale;
        if (!(error <= tolerance<real>)) {
            throw Failure(std::string(what) + ": number " + std::to_string(i) + " is " + text_of(got[i]) +
                          " instead of " + text_of(want[i]));
        }
    }
}

}  // namespace check
