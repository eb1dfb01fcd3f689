// Plans: the sorted index lists of one layer. They are built by counting: one pass over the kept weights
// counts the entries of each row, a second one places the entries.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "acdc_kernels.h"

using std::size_t;

namespace {

int floor_div(int a, int b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// The position of a kept weight. `in` counts the input channels of all groups.
struct Kept { int out, in, in_group, tap; };

// Calls body(kept weight) in the order of the support. The order is ascending, so the output channel is
// advanced step by step. The rest of the index fits into 32 bits, which divide faster than 64.
template <class Body> void each_kept(const acdc_plan_args& a, Body body) {
    const uint32_t taps = uint32_t(a.kernel_rows * a.kernel_columns);
    const int per_group = a.in_channels / a.groups, outs_per_group = a.out_channels / a.groups;
    const int64_t filter = int64_t(per_group) * taps;
    int out = 0, first_in = 0;
    int64_t start = 0;
    for (int64_t i = 0; i < a.nnz; ++i) {
        const int64_t flat = a.support[i];
        for (; flat >= start + filter; start += filter)
            if (++out % outs_per_group == 0) first_in += per_group;
        const uint32_t rest = uint32_t(flat - start), in = rest / taps;
        body(Kept{out, first_in + int(in), int(in), int(rest - in * taps)});
    }
}

// The lists of one pass, one list per phase. All of them share one array of rows and one of entries.
// Call order: shape, fits, bin for each weight (counts), lay_out, insert for each weight, seal.
struct Lists {
    int count, tiles, rows;
    std::vector<int32_t> list_of, offset_of;  // by tap
    int64_t pitch;                            // of the input channels
    int tile;                                 // input channels in a tile
    std::vector<int32_t> bin_of;              // first bin of the tile of a channel
    std::vector<int32_t> next;                // by bin: number of entries, then index of the next one
    std::vector<int32_t> tile_rows, channel, begin;
    std::unique_ptr<int32_t[]> source;
    std::unique_ptr<acdc_entry_f32[]> f32;
    std::unique_ptr<acdc_entry_f64[]> f64;
    std::vector<acdc_list> views;

    // Each of the `written` channels gets sums over tiles of `tile_` of the `read` channels.
    void shape(int lists, int taps, int written, int read, int tile_, int64_t channel_pitch) {
        count = lists;
        rows = written;
        tile = tile_;
        tiles = (read + tile - 1) / tile;
        pitch = channel_pitch;
        list_of.resize(size_t(taps));
        offset_of.resize(size_t(taps));
        bin_of.resize(size_t(read));
        for (int c = 0; c < read; ++c) bin_of[size_t(c)] = c / tile * rows;
        next.assign(size_t(count) * tiles * rows, 0);
        views.resize(size_t(count));
        for (acdc_list& view : views) view.in_channels = read;
    }

    bool fits() const {
        const auto reach = std::minmax_element(offset_of.begin(), offset_of.end());
        const int64_t far = int64_t(bin_of.size() - 1) * pitch + *reach.second;
        return far <= std::numeric_limits<int32_t>::max();
    }

    int32_t& bin(int written, int read, int tap) {
        return next[size_t(list_of[size_t(tap)]) * tiles * rows + size_t(bin_of[size_t(read)]) + size_t(written)];
    }

    // Lays out the rows. The rows of a tile are sorted by length, so that the branch predictor learns the
    // trip count of the loop over the entries.
    void lay_out(int64_t nnz, bool is_double) {
        std::vector<int32_t> by_length(static_cast<size_t>(rows)), first;
        begin.assign(1, 0);
        begin.reserve(next.size() + 1);
        channel.reserve(next.size());
        int32_t* counts = next.data();
        for (acdc_list& view : views) {
            const size_t first_row = channel.size();
            tile_rows.push_back(0);
            for (int t = 0; t < tiles; ++t, counts += rows) {
                sort_rows(counts, &by_length, &first);
                const bool keep_empty = t == 0 || t == tiles - 1;
                for (const int32_t row : by_length) {
                    const int32_t start = begin.back(), entries = counts[row];
                    counts[row] = start;
                    if (entries == 0 && !keep_empty) continue;
                    channel.push_back(row);
                    begin.push_back(start + entries);
                }
                tile_rows.push_back(int32_t(channel.size() - first_row));
            }
            view.tiles = tiles;
            view.nnz = begin.back() - begin[first_row];
        }
        source.reset(new int32_t[size_t(nnz)]);
        if (is_double) f64.reset(new acdc_entry_f64[size_t(nnz) + ACDC_PAD]);
        else f32.reset(new acdc_entry_f32[size_t(nnz) + ACDC_PAD]);
    }

    // Counting sort of the rows of a tile by their number of entries, longest first.
    void sort_rows(const int32_t* counts, std::vector<int32_t>* by_length, std::vector<int32_t>* first) const {
        const int32_t most = *std::max_element(counts, counts + rows);
        first->assign(size_t(most) + 2, 0);
        for (int row = 0; row < rows; ++row) ++(*first)[size_t(most - counts[row]) + 1];
        for (size_t i = 1; i < first->size(); ++i) (*first)[i] += (*first)[i - 1];
        for (int row = 0; row < rows; ++row) (*by_length)[size_t((*first)[size_t(most - counts[row])]++)] = row;
    }

    template <class Entry> void insert(Entry* entries, int written, int read, int tap, int32_t from) {
        const size_t k = size_t(bin(written, read, tap)++);
        entries[k] = {int32_t(read * pitch + offset_of[size_t(tap)]), 0};
        source[k] = from;
    }

    // The weight gradient reads past the end of a row: the padding repeats an offset that is valid.
    template <class Entry> static void pad(Entry* entries, int64_t nnz) {
        for (int64_t k = nnz; k < nnz + ACDC_PAD; ++k) entries[k] = nnz ? entries[nnz - 1] : Entry{};
    }

    void seal(int64_t nnz, bool is_double) {
        const int32_t *first_tile = tile_rows.data(), *first_channel = channel.data(), *first_begin = begin.data();
        for (acdc_list& view : views) {
            view.tile_rows = first_tile;
            view.channel = first_channel;
            view.begin = first_begin;
            view.source = source.get();
            view.entries = is_double ? static_cast<const void*>(f64.get()) : f32.get();
            first_channel += first_tile[tiles];
            first_begin += first_tile[tiles];
            first_tile += tiles + 1;
        }
        if (is_double) pad(f64.get(), nnz);
        else pad(f32.get(), nnz);
        for (auto* scratch : {&list_of, &offset_of, &bin_of, &next}) std::vector<int32_t>().swap(*scratch);
    }

    template <class Entry, class real>
    static void copy(Entry* entries, const int32_t* source, int64_t count, const real* weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 20000 && threads > 1)
        for (int64_t k = 0; k < count; ++k) entries[k].value = weight[source[k]];
    }

    void refresh(const void* weight, int64_t nnz, int threads) {
        if (f64) copy(f64.get(), source.get(), nnz, static_cast<const double*>(weight), threads);
        else copy(f32.get(), source.get(), nnz, static_cast<const float*>(weight), threads);
    }
};

}  // namespace

