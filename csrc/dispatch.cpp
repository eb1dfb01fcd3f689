// The compiled tables, from the most portable to the widest. This file is compiled for the baseline.
#include "acdc_points.h"

extern "C" {
extern const acdc_table acdc_table_baseline;
extern const acdc_points_table acdc_points_table_baseline;
#ifdef ACDC_HAS_AVX2
extern const acdc_table acdc_table_avx2;
extern const acdc_points_table acdc_points_table_avx2;
#endif
#ifdef ACDC_HAS_AVX512
extern const acdc_table acdc_table_avx512;
extern const acdc_points_table acdc_points_table_avx512;
#endif

static const acdc_table* const tables[] = {
    &acdc_table_baseline,
#ifdef ACDC_HAS_AVX2
    &acdc_table_avx2,
#endif
#ifdef ACDC_HAS_AVX512
    &acdc_table_avx512,
#endif
};

static const acdc_points_table* const points_tables[] = {
    &acdc_points_table_baseline,
#ifdef ACDC_HAS_AVX2
    &acdc_points_table_avx2,
#endif
#ifdef ACDC_HAS_AVX512
    &acdc_points_table_avx512,
#endif
};

int32_t acdc_table_count(void) { return int32_t(sizeof(tables) / sizeof(tables[0])); }
const acdc_table* acdc_table_at(int32_t index) { return tables[index]; }
const acdc_points_table* acdc_points_table_at(int32_t index) { return points_tables[index]; }
}
