/* The kernels of the runtime: inference on buffers whose registers hold neighbouring pixels.
 *
 * A buffer is [channel][point]. The rows of all samples of a batch lie one after another in a channel, as one
 * tall image: between two rows lie `row - width` points, and between two samples `sample - height * row`. They
 * hold zeros, and so do the points before the first row and after the last one. A convolution with stride 1 is
 * then "y[point] += value * x[point + offset]" over one range of points, whatever the batch and the filter are:
 * padding needs no code. What a kernel computes between rows is no pixel, and is cleared by a mask.
 *
 * A token of a linear layer is an image of one pixel.
 *
 * Pitches count elements. docs/runtime.md explains the design.
 */
#ifndef ACDC_POINTS_H
#define ACDC_POINTS_H

#include "acdc_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct acdc_points {
    void* origin;         /* point 0 of channel 0, aligned to 64 bytes */
    int64_t channel;      /* pitches; that of channels is a whole number of cache lines */
    int64_t sample, row;
    int32_t channels, samples, height, width;
    const void* live;     /* all bits set at each point that is a pixel, for whole registers; null: no gaps */
} acdc_points;

/* What is applied to each number of a result. */
enum {
    ACDC_NOTHING, ACDC_RELU, ACDC_RELU6, ACDC_SIGMOID, ACDC_HARDSIGMOID, ACDC_HARDSWISH, ACDC_SILU, ACDC_GELU,
    ACDC_GELU_TANH, ACDC_TANH
};

/* y[out] = f(bias + residual[out] + sum over the entries of the row of `out` of value * x[point + offset]).
 *
 * The output channels are cut into groups, and the input channels into tiles whose points fit into the first-level
 * cache. A part is one tile of one group; the parts of a group follow each other. A row is one output channel
 * inside a part. The first tile of a group has a row for each channel, since it starts the sums, and the last one,
 * since it ends them. */
typedef struct acdc_points_conv_args {
    acdc_points x, y, residual; /* residual: origin null: absent; it may be y */
    int32_t groups, tiles;
    const int32_t* parts;       /* [groups * tiles + 1] number of the first row of each part */
    const int32_t* channel;     /* [rows] the output channel of a row */
    const int32_t* begin;       /* [rows + 1] its first entry */
    const void* entries;        /* [nnz] acdc_entry_f32 or _f64 */
    const void* bias;           /* [channels of y] or null */
    int32_t uniform;            /* all rows of a part have the same offsets: every weight is kept */
    int32_t vectors;            /* registers of points in a tile; the kernel cuts it to what exists */
    int32_t tile_channels;      /* channels of x in a tile of channels; 0: they do not follow each other */
    int32_t activation, threads;
} acdc_points_conv_args;

/* The same for a linear layer that keeps all weights, where every image has one pixel: y[out] = f(bias + residual[out] +
 * sum over the channels of x of weight[out][in] * x[in]). */
typedef struct acdc_points_dense_args {
    acdc_points x, y, residual; /* residual: origin null: absent; it may be y */
    const void* weight;         /* [channels of y][size], zeros behind the channels of x */
    const void* bias;           /* [channels of y] or null */
    int64_t size;               /* channels of x, rounded up to whole registers of 16 numbers */
    void* workspace;            /* [samples of x][size] numbers, aligned to 64 bytes */
    int32_t activation, threads;
} acdc_points_dense_args;

/* Makes the list of acdc_points_conv_args from the kept weights of a layer. */
typedef struct acdc_points_list_args {
    const int32_t* index;       /* [kept] positions in the weight [out][in of a group][tap], ascending */
    const void* values;         /* [kept] floats or doubles */
    int64_t kept;
    int32_t out_channels, in_channels, groups, taps; /* in_channels: of all groups */
    const int64_t* tap;         /* [taps] from a point to the point that a position of the filter reads */
    int64_t x_channel;          /* the pitch of the channels that are read */
    int32_t tile, cuts;         /* input channels in a tile; groups into which the output channels are cut */
    int32_t is_double;
    int32_t *parts, *channel, *begin; /* the results; channel and begin: for tiles * out_channels rows */
    void* entries;
} acdc_points_list_args;

/* Returns the number of rows; -1: an offset does not fit into 32 bits; -2: out of memory. */
int64_t acdc_points_list(const acdc_points_list_args* args);

/* The positions of the bits that are set, the lowest bit of a byte first. Returns how many there are, and writes the
 * first `room` of them. */
int64_t acdc_positions(const uint8_t* bits, int64_t bytes, int32_t* index, int64_t room);

/* Cuts images into the planes of a stride: plane (p, c) holds the pixels (row_step * i + phase_row[p],
 * column_step * j + phase_column[p]) of channel c at point (i, j), for `rows` values of i from `first_row` and
 * `columns` values of j from `first_column`; 0 outside of the image. */
typedef struct acdc_points_planes_args {
    acdc_points x, planes;
    const int32_t *phase_row, *phase_column; /* [phases] */
    int32_t phases, first_row, first_column, rows, columns, row_step, column_step, threads;
} acdc_points_planes_args;

