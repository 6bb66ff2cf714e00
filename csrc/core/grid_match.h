// Parameters of grid_match: cell cosines that tolerate faces out of alignment. CPU and CUDA kernels take the
// same structs.
//
// Every cell i of A is compared with the cells j of B that lie at most `radius` rows and columns away, inside
// the grid; c_ij is the cosine of grid_cosine. Then, with j over that neighbourhood,
//
//   best:  S[i] = max_j c_ij                 (the first in row-major order among equals)
//   soft:  S[i] = sum_j p_j c_ij,  p = softmax_j(c_ij / temperature)
//
// symmetric: the mean of that and of the same with the faces' parts exchanged, so that S(A, B) = S(B, A).
// NaN among a cell's candidates is its result, as in torch's max.
#pragma once

#include "core/xcos_score.h"

namespace xcos {

constexpr int kMostRadius = 7;

// The values are part of the operator schema.
enum class Match : int32_t { best = 0, soft = 1 };

struct MatchProblem {
  PairProblem pair;  // its attention is not looked at
  int64_t height;    // height * width = pair.shape.cells
  int64_t width;
  int32_t radius;  // 0 .. kMostRadius
  Match match;
  double temperature;  // > 0; soft only
  bool symmetric;
};

// A neighbourhood without the rows and columns that no cell of the grid has. Candidates are numbered row by
// row: k is `row(k)` rows down and `column(k)` columns right of the cell.
struct MatchWindow {
  int32_t rows;     // up and down
  int32_t columns;  // left and right
  int32_t across;   // 2 columns + 1
  int32_t count;    // candidates of a cell in the middle

  XCOS_HD int32_t row(int32_t k) const { return k / across - rows; }
  XCOS_HD int32_t column(int32_t k) const { return k % across - columns; }
};

XCOS_HD inline MatchWindow match_window(const MatchProblem& p) {
  MatchWindow w;
  w.rows = static_cast<int32_t>(p.radius < p.height ? p.radius : p.height - 1);
  w.columns = static_cast<int32_t>(p.radius < p.width ? p.radius : p.width - 1);
  w.across = 2 * w.columns + 1;
  w.count = (2 * w.rows + 1) * w.across;
  return w;
}

// 1 / temperature, finite in every type of sums.
XCOS_HD inline double match_inverse_temperature(const MatchProblem& p) {
  return 1.0 / (p.temperature < 1e-30 ? 1e-30 : p.temperature);
}

struct MatchOutputs {
  void* similarity;  // S [pairs, cells], dense, of result_scalar
  // best only, null: not wanted. The chosen neighbours, dense [pairs, directions, 2, cells]: rows down and
  // columns right from the cell to the neighbour; direction 0 from A's cells to B's, direction 1 (symmetric)
  // from B's to A's.
  int8_t* offsets;
};

// dL/dcosine of one candidate, from one direction: what dL/dS of the cell passes on to it.
// grad: dL/dS of the cell (half of it where symmetric). similarity: the direction's soft result. probability:
// p_j.
template <typename T>
XCOS_HD inline T soft_gradient(T grad, T probability, T cosine, T similarity, T inverse_temperature) {
  return grad * probability * ((T{} + 1) + (cosine - similarity) * inverse_temperature);
}

}  // namespace xcos
