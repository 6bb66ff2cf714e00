// xcos_ext._C: what was built, and the operators on NumPy arrays. Importing it registers the torch operators.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/xcos_score.h"
#include "cpu/grid_cosine.h"
#include "cpu/isa.h"
#include "cpu/xcos_score.h"
#include "ops/threads.h"

namespace py = pybind11;

namespace {

using xcos::Attention;
using xcos::Scalar;
using xcos::ops::torch_threads;

std::string shape_string(const py::array& array) {
  std::string out = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) out += (i ? ", " : "") + std::to_string(array.shape(i));
  return out + "]";
}

[[noreturn]] void fail(const char* op, const std::string& message) {
  throw std::invalid_argument(std::string(op) + ": " + message);
}

Scalar numpy_scalar(const char* op, const char* name, const py::array& array) {
  const py::dtype type = array.dtype();
  const bool native = type.byteorder() == '=' || type.byteorder() == '|';
  if (type.kind() == 'f' && native) {
    if (type.itemsize() == 2) return Scalar::f16;
    if (type.itemsize() == 4) return Scalar::f32;
    if (type.itemsize() == 8) return Scalar::f64;
  }
  fail(op, std::string(name) + ": expected dtype float16, float32 or float64, got " +
               py::cast<std::string>(py::str(type)));
}

bool element_strides(const py::array& array) {
  for (py::ssize_t i = 0; i < array.ndim(); ++i)
    if (array.strides(i) % array.itemsize() != 0) return false;
  return reinterpret_cast<uintptr_t>(array.data()) % array.itemsize() == 0;
}

int64_t stride(const py::array& array, int dim) { return array.strides(dim) / array.itemsize(); }

bool cells_evenly_spaced(const py::array& array) {
  const int d = static_cast<int>(array.ndim());
  return array.shape(d - 2) == 1 || array.shape(d - 1) == 1 ||
         array.strides(d - 2) == array.shape(d - 1) * array.strides(d - 1);
}

int64_t cell_stride(const py::array& array) {
  const int d = static_cast<int>(array.ndim());
  return array.shape(d - 1) > 1 ? stride(array, d - 1) : array.shape(d - 2) > 1 ? stride(array, d - 2) : 1;
}

py::array contiguous(const py::array& array) {
  return py::module_::import("numpy").attr("ascontiguousarray")(array).cast<py::array>();
}

// Read in place where one stride leads from cell to cell, as the tensor operators do; copied otherwise.
py::array readable(const py::array& array, bool adjacent) {
  const bool usable =
      element_strides(array) && cells_evenly_spaced(array) && (!adjacent || cell_stride(array) == 1);
  return usable ? array : contiguous(array);
}

struct Pair {
  py::array a, b;
  xcos::PairProblem problem{};
};

void check_positive(const char* op, const char* name, double value) {
  if (!(std::isfinite(value) && value > 0)) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", value);
    fail(op, std::string(name) + ": expected a finite number above 0, got " + text);
  }
}

Pair checked_pair(const char* op, const py::array& a, const py::array& b, double eps) {
  if (a.ndim() != 4) fail(op, "a: expected a feature map [N, C, H, W], got shape " + shape_string(a));
  const Scalar scalar = numpy_scalar(op, "a", a);
  if (a.shape(1) == 0 || a.shape(2) == 0 || a.shape(3) == 0)
    fail(op, "a: expected at least one channel and one cell, got shape " + shape_string(a));
  if (shape_string(a) != shape_string(b))
    fail(op, "b: expected shape " + shape_string(a) + " like a, got " + shape_string(b));
  if (numpy_scalar(op, "b", b) != scalar)
    fail(op, "b: expected dtype " + py::cast<std::string>(py::str(a.dtype())) + " like a, got " +
                 py::cast<std::string>(py::str(b.dtype())));
  check_positive(op, "eps", eps);
  Pair pair{readable(a, false), readable(b, false)};
  xcos::PairProblem& p = pair.problem;
  p.shape = {a.shape(0), a.shape(1), a.shape(2) * a.shape(3)};
  p.scalar = scalar;
  p.a = {pair.a.data(), stride(pair.a, 0), stride(pair.a, 1), cell_stride(pair.a)};
  p.b = {pair.b.data(), stride(pair.b, 0), stride(pair.b, 1), cell_stride(pair.b)};
  p.mode = Attention::uniform;
  p.attention = {nullptr, Scalar::f32, 0};
  p.temperature = 1.0;
  p.eps = eps;
  return pair;
}

py::array empty_result(Scalar scalar, std::vector<py::ssize_t> shape) {
  const py::dtype type =
      xcos::result_scalar(scalar) == Scalar::f64 ? py::dtype::of<double>() : py::dtype::of<float>();
  return py::array(type, std::move(shape));
}

