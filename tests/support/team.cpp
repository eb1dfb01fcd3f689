// The part of OpenMP that the kernels use, on threads that ThreadSanitizer knows. GNU's libgomp waits by
// futexes that the sanitizer does not see, so that every kernel would look like a race. CMake links this file
// instead of libgomp into the module of `make sanitize-threads`.
#include <thread>
#include <vector>

#define HIDDEN __attribute__((visibility("hidden")))

namespace {
thread_local int team = 1, self = 0;
}

extern "C" {

HIDDEN int omp_get_num_threads() { return team; }
HIDDEN int omp_get_thread_num() { return self; }

// What GCC makes of `#pragma omp parallel`.
HIDDEN void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back([=] {
            team = int(threads), self = int(i);
            body(data);
        });
    team = threads ? int(threads) : 1;
    body(data);
    team = 1;
    for (std::thread& other : others) other.join();
}
}
