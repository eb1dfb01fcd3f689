// Runs a sequence of kernels, block by block between the calls that need all blocks. Built for the
// baseline: the kernels that it calls are those of any instruction set.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "acdc_kernels.h"

namespace {

void each_call(const acdc_call* first, const acdc_call* last, const acdc_share& share) {
    for (const acdc_call* c = first; c < last; ++c) c->call(c->kernel, c->args, &share);
}

// The blocks [begin, end) of one thread, forwards or backwards: every other group goes backwards, so
// that a thread starts with the block that it left in the cache.
void work(const acdc_call* first, const acdc_call* last, acdc_share share, bool backwards) {
    const int64_t begin = share.first_block, count = share.last_block - begin;
    for (int64_t i = 0; i < count; ++i) {
        share.first_block = begin + (backwards ? count - 1 - i : i);
        share.last_block = share.first_block + 1;
        each_call(first, last, share);
    }
}

void run_group(const acdc_call* first, const acdc_call* last, int64_t blocks, int threads, bool backwards) {
    each_call(first, last, {ACDC_BEGIN, 0, 0, 0});
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
        work(first, last, {ACDC_WORK, int32_t(self), blocks * self / team, blocks * (self + 1) / team}, backwards);
    }
#else
    (void)threads;
    work(first, last, {ACDC_WORK, 0, 0, blocks}, backwards);
#endif
    each_call(first, last, {ACDC_END, 0, 0, 0});
}

}  // namespace

extern "C" void acdc_run(const acdc_call* calls, int64_t count, int64_t blocks, int32_t threads) {
    bool backwards = false;
    for (int64_t i = 0; i < count;) {
        if (calls[i].alone) {
            calls[i].call(calls[i].kernel, calls[i].args, nullptr);
            ++i;
            continue;
        }
        int64_t end = i;
        while (end < count && !calls[end].alone) ++end;
        run_group(calls + i, calls + end, blocks, threads, backwards);
        backwards = !backwards;
        i = end;
    }
}
