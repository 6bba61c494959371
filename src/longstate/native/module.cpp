// What Python calls: each kernel as a function of the numbers in its struct, in their order. No lock is held meanwhile.
#include <nanobind/nanobind.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace longstate;

static const Kernels* kernels = choose_kernels("");

static void check_count(const char* name, size_t came, size_t wanted) {
    if (came == wanted) return;
    PyErr_Format(PyExc_TypeError, "%s: %zu numbers came, wanted %zu", name, came, wanted);
    throw nb::python_error();
}

static int64_t word(PyObject* x) {
    int64_t word;
    if (PyFloat_Check(x)) {
        const double value = PyFloat_AS_DOUBLE(x);
        std::memcpy(&word, &value, 8);
    } else {
        word = PyLong_AsLongLong(x);
        if (word == -1 && PyErr_Occurred()) throw nb::python_error();
    }
    return word;
}

template <class Arguments>
static void call(const int64_t* words, void (*kernel)(const Arguments&)) {
    static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) % 8 == 0);
    Arguments arguments;
    std::memcpy(static_cast<void*>(&arguments), words, sizeof arguments);
    kernel(arguments);
}

// Kernels to run one after the other in a single call. What stays the same is given once. For what does not, a number is
// a pair (i, k): k bytes behind the i-th address that a run is given, or, if i is 0, behind room that a run has itself.
class Program {
    struct Later {
        size_t word, address;
    };
    size_t room;
    std::vector<void (*)(const int64_t*)> calls;
    std::vector<size_t> begins;  // of each call's words, and their end
    std::vector<int64_t> words;
    std::vector<Later> later;

    template <class Arguments>
    void append(const char* name, const nb::args& given, void (*run)(const int64_t*)) {
        check_count(name, given.size(), sizeof(Arguments) / 8);
        for (size_t i = 0; i < given.size(); i++) {
            PyObject* x = PyTuple_GET_ITEM(given.ptr(), i);
            const bool pair = PyTuple_Check(x) && PyTuple_GET_SIZE(x) == 2;
            if (pair) later.push_back({words.size(), size_t(word(PyTuple_GET_ITEM(x, 0)))});
            words.push_back(word(pair ? PyTuple_GET_ITEM(x, 1) : x));
        }
        calls.push_back(run);
        begins.push_back(words.size());
    }

public:
    explicit Program(size_t bytes) : room(bytes), begins{0} {}

    void add(const char* name, const nb::args& given) {
#define ADD(kernel, Arguments)               \
    if (!std::strcmp(name, #kernel))         \
        return append<Arguments>(name, given, [](const int64_t* words) { call(words, kernels->kernel); });
        LONGSTATE_KERNELS(ADD)
#undef ADD
        PyErr_Format(PyExc_ValueError, "there is no kernel %s", name);
        throw nb::python_error();
    }

    size_t bytes() const { return room; }

    // Append what is to be called, and the words with which.
    void prepare(const std::vector<int64_t>& addresses, std::vector<void (*)(const int64_t*)>& all, std::vector<size_t>& at,
                 std::vector<int64_t>& now) const {
        const size_t first = now.size();
        now.insert(now.end(), words.begin(), words.end());
        for (const Later& x : later) {
            if (x.address >= addresses.size()) {
                PyErr_Format(PyExc_TypeError, "run: %zu addresses came, wanted %zu", addresses.size() - 1, x.address);
                throw nb::python_error();
            }
            now[first + x.word] += addresses[x.address];
        }
        for (size_t i = 0; i < calls.size(); i++) at.push_back(first + begins[i]);
        all.insert(all.end(), calls.begin(), calls.end());
    }
};

// Run programs one after the other, each given with its addresses behind it, by one team of threads.
static void run_programs(int threads, const nb::args& given) {
    std::vector<std::pair<const Program*, std::vector<int64_t>>> programs;
    size_t bytes = 0;
    for (nb::handle x : given) {
        const Program* program;
        if (nb::try_cast(x, program)) {
            programs.push_back({program, {0}});
            bytes = std::max(bytes, program->bytes());
        } else if (!programs.empty())
            programs.back().second.push_back(word(x.ptr()));
    }
    std::vector<char> room(bytes + 64);
    std::vector<void (*)(const int64_t*)> calls;
    std::vector<size_t> at;
    std::vector<int64_t> words;
    for (auto& [program, addresses] : programs) {
        addresses[0] = int64_t(reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64;
        program->prepare(addresses, calls, at, words);
    }
    nb::gil_scoped_release unlocked;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (size_t i = 0; i < calls.size(); i++) calls[i](words.data() + at[i]);
}

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);
    m.attr("PIECE") = PIECE;
    m.attr("MOST_TAPS") = MOST_TAPS;
    m.attr("HEADS") = HEADS;
    m.def("instructions", [] { return kernels->name; });
    m.def("use", [](const char* name) {
        const Kernels* found = choose_kernels(name);
        if (found) kernels = found;
        return found != nullptr;
    });
    // Large pages for memory that will be written whole; a wish, which systems without them may pass over.
    m.def("advise", [](uintptr_t begin, size_t bytes) {
#ifdef MADV_HUGEPAGE
        constexpr uintptr_t page = 1 << 21;
        const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
        if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    });
#define BINDING(name, Arguments)                               \
    m.def(#name, [](const nb::args& given) {                   \
        constexpr size_t count = sizeof(Arguments) / 8;        \
        check_count(#name, given.size(), count);               \
        int64_t words[count];                                  \
        for (size_t i = 0; i < count; i++)                     \
            words[i] = word(PyTuple_GET_ITEM(given.ptr(), i)); \
        nb::gil_scoped_release unlocked;                       \
        call(words, kernels->name);                            \
    });
    LONGSTATE_KERNELS(BINDING)
#undef BINDING
    nb::class_<Program>(m, "Program").def(nb::init<size_t>()).def("add", &Program::add);
    m.def("run", &run_programs);
}
