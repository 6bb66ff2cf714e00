#include "cpu/grid_cosine.h"

#include <type_traits>

#include "cpu/pair_kernels.h"

namespace xcos::cpu::XCOS_ISA {

void grid_cosine(const PairProblem& problem, void* similarity, ParallelFor parallel_for) {
  score_forward(problem, {nullptr, similarity, nullptr}, parallel_for);
}

void grid_cosine_backward(const PairProblem& problem, const void* grad_similarity, MutableFeatureView grad_a,
                          MutableFeatureView grad_b, ParallelFor parallel_for) {
  score_backward(problem, {nullptr, 0, grad_similarity, nullptr}, {grad_a, grad_b, nullptr}, parallel_for);
}

}  // namespace xcos::cpu::XCOS_ISA
