// The pybind11 module tempnet_kernels._C: questions to the library of the CPU kernels.
#include <pybind11/pybind11.h>

#include "cpu/simd_level.h"

PYBIND11_MODULE(_C, module) {
  module.attr("compiler") = __VERSION__;
  module.def("cpu_capability", &tempnet::cpu_capability,
             "The SIMD level in use: 'baseline', 'avx2' or 'avx512'.");
  module.def("set_cpu_capability", &tempnet::set_cpu_capability,
             "Use a lower SIMD level than the processor's, to test it.");
}
