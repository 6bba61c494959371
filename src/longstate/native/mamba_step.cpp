// All of a Mamba mixer for a few tokens: its kernels one after the other, without going back to Python between them.
#include "isa.h"

namespace longstate::ISA {

void mamba_step(const MambaStep& x) {
    linear(x.in_proj);
    short_convolution(x.conv);
    linear(x.x_proj);
    linear(x.dt_proj);
    selective_scan(x.scan);
    linear(x.out_proj);
}

}  // namespace longstate::ISA
