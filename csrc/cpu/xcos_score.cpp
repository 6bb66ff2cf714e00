#include "cpu/xcos_score.h"

#include <type_traits>

#include "cpu/pair_kernels.h"

namespace xcos::cpu::XCOS_ISA {

void xcos_score(const PairProblem& problem, const XcosScoreOutputs& outputs, ParallelFor parallel_for) {
  score_forward(problem, outputs, parallel_for);
}

void xcos_score_backward(const PairProblem& problem, const XcosScoreGradients& gradients,
                         const XcosScoreGradientOutputs& outputs, ParallelFor parallel_for) {
  score_backward(problem, gradients, outputs, parallel_for);
}

}  // namespace xcos::cpu::XCOS_ISA
