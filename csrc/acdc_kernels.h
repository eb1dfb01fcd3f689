/* The native kernels of a sparse phase: a plain C interface, no torch in it.
 *
 * Every activation lies in one layout, [block][channel][row][column][lane]: a block is as many samples
 * as a SIMD register has lanes, so one register holds one pixel of one channel of all of them, and a
 * kept weight is a broadcast and a few multiply-adds, whatever its position in the filter. Around each
 * channel lies a halo of zeros. It belongs to the buffer and is never written, so padding needs no code.
 *
 * A kernel takes one struct of pointers, pitches and integers. Pitches and strides count elements, not
 * bytes. All pointers into layout buffers are aligned to 64 bytes at pixel (-halo, -halo).
 * docs/engine.md explains the design.
 */
#ifndef ACDC_KERNELS_H
#define ACDC_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A buffer in the layout. For images a block is `lanes` samples. For tokens (linear layers) a block is
 * 8 columns of `lanes` tokens, height 1, so that the panel of a tile is contiguous in memory. */
typedef struct acdc_image {
    void* origin;                 /* pixel (0, 0) of channel 0 of block 0, inside the halo */
    int64_t row, channel, block;  /* pitches */
    int32_t blocks, channels, height, width;
    int32_t samples;              /* samples (tokens); the lanes after the last one hold zeros */
    int32_t per_block;            /* samples in a block */
    int32_t per_column;           /* samples from a column to the next: 0 (images) or lanes (tokens) */
    int32_t per_thread;           /* the memory has one block per thread, whatever `blocks` says */
} acdc_image;

/* The share of its work that a kernel does. Null means all of it, on all threads. A caller that runs
 * several kernels block by block first asks for BEGIN, then, on every thread, for WORK on the thread's
 * blocks, and finally, when all threads are done, for END. See acdc_run. */
typedef struct acdc_share {
    int32_t stage;
    int32_t thread;
    int64_t first_block, last_block;
} acdc_share;
enum { ACDC_BEGIN, ACDC_WORK, ACDC_END };

/* A plain tensor seen as [block][lane][channel][row][column], with strides in any order. Either its planes
 * are dense (column == 1, row == width), or its channels are (channel == 1). */
typedef struct acdc_plain {
    void* data;
    int64_t block, lane, channel, row, column;
} acdc_plain;

typedef struct acdc_entry_f32 { int32_t offset; float value; } acdc_entry_f32;
typedef struct acdc_entry_f64 { int32_t offset; double value; } acdc_entry_f64;

/* The kept weights in the order in which one pass reads them: by tile of input channels (the panel of a
 * tile fits into the first-level cache), by output channel, by position. A *row* is one output channel
 * inside one tile. The rows of a tile are sorted by length, longest first. Empty rows are left out,
 * except in the first tile, which starts the sums, and in the last tile, which ends them. */
typedef struct acdc_list {
    int32_t tiles;
    int32_t in_channels;
    const int32_t* tile_rows; /* [tiles + 1] number of the first row of each tile */
    const int32_t* channel;   /* [rows] the output channel of a row */
    const int32_t* begin;     /* [rows + 1] its first entry */
    const void* entries;      /* [nnz + 16] acdc_entry_f32 or _f64 */
    const int32_t* source;    /* [nnz] index into the dense weight's memory */
    int64_t nnz;
    int32_t out_row, out_column;       /* first output pixel this list computes (its phase) */
    int32_t top, bottom, left, right;  /* input pixels reached, relative to a tile; for prefetching */
} acdc_list;

/* y[out] (+)= sum over a row's entries of value * x[in + offset], for every output pixel of every phase.
 * A convolution is one phase with the stride on the input; its input gradient is stride x stride phases
 * with the stride on the output. */
