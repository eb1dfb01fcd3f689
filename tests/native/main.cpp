// Checks the compiled kernels without Python and torch: every kernel of every instruction set of this machine, over
// random sizes, against plain loops in double. An emulator of another CPU runs it, too.
//
//   check-kernels [--examples N] [--first N] [--isa NAME] [--self-test]
//
// --first is the number of the first example, so that a failed one can be repeated alone. --self-test replaces
// each kernel in turn by one that does nothing, and fails if no check sees that.
#include <cstdio>
#include <cstdlib>

#include "between.h"
#include "conversions.h"
#include "draws.h"
#include "kept.h"
#include "layers.h"
#include "norms.h"
#include "point_lists.h"
#include "sequences.h"

namespace check {
namespace {

struct Options {
    int examples = 100, first = 0;
    std::string isa;
    bool self_test = false;
};

[[noreturn]] void refuse(const std::string& what) {
    std::fprintf(stderr, "check-kernels: %s. The options are --examples N, --first N, --isa NAME and --self-test.\n",
                 what.c_str());
    std::exit(2);
}

Options options_of(int count, char** words) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        auto value = [&] { return ++i < count ? words[i] : (refuse(word + " needs a value"), words[0]); };
        if (word == "--examples") options.examples = std::atoi(value());
        else if (word == "--first") options.first = std::atoi(value());
        else if (word == "--isa") options.isa = value();
        else if (word == "--self-test") options.self_test = true;
        else refuse("there is no option " + word);
    }
    return options;
}

template <class real> void check_example(const acdc_table& table, std::set<std::string>* called, int example) {
    Random random(uint64_t(example) * 2 + (sizeof(real) == 8));
    Kernels<real> k(table, called);
    k.threads = random.between(1, 3);
    k.in_shares = random.chance(0.5);
    check_conversions<real>(k, random);
    check_layers<real>(k, random);
    check_norms<real>(k, random);
    check_folds<real>(k, random);
    check_layer_norms<real>(k, random);
    check_activations<real>(k, random);
    check_pointwise<real>(k, random);
    check_gates<real>(k, random);
    check_pools<real>(k, random);
    check_sequences<real>(k, random);
    check_draws<real>(table, random);
}

// Returns what the checks of a table found; empty: nothing.
std::string fault_of(const acdc_table& table, std::set<std::string>* called, const Options& options) {
    for (int example = options.first; example < options.first + options.examples; ++example) {
        const char* type = "float";
        try {
            check_example<float>(table, called, example);
            type = "double";
            check_example<double>(table, called, example);
        } catch (const Failure& failure) {
            return std::string(failure.what()) + " (" + table.isa + ", " + type + ", example " +
                   std::to_string(example) + ")";
        }
    }
    return "";
}

// As fault_of, for a check that takes no table.
std::string fault_of(void (*check)(Random&), const char* what, const Options& options) {
    for (int example = options.first; example < options.first + options.examples; ++example) {
        Random random(static_cast<uint64_t>(example));
        try {
            check(random);
        } catch (const Failure& failure) {
            return std::string(failure.what()) + " (" + what + ", example " + std::to_string(example) + ")";
        }
    }
    return "";
}

bool check_without_table(void (*check)(Random&), const char* what, const Options& options) {
    const std::string fault = fault_of(check, what, options);
    if (fault.empty()) std::printf("%s: %d examples\n", what, options.examples);
    else std::printf("FAILED: %s\n", fault.c_str());
    return fault.empty();
}

#define ACDC_ROW(name, args) #name " (f32)", #name " (f64)",
const std::set<std::string> rows = {ACDC_KERNELS(ACDC_ROW)};
#undef ACDC_ROW

// Whether the checks see it if one kernel of a table does nothing.
bool self_test(const acdc_table& table, const Options& options) {
    bool all = true;
    auto test = [&](const char* name, const acdc_table& broken) {
        std::set<std::string> called;
        if (!fault_of(broken, &called, options).empty()) return;
        std::printf("FAILED: no check saw that %s does nothing (%s)\n", name, table.isa);
        all = false;
    };
#define ACDC_ROW(name, args)                                          \
    {                                                                 \
        acdc_table broken = table;                                    \
        broken.name##_f32 = [](const args*, const acdc_share*) {};    \
        test(#name " (f32)", broken);                                 \
        broken = table;                                               \
        broken.name##_f64 = [](const args*, const acdc_share*) {};    \
        test(#name " (f64)", broken);                                 \
    }
    ACDC_KERNELS(ACDC_ROW)
#undef ACDC_ROW
    acdc_table broken = table;
    broken.bernoulli = [](acdc_generator*, double, double, void*, int64_t, int32_t) {};
    test("bernoulli", broken);
    if (all) std::printf("%s: each of %d kernels is checked\n", table.isa, int(rows.size()));
    return all;
}

bool check_table(const acdc_table& table, const Options& options) {
    std::set<std::string> called;
    const std::string fault = fault_of(table, &called, options);
    if (!fault.empty()) {
        std::printf("FAILED: %s\n", fault.c_str());
        return false;
    }
    for (const std::string& row : rows)
        if (!called.count(row)) {
            std::printf("FAILED: %s was never called (%s)\n", row.c_str(), table.isa);
            return false;
        }
    std::printf("%s: %d kernels, %d examples\n", table.isa, int(called.size()), options.examples);
    return true;
}

int run(const Options& options) {
    bool good = true, found = false;
    for (int i = 0; i < acdc_table_count(); ++i) {
        const acdc_table& table = *acdc_table_at(i);
        if (!options.isa.empty() && options.isa != table.isa) continue;
        found = true;
        if (!table.supported()) std::printf("%s: not run, this CPU does not have it\n", table.isa);
        else good = (options.self_test ? self_test(table, options) : check_table(table, options)) && good;
    }
    if (!found) refuse("no kernels were compiled for " + options.isa);
    if (options.self_test) return !good;
    good = check_without_table(check_kept, "kept elements", options) && good;
    good = check_without_table(check_point_lists, "the runtime's layers", options) && good;
    return !good;
}

}  // namespace
}  // namespace check

int main(int count, char** words) { return check::run(check::options_of(count, words)); }