/* out = f(scale * a + offset, b), where f adds or multiplies b (origin null: absent) and applies an activation. */
typedef struct acdc_points_map_args {
    acdc_points a, b, out;
    const void *scale, *offset; /* [channels] or null: 1 and 0 */
    int32_t multiply;           /* by b; otherwise b is added */
    int32_t activation, threads;
} acdc_points_map_args;

/* out = f(x * gate), where the gate has one pixel. */
typedef struct acdc_points_gate_args {
    acdc_points x, gate, out;
    int32_t threads;
} acdc_points_gate_args;

/* LayerNorm, or RMSNorm (`centered` is 0), over the channels of each point. */
typedef struct acdc_points_norm_args {
    acdc_points x, out;
    const void *weight, *bias; /* [channels] or null: 1 and 0 */
    double eps;
    int32_t centered, threads;
} acdc_points_norm_args;

/* Max or average pooling. Pixels outside of the image are ignored (max) or count as zero (average). */
typedef struct acdc_points_pool_args {
    acdc_points x, y;
    int32_t maximum;
    int32_t window_rows, window_columns, row_step, column_step, row_padding, column_padding;
    int32_t count_padding; /* average: divide by the whole window even at the border */
    void* workspace;       /* threads * (width of x + 2 * column_padding) numbers */
    int32_t threads;
} acdc_points_pool_args;

/* Some points of some channels of a value. The points of a sample are numbered row by row. All fields have 64 bits,
 * so that an array of parts is a matrix of integers. */
typedef struct acdc_points_part {
    const void* origin;           /* point 0 of the first channel that is read */
    int64_t channel, sample, row; /* pitches of what is read */
    int64_t width;                /* of what is read */
    int64_t point;                /* the first point that is read */
    int64_t channels, points;     /* how many are copied */
    int64_t to_channel, to_point; /* the first ones that are written */
} acdc_points_part;

/* Copies parts of values into `out`, and adds `table`. With `fill`, what no part covers is that of the table, or 0. */
typedef struct acdc_points_join_args {
    acdc_points out;
    const void* parts;  /* [count] acdc_points_part, copied in this order */
    const void* table;  /* [channels of out][points of a sample] or null */
    int32_t count, fill, threads;
} acdc_points_join_args;

/* out[channel] at a point = table[the number at this point of `ids`][channel]. Numbers outside of the table are
 * those of its nearest row. */
typedef struct acdc_points_embed_args {
    acdc_points ids, out; /* one row of points in each sample; ids: one channel */
    const void* table;    /* [rows][channels of out] */
    int32_t rows, threads;
} acdc_points_embed_args;

/* Attention: out = softmax(scale * queries . keys) . values for each sample and head. The channels of a head follow
 * one another. The points of a sample are its tokens, in one row. */
typedef struct acdc_points_attention_args {
    acdc_points queries, keys, values, out;
    acdc_points mask; /* one channel: 0 at each key that is not attended to; origin null: none */
    int32_t heads;
    int32_t causal;   /* a query attends to the keys up to its own number */
    double scale;
    void* workspace;  /* threads * ACDC_QUERIES * (points of a sample of keys) numbers */
    int32_t threads;
} acdc_points_attention_args;
enum { ACDC_QUERIES = 64 }; /* at most so many queries are computed at a time */

/* Between a plain tensor and a buffer. Strides of the tensor, in any order. */
typedef struct acdc_points_copy_args {
    acdc_points points;
    void* data;
    int64_t sample, channel, row, column;
    int32_t threads;
} acdc_points_copy_args;

/* The list of these kernels, as ACDC_KERNELS. They never run block by block, and ignore their share. */
#define ACDC_POINT_KERNELS(row)                    \
    row(points_load, acdc_points_copy_args)        \
    row(points_store, acdc_points_copy_args)       \
    row(points_planes, acdc_points_planes_args)    \
    row(points_conv, acdc_points_conv_args)        \
    row(points_dense, acdc_points_dense_args)      \
    row(points_map, acdc_points_map_args)          \
    row(points_gate, acdc_points_gate_args)        \
    row(points_norm, acdc_points_norm_args)        \
    row(points_pool, acdc_points_pool_args)        \
    row(points_join, acdc_points_join_args)        \
    row(points_embed, acdc_points_embed_args)      \
    row(points_attention, acdc_points_attention_args)

/* One table for each compiled instruction set, in the order of acdc_table_at. */
typedef struct acdc_points_table {
#define ACDC_FIELD(name, args)                          \
    void (*name##_f32)(const args*, const acdc_share*); \
    void (*name##_f64)(const args*, const acdc_share*);
    ACDC_POINT_KERNELS(ACDC_FIELD)
#undef ACDC_FIELD
} acdc_points_table;

const acdc_points_table* acdc_points_table_at(int32_t index);

#ifdef __cplusplus
}
#endif
#endif
