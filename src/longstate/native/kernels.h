// What a kernel takes, and the table of kernels that there is one of for each instruction set.
//
// Addresses, sizes and strides only: nothing here knows of PyTorch. Sizes are counted in numbers, never in bytes.
#pragma once
#include <cstdint>

namespace longstate {

// h_t = e^(dt_t A) h_(t-1) + dt_t u_t B_t,  y_t = C_t h_t; channels d, states n, both contiguous; start may be null.
struct SelectiveScan {
    int64_t batch, length, width, states, tile;  // tile: steps between kept states
    int threads;
    const float *u, *dt, *A, *B, *C, *initial;  // [b t d] [b t d] [d n] [b t n] [b t n] [b d n]
    const uint8_t* start;                       // [b t]
    float *y, *final;                           // [b t d] [b d n]
    float* kept;                                // [tiles+1 b d n], the states around the tiles; null if not wanted
};

struct SelectiveScanBackward {
    SelectiveScan forward;             // with kept; y and final are not used
    const float *grad, *grad_final;    // of y and final
    float *grad_u, *grad_dt, *grad_A;  // [b t d] [b t d] [b d n]: of A for each sequence
    float *grad_B, *grad_C;            // [pieces b t n]: for each piece of channels
    float* grad_initial;               // [b d n]
};

constexpr int64_t PIECE = 256;  // channels whose sums are formed together, whatever the number of threads

struct Kernels {
    const char* name;
    void (*elementwise)(int function, const float* x, float* y, int64_t count);  // exp, log, softplus, sigmoid
    void (*selective_scan)(const SelectiveScan&);
    void (*selective_scan_backward)(const SelectiveScanBackward&);
};

extern const Kernels baseline_kernels;
#ifdef LONGSTATE_X86
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// The best that this processor runs; or the one of that name, null if it does not run here.
const Kernels* choose_kernels(const char* name);

}  // namespace longstate