typedef struct acdc_conv_args {
    acdc_image x, y;
    const acdc_list* lists;
    int32_t phases;
    int32_t in_row_step, in_column_step, out_row_step, out_column_step;
    int32_t tile_rows, tile_columns; /* register tile, cut to what exists; see tile_within */
    int32_t accumulate;              /* add to what y holds */
    int64_t stream_bytes;            /* a y that is larger, and written once, is written around the caches */
    const void* bias;                /* [channels of y] or null */
    const void* shift;               /* [channels of y] or null: subtracted inside `sums` */
    double* sums;                    /* [2][channels of y] or null: sum and sum of squares of y - shift */
    void* workspace;                 /* with sums: threads * channels * 2 * lanes elements, 64-B aligned */
    int32_t threads;
} acdc_conv_args;

/* target[source[k]] (+)= sum over pixels of dy * x at the offset of entry k: only the support. With `size`, every
 * other element of the target becomes zero. */
typedef struct acdc_weight_grad_args {
    acdc_image x, dy;
    const acdc_list* list; /* of the forward pass */
    int32_t in_row_step, in_column_step;
    int32_t tile_rows, tile_columns;
    int32_t accumulate;
    void* target;          /* as large as the dense weight */
    int64_t size;          /* elements of the target, if it holds anything; 0: zeros, or something to add to */
    int64_t row;           /* elements of an output channel, if these follow each other in the target; else 0 */
    void* workspace;       /* threads * acdc_grad_pitch(nnz) elements, 64-B aligned */
    int32_t threads;
} acdc_weight_grad_args;

typedef struct acdc_convert_args {
    acdc_image image;
    acdc_plain plain;
    int32_t threads;
} acdc_convert_args;

/* sums[c] = sum of x over samples and pixels (a bias gradient). */
typedef struct acdc_channel_sums_args {
    acdc_image x;
    double* sums;
    void* workspace; /* threads * channels * lanes elements, 64-B aligned */
    int32_t threads;
} acdc_channel_sums_args;

/* out = f(scale*y + offset [+ scale2*y2] [+ residual]), f = ReLU or nothing. The offset of the second
 * normalisation is part of `offset`. Dead lanes become zero. */
typedef struct acdc_norm_args {
    acdc_image y, out, y2, residual; /* origin null: absent */
    const void *scale, *offset, *scale2;
    int32_t relu;
    int32_t threads;
} acdc_norm_args;

/* First pass of the backward of acdc_norm_args: dz = grad where the ReLU passed, and its sums
 *   sums[0][c] = sum dz, sums[1][c] = sum dz*(y - mean), sums[2][c] = sum dz*(y2 - mean2).
 * dz is stored if dz.origin is not null. It may be grad itself, as the residual's gradient. */
typedef struct acdc_norm_reduce_args {
    acdc_image grad, y, out, y2, dz; /* out is read only if relu */
    const void *scale, *offset;      /* with relu and without out: the mask is scale*y + offset > 0 */
    const void *mean, *mean2;
    int32_t relu;
    double* sums;
    void* workspace; /* threads * channels * 3 * lanes elements, 64-B aligned */
    int32_t threads;
} acdc_norm_reduce_args;

/* Second pass: dy = a*dz + b*y + c, and dy2 = a2*dz + b2*y2 + c2. dz is grad, masked by out if relu. */
typedef struct acdc_norm_grad_args {
    acdc_image grad, y, out, y2, dy, dy2;
    const void *scale, *offset; /* as in acdc_norm_reduce_args */
    const void *a, *b, *c, *a2, *b2, *c2;
    int32_t relu;
    int32_t threads;
} acdc_norm_grad_args;

/* sums[0][c] = sum of x - shift, sums[1][c] = sum of its square, over samples and pixels: the statistics
 * of a batch, if no convolution computes them. */
typedef struct acdc_statistics_args {
    acdc_image x;
    const void* shift; /* [channels] or null */
    double* sums;
    void* workspace;   /* threads * channels * 2 * lanes elements, 64-B aligned */
    int32_t threads;
} acdc_statistics_args;

