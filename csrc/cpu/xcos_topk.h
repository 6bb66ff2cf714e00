// Running top-k lists on the CPU. Compiled for the baseline only: reading scores once costs next to nothing
// beside computing them.
#pragma once

#include "core/parallel.h"
#include "core/xcos_matrix.h"

namespace xcos::cpu {

void xcos_topk_update(const TopkUpdate& update, ParallelFor parallel_for);

}  // namespace xcos::cpu
