// Running top-k lists on the GPU. Needs no CUDA headers.
//
// Enqueues one kernel on the stream and returns: no synchronisation, no allocation, capturable in a CUDA
// graph. The lists do not depend on timing, nor on the order in which blocks of scores arrive.
#pragma once

#include "core/xcos_matrix.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

// Lists that come in must be sorted as this function leaves them; the first ones are -inf and -1 throughout.
Status xcos_topk_update(const TopkUpdate& update, Stream stream);

}  // namespace xcos::cuda
