// Plans: the sorted index lists of one layer. Built by counting, in two passes over the kept weights.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "acdc_kernels.h"

using std::size_t;

namespace {

// A kept weight as one list sees it: which row adds it, and where it reads.
struct Item { int32_t tile, row; int64_t offset; };

int floor_div(int a, int b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

struct List {
    acdc_list view{};
    std::vector<int32_t> tile_rows, channel, begin, source;
    std::vector<acdc_entry_f32> f32;
    std::vector<acdc_entry_f64> f64;

    // Stable counting sort of items by (tile, row); items come in the order of the dense weight.
    bool fill(const std::vector<Item>& items, const std::vector<int32_t>& flat, int tiles, int rows, bool is_double) {
        std::vector<int32_t> next(size_t(tiles) * rows + 1, 0);
        for (const Item& item : items) ++next[size_t(item.tile) * rows + item.row + 1];
        tile_rows.assign(1, 0);
        begin.assign(1, 0);
        channel.clear();
        for (int tile = 0; tile < tiles; ++tile) {
            for (int row = 0; row < rows; ++row) {
                const size_t bin = size_t(tile) * rows + row;
                const int32_t count = next[bin + 1];
                next[bin + 1] += next[bin];
                if (count == 0 && tile != 0 && tile != tiles - 1) continue;
                channel.push_back(row);
                begin.push_back(next[bin + 1]);
            }
            tile_rows.push_back(int32_t(channel.size()));
        }
        source.resize(items.size());
        if (is_double) f64.assign(items.size() + ACDC_PAD, {});
        else f32.assign(items.size() + ACDC_PAD, {});
        for (size_t i = 0; i < items.size(); ++i) {
            if (items[i].offset > std::numeric_limits<int32_t>::max() ||
                items[i].offset < std::numeric_limits<int32_t>::min())
                return false;
            const size_t k = size_t(next[size_t(items[i].tile) * rows + items[i].row]++);
            source[k] = flat[i];
            set_offset(k, int32_t(items[i].offset), is_double);
        }
        // The weight gradient reads one entry past a row: the padding repeats an offset that is valid.
        for (size_t k = items.size(); k < items.size() + ACDC_PAD && !items.empty(); ++k)
            set_offset(k, is_double ? f64[items.size() - 1].offset : f32[items.size() - 1].offset, is_double);
        view.tiles = tiles;
        view.nnz = int64_t(items.size());
        return true;
    }

    void set_offset(size_t k, int32_t offset, bool is_double) {
        if (is_double) f64[k].offset = offset;
        else f32[k].offset = offset;
    }

    void seal(bool is_double) {
        view.tile_rows = tile_rows.data();
        view.channel = channel.data();
        view.begin = begin.data();
        view.source = source.data();
        view.entries = is_double ? static_cast<const void*>(f64.data()) : f32.data();
    }

    template <class Entry, class real> static void copy(std::vector<Entry>& entries, const std::vector<int32_t>& source, const real* weight, int threads) {
        const int64_t count = int64_t(source.size());
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 20000 && threads > 1)
        for (int64_t k = 0; k < count; ++k) entries[size_t(k)].value = weight[source[size_t(k)]];
    }

    void refresh(const void* weight, bool is_double, int threads) {
        if (is_double) copy(f64, source, static_cast<const double*>(weight), threads);
        else copy(f32, source, static_cast<const float*>(weight), threads);
    }
};

// A kept weight by its place in the filter.
struct Kept { int out, in, row, column; };

}  // namespace

struct acdc_plan {
    acdc_plan_args args;
    List forward;
    std::vector<List> input_grad;
    std::vector<acdc_list> phases;

    Kept kept(int64_t flat) const {
        const int per_group = args.in_channels / args.groups;
        const int column = int(flat % args.kernel_columns);
        flat /= args.kernel_columns;
        const int row = int(flat % args.kernel_rows);
        flat /= args.kernel_rows;
        const int in = int(flat % per_group), out = int(flat / per_group);
        return {out, in + out / (args.out_channels / args.groups) * per_group, row, column};
    }

    int row_shift(int row) const { return row * args.row_dilation - args.row_padding; }
    int column_shift(int column) const { return column * args.column_dilation - args.column_padding; }

