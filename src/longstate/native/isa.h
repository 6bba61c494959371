// What every kernel's source begins with: it is compiled once for each instruction set, with ISA and WIDTH defined.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>
#if WIDTH > 4
#include <immintrin.h>
#endif

#include "kernels.h"

namespace longstate::ISA {

#define DECLARATION(name, Arguments) void name(const Arguments&);
LONGSTATE_KERNELS(DECLARATION)
#undef DECLARATION

#include "simd.h"
#include "elementary.h"

// Run jobs 0 … count - 1, and return when all are done. One thread does not open a parallel region, which would take
// longer than a short job. In a program all threads are there already, and come here together: what a kernel of a
// program does outside of its jobs is done by each of them, so it writes to nothing that others read.
template <class Job>
static void for_jobs(int64_t count, int64_t threads, const Job& job) {
    if (omp_in_parallel()) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) job(i);
        return;
    }
    if (threads == 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) job(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) job(i);
}

}  // namespace longstate::ISA
