// Runs a sequence of kernels, block by block between the calls that need all blocks. This file is compiled
// for the baseline only; the kernels that it calls may be of any instruction set.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <chrono>

#include "acdc_kernels.h"

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The calls [first, last). `seconds` has one number for each call, or is null if nothing is timed.
struct Calls {
    const acdc_call *first, *last;
    double* seconds;

    void run(const acdc_share* share) const {
        for (const acdc_call* c = first; c < last; ++c) {
            const double began = seconds ? now() : 0.0;
            c->call(c->kernel, c->args, share);
            if (seconds) seconds[c - first] += now() - began;
        }
    }
};

// Runs the blocks of one thread, forwards or backwards. Every other group goes backwards, so that a thread
// starts with the block that is still in its cache.
void work(const Calls& calls, acdc_share share, bool backwards) {
    const int64_t begin = share.first_block, count = share.last_block - begin;
    for (int64_t i = 0; i < count; ++i) {
        share.first_block = begin + (backwards ? count - 1 - i : i);
        share.last_block = share.first_block + 1;
        calls.run(&share);
    }
}

// `alone` times the work of one thread while the others wait. `seconds` has a row of `pitch` per thread.
void run_group(const Calls& alone, double* seconds, int64_t pitch, int64_t blocks, int threads, bool backwards) {
    const acdc_share begin{ACDC_BEGIN, 0, 0, 0}, end{ACDC_END, 0, 0, 0};
    alone.run(&begin);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
        work({alone.first, alone.last, seconds ? seconds + self * pitch : nullptr},
             {ACDC_WORK, int32_t(self), blocks * self / team, blocks * (self + 1) / team}, backwards);
    }
#else
    (void)threads, (void)pitch;
    work({alone.first, alone.last, seconds}, {ACDC_WORK, 0, 0, blocks}, backwards);
#endif
    alone.run(&end);
}

}  // namespace

extern "C" void acdc_run(const acdc_call* calls, int64_t count, int64_t blocks, int32_t threads, double* seconds) {
    bool backwards = false;
    for (int64_t i = 0; i < count;) {
        double* const alone = seconds ? seconds + i : nullptr;
        if (calls[i].alone) {
            Calls{calls + i, calls + i + 1, alone}.run(nullptr);
            ++i;
            continue;
        }
        int64_t end = i;
        while (end < count && !calls[end].alone) ++end;
        run_group({calls + i, calls + end, alone}, alone ? alone + count : nullptr, count, blocks, threads, backwards);
        backwards = !backwards;
        i = end;
    }
}