/* The scale and the offset that acdc_norm_args needs, one number per channel. They follow from the sums of
 * the batch, which also update the running statistics, or, without sums, from the running statistics.
 *   scale = weight / sqrt(variance + eps),  offset = bias - mean * scale [+ other_offset] */
typedef struct acdc_norm_fold_args {
    int32_t channels;
    double count, eps;               /* numbers that went into a sum */
    double momentum;                 /* of the running statistics; negative: the average of all batches */
    const double* sums;              /* [2][channels], of y - shift; null: evaluation */
    const void* shift;               /* [channels] or null; may be running_mean */
    const void *weight, *bias;       /* [channels] or null: 1 and 0 */
    void *running_mean, *running_var; /* [channels] or null */
    int64_t* batches;                /* batches seen; null without running statistics */
    const void* other_offset;        /* [channels] or null */
    void *mean, *inverse, *scale, *offset; /* [channels] results; inverse = 1 / sqrt(variance + eps) */
    int32_t threads;
} acdc_norm_fold_args;

/* The coefficients of acdc_norm_grad_args and the gradients of weight and bias, from the sums of
 * acdc_norm_reduce_args. */
typedef struct acdc_norm_unfold_args {
    int32_t channels, training;
    double count;
    const double *sums, *sums_y;     /* [channels]: of dz, and of dz * (y - mean) */
    const void *weight, *mean, *inverse;
    void *a, *b, *c;                 /* [channels] results */
    void *weight_grad, *bias_grad;   /* [channels] or null */
    int32_t threads;
} acdc_norm_unfold_args;

/* LayerNorm and RMSNorm over the channels of each pixel or token:
 *   out = (x - mean) * inverse * weight + bias,  inverse = 1 / sqrt(variance + eps)
 * For RMSNorm (`centered` is 0) the mean is 0, and the variance is the mean of the squares. `stats` has two
 * channels, mean and inverse. They are computed and stored, or read if `known`. Dead lanes become zero. */
typedef struct acdc_layer_norm_args {
    acdc_image x, stats, out;
    const void *weight, *bias; /* [channels] or null: 1 and 0 */
    double eps;
    int32_t centered, known;
    int32_t threads;
} acdc_layer_norm_args;

/* Its gradient. dx is added to if `accumulate`. sums[0][c] = sum of grad, sums[1][c] = sum of grad times the
 * normalised x: the gradients of bias and weight. */
typedef struct acdc_layer_norm_grad_args {
    acdc_image grad, x, stats, dx; /* dx: origin null: absent */
    const void* weight;
    int32_t centered, accumulate;
    double* sums;    /* [2][channels] or null */
    void* workspace; /* with sums: threads * channels * 2 * lanes elements, 64-B aligned */
    int32_t threads;
} acdc_layer_norm_grad_args;

/* out = x * gate. The gate has one pixel. */
typedef struct acdc_gate_args {
    acdc_image x, gate, out;
    int32_t threads;
} acdc_gate_args;

/* dgate = sum of grad * x over the pixels. */
typedef struct acdc_gate_grad_args {
    acdc_image grad, x, dgate;
    int32_t threads;
} acdc_gate_grad_args;

/* out = op(a, b), where op is the row of the kernel table. */
typedef struct acdc_pointwise_args {
    acdc_image a, b, out;
    int32_t threads;
} acdc_pointwise_args;

/* Pooling over a window; pixels outside of the image are ignored (max) or count as zero (average). */
typedef struct acdc_pool_args {
    acdc_image x, y, dx, dy; /* forward: x -> y; backward: (x, y,) dy -> dx */
    int32_t window_rows, window_columns, row_step, column_step, row_padding, column_padding;
    int32_t count_padding;   /* average: divide by the whole window even at the border */
    int32_t threads;
} acdc_pool_args;

/* The one list of kernels. The dispatch table, the binding and the list of kernels that the tests must
 * cover are made from it. row(name, arguments) */
