// The emulated kernels as a Python module: pointers in, and kernels with planted faults.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <vector>

#include "cuda/contrastive_anchors.cuh"
#include "cuda/dro_contrastive.cuh"
#include "cuda/dro_cross_entropy_launch.cuh"
#include "cuda/linear_dro_cross_entropy.cuh"
#include "cuda/optimal_temperature.cuh"
#include "cuda/per_sample_state.cuh"
#include "cuda/temperature_head.cuh"
#include "cuda/tempered_softmax.cuh"
#include "cuda/token_rows.cuh"
#include "faults.h"

namespace tempnet {
namespace {

namespace py = pybind11;
using namespace device;

template <class T>
T* pointer(const py::dict& d, const char* name) {
  return reinterpret_cast<T*>(d[name].cast<uintptr_t>());
}

Params params_from(const py::dict& d) {
  Params p{};
  p.n = d["n"].cast<int64_t>();
  p.v = d["v"].cast<int>();
  p.logits = pointer<void>(d, "logits");
  p.logits_stride = d["logits_stride"].cast<int64_t>();
  p.grad = pointer<void>(d, "grad");
  p.grad_stride = d["grad_stride"].cast<int64_t>();
  p.target = pointer<void>(d, "target");
  p.target_stride = d["target_stride"].cast<int64_t>();
  p.wide_target = d["wide_target"].cast<bool>();
  p.tau = pointer<float>(d, "tau");
  p.tau_stride = d["tau_stride"].cast<int64_t>();
  p.scale = pointer<float>(d, "scale");
  p.scale_stride = d["scale_stride"].cast<int64_t>();
  p.loss = pointer<float>(d, "loss");
  p.rows = pointer<float>(d, "rows");
  p.argmax = pointer<int64_t>(d, "argmax");
  p.ignore_index = d["ignore_index"].cast<int64_t>();
  p.begin = d["begin"].cast<int64_t>();
  p.vocab_size = d["vocab_size"].cast<int64_t>();
  p.options = {d["rho"].cast<float>(), float(std::log(double(p.vocab_size))),
               d["label_smoothing"].cast<float>(), d["z_loss"].cast<float>()};
  p.unscaled = d["unscaled"].cast<bool>();
  p.parts = pointer<Partial>(d, "parts");
  p.extras = pointer<Extras>(d, "extras");
  p.softcap = d["softcap"].cast<float>();
  return p;
}

template <class F>
void for_dtype(const std::string& dtype, F f) {
  if (dtype == "float32") return f(float{});
  if (dtype == "bfloat16") return f(BFloat16{});
  if (dtype == "float16") return f(Half{});
  throw std::invalid_argument("dtype");
}

Plan plan_from(const py::dict& d) {
  return {static_cast<Kernel>(d["kernel"].cast<int>()), d["cluster"].cast<int>(),
          d["threads"].cast<int>(), d["vectors"].cast<int>(), d["slice"].cast<int>()};
}

py::dict plan_dict(const Plan& plan) {
  py::dict d;
  d["kernel"] = int(plan.kernel);
  d["name"] = kernel_name(plan.kernel);
  d["cluster"] = plan.cluster;
  d["threads"] = plan.threads;
  d["vectors"] = plan.vectors;
  d["slice"] = plan.slice;
  return d;
}

void stats(const std::string& dtype, const py::dict& d, bool want_mean, int multiprocessors) {
  Params p = params_from(d);
  p.stats = pointer<float>(d, "stats");
  for_dtype(dtype, [&](auto zero) {
    using Z = decltype(zero);
    plan_stats(p, sizeof(Z), multiprocessors);
    Partial nowhere;
    nowhere.zmax = nowhere.s = nowhere.sx = nowhere.z_y = std::numeric_limits<float>::quiet_NaN();
    std::vector<Partial> parts(p.n * p.slices, nowhere);
    std::vector<Extras> extras(p.n * p.slices);
    p.parts = parts.data();
    p.extras = extras.data();
    launch_stats<Z>(p, want_mean, 0);
  });
}

contrastive::Tile tile_from(const py::dict& d) {
  contrastive::Tile t{};
  t.row_begin = d["row_begin"].cast<int64_t>();
  t.column_begin = d["column_begin"].cast<int64_t>();
  t.m = d["m"].cast<int64_t>();
  t.n = d["n"].cast<int64_t>();
  t.rows = d["tile_rows"].cast<int>();
  t.columns = d["tile_columns"].cast<int>();
  t.similarity = pointer<float>(d, "similarity");
  t.stride = d["stride"].cast<int64_t>();
  t.positive = pointer<int64_t>(d, "positive");
  t.ids = pointer<int32_t>(d, "ids");
  t.mask = pointer<bool>(d, "mask");
  t.mask_stride = d["mask_stride"].cast<int64_t>();
  t.include_positive = d["include_positive"].cast<bool>();
  return t;
}

void similarity_stats(const py::dict& d, int multiprocessors) {
  contrastive::StatsParams p{};
  p.tile = tile_from(d);
  p.tile.aligned = contrastive::aligned_groups<float>(p.tile, nullptr, 0);
  p.row_a = pointer<float>(d, "row_a");
  p.column_a = pointer<float>(d, "column_a");
  p.rows = pointer<float>(d, "rows");
  p.columns = pointer<float>(d, "columns");
  contrastive::plan_stats(p, multiprocessors);
  const float poison = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> parts(contrastive::part_floats(p), poison);
  contrastive::launch_stats(p, parts.data(), 0);
}

void similarity_weights(const std::string& dtype, const py::dict& d) {
  contrastive::WeightsParams p{};
  p.tile = tile_from(d);
  p.rows = pointer<float>(d, "rows");
  p.columns = pointer<float>(d, "columns");
  p.weights = pointer<void>(d, "weights");
  p.stride = d["weights_stride"].cast<int64_t>();
  for_dtype(dtype, [&](auto zero) {
    using Z = decltype(zero);
    p.tile.aligned =
        contrastive::aligned_groups(p.tile, static_cast<const Z*>(p.weights), p.stride);
    contrastive::launch_weights<Z>(p, 0);
  });
}

void anchor_states(const py::dict& d) {
  const StartParams<float> params{d["m"].cast<int64_t>(),
                                  d["n"].cast<int64_t>(),
                                  d["all"].cast<int64_t>(),
                                  d["begin"].cast<int64_t>(),
                                  pointer<float>(d, "tau_image"),
                                  pointer<float>(d, "tau_text"),
                                  d["tau_image_stride"].cast<int64_t>(),
                                  d["tau_text_stride"].cast<int64_t>(),
                                  pointer<int64_t>(d, "given"),
                                  d["include_positive"].cast<bool>(),
                                  d["every_pair"].cast<bool>(),
                                  pointer<float>(d, "row_a"),
                                  pointer<float>(d, "column_a"),
                                  pointer<float>(d, "rows"),
                                  pointer<float>(d, "columns"),
                                  pointer<int64_t>(d, "place"),
                                  pointer<int32_t>(d, "pair")};
  anchors::launch_start(params, 0);
}

void contrastive_anchors(const py::dict& d) {
  const AnchorParams<float> params{
      d["m"].cast<int64_t>(),
      d["n"].cast<int64_t>(),
      d["begin"].cast<int64_t>(),
      pointer<float>(d, "rows"),
      pointer<float>(d, "columns"),
      pointer<float>(d, "row_a"),
      pointer<float>(d, "column_a"),
      pointer<float>(d, "tau_image"),
      pointer<float>(d, "tau_text"),
      d["tau_image_stride"].cast<int64_t>(),
      d["tau_text_stride"].cast<int64_t>(),
      pointer<int64_t>(d, "positive"),
      pointer<int32_t>(d, "pair"),
      pointer<float>(d, "log_s_image"),
      pointer<float>(d, "log_s_text"),
      AnchorOptions(d["gamma"].cast<double>(), d["rho"].cast<double>()),
      pointer<float>(d, "stats"),
      pointer<float>(d, "term"),
      pointer<float>(d, "total"),
      pointer<float>(d, "row_parameters"),
      pointer<float>(d, "column_parameters")};
  anchors::launch_anchors(params, 0);
}

void pair_gradients(const std::string& dtype, const py::dict& d, bool wide_text) {
  const auto side = [&](const char* rows, const char* grad, const char* sum, const char* others) {
    return anchors::GradientSide{d[rows].cast<int64_t>(), pointer<void>(d, grad),
                                 pointer<float>(d, sum), pointer<void>(d, others)};
  };
  const anchors::GradientParams params{side("images", "grad_image", "image_sum", "text"),
                                       side("texts", "grad_text", "text_sum", "image"),
                                       d["d"].cast<int64_t>(),
                                       pointer<float>(d, "total"),
                                       pointer<int64_t>(d, "positive"),
                                       pointer<int32_t>(d, "pair"),
                                       pointer<float>(d, "unit"),
                                       pointer<float>(d, "scale")};
  for_dtype(dtype, [&](auto zero) {
    using F = decltype(zero);
    if (wide_text) {
      anchors::launch_gradients<F, float>(params, 0);
    } else {
      anchors::launch_gradients<F, F>(params, 0);
    }
  });
}

void samples_at(const std::vector<std::pair<uintptr_t, int64_t>>& tables, const py::dict& d,
                bool write) {
  samples::Params params{};
  params.count = int(tables.size());
  for (int t = 0; t < params.count; ++t) {
    params.tables[t] = reinterpret_cast<float*>(tables[t].first);
    params.sizes[t] = tables[t].second;
  }
  params.b = d["b"].cast<int64_t>();
  params.ids = pointer<int64_t>(d, "ids");
  params.order = pointer<int64_t>(d, "order");
  params.values = pointer<float>(d, "values");
  params.id_stride = d["id_stride"].cast<int64_t>();
  params.table_stride = d["table_stride"].cast<int64_t>();
  params.value_stride = d["value_stride"].cast<int64_t>();
  samples::launch_samples(params, write, 0);
}

// The plan of the launch, which ``wanted`` overrides.
py::dict tempered_softmax(const std::string& dtype, const py::dict& d, int arch,
                          const py::dict& wanted) {
  softmax::Params p{};
  p.n = d["n"].cast<int64_t>();
  p.v = d["v"].cast<int>();
  p.logits = pointer<void>(d, "logits");
  p.logits_stride = d["logits_stride"].cast<int64_t>();
  p.grad_output = pointer<void>(d, "grad_output");
  p.grad_output_stride = d["grad_output_stride"].cast<int64_t>();
  p.out = pointer<void>(d, "out");
  p.tau = pointer<float>(d, "tau");
  p.tau_stride = d["tau_stride"].cast<int64_t>();
  p.rows = pointer<float>(d, "rows");
  p.grad_tau = pointer<float>(d, "grad_tau");
  p.log = d["log"].cast<bool>();
  py::dict used;
  for_dtype(dtype, [&](auto zero) {
    using Z = decltype(zero);
    softmax::Plan plan = softmax::plan_launch<Z>(p, arch, 132);
    if (wanted.contains("cluster")) {
      plan = {wanted["twice"].cast<bool>(), wanted["cluster"].cast<int>(),
              wanted["threads"].cast<int>(), wanted["slice"].cast<int>()};
    }
    used["twice"] = plan.twice, used["cluster"] = plan.cluster;
    used["threads"] = plan.threads, used["slice"] = plan.slice;
    if (d["run"].cast<bool>()) softmax::launch_softmax<Z>(p, plan, 0);
  });
  return used;
}

void optimal_temperature(const std::string& dtype, const py::dict& d, bool hold) {
  TemperatureParams p{};
  p.n = d["n"].cast<int64_t>();
  p.v = d["v"].cast<int>();
  p.logits = pointer<void>(d, "logits");
  p.logits_stride = d["logits_stride"].cast<int64_t>();
  p.rho = pointer<float>(d, "rho");
  p.rho_stride = d["rho_stride"].cast<int64_t>();
  p.log_v = float(std::log(double(p.v)));
  p.tau_min = d["tau_min"].cast<float>();
  p.tau_max = d["tau_max"].cast<float>();
  p.tau = pointer<float>(d, "tau");
  p.kl = pointer<float>(d, "kl");
  p.iterations = pointer<int32_t>(d, "iterations");
  for_dtype(dtype, [&](auto zero) { launch_temperature<decltype(zero)>(p, hold, 0); });
}

head::HeadParams head_from(const py::dict& d) {
  head::HeadParams p{};
  p.n = d["n"].cast<int64_t>();
  p.rows = rows_of_block(p.n);
  p.k = d["k"].cast<int>();
  p.h = pointer<float>(d, "h");
  p.norms = pointer<float>(d, "norms");
  p.scaler = pointer<float>(d, "scaler");
  p.weight = pointer<float>(d, "weight");
  p.bias = pointer<float>(d, "bias");
  p.tau_min = d["tau_min"].cast<float>();
  p.tau_range = d["tau_range"].cast<float>();
  p.tau = pointer<float>(d, "tau");
  p.grad_tau = pointer<float>(d, "grad_tau");
  p.grad_tau_stride = d["grad_tau_stride"].cast<int64_t>();
  p.grad_h = pointer<float>(d, "grad_h");
  p.sums = pointer<float>(d, "sums");
  return p;
}

void sigmoid_dropout(const py::dict& d) {
  head::DropoutParams p{};
  p.n = d["n"].cast<int64_t>();
  p.h = d["h"].cast<int>();
  p.pre = pointer<float>(d, "pre");
  p.bias = pointer<float>(d, "bias");
  p.factor = pointer<float>(d, "factor");
  p.key = pointer<int64_t>(d, "key");
  p.ids = pointer<int64_t>(d, "ids");
  p.ids_stride = d["ids_stride"].cast<int64_t>();
  p.first_row = d["first_row"].cast<int64_t>();
  const double probability = d["probability"].cast<double>();
  p.threshold = dropout_threshold(probability);
  p.scale = float(1 / (1 - probability));
  p.dropped = pointer<float>(d, "dropped");
  head::launch_dropout(p, 0);
}

void sigmoid_dropout_bwd(const py::dict& d) {
  head::DropoutGradParams p{};
  p.n = d["n"].cast<int64_t>();
  p.rows = rows_of_block(p.n);
  p.h = d["h"].cast<int>();
  p.grad = pointer<float>(d, "grad");
  p.dropped = pointer<float>(d, "dropped");
  p.factor = pointer<float>(d, "factor");
  p.kept = float(1 - d["probability"].cast<double>());
  p.grad_pre = pointer<float>(d, "grad_pre");
  p.sums = pointer<float>(d, "sums");
  head::launch_dropout_grad(p, 0);
}

}  // namespace
}  // namespace tempnet

