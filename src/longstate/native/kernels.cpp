// All kernels for one instruction set: compiled once for each, with ISA and WIDTH defined.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace longstate::ISA {

#include "simd.h"
#include "math.h"
#include "selective_scan.h"

static void elementwise(int function, const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        vf v = load_some(x + i, int(std::min<int64_t>(W, count - i)));
        switch (function) {
            case 0: v = exp(v); break;
            case 1: v = log(v); break;
            case 2: v = softplus(v); break;
            default: v = sigmoid(v);
        }
        store_some(y + i, v, int(std::min<int64_t>(W, count - i)));
    }
}

}  // namespace longstate::ISA

#define JOINED(a, b) a##b
#define TABLE(isa) JOINED(isa, _kernels)
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)
namespace longstate {
extern const Kernels TABLE(ISA);  // a constant alone would be seen here only
const Kernels TABLE(ISA) = {TEXT_OF(ISA), ISA::elementwise, ISA::selective_scan, ISA::selective_scan_backward};
}