    bool build_forward() {
        std::vector<Item> items(size_t(args.nnz));
        std::vector<int32_t> flat(size_t(args.nnz));
        for (int64_t i = 0; i < args.nnz; ++i) {
            const Kept w = kept(args.support[i]);
            items[size_t(i)] = {w.in / args.in_tile, w.out,
                                w.in * args.x_channel + row_shift(w.row) * args.x_row +
                                    int64_t(column_shift(w.column)) * args.lanes};
            flat[size_t(i)] = int32_t(args.support[i]);
        }
        const int tiles = (args.in_channels + args.in_tile - 1) / args.in_tile;
        if (!forward.fill(items, flat, tiles, args.out_channels, args.is_double)) return false;
        forward.view.in_channels = args.in_channels;
        forward.view.top = row_shift(0);
        forward.view.bottom = row_shift(args.kernel_rows - 1);
        forward.view.left = column_shift(0);
        forward.view.right = column_shift(args.kernel_columns - 1);
        forward.seal(args.is_double);
        return true;
    }

    // Input pixel (h, w) = (step*i + row phase, step*j + column phase) gets weight (row, column) from the
    // output pixel (i + d, j + e) where step*d = row phase - shift(row), if that is a whole number.
    bool build_phase(int row_phase, int column_phase, List* list) {
        std::vector<Item> items;
        std::vector<int32_t> flat;
        items.reserve(size_t(args.nnz / (args.row_step * args.column_step) + 64));
        flat.reserve(items.capacity());
        for (int64_t i = 0; i < args.nnz; ++i) {
            const Kept w = kept(args.support[i]);
            const int down = row_phase - row_shift(w.row), right = column_phase - column_shift(w.column);
            if (down % args.row_step != 0 || right % args.column_step != 0) continue;
            items.push_back({w.out / args.out_tile, w.in,
                             w.out * args.dy_channel + down / args.row_step * args.dy_row +
                                 int64_t(right / args.column_step) * args.lanes});
            flat.push_back(int32_t(args.support[i]));
        }
        const int tiles = (args.out_channels + args.out_tile - 1) / args.out_tile;
        if (!list->fill(items, flat, tiles, args.in_channels, args.is_double)) return false;
        list->view.in_channels = args.out_channels;
        list->view.out_row = row_phase;
        list->view.out_column = column_phase;
        list->view.top = floor_div(-row_shift(args.kernel_rows - 1), args.row_step);
        list->view.bottom = floor_div(args.row_step - 1 - row_shift(0), args.row_step);
        list->view.left = floor_div(-column_shift(args.kernel_columns - 1), args.column_step);
        list->view.right = floor_div(args.column_step - 1 - column_shift(0), args.column_step);
        return true;
    }

    bool build_input_grad() {
        input_grad.resize(size_t(args.row_step) * args.column_step);
        for (int row = 0; row < args.row_step; ++row)
            for (int column = 0; column < args.column_step; ++column)
                if (!build_phase(row, column, &input_grad[size_t(row) * args.column_step + column])) return false;
        for (List& list : input_grad) {
            list.seal(args.is_double);
            phases.push_back(list.view);
        }
        return true;
    }
};

extern "C" {

acdc_plan* acdc_plan_create(const acdc_plan_args* args) {
    try {
        acdc_plan* plan = new acdc_plan{};
        plan->args = *args;
        const bool fits = plan->build_forward() && plan->build_input_grad();
        plan->args.support = nullptr;  // the caller's memory
        if (fits) return plan;
        delete plan;
    } catch (const std::bad_alloc&) {
    }
    return nullptr;
}

void acdc_plan_destroy(acdc_plan* plan) { delete plan; }

void acdc_plan_refresh(acdc_plan* plan, const void* weight, int32_t input_grad, int32_t threads) {
    if (!input_grad) {
        plan->forward.refresh(weight, plan->args.is_double, threads);
        return;
    }
    for (List& list : plan->input_grad) list.refresh(weight, plan->args.is_double, threads);
}

const acdc_list* acdc_plan_forward(const acdc_plan* plan) { return &plan->forward.view; }

const acdc_list* acdc_plan_input_grad(const acdc_plan* plan, int32_t* phases) {
    *phases = int32_t(plan->phases.size());
    return plan->phases.data();
}
}
