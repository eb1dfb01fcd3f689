// The compiled module acdc._kernels: the structs of acdc_kernels.h and one function per kernel row.
// Pointers are passed as integers (tensor.data_ptr()). acdc/engine/native.py is the only caller. It keeps
// the tensors alive and checks shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "acdc_points.h"

namespace nb = nanobind;
using Address = std::uintptr_t;

namespace {

template <class T = void> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

const acdc_points_table& points_table(int index) { return *acdc_points_table_at(index); }

const acdc_table& table(int index) {
    if (index < 0 || index >= acdc_table_count() || !acdc_table_at(index)->supported())
        throw std::out_of_range("no such instruction set on this machine");
    return *acdc_table_at(index);
}

// The fields of a struct are set by name, so that the Python code reads like the header.
template <class T> void set_field(nb::class_<T>& cls, const char* name, void* T::*field) {
    cls.def_prop_rw(
        name, [field](const T& self) { return Address(self.*field); },
        [field](T& self, Address value) { self.*field = pointer(value); });
}
template <class T> void set_field(nb::class_<T>& cls, const char* name, const void* T::*field) {
    cls.def_prop_rw(
        name, [field](const T& self) { return Address(self.*field); },
        [field](T& self, Address value) { self.*field = pointer(value); });
}
template <class T, class V> void set_pointer(nb::class_<T>& cls, const char* name, V* T::*field) {
    cls.def_prop_rw(
        name, [field](const T& self) { return Address(self.*field); },
        [field](T& self, Address value) { self.*field = pointer<V>(value); });
}
template <class T> void set_field(nb::class_<T>& cls, const char* name, double* T::*field) { set_pointer(cls, name, field); }
template <class T> void set_field(nb::class_<T>& cls, const char* name, const double* T::*field) {
    set_pointer(cls, name, field);
}
template <class T> void set_field(nb::class_<T>& cls, const char* name, int64_t* T::*field) { set_pointer(cls, name, field); }
template <class T> void set_field(nb::class_<T>& cls, const char* name, float* T::*field) { set_pointer(cls, name, field); }
template <class T> void set_field(nb::class_<T>& cls, const char* name, const float* T::*field) {
    set_pointer(cls, name, field);
}
template <class T> void set_field(nb::class_<T>& cls, const char* name, int32_t* T::*field) { set_pointer(cls, name, field); }
template <class T> void set_field(nb::class_<T>& cls, const char* name, const int32_t* T::*field) {
    set_pointer(cls, name, field);
}
template <class T> void set_field(nb::class_<T>& cls, const char* name, const int64_t* T::*field) {
    set_pointer(cls, name, field);
}
template <class T, class V> void set_field(nb::class_<T>& cls, const char* name, V T::*field) { cls.def_rw(name, field); }

struct Plan {
    acdc_plan* plan;
    explicit Plan(const acdc_plan_args& args) : plan(nullptr) {
        nb::gil_scoped_release release;
        plan = acdc_plan_create(&args);
    }
    Plan(const Plan&) = delete;
    ~Plan() { acdc_plan_destroy(plan); }
    bool valid() const { return plan != nullptr; }
    void refresh(Address weight, bool input_grad, int threads) {
        nb::gil_scoped_release release;
        acdc_plan_refresh(plan, pointer(weight), input_grad, threads);
    }
};

// Memory that was freed, and that the C library holds for later. Only glibc has the call, and it takes some
// milliseconds for each hundred megabytes.
void give_memory_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// Whole pages inside of [address, address + bytes).
void advise_huge_pages(Address address, Address bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const Address page = Address(sysconf(_SC_PAGESIZE));
    const Address first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (first < last) madvise(pointer(first), last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

template <class Args> using Kernel = void (*)(const Args*, const acdc_share*);

template <class Args> void call(Kernel<Args> kernel, const Args& args) {
    nb::gil_scoped_release release;
    kernel(&args, nullptr);
}

// A list of calls for acdc_run. Python owns the structs of arguments and keeps them alive.
struct Sequence {
    std::vector<acdc_call> calls;

    template <class Args> void add(Kernel<Args> kernel, const Args& args, bool alone) {
        calls.push_back({&erased<Args>, reinterpret_cast<void (*)()>(kernel), &args, alone});
    }
    template <class Args> static void erased(void (*kernel)(), const void* args, const acdc_share* share) {
        reinterpret_cast<Kernel<Args>>(kernel)(static_cast<const Args*>(args), share);
    }
    void run(int64_t blocks, int threads, Address seconds) const {
        nb::gil_scoped_release release;
        acdc_run(calls.data(), int64_t(calls.size()), blocks, threads, pointer<double>(seconds));
    }
};

}  // namespace

#define FIELD(field) set_field(cls, #field, &Struct::field)

NB_MODULE(_kernels, m) {
    // A process may end while frames still hold their structs. This leak needs no warning.
    nb::set_leak_warnings(false);
    {
        using Struct = acdc_image;
        nb::class_<Struct> cls(m, "Image");
        cls.def(nb::init<>());
        FIELD(origin); FIELD(row); FIELD(channel); FIELD(block); FIELD(blocks); FIELD(channels); FIELD(height);
        FIELD(width); FIELD(samples); FIELD(per_block); FIELD(per_column);
        FIELD(per_thread);
    }
    {
        using Struct = acdc_plain;
        nb::class_<Struct> cls(m, "Plain");
        cls.def(nb::init<>());
        FIELD(data); FIELD(block); FIELD(lane); FIELD(channel); FIELD(row); FIELD(column);
    }
    {
        using Struct = acdc_conv_args;
        nb::class_<Struct> cls(m, "conv_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(y); FIELD(in_row_step); FIELD(in_column_step); FIELD(out_row_step); FIELD(out_column_step);
        FIELD(tile_rows); FIELD(tile_columns); FIELD(accumulate); FIELD(stream_bytes); FIELD(bias); FIELD(shift); FIELD(sums);
        FIELD(workspace); FIELD(threads);
        cls.def("set_plan", [](Struct& self, const Plan& plan, bool input_grad) {
            self.phases = 1;
            self.lists = input_grad ? acdc_plan_input_grad(plan.plan, &self.phases) : acdc_plan_forward(plan.plan);
        });
    }
    {
        using Struct = acdc_weight_grad_args;
        nb::class_<Struct> cls(m, "weight_grad_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(dy); FIELD(in_row_step); FIELD(in_column_step); FIELD(tile_rows); FIELD(tile_columns);
        FIELD(accumulate); FIELD(target); FIELD(size); FIELD(row); FIELD(workspace); FIELD(threads);
        cls.def("set_plan", [](Struct& self, const Plan& plan) { self.list = acdc_plan_forward(plan.plan); });
    }
    {
        using Struct = acdc_convert_args;
        nb::class_<Struct> cls(m, "convert_args");
        cls.def(nb::init<>());
        FIELD(image); FIELD(plain); FIELD(threads);
    }
    {
        using Struct = acdc_channel_sums_args;
        nb::class_<Struct> cls(m, "channel_sums_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(sums); FIELD(workspace); FIELD(threads);
    }
    {
        using Struct = acdc_norm_args;
        nb::class_<Struct> cls(m, "norm_args");
        cls.def(nb::init<>());
        FIELD(y); FIELD(out); FIELD(y2); FIELD(residual); FIELD(scale); FIELD(offset); FIELD(scale2); FIELD(relu);
        FIELD(threads);
    }
    {
        using Struct = acdc_norm_reduce_args;
        nb::class_<Struct> cls(m, "norm_reduce_args");
        cls.def(nb::init<>());
        FIELD(grad); FIELD(y); FIELD(out); FIELD(y2); FIELD(dz); FIELD(scale); FIELD(offset); FIELD(mean); FIELD(mean2);
        FIELD(relu); FIELD(sums); FIELD(workspace); FIELD(threads);
    }
    {
        using Struct = acdc_norm_grad_args;
        nb::class_<Struct> cls(m, "norm_grad_args");
        cls.def(nb::init<>());
        FIELD(grad); FIELD(y); FIELD(out); FIELD(y2); FIELD(dy); FIELD(dy2); FIELD(scale); FIELD(offset);
        FIELD(a); FIELD(b); FIELD(c); FIELD(a2); FIELD(b2); FIELD(c2); FIELD(relu); FIELD(threads);
    }
    {
        using Struct = acdc_statistics_args;
        nb::class_<Struct> cls(m, "statistics_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(shift); FIELD(sums); FIELD(workspace); FIELD(threads);
    }
    {
        using Struct = acdc_norm_fold_args;
        nb::class_<Struct> cls(m, "norm_fold_args");
        cls.def(nb::init<>());
        FIELD(channels); FIELD(count); FIELD(eps); FIELD(momentum); FIELD(sums); FIELD(shift); FIELD(weight);
        FIELD(bias); FIELD(running_mean); FIELD(running_var); FIELD(batches); FIELD(other_offset); FIELD(mean);
        FIELD(inverse); FIELD(scale); FIELD(offset); FIELD(threads);
    }
    {
        using Struct = acdc_norm_unfold_args;
        nb::class_<Struct> cls(m, "norm_unfold_args");
        cls.def(nb::init<>());
        FIELD(channels); FIELD(training); FIELD(count); FIELD(sums); FIELD(sums_y); FIELD(weight); FIELD(mean);
        FIELD(inverse); FIELD(a); FIELD(b); FIELD(c); FIELD(weight_grad); FIELD(bias_grad); FIELD(threads);
    }
    {
        using Struct = acdc_layer_norm_args;
        nb::class_<Struct> cls(m, "layer_norm_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(stats); FIELD(out); FIELD(weight); FIELD(bias); FIELD(eps); FIELD(centered); FIELD(known);
        FIELD(threads);
    }
    {
        using Struct = acdc_layer_norm_grad_args;
        nb::class_<Struct> cls(m, "layer_norm_grad_args");
        cls.def(nb::init<>());
        FIELD(grad); FIELD(x); FIELD(stats); FIELD(dx); FIELD(weight); FIELD(centered); FIELD(accumulate);
        FIELD(sums); FIELD(workspace); FIELD(threads);
    }
    {
        using Struct = acdc_gate_args;
        nb::class_<Struct> cls(m, "gate_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(gate); FIELD(out); FIELD(threads);
    }
    {
        using Struct = acdc_gate_grad_args;
        nb::class_<Struct> cls(m, "gate_grad_args");
        cls.def(nb::init<>());
        FIELD(grad); FIELD(x); FIELD(dgate); FIELD(threads);
    }
    {
        using Struct = acdc_pointwise_args;
        nb::class_<Struct> cls(m, "pointwise_args");
        cls.def(nb::init<>());
        FIELD(a); FIELD(b); FIELD(out); FIELD(threads);
    }
    {
        using Struct = acdc_pool_args;
        nb::class_<Struct> cls(m, "pool_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(y); FIELD(dx); FIELD(dy); FIELD(window_rows); FIELD(window_columns); FIELD(row_step);
        FIELD(column_step); FIELD(row_padding); FIELD(column_padding); FIELD(count_padding); FIELD(threads);
    }
    {
        using Struct = acdc_plan_args;
        nb::class_<Struct> cls(m, "plan_args");
        cls.def(nb::init<>());
        FIELD(out_channels); FIELD(in_channels); FIELD(kernel_rows); FIELD(kernel_columns); FIELD(groups);
        FIELD(row_step); FIELD(column_step); FIELD(row_padding); FIELD(column_padding); FIELD(row_dilation);
        FIELD(column_dilation); FIELD(nnz); FIELD(lanes); FIELD(is_double); FIELD(x_row); FIELD(x_channel);
        FIELD(dy_row); FIELD(dy_channel); FIELD(in_tile); FIELD(out_tile); FIELD(out_stride); FIELD(in_stride);
        FIELD(row_stride); FIELD(column_stride); FIELD(support);
    }
    nb::class_<Plan>(m, "Plan")
        .def(nb::init<const acdc_plan_args&>())
        .def("valid", &Plan::valid)
        .def("refresh", &Plan::refresh);

    m.def("table_count", &acdc_table_count);
    m.def("advise_huge_pages", &advise_huge_pages);
    m.def("give_memory_back", &give_memory_back, nb::call_guard<nb::gil_scoped_release>());
    m.def("gather", [](Address dense, Address index, int64_t count, Address vector, int bytes, int threads) {
        nb::gil_scoped_release release;
        acdc_gather(pointer(dense), pointer<int32_t>(index), count, pointer(vector), bytes, threads);
    });
    m.def("expand", [](Address vector, Address index, int64_t count, Address dense, int64_t size, int bytes,
                       int threads) {
        nb::gil_scoped_release release;
        acdc_expand(pointer(vector), pointer<int32_t>(index), count, pointer(dense), size, bytes, threads);
    });
    m.def("clear", [](Address mask, bool where, Address dense, int64_t size, int bytes, int threads) {
        nb::gil_scoped_release release;
        acdc_clear(pointer<uint8_t>(mask), where, pointer(dense), size, bytes, threads);
    });
    {
        using Struct = acdc_kept;
        nb::class_<Struct> cls(m, "kept");
        cls.def(nb::init<>());
        FIELD(weight); FIELD(grad); FIELD(index); FIELD(count); FIELD(size);
    }
    {
        using Struct = acdc_sgd_args;
        nb::class_<Struct> cls(m, "sgd_args");
        cls.def(nb::init<>());
        FIELD(momentum_buffer); FIELD(lr); FIELD(momentum); FIELD(share); FIELD(weight_decay); FIELD(sign);
        FIELD(nesterov);
    }
    {
        using Struct = acdc_adam_args;
        nb::class_<Struct> cls(m, "adam_args");
        cls.def(nb::init<>());
        FIELD(exp_avg); FIELD(exp_avg_sq); FIELD(step_size); FIELD(share1); FIELD(beta2); FIELD(share2); FIELD(eps);
        FIELD(root); FIELD(weight_decay); FIELD(shrink); FIELD(sign);
    }
    m.def("sgd", [](const acdc_kept& kept, const acdc_sgd_args& args, int threads) {
        nb::gil_scoped_release release;
        acdc_sgd(&kept, &args, threads);
    });
    m.def("adam", [](const acdc_kept& kept, const acdc_adam_args& args, int threads) {
        nb::gil_scoped_release release;
        acdc_adam(&kept, &args, threads);
    });
    m.def("bernoulli", [](int index, Address generator, double p, double one, Address out, int64_t count,
                          bool is_double) {
        nb::gil_scoped_release release;
        table(index).bernoulli(pointer<acdc_generator>(generator), p, one, pointer(out), count, is_double);
    });
    m.attr("GENERATOR_BYTES") = sizeof(acdc_generator);
    {
        using Struct = acdc_points;
        nb::class_<Struct> cls(m, "Points");
        cls.def(nb::init<>());
        FIELD(origin); FIELD(channel); FIELD(sample); FIELD(row); FIELD(channels); FIELD(samples); FIELD(height);
        FIELD(width); FIELD(live);
    }
    {
        using Struct = acdc_points_conv_args;
        nb::class_<Struct> cls(m, "points_conv_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(y); FIELD(residual); FIELD(groups); FIELD(tiles); FIELD(parts); FIELD(channel); FIELD(begin);
        FIELD(entries); FIELD(bias); FIELD(uniform); FIELD(vectors); FIELD(tile_channels);
        FIELD(activation); FIELD(threads);
    }
    {
        using Struct = acdc_points_dense_args;
        nb::class_<Struct> cls(m, "points_dense_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(y); FIELD(residual); FIELD(weight); FIELD(bias); FIELD(size); FIELD(workspace);
        FIELD(activation); FIELD(threads);
    }
    {
        using Struct = acdc_points_list_args;
        nb::class_<Struct> cls(m, "points_list_args");
        cls.def(nb::init<>());
        FIELD(index); FIELD(values); FIELD(kept); FIELD(out_channels); FIELD(in_channels); FIELD(groups); FIELD(taps);
        FIELD(tap); FIELD(x_channel); FIELD(tile); FIELD(cuts); FIELD(is_double); FIELD(parts); FIELD(channel);
        FIELD(begin); FIELD(entries);
    }
    m.def("points_list", [](const acdc_points_list_args& args) {
        nb::gil_scoped_release release;
        return acdc_points_list(&args);
    });
    m.def("positions", [](Address bits, int64_t bytes, Address index, int64_t room) {
        nb::gil_scoped_release release;
        return acdc_positions(pointer<uint8_t>(bits), bytes, pointer<int32_t>(index), room);
    });
    {
        using Struct = acdc_points_planes_args;
        nb::class_<Struct> cls(m, "points_planes_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(planes); FIELD(phase_row); FIELD(phase_column); FIELD(phases); FIELD(first_row);
        FIELD(first_column); FIELD(rows); FIELD(columns); FIELD(row_step); FIELD(column_step); FIELD(threads);
    }
    {
        using Struct = acdc_points_map_args;
        nb::class_<Struct> cls(m, "points_map_args");
        cls.def(nb::init<>());
        FIELD(a); FIELD(b); FIELD(out); FIELD(scale); FIELD(offset); FIELD(multiply); FIELD(activation); FIELD(threads);
    }
    {
        using Struct = acdc_points_gate_args;
        nb::class_<Struct> cls(m, "points_gate_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(gate); FIELD(out); FIELD(threads);
    }
    {
        using Struct = acdc_points_norm_args;
        nb::class_<Struct> cls(m, "points_norm_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(out); FIELD(weight); FIELD(bias); FIELD(eps); FIELD(centered); FIELD(threads);
    }
    {
        using Struct = acdc_points_pool_args;
        nb::class_<Struct> cls(m, "points_pool_args");
        cls.def(nb::init<>());
        FIELD(x); FIELD(y); FIELD(maximum); FIELD(window_rows); FIELD(window_columns); FIELD(row_step);
        FIELD(column_step); FIELD(row_padding); FIELD(column_padding); FIELD(count_padding); FIELD(workspace);
        FIELD(threads);
    }
    {
        using Struct = acdc_points_join_args;
        nb::class_<Struct> cls(m, "points_join_args");
        cls.def(nb::init<>());
        FIELD(out); FIELD(parts); FIELD(table); FIELD(count); FIELD(fill); FIELD(threads);
    }
    {
        using Struct = acdc_points_embed_args;
        nb::class_<Struct> cls(m, "points_embed_args");
        cls.def(nb::init<>());
        FIELD(ids); FIELD(out); FIELD(table); FIELD(rows); FIELD(threads);
    }
    {
        using Struct = acdc_points_attention_args;
        nb::class_<Struct> cls(m, "points_attention_args");
        cls.def(nb::init<>());
        FIELD(queries); FIELD(keys); FIELD(values); FIELD(out); FIELD(mask); FIELD(heads); FIELD(causal);
        FIELD(scale); FIELD(workspace); FIELD(threads);
    }
    m.attr("QUERIES") = int(ACDC_QUERIES);
    {
        using Struct = acdc_points_copy_args;
        nb::class_<Struct> cls(m, "points_copy_args");
        cls.def(nb::init<>());
        FIELD(points); FIELD(data); FIELD(sample); FIELD(channel); FIELD(row); FIELD(column); FIELD(threads);
    }
    m.def("isa", [](int index) { return std::string(acdc_table_at(index)->isa); });
    m.def("lanes", [](int index) { return acdc_table_at(index)->lanes; });
    m.def("supported", [](int index) { return acdc_table_at(index)->supported() != 0; });

    nb::class_<Sequence> sequence(m, "Sequence");
    sequence.def(nb::init<>()).def("run", &Sequence::run);

    nb::list names;
#define ROW_OF(table, name, args)                                                                    \
    names.append(#name);                                                                             \
    m.def(#name, [](int index, bool is_double, const args& a) {                                      \
        call<args>(is_double ? table(index).name##_f64 : table(index).name##_f32, a);                \
    });                                                                                              \
    sequence.def("add_" #name, [](Sequence& s, int index, bool is_double, const args& a, bool alone) { \
        s.add<args>(is_double ? table(index).name##_f64 : table(index).name##_f32, a, alone);        \
    });
#define ROW(name, args) ROW_OF(table, name, args)
    ACDC_KERNELS(ROW)
    m.attr("KERNELS") = nb::tuple(names);
#define POINTS_ROW(name, args) ROW_OF(points_table, name, args)
    names = nb::list();
    ACDC_POINT_KERNELS(POINTS_ROW)
    m.attr("POINT_KERNELS") = nb::tuple(names);
#if defined(__SANITIZE_ADDRESS__)
    m.attr("sanitized") = "address";
#elif defined(__SANITIZE_THREAD__)
    m.attr("sanitized") = "thread";
#else
    m.attr("sanitized") = "";
#endif
}
