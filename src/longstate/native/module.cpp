// What Python calls: each kernel as a function of addresses, sizes and a number of threads. No lock is held meanwhile.
#include <nanobind/nanobind.h>

#include "kernels.h"

namespace nb = nanobind;
using namespace longstate;

static const float* in(uintptr_t address) { return (const float*)address; }
static float* out(uintptr_t address) { return (float*)address; }

static const Kernels* kernels = choose_kernels("");

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);
    m.def("instructions", [] { return kernels->name; });
    m.def("use", [](const char* name) {
        const Kernels* found = choose_kernels(name);
        if (found) kernels = found;
        return found != nullptr;
    });
    m.def("elementwise", [](int function, uintptr_t x, uintptr_t y, int64_t count) {
        nb::gil_scoped_release unlocked;
        kernels->elementwise(function, (const float*)x, (float*)y, count);
    });
    m.attr("PIECE") = PIECE;
    m.def("selective_scan", [](int64_t batch, int64_t length, int64_t width, int64_t states, int64_t tile, uintptr_t u, uintptr_t dt,
                               uintptr_t A, uintptr_t B, uintptr_t C, uintptr_t initial, uintptr_t start, uintptr_t y,
                               uintptr_t final, uintptr_t kept, int threads) {
        nb::gil_scoped_release unlocked;
        kernels->selective_scan({batch, length, width, states, tile, threads, in(u), in(dt), in(A), in(B), in(C), in(initial),
                                 (const uint8_t*)start, out(y), out(final), out(kept)});
    });
    m.def("selective_scan_backward",
          [](int64_t batch, int64_t length, int64_t width, int64_t states, int64_t tile, uintptr_t u, uintptr_t dt, uintptr_t A,
             uintptr_t B, uintptr_t C, uintptr_t start, uintptr_t kept, uintptr_t grad, uintptr_t grad_final,
             uintptr_t grad_u, uintptr_t grad_dt, uintptr_t grad_A, uintptr_t grad_B, uintptr_t grad_C,
             uintptr_t grad_initial, int threads) {
              nb::gil_scoped_release unlocked;
              kernels->selective_scan_backward({{batch, length, width, states, tile, threads, in(u), in(dt), in(A), in(B),
                                                 in(C), nullptr, (const uint8_t*)start, nullptr, nullptr, out(kept)},
                                                in(grad), in(grad_final), out(grad_u), out(grad_dt), out(grad_A),
                                                out(grad_B), out(grad_C), out(grad_initial)});
          });
}