PYBIND11_MODULE(cuda_emulator, module) {
  using namespace tempnet;
  module.def("set_order", [](const std::string& order, uint32_t seed) {
    using emulator::Order;
    emulator::settings.order = order == "forward"    ? Order::kForward
                               : order == "reversed" ? Order::kReversed
                                                     : Order::kRandom;
    emulator::settings.seed = seed;
  });
  module.def("plan", [](const std::string& dtype, const py::dict& params, int arch) {
    const device::Params p = params_from(params);
    py::dict plan;
    for_dtype(dtype, [&](auto zero) {
      using Z = decltype(zero);
      plan =
          plan_dict(device::plan_forward(p.n, p.v, sizeof(Z), device::aligned_rows<Z>(p), arch, 132,
                                         device::mode_of(p), p.grad != nullptr, p.softcap > 0));
    });
    return plan;
  });
  module.def("forward", [](const std::string& dtype, const py::dict& params, const py::dict& plan) {
    for_dtype(dtype, [&](auto zero) {
      device::launch_forward<decltype(zero)>(params_from(params), plan_from(plan), 0);
    });
  });
  module.def("backward", [](const std::string& dtype, const py::dict& params) {
    for_dtype(dtype,
              [&](auto zero) { device::launch_backward<decltype(zero)>(params_from(params), 0); });
  });
  module.def("stats", &stats);
  module.def("scale", [](const std::string& dtype, const py::dict& params) {
    for_dtype(dtype,
              [&](auto zero) { device::launch_scale<decltype(zero)>(params_from(params), 1, 0); });
  });
  module.def("row_scale", [](const py::dict& d) {
    token_rows::launch_scale(
        {d["n"].cast<int64_t>(), pointer<void>(d, "target"), d["target_stride"].cast<int64_t>(),
         d["wide_target"].cast<bool>(), d["weighted"].cast<bool>(), pointer<float>(d, "weight"),
         d["weight_stride"].cast<int64_t>(), pointer<float>(d, "normalizer"),
         d["divisor"].cast<float>(), d["ignore_index"].cast<int64_t>(), d["mean"].cast<bool>(),
         pointer<float>(d, "scale"), pointer<float>(d, "total")},
        0);
  });
  module.def("sum_rows", [](const py::dict& d) {
    token_rows::launch_sum(
        {d["n"].cast<int64_t>(), pointer<float>(d, "rows"), d["stride"].cast<int64_t>(),
         pointer<float>(d, "total"), pointer<float>(d, "sum")},
        0);
  });
  module.def("row_moments", [](const std::string& dtype, const py::dict& d, bool center) {
    const linear::Params params{d["n"].cast<int64_t>(),       d["v"].cast<int>(),
                                pointer<void>(d, "logits"),   d["stride"].cast<int64_t>(),
                                pointer<float>(d, "moments"), d["softcap"].cast<float>()};
    for_dtype(dtype, [&](auto zero) { linear::launch_moments<decltype(zero)>(params, center, 0); });
  });
  module.def("normalized_rows", [](const std::string& dtype, const py::dict& d) {
    const linear::NormalizeParams params{d["n"].cast<int64_t>(),     d["v"].cast<int>(),
                                         pointer<void>(d, "logits"), d["stride"].cast<int64_t>(),
                                         pointer<float>(d, "shift"), pointer<float>(d, "inverse"),
                                         d["softcap"].cast<float>(), pointer<float>(d, "x")};
    for_dtype(dtype, [&](auto zero) { linear::launch_normalize<decltype(zero)>(params, 0); });
  });
  module.def("sigmoid_dropout", &sigmoid_dropout);
  module.def("sigmoid_dropout_bwd", &sigmoid_dropout_bwd);
  module.def("temperature_head",
             [](const py::dict& d, bool squash) { head::launch_head(head_from(d), squash, 0); });
  module.def("temperature_head_bwd", [](const py::dict& d, bool squash) {
    head::launch_head_grad(head_from(d), squash, 0);
  });
  module.def("tempered_softmax", &tempered_softmax);
  module.def("similarity_stats", &similarity_stats);
  module.def("similarity_weights", &similarity_weights);
  module.def("anchor_states", &anchor_states);
  module.def("contrastive_anchors", &contrastive_anchors);
  module.def("pair_gradients", &pair_gradients);
  module.def("samples_at", &samples_at);
  module.def("optimal_temperature", &optimal_temperature);
  module.def("reverse_blocks", &faults::reverse_blocks);
  module.def("divergent_barrier", &faults::divergent_barrier);
  module.def("early_exit", &faults::early_exit);
  module.def("copy_through_shared", &faults::copy_through_shared);
  module.def("overrun", &faults::overrun);
}