struct acdc_plan {
    acdc_plan_args args;
    Lists forward, input_grad;

    int row_shift(int row) const { return row * args.row_dilation - args.row_padding; }
    int column_shift(int column) const { return column * args.column_dilation - args.column_padding; }

    template <class Body> void each_tap(Body body) const {
        for (int row = 0; row < args.kernel_rows; ++row)
            for (int column = 0; column < args.kernel_columns; ++column)
                body(size_t(row) * args.kernel_columns + column, row_shift(row), column_shift(column));
    }

    void shape_forward() {
        const int taps = args.kernel_rows * args.kernel_columns;
        forward.shape(1, taps, args.out_channels, args.in_channels, args.in_tile, args.x_channel);
        each_tap([&](size_t tap, int down, int right) {
            forward.list_of[tap] = 0;
            forward.offset_of[tap] = int32_t(down * args.x_row + int64_t(right) * args.lanes);
        });
        acdc_list& view = forward.views[0];
        view.top = row_shift(0);
        view.bottom = row_shift(args.kernel_rows - 1);
        view.left = column_shift(0);
        view.right = column_shift(args.kernel_columns - 1);
    }

    // Input pixel (h, w) = (step*i + row phase, step*j + column phase) gets weight (row, column) from the
    // output pixel (i + d, j + e) where step*d = row phase - shift(row): for every tap in one phase.
    void shape_input_grad() {
        const int taps = args.kernel_rows * args.kernel_columns, phases = args.row_step * args.column_step;
        input_grad.shape(phases, taps, args.in_channels, args.out_channels, args.out_tile, args.dy_channel);
        each_tap([&](size_t tap, int down, int right) {
            const int d = -floor_div(down, args.row_step), e = -floor_div(right, args.column_step);
            const int row_phase = down + d * args.row_step, column_phase = right + e * args.column_step;
            input_grad.list_of[tap] = row_phase * args.column_step + column_phase;
            input_grad.offset_of[tap] = int32_t(d * args.dy_row + int64_t(e) * args.lanes);
        });
        for (int phase = 0; phase < phases; ++phase) {
            acdc_list& view = input_grad.views[size_t(phase)];
            view.out_row = phase / args.column_step;
            view.out_column = phase % args.column_step;
            view.top = floor_div(-row_shift(args.kernel_rows - 1), args.row_step);
            view.bottom = floor_div(args.row_step - 1 - row_shift(0), args.row_step);
            view.left = floor_div(-column_shift(args.kernel_columns - 1), args.column_step);
            view.right = floor_div(args.column_step - 1 - column_shift(0), args.column_step);
        }
    }

