// What the library of the CUDA kernels was compiled for, as TORCH_CUDA_ARCH_LIST writes it. C, so
// that any Python can ask.
#include "../export.h"

extern "C" TEMPNET_EXPORT const char* tempnet_architectures() { return TEMPNET_ARCHITECTURES; }
