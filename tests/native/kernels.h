// The kernels of one instruction set and one type of numbers, called as the engine calls them.
#pragma once
#include <set>
#include <string>

#include "layout.h"

namespace check {

template <class real> class Kernels {
    acdc_table table;
    std::set<std::string>* called;

    static constexpr bool is_double = sizeof(real) == 8;

    template <class Args>
    void run(const char* name, void (*kernel)(const Args*, const acdc_share*), const Args& args, int64_t blocks) const {
        called->insert(std::string(name) + (is_double ? " (f64)" : " (f32)"));
        if (!in_shares || blocks == 0) return kernel(&args, nullptr);
        const acdc_share begin{ACDC_BEGIN, 0, 0, 0}, end{ACDC_END, 0, 0, 0};
        kernel(&args, &begin);
        for (int thread = 0; thread < threads; ++thread) {
            const acdc_share work{ACDC_WORK, thread, blocks * thread / threads, blocks * (thread + 1) / threads};
            kernel(&args, &work);
        }
        kernel(&args, &end);
    }

public:
    int threads = 1;
    bool in_shares = false;  // the parts of a kernel one after the other, as acdc_run calls them

    Kernels(const acdc_table& table, std::set<std::string>* called) : table(table), called(called) {}

    int lanes() const { return table.lanes; }
    Place place(int halo = 0, bool tokens = false) const { return {table.lanes, halo, tokens}; }
    Memory<real> workspace(int64_t count) const {
        Memory<real> memory(threads * count, Aligned::line);
        memory.fill(real(7));
        return memory;
    }

    // name(args, blocks): runs a kernel. Without blocks it runs as a whole.
#define ACDC_ROW(name, args)                                                        \
    void name(args a, int64_t blocks) const {                                       \
        a.threads = threads;                                                        \
        if constexpr (is_double) run(#name, table.name##_f64, a, blocks);           \
        else run(#name, table.name##_f32, a, blocks);                               \
    }                                                                               \
    auto pointer_to_##name() const {                                                \
        if constexpr (is_double) return table.name##_f64;                           \
        else return table.name##_f32;                                               \
    }
    ACDC_KERNELS(ACDC_ROW)
#undef ACDC_ROW
};

}  // namespace check
