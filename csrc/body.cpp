// One instruction set's kernels. CMake compiles this file once for each, with ACDC_ISA (its name, and
// the namespace) and ACDC_LANES (floats in a register) defined.
#include "activation.h"
#include "convert.h"
#include "conv.h"
#include "draws.h"
#include "gate.h"
#include "layer_norm.h"
#include "norm.h"
#include "pool.h"
#include "weight_grad.h"

namespace ACDC_ISA {
namespace {
int32_t supported() {
#if defined(ACDC_NEEDS_AVX512)
    return __builtin_cpu_supports("avx512f");
#elif defined(ACDC_NEEDS_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}
}  // namespace
}  // namespace ACDC_ISA

#define ACDC_STRING_(x) #x
#define ACDC_STRING(x) ACDC_STRING_(x)
#define ACDC_JOIN_(a, b) a##b
#define ACDC_JOIN(a, b) ACDC_JOIN_(a, b)
#define ACDC_ENTRY(name, args) ACDC_ISA::name<float>, ACDC_ISA::name<double>,

extern "C" const acdc_table ACDC_JOIN(acdc_table_, ACDC_ISA) = {
    ACDC_STRING(ACDC_ISA), ACDC_LANES, ACDC_ISA::supported, ACDC_ISA::any_bernoulli,
    ACDC_KERNELS(ACDC_ENTRY)};