py::array grid_cosine_numpy(const py::array& a, const py::array& b, double eps) {
  const Pair pair = checked_pair("grid_cosine", a, b, eps);
  py::array out = empty_result(pair.problem.scalar, {a.shape(0), a.shape(2), a.shape(3)});
  void* data = out.mutable_data();
  const py::gil_scoped_release release;
  xcos::cpu::grid_cosine(pair.problem, data, torch_threads);
  return out;
}

py::object xcos_score_numpy(const py::array& a, const py::array& b, const std::optional<py::array>& attention,
                            int64_t mode, double temperature, double eps, bool return_maps) {
  constexpr const char* op = "xcos_score";
  Pair pair = checked_pair(op, a, b, eps);
  if (mode < 0 || mode > 3)
    fail(op, "mode: expected 0 (uniform), 1 (norm), 2 (weights) or 3 (logits), got " + std::to_string(mode));
  xcos::PairProblem& p = pair.problem;
  p.mode = static_cast<Attention>(mode);
  check_positive(op, "temperature", temperature);
  p.temperature = temperature;
  const bool given = p.mode == Attention::weights || p.mode == Attention::logits;
  if (attention.has_value() != given)
    fail(op, std::string("attention: expected ") + (given ? "an array" : "None") + " for this mode, got " +
                 (attention.has_value() ? "an array" : "None"));
  py::array weights;
  if (given) {
    const auto d = attention->ndim();
    const bool shape = (d == 2 || d == 3) && attention->shape(d - 2) == a.shape(2) &&
                       attention->shape(d - 1) == a.shape(3) && (d == 2 || attention->shape(0) == a.shape(0));
    const std::string map = std::to_string(a.shape(2)) + ", " + std::to_string(a.shape(3)) + "]";
    if (!shape)
      fail(op, "attention: expected shape [" + map + " or [" + std::to_string(a.shape(0)) + ", " + map +
                   ", got " + shape_string(*attention));
    const Scalar scalar = numpy_scalar(op, "attention", *attention);
    weights = readable(*attention, true);
    p.attention = {weights.data(), scalar, d == 3 ? stride(weights, 0) : 0};
  }
  py::array score = empty_result(p.scalar, {a.shape(0)});
  xcos::XcosScoreOutputs out{score.mutable_data(), nullptr, nullptr};
  py::array similarity, map;
  if (return_maps) {
    similarity = empty_result(p.scalar, {a.shape(0), a.shape(2), a.shape(3)});
    map = empty_result(p.scalar, {a.shape(0), a.shape(2), a.shape(3)});
    out.similarity = similarity.mutable_data();
    out.attention = map.mutable_data();
  }
  {
    const py::gil_scoped_release release;
    xcos::cpu::xcos_score(p, out, torch_threads);
  }
  if (!return_maps) return std::move(score);
  return py::make_tuple(score, similarity, map);
}

py::dict build_info() {
  py::dict info;
  info["version"] = XCOS_VERSION;
  info["compiler"] = XCOS_COMPILER;
  info["torch"] = XCOS_TORCH_VERSION;
  info["torch_abi"] = "stable, 2.10 and later";
  std::vector<std::string> compiled, supported;
  for (auto isa :
       {xcos::cpu::Isa::baseline, xcos::cpu::Isa::avx2, xcos::cpu::Isa::avx512, xcos::cpu::Isa::avx512vnni}) {
    if (xcos::cpu::isa_compiled(isa)) compiled.emplace_back(xcos::cpu::isa_name(isa));
    if (xcos::cpu::isa_supported(isa)) supported.emplace_back(xcos::cpu::isa_name(isa));
  }
  info["isa_compiled"] = compiled;
  info["isa_supported"] = supported;
  info["isa"] = xcos::cpu::isa_name(xcos::cpu::selected_isa());
#if defined(XCOS_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_compiler"] = XCOS_CUDA_COMPILER;
  info["cuda_architectures"] = XCOS_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_compiler"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled part of xcos_ext: torch operators (registered on import), NumPy entry points, build "
      "information.";
  m.def("build_info", &build_info,
        "What was built: version, compiler, torch, instruction sets, CUDA architectures.");
  m.def("grid_cosine_numpy", &grid_cosine_numpy, py::arg("a"), py::arg("b"), py::arg("eps"));
  m.def("xcos_score_numpy", &xcos_score_numpy, py::arg("a"), py::arg("b"), py::arg("attention").none(true),
        py::arg("mode"), py::arg("temperature"), py::arg("eps"), py::arg("return_maps"));
}
