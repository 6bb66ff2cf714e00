// Gradients of all pairs, against reference_matrix.h.
#include "cuda/xcos_matrix.h"
#include "cuda_runtime.h"
#include "driver.h"
#include "matrix_case.h"

namespace driver {
Groups matrix_backward_groups() { return {}; }
}  // namespace driver
