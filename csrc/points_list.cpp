// The kept weights of the runtime's layers: their positions from a mask of bits, and the index lists of convolutions.
// A list is built by counting: one pass over the kept weights counts the entries of each row, a second one places the
// entries.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <new>
#include <vector>

#include "acdc_points.h"

namespace {

using std::size_t;

// The position of a kept weight. `in` counts the input channels of all groups.
struct Position { int out, in, tap; };

// Calls body(number, position) for each kept weight. The indices ascend, so that the output channel is advanced
// step by step. The rest of an index fits into 32 bits, which divide faster than 64.
template <class Body> void each_kept(const acdc_points_list_args& a, Body body) {
    const int per_group = a.in_channels / a.groups, outs_per_group = a.out_channels / a.groups;
    const uint32_t taps = uint32_t(a.taps);
    const int64_t filter = int64_t(per_group) * taps;
    int out = 0, first_in = 0;
    int64_t start = 0;
    for (int64_t i = 0; i < a.kept; ++i) {
        for (; a.index[i] >= start + filter; start += filter)
            if (++out % outs_per_group == 0) first_in += per_group;
        const uint32_t rest = uint32_t(a.index[i] - start), in = rest / taps;
        body(i, Position{out, first_in + int(in), int(rest - in * taps)});
    }
}

bool fits(const acdc_points_list_args& a) {
    const auto [least, most] = std::minmax_element(a.tap, a.tap + a.taps);
    const int64_t far = int64_t(a.in_channels - 1) * a.x_channel + *most;
    return far <= std::numeric_limits<int32_t>::max() && *least >= std::numeric_limits<int32_t>::min();
}

class Builder {
    const acdc_points_list_args& a;
    const int outs, tiles;
    std::vector<int32_t> next;  // [tile][output channel] number of entries, then the place of the next one
    std::vector<int32_t> group, sorted, first;

    size_t row(const Position& p) const { return size_t(p.in / a.tile) * size_t(outs) + size_t(p.out); }

    // Output channels that follow each other, with equal numbers of kept weights in each group.
    void group_channels() {
        std::vector<int64_t> work(size_t(outs), 1);
        for (int tile = 0; tile < tiles; ++tile)
            for (int out = 0; out < outs; ++out) work[size_t(out)] += next[size_t(tile) * outs + out];
        const int64_t all = a.kept + outs;
        int64_t before = 0;
        group.resize(size_t(outs));
        for (int out = 0; out < outs; before += work[size_t(out++)]) group[size_t(out)] = int32_t(before * a.cuts / all);
    }

    // Counting sort of the channels [begin, end) by their number of entries, longest first, so that the branch
    // predictor learns the trip count of the loop over the entries.
    void sort(const int32_t* counts, int begin, int end) {
        const int32_t most = *std::max_element(counts + begin, counts + end);
        first.assign(size_t(most) + 2, 0);
        sorted.resize(size_t(end - begin));
        for (int out = begin; out < end; ++out) ++first[size_t(most - counts[out]) + 1];
        for (size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];
        for (int out = begin; out < end; ++out) sorted[size_t(first[size_t(most - counts[out])]++)] = out;
    }

    // The rows of a part, after `rows` others.
    int64_t lay_out_part(int tile, int begin, int end, int64_t rows) {
        if (begin == end) return rows;
        int32_t* counts = next.data() + size_t(tile) * outs;
        sort(counts, begin, end);
        const bool keep_empty = tile == 0 || tile == tiles - 1;
        for (const int32_t out : sorted) {
            const int32_t entries = counts[out], start = a.begin[rows];
            counts[out] = start;
            if (entries == 0 && !keep_empty) continue;
            a.channel[rows++] = out;
            a.begin[rows] = start + entries;
        }
        return rows;
    }

    int64_t lay_out() {
        int64_t rows = 0;
        int end = 0;
        int32_t* part = a.parts;
        *part = a.begin[0] = 0;
        for (int cut = 0; cut < a.cuts; ++cut) {
            const int begin = end;
            while (end < outs && group[size_t(end)] == cut) ++end;
            for (int tile = 0; tile < tiles; ++tile) *++part = int32_t(rows = lay_out_part(tile, begin, end, rows));
        }
        return rows;
    }

    template <class Entry, class real> void place(Entry* entries, const real* values) {
        each_kept(a, [&](int64_t i, const Position& p) {
            entries[next[row(p)]++] = {int32_t(p.in * a.x_channel + a.tap[p.tap]), values[i]};
        });
    }

public:
    explicit Builder(const acdc_points_list_args& a)
        : a(a), outs(a.out_channels), tiles((a.in_channels + a.tile - 1) / a.tile), next(size_t(tiles) * size_t(outs)) {}

    int64_t build() {
        each_kept(a, [&](int64_t, const Position& p) { ++next[row(p)]; });
        group_channels();
        const int64_t rows = lay_out();
        if (a.is_double) place(static_cast<acdc_entry_f64*>(a.entries), static_cast<const double*>(a.values));
        else place(static_cast<acdc_entry_f32*>(a.entries), static_cast<const float*>(a.values));
        return rows;
    }
};

}  // namespace

extern "C" {

int64_t acdc_points_list(const acdc_points_list_args* args) {
    if (!fits(*args)) return -1;
    try {
        return Builder(*args).build();
    } catch (const std::bad_alloc&) {
        return -2;
    }
}

int64_t acdc_positions(const uint8_t* bits, int64_t bytes, int32_t* index, int64_t room) {
    int64_t count = 0;
    for (int64_t i = 0; i < bytes; ++i)
        for (uint32_t left = bits[i]; left; left &= left - 1, ++count)
            if (count < room) index[count] = int32_t(8 * i + __builtin_ctz(left));
    return count;
}
}
