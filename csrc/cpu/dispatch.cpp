// Picks the instruction set at run time. Compiled for the baseline only.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/grid_cosine.h"
#include "cpu/grid_match.h"
#include "cpu/isa.h"
#include "cpu/xcos_head.h"
#include "cpu/xcos_matrix.h"
#include "cpu/xcos_matrix_fixed.h"
#include "cpu/xcos_score.h"

namespace xcos::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool isa_compiled(Isa isa) {
  switch (isa) {
#if defined(XCOS_HAVE_X86_ISAS)
    case Isa::avx512vnni:
      return avx512vnni::grid_cosine != nullptr;
    case Isa::avx512:
      return avx512::grid_cosine != nullptr;
    case Isa::avx2:
      return avx2::grid_cosine != nullptr;
#endif
    case Isa::baseline:
      return baseline::grid_cosine != nullptr;
    default:
      return false;
  }
}

bool isa_supported(Isa isa) {
  if (!isa_compiled(isa)) return false;
  if (isa == Isa::baseline) return true;
#if defined(XCOS_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 && (isa == Isa::avx512 || __builtin_cpu_supports("avx512vnni"));
#else
  return false;
#endif
}

namespace {

Isa choose_isa() {
  const Isa all[] = {Isa::avx512vnni, Isa::avx512, Isa::avx2, Isa::baseline};
  const char* variable = std::getenv("XCOS_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  std::string available;
  for (Isa isa : all) {
    if (!isa_supported(isa)) continue;
    if (wanted.empty() || wanted == isa_name(isa)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("XCOS_CPU_ISA: expected one that this build and this processor have (" +
                              available + "), got " + (wanted.empty() ? "none" : wanted));
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

#if defined(XCOS_HAVE_X86_ISAS)
#define XCOS_CALL(name, ...)                \
  switch (selected_isa()) {                 \
    case Isa::avx512vnni:                   \
      return avx512vnni::name(__VA_ARGS__); \
    case Isa::avx512:                       \
      return avx512::name(__VA_ARGS__);     \
    case Isa::avx2:                         \
      return avx2::name(__VA_ARGS__);       \
    default:                                \
      return baseline::name(__VA_ARGS__);   \
  }
#else
#define XCOS_CALL(name, ...) return baseline::name(__VA_ARGS__);
#endif

void xcos_score(const PairProblem& problem, const XcosScoreOutputs& outputs, ParallelFor parallel_for) {
  XCOS_CALL(xcos_score, problem, outputs, parallel_for)
}

void xcos_score_backward(const PairProblem& problem, const XcosScoreGradients& gradients,
                         const XcosScoreGradientOutputs& outputs, ParallelFor parallel_for) {
  XCOS_CALL(xcos_score_backward, problem, gradients, outputs, parallel_for)
}

void grid_cosine(const PairProblem& problem, void* similarity, ParallelFor parallel_for) {
  XCOS_CALL(grid_cosine, problem, similarity, parallel_for)
}

void grid_cosine_backward(const PairProblem& problem, const void* grad_similarity, MutableFeatureView grad_a,
                          MutableFeatureView grad_b, ParallelFor parallel_for) {
  XCOS_CALL(grid_cosine_backward, problem, grad_similarity, grad_a, grad_b, parallel_for)
}

void grid_match(const MatchProblem& problem, const MatchOutputs& outputs, ParallelFor parallel_for) {
  XCOS_CALL(grid_match, problem, outputs, parallel_for)
}

void grid_match_backward(const MatchProblem& problem, const void* grad_similarity, MutableFeatureView grad_a,
                         MutableFeatureView grad_b, ParallelFor parallel_for) {
  XCOS_CALL(grid_match_backward, problem, grad_similarity, grad_a, grad_b, parallel_for)
}

void xcos_head(const HeadProblem& problem, const XcosScoreOutputs& outputs, ParallelFor parallel_for) {
  XCOS_CALL(xcos_head, problem, outputs, parallel_for)
}

void xcos_matrix(const MatrixProblem& problem, void* scores, ParallelFor parallel_for) {
  XCOS_CALL(xcos_matrix, problem, scores, parallel_for)
}

void xcos_matrix_backward(const MatrixProblem& problem, const MatrixGradients& gradients,
                          ParallelFor parallel_for) {
  XCOS_CALL(xcos_matrix_backward, problem, gradients, parallel_for)
}

void xcos_matrix_fixed(const FixedMatrixProblem& problem, void* scores, ParallelFor parallel_for) {
  XCOS_CALL(xcos_matrix_fixed, problem, scores, parallel_for)
}

}  // namespace xcos::cpu
