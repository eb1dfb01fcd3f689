// One instruction set's kernels of the runtime, compiled as body.cpp is.
#include "points_attention.h"
#include "points_conv.h"
#include "points_dense.h"
#include "points_move.h"

#define ACDC_JOIN_(a, b) a##b
#define ACDC_JOIN(a, b) ACDC_JOIN_(a, b)
#define ACDC_ENTRY(name, args) ACDC_ISA::name<float>, ACDC_ISA::name<double>,

extern "C" const acdc_points_table ACDC_JOIN(acdc_points_table_, ACDC_ISA) = {ACDC_POINT_KERNELS(ACDC_ENTRY)};