#define ACDC_KERNELS(row)                           \
    row(to_layout, acdc_convert_args)               \
    row(from_layout, acdc_convert_args)             \
    row(conv, acdc_conv_args)                       \
    row(weight_grad, acdc_weight_grad_args)         \
    row(channel_sums, acdc_channel_sums_args)       \
    row(norm, acdc_norm_args)                       \
    row(norm_reduce, acdc_norm_reduce_args)         \
    row(norm_grad, acdc_norm_grad_args)             \
    row(statistics, acdc_statistics_args)           \
    row(norm_fold, acdc_norm_fold_args)             \
    row(norm_unfold, acdc_norm_unfold_args)         \
    row(relu, acdc_pointwise_args)                  \
    row(relu_grad, acdc_pointwise_args)             \
    row(add, acdc_pointwise_args)                   \
    row(mul, acdc_pointwise_args)                   \
    row(copy, acdc_pointwise_args)                  \
    row(gelu, acdc_pointwise_args)                  \
    row(gelu_grad, acdc_pointwise_args)             \
    row(gelu_tanh, acdc_pointwise_args)             \
    row(gelu_tanh_grad, acdc_pointwise_args)        \
    row(silu, acdc_pointwise_args)                  \
    row(silu_grad, acdc_pointwise_args)             \
    row(sigmoid, acdc_pointwise_args)               \
    row(sigmoid_grad, acdc_pointwise_args)          \
    row(relu6, acdc_pointwise_args)                 \
    row(relu6_grad, acdc_pointwise_args)            \
    row(hardsigmoid, acdc_pointwise_args)           \
    row(hardsigmoid_grad, acdc_pointwise_args)      \
    row(hardswish, acdc_pointwise_args)             \
    row(hardswish_grad, acdc_pointwise_args)        \
    row(layer_norm, acdc_layer_norm_args)           \
    row(layer_norm_grad, acdc_layer_norm_grad_args) \
    row(gate, acdc_gate_args)                       \
    row(gate_grad, acdc_gate_grad_args)             \
    row(max_pool, acdc_pool_args)                   \
    row(max_pool_grad, acdc_pool_args)              \
    row(avg_pool, acdc_pool_args)                   \
    row(avg_pool_grad, acdc_pool_args)

/* The first bytes of what `torch.Generator.get_state()` returns on the CPU. */
#define ACDC_GENERATOR_WORDS 624
typedef struct acdc_generator {
    uint64_t seed;
    int32_t left, seeded; /* left: words of the state that were not drawn yet, and one more */
    uint64_t next;        /* the word that is drawn next */
    uint64_t state[ACDC_GENERATOR_WORDS];
} acdc_generator;

