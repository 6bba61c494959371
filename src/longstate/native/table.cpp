// The table of kernels of one instruction set.
#include "isa.h"

#define JOINED(a, b) a##b
#define TABLE(isa) JOINED(isa, _kernels)
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

namespace longstate {

extern const Kernels TABLE(ISA);  // a constant alone would be seen here only
#define ENTRY(name, Arguments) ISA::name,
const Kernels TABLE(ISA) = {TEXT_OF(ISA), LONGSTATE_KERNELS(ENTRY)};

}  // namespace longstate
