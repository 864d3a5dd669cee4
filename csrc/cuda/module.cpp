// The pybind11 module tempnet_kernels._C_cuda: questions to the library of the CUDA kernels.
#include <pybind11/pybind11.h>

#include "launch_plan.h"

namespace tempnet {
namespace {

pybind11::dict launch_plan_dict(int64_t n, int64_t v, const std::string& dtype, int arch) {
  const LaunchPlan plan = launch_plan(n, v, dtype, arch);
  pybind11::dict info;
  info["kernel"] = plan.kernel;
  info["cluster"] = plan.cluster;
  info["threads"] = plan.threads;
  info["vectors"] = plan.vectors;
  info["slice"] = plan.slice;
  info["shared_bytes"] = plan.shared_bytes;
  info["registers"] = plan.registers < 0 ? pybind11::object(pybind11::none())
                                         : pybind11::object(pybind11::int_(plan.registers));
  return info;
}

}  // namespace
}  // namespace tempnet

PYBIND11_MODULE(_C_cuda, module) {
  module.def("launch_plan", &tempnet::launch_plan_dict, pybind11::arg("N"), pybind11::arg("V"),
             pybind11::arg("dtype"), pybind11::arg("arch"),
             "How the forward of dro_cross_entropy is launched for [N, V] logits of that dtype "
             "('float32', 'bfloat16', 'float16') on compute capability arch / 10.");
}
