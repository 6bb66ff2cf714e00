// Parameters of xcos_head: the learned attention of xCos and the score, from the grid features of N pairs, in
// evaluation mode. CPU and CUDA kernels take the same structs.
//
// With conv a 3x3 convolution (cells outside the grid count nothing) and the batch norm behind it:
//
//   E(F)    = prelu(conv(F))                                  channels -> hidden
//   g(A, B) = [prelu](conv(prelu(conv(cat(E(A), E(B))))))     2 hidden -> hidden -> 1
//   z(A, B) = g(A, B) + (residual: temperature (log |F(A)| + log |F(B)|), norms below eps counting as eps)
//   W       = softmax(z(A, B) / temperature) over the cells, or, symmetric, the mean of that and of the same
//             with the faces exchanged
//   S       = grid_cosine(F(A), F(B)),  score = sum W S
//
// Where residual, the last convolution has no batch norm and no activation behind it.
#pragma once

#include "core/xcos_score.h"

namespace xcos {

constexpr int kHeadHidden = 16;
constexpr int kHeadTaps = 9;
constexpr int64_t kHeadMostCells = 64;

// A convolution with what is behind it. Values are of the problem's parameter type.
struct HeadLayer {
  const void* weight;  // [out, in, 3, 3]
  int64_t weight_strides[4];
  const void* bias;           // [out]
  const void* norm_weight;    // [out]; null, as the next three: no batch norm
  const void* norm_bias;      // [out]
  const void* norm_mean;      // [out]
  const void* norm_variance;  // [out]
  double norm_eps;
  const void* slope;  // [1]; null: no activation
};

struct HeadProblem {
  PairProblem pair;  // its attention is not looked at; f16, bf16 or f32
  int64_t height;    // height * width = pair.shape.cells <= kHeadMostCells
  int64_t width;
  Scalar parameters;  // type of the layers' values: f16, bf16 or f32
  HeadLayer embed;    // channels -> hidden
  HeadLayer first;    // 2 hidden -> hidden
  HeadLayer last;     // hidden -> 1
  bool symmetric;
  bool residual;
};

// The layers folded and in the order in which kernels read them: a float array with, one behind the other,
//   embed [channels, taps, hidden], first [2 hidden, taps, hidden], last [taps, hidden], their shifts
//   (hidden, hidden, 1) and the slopes of the activations (3; 1 where there is none).
struct HeadLayout {
  int64_t embed, first, last, embed_shift, first_shift, last_shift, slopes, size;

  XCOS_HD static HeadLayout of(int64_t channels) {
    HeadLayout l;
    l.embed = 0;
    l.first = channels * kHeadTaps * kHeadHidden;
    l.last = l.first + 2 * kHeadHidden * kHeadTaps * kHeadHidden;
    l.embed_shift = l.last + kHeadTaps * kHeadHidden;
    l.first_shift = l.embed_shift + kHeadHidden;
    l.last_shift = l.first_shift + kHeadHidden;
    l.slopes = l.last_shift + 1;
    l.size = (l.slopes + 3 + 15) / 16 * 16;
    return l;
  }
};

}  // namespace xcos