    template <class Entry> void place_all(Entry* forward_entries, Entry* grad_entries) {
        std::vector<int32_t> source_of;  // by tap
        for (int row = 0; row < args.kernel_rows; ++row)
            for (int column = 0; column < args.kernel_columns; ++column)
                source_of.push_back(int32_t(row * args.row_stride + column * args.column_stride));
        each_kept(args, [&](Kept w) {
            const int32_t from = int32_t(w.out * args.out_stride + w.in_group * args.in_stride) +
                                 source_of[size_t(w.tap)];
            forward.insert(forward_entries, w.out, w.in, w.tap, from);
            input_grad.insert(grad_entries, w.in, w.out, w.tap, from);
        });
    }

    bool build() {
        shape_forward();
        shape_input_grad();
        if (!forward.fits() || !input_grad.fits()) return false;
        each_kept(args, [&](Kept w) {
            ++forward.bin(w.out, w.in, w.tap);
            ++input_grad.bin(w.in, w.out, w.tap);
        });
        forward.lay_out(args.nnz, args.is_double);
        input_grad.lay_out(args.nnz, args.is_double);
        if (args.is_double) place_all(forward.f64.get(), input_grad.f64.get());
        else place_all(forward.f32.get(), input_grad.f32.get());
        forward.seal(args.nnz, args.is_double);
        input_grad.seal(args.nnz, args.is_double);
        args.support = nullptr;  // the caller's memory
        return true;
    }
};

extern "C" {

acdc_plan* acdc_plan_create(const acdc_plan_args* args) {
    try {
        std::unique_ptr<acdc_plan> plan(new acdc_plan{});
        plan->args = *args;
        return plan->build() ? plan.release() : nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void acdc_plan_destroy(acdc_plan* plan) { delete plan; }

void acdc_plan_refresh(acdc_plan* plan, const void* weight, int32_t input_grad, int32_t threads) {
    (input_grad ? plan->input_grad : plan->forward).refresh(weight, plan->args.nnz, threads);
}

const acdc_list* acdc_plan_forward(const acdc_plan* plan) { return plan->forward.views.data(); }

const acdc_list* acdc_plan_input_grad(const acdc_plan* plan, int32_t* phases) {
    *phases = int32_t(plan->input_grad.views.size());
    return plan->input_grad.views.data();
}
}