/* One table for each compiled instruction set. `f64` serves gradient checks, not speed. */
typedef struct acdc_table {
    const char* isa;
    int32_t lanes;
    int32_t (*supported)(void);
    /* out[i] [count] = `one` with probability p, else 0, as `Tensor.bernoulli_(p)` draws; the generator moves on. */
    void (*bernoulli)(acdc_generator*, double p, double one, void* out, int64_t count, int32_t is_double);
#define ACDC_FIELD(name, args)                            \
    void (*name##_f32)(const args*, const acdc_share*);   \
    void (*name##_f64)(const args*, const acdc_share*);
    ACDC_KERNELS(ACDC_FIELD)
#undef ACDC_FIELD
} acdc_table;

int32_t acdc_table_count(void);
const acdc_table* acdc_table_at(int32_t index); /* from the most portable to the widest */

enum { ACDC_PAD = 16 };

/* Pitch of one thread's weight gradients: whole cache lines, and room for one more register. */
static inline int64_t acdc_grad_pitch(int64_t nnz) { return (nnz + 2 * ACDC_PAD - 1) / ACDC_PAD * ACDC_PAD; }

/* ---- sequences of kernels ---- */

/* A kernel and its arguments without their types. `call` casts `kernel` and `args` back. */
typedef struct acdc_call {
    void (*call)(void (*kernel)(void), const void* args, const acdc_share* share);
    void (*kernel)(void);
    const void* args;
    int32_t alone; /* needs the results of all blocks, such as a BatchNorm's statistics */
} acdc_call;

/* Runs calls in order. All calls between two that stand alone run block by block: a thread takes a block
 * through all of them before it takes the next block. The output of one kernel is then still in the cache
 * when the next kernel reads it. All their images have `blocks` blocks, and each call has its own workspace.
 *
 * `seconds` is null, or [1 + threads][count]. The time of each call is added to it: in the first row the
 * work that is done once, while all threads wait; in the others the work of each thread. */
void acdc_run(const acdc_call* calls, int64_t count, int64_t blocks, int32_t threads, double* seconds);

/* ---- plans: the index structures of one layer, for one support and one pair of buffer shapes ---- */

typedef struct acdc_plan acdc_plan;

typedef struct acdc_plan_args {
    int32_t out_channels, in_channels, kernel_rows, kernel_columns, groups; /* in_channels: all groups */
    int32_t row_step, column_step, row_padding, column_padding, row_dilation, column_dilation;
    int64_t nnz;
    const int64_t* support;          /* [nnz] flat indices of the kept weights, ascending */
    int64_t out_stride, in_stride, row_stride, column_stride; /* of the weight, as it lies in memory */
    int32_t lanes, is_double;
    int64_t x_row, x_channel;        /* pitches of the input */
    int64_t dy_row, dy_channel;      /* pitches of the output's gradient */
    int32_t in_tile, out_tile;       /* channels in a tile: forward, input gradient */
} acdc_plan_args;

acdc_plan* acdc_plan_create(const acdc_plan_args* args); /* null: out of memory, or an offset too large */
void acdc_plan_destroy(acdc_plan* plan);
void acdc_plan_refresh(acdc_plan* plan, const void* weight, int32_t input_grad, int32_t threads);
const acdc_list* acdc_plan_forward(const acdc_plan* plan);
const acdc_list* acdc_plan_input_grad(const acdc_plan* plan, int32_t* phases);

/* ---- kept elements: between a tensor of dense size and the vector of its kept elements ----
 *
 * `index` [count] holds positions in the dense tensor, ascending. An element has 2, 4 or 8 bytes. */

/* vector[i] = dense[index[i]] */
void acdc_gather(const void* dense, const int32_t* index, int64_t count, void* vector, int32_t bytes, int32_t threads);

/* dense[index[i]] = vector[i], and every other of the `size` elements of `dense` becomes zero. */
void acdc_expand(const void* vector, const int32_t* index, int64_t count, void* dense, int64_t size, int32_t bytes,
                 int32_t threads);

/* dense[i] = 0 where mask[i] is not 0; or, if `where` is 0, where mask[i] is 0 */
void acdc_clear(const uint8_t* mask, int32_t where, void* dense, int64_t size, int32_t bytes, int32_t threads);

/* One step of an optimizer on the kept elements. The other elements of the weight become zero. */
typedef struct acdc_kept {
    float* weight;
    const float* grad; /* in the order of memory of the weight, as all of `size` elements */
    const int32_t* index;
    int64_t count, size;
} acdc_kept;

typedef struct acdc_sgd_args {
    float* momentum_buffer; /* [count], or null: no momentum */
    float lr, momentum, share, weight_decay, sign; /* share: 1 - dampening; sign: -1 maximizes */
    int32_t nesterov;
} acdc_sgd_args;

typedef struct acdc_adam_args {
    float *exp_avg, *exp_avg_sq; /* [count] */
    float step_size, share1, beta2, share2, eps, root; /* root: of the bias correction of exp_avg_sq */
    float weight_decay, shrink, sign;                  /* added to the gradient; a factor of the weight */
} acdc_adam_args;

void acdc_sgd(const acdc_kept* kept, const acdc_sgd_args* args, int32_t threads);
void acdc_adam(const acdc_kept* kept, const acdc_adam_args* args, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
