// The elementary functions by themselves, so that their accuracy can be tested; and what stands between the kernels of a program.
#include "isa.h"

namespace longstate::ISA {

void elementwise(const Elementwise& x) {
    for (int64_t i = 0; i < x.count; i += W) {
        const int count = int(std::min<int64_t>(W, x.count - i));
        vf v = load_some(x.x + i, count);
        switch (x.function) {
            case 0: v = exp(v); break;
            case 1: v = log(v); break;
            case 2: v = softplus(v); break;
            case 3: v = sigmoid(v); break;
            case 4: v = silu(v); break;
            default: silu(v, v);
        }
        store_some(x.y + i, v, count);
    }
}

void head_steps(const HeadSteps& x) {
    for_jobs(x.batch, 1, [&](int64_t b) {
        for_vectors(x.heads, [&](int64_t h, int some) {
            vf step = softplus(read(x.x, b, 0, h, some) + read(x.bias, 0, 0, h, some));
            step = choose(step < all(float(x.least)), all(float(x.least)), step);
            step = choose(step > all(float(x.most)), all(float(x.most)), step);
            write(x.step, b, 0, h, step, some);
            write(x.decay, b, 0, h, step * -exp(read(x.A_log, 0, 0, h, some)), some);
        });
    });
}

void add(const Add& x) {
    for_jobs(x.batch, 1, [&](int64_t b) {
        for_vectors(x.width, [&](int64_t i, int some) {
            write(x.y, b, 0, i, read(x.x, b, 0, i, some) + all(float(x.factor)) * read(x.z, b, 0, i, some), some);
        });
    });
}

}  // namespace longstate::ISA
