// What Python calls: each kernel as a function of the numbers in its struct, in their order. No lock is held meanwhile.
#include <nanobind/nanobind.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace nb = nanobind;
using namespace longstate;

static const Kernels* kernels = choose_kernels("");

template <class Arguments>
static Arguments read(const char* name, const nb::args& given) {
    static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) % 8 == 0);
    constexpr size_t count = sizeof(Arguments) / 8;
    if (given.size() != count) {
        PyErr_Format(PyExc_TypeError, "%s: %zu numbers came, wanted %zu", name, given.size(), count);
        throw nb::python_error();
    }
    int64_t words[count];
    for (size_t i = 0; i < count; i++) {
        PyObject* x = PyTuple_GET_ITEM(given.ptr(), i);
        if (PyFloat_Check(x)) {
            const double value = PyFloat_AS_DOUBLE(x);
            std::memcpy(&words[i], &value, 8);
        } else {
            words[i] = PyLong_AsLongLong(x);
            if (words[i] == -1 && PyErr_Occurred()) throw nb::python_error();
        }
    }
    Arguments arguments;
    std::memcpy(static_cast<void*>(&arguments), words, sizeof arguments);
    return arguments;
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
#define BINDING(name, Arguments)                              \
    m.def(#name, [](const nb::args& given) {                  \
        const Arguments arguments = read<Arguments>(#name, given); \
        nb::gil_scoped_release unlocked;                      \
        kernels->name(arguments);                             \
    });
    LONGSTATE_KERNELS(BINDING)
#undef BINDING
}
