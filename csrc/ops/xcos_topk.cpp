// xcos_topk_update: merges a block of scores into running top-k lists, in place.
#include "cpu/xcos_topk.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/cuda_bridge.h"
#include "ops/tensors.h"
#if defined(XCOS_WITH_CUDA)
#include "cuda/xcos_topk.h"
#endif

namespace xcos::ops {
namespace {

constexpr const char* kName = "xcos_topk_update";
constexpr int64_t kMostK = 2048;

void check_device(const char* name, const Tensor& t, const Tensor& scores) {
  check(device_string(t) == device_string(scores), kName, ": ", name, ": expected device ",
        device_string(scores), " like scores, got ", device_string(t));
}

void update(Tensor values, Tensor indices, const Tensor& scores, int64_t first_index, double min_score,
            const std::optional<Tensor>& exclude_indices, const std::optional<Tensor>& exclude_mask) {
  const ScalarType type = scores.scalar_type();
  check(scores.dim() == 2 && (scores.size(1) <= 1 || scores.stride(1) == 1), kName,
        ": scores: expected shape [P, M] with dense rows, got ", shape_string(scores));
  check(type == ScalarType::Float || type == ScalarType::Double, kName,
        ": scores: expected dtype float32 or float64, got ", dtype_name(type));
  check(values.dim() == 2 && values.size(0) == scores.size(0) && values.is_contiguous(), kName,
        ": values: expected shape [", scores.size(0), ", k], contiguous, got ", shape_string(values));
  const int64_t k = values.size(1);
  check(k >= 1 && k <= kMostK, kName, ": values: expected k from 1 to ", kMostK, ", got ", k);
  check(values.scalar_type() == type, kName, ": values: expected dtype ", dtype_name(type), ", got ",
        dtype_name(values.scalar_type()));
  check(indices.dim() == 2 && indices.size(0) == scores.size(0) && indices.size(1) == k &&
            indices.is_contiguous() && indices.scalar_type() == ScalarType::Long,
        kName, ": indices: expected int64 of shape ", shape_string(values), ", contiguous, got ",
        dtype_name(indices.scalar_type()), " of shape ", shape_string(indices));
  check_device("values", values, scores);
  check_device("indices", indices, scores);
  check(first_index >= 0, kName, ": first_index: expected 0 or more, got ", first_index);
  check(!std::isnan(min_score), kName, ": min_score: expected a number, got nan");

  TopkUpdate u{};
  u.scalar = to_scalar(type);
  u.probes = scores.size(0);
  u.count = scores.size(1);
  u.scores = scores.const_data_ptr();
  u.scores_stride = scores.stride(0);
  u.first_index = first_index;
  u.k = k;
  u.min_score = min_score;
  u.values = values.mutable_data_ptr();
  u.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  Tensor keep = scores;
  if (exclude_indices.has_value()) {
    const Tensor& e = *exclude_indices;
    check(e.dim() == 2 && e.size(0) == scores.size(0) && e.scalar_type() == ScalarType::Long, kName,
          ": exclude_indices: expected int64 of shape [", scores.size(0), ", E], got ",
          dtype_name(e.scalar_type()), " of shape ", shape_string(e));
    check_device("exclude_indices", e, scores);
    keep = e.size(1) <= 1 || e.stride(1) == 1 ? e : torch::stable::contiguous(e);
    u.exclude_indices = e.size(1) > 0 ? static_cast<const int64_t*>(keep.const_data_ptr()) : nullptr;
    u.exclude_count = keep.size(1);
    u.exclude_stride = keep.stride(0);
  }
  if (exclude_mask.has_value()) {
    const Tensor& e = *exclude_mask;
    check(e.dim() == 2 && (e.size(0) == scores.size(0) || e.size(0) == 1) && e.size(1) == scores.size(1) &&
              e.scalar_type() == ScalarType::Bool,
          kName, ": exclude_mask: expected bool of shape [", scores.size(0), " or 1, ", scores.size(1),
          "], got ", dtype_name(e.scalar_type()), " of shape ", shape_string(e));
    check_device("exclude_mask", e, scores);
    u.exclude_mask = static_cast<const bool*>(e.const_data_ptr());
    u.exclude_mask_stride = e.size(0) == 1 ? 0 : e.stride(0);
    u.exclude_mask_step = e.stride(1);
  }
  if (scores.is_cpu()) return cpu::xcos_topk_update(u, torch_threads);
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(scores);
  check_launch(kName, cuda::xcos_topk_update(u, cuda.stream()));
#endif
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) { m.impl("xcos_topk_update", TORCH_BOX(&xcos::ops::update)); }

#if defined(XCOS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CUDA, m) { m.impl("xcos_topk_update", TORCH_BOX(&xcos::ops::update)); }
#endif
