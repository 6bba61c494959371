// Which table of kernels this processor runs.
#include <cstring>

#include "kernels.h"

namespace longstate {

extern const Kernels baseline_kernels;
#ifdef LONGSTATE_X86
extern const Kernels avx2_kernels, avx512_kernels;
#endif

const Kernels* choose_kernels(const char* name) {
    const Kernels* found[3] = {&baseline_kernels};
    int count = 1;
#ifdef LONGSTATE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found[count++] = &avx2_kernels;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
            found[count++] = &avx512_kernels;
    }
#endif
    if (!*name) return found[count - 1];
    for (int i = 0; i < count; i++)
        if (!std::strcmp(found[i]->name, name)) return found[i];
    return nullptr;
}

}  // namespace longstate
