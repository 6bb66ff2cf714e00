// xcos_matrix_fixed: scores of all pairs by products of rows. CPU only: on a GPU torch's own product does it.
#include "cpu/xcos_matrix_fixed.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/tensors.h"

namespace xcos::ops {
namespace {

constexpr const char* kName = "xcos_matrix_fixed";

void check_norms(const char* name, const Tensor& norms, const Tensor& rows, ScalarType type) {
  check(norms.dim() == 2 && norms.size(0) == rows.size(0) && norms.size(1) == rows.size(1), kName, ": ", name,
        ": expected shape [", rows.size(0), ", ", rows.size(1), "], got ", shape_string(norms));
  check(norms.scalar_type() == type, kName, ": ", name, ": expected dtype ", dtype_name(type), ", got ",
        dtype_name(norms.scalar_type()));
}

Tensor forward(const Tensor& probe_rows, const Tensor& gallery_features,
               const std::optional<Tensor>& probe_norms, const std::optional<Tensor>& gallery_norms) {
  check(probe_rows.dim() == 3 && probe_rows.size(1) >= 1 && probe_rows.size(2) >= 1, kName,
        ": probe_rows: expected shape [P, cells, C], got ", shape_string(probe_rows));
  check_dtype(kName, "gallery_features", gallery_features);
  const ScalarType wide = result_type(gallery_features.scalar_type());
  check(gallery_features.dim() == 3 && gallery_features.size(1) == probe_rows.size(1) &&
            gallery_features.size(2) == probe_rows.size(2),
        kName, ": gallery_features: expected shape [G, ", probe_rows.size(1), ", ", probe_rows.size(2),
        "], got ", shape_string(gallery_features));
  check(probe_rows.scalar_type() == wide, kName, ": probe_rows: expected dtype ", dtype_name(wide), ", got ",
        dtype_name(probe_rows.scalar_type()));
  check(probe_norms.has_value() == gallery_norms.has_value(), kName,
        ": gallery_norms: expected norms of both sides or of neither");
  const Tensor rows = dense_faces(probe_rows), faces = dense_faces(gallery_features);
  FixedMatrixProblem m{};
  m.cells = rows.size(1);
  m.channels = rows.size(2);
  m.scalar = to_scalar(faces.scalar_type());
  m.probes = rows.size(0);
  m.probe_rows = rows.const_data_ptr();
  m.probe_stride = rows.stride(0);
  m.gallery = faces.size(0);
  m.gallery_features = faces.const_data_ptr();
  m.gallery_stride = faces.stride(0);
  Tensor keep_probes = rows, keep_gallery = faces;
  if (probe_norms.has_value()) {
    check_norms("probe_norms", *probe_norms, rows, wide);
    check_norms("gallery_norms", *gallery_norms, faces, wide);
    keep_probes = dense_faces(*probe_norms);
    keep_gallery = dense_faces(*gallery_norms);
    m.probe_norms = keep_probes.const_data_ptr();
    m.probe_norms_stride = keep_probes.stride(0);
    m.gallery_norms = keep_gallery.const_data_ptr();
    m.gallery_norms_stride = keep_gallery.stride(0);
  }
  const Tensor scores = empty_like_device(rows, {rows.size(0), faces.size(0)}, wide);
  cpu::xcos_matrix_fixed(m, scores.mutable_data_ptr(), torch_threads);
  return scores;
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) { m.impl("xcos_matrix_fixed", TORCH_BOX(&xcos::ops::forward)); }
