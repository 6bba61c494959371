// What every kernel's source begins with: it is compiled once for each instruction set, with ISA and WIDTH defined.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
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

}  // namespace longstate::ISA
