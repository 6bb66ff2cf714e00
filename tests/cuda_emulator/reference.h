// What the kernels should compute, in float64, one plain loop after the other. Written from the contracts in
// csrc/core, not from the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/types.h"

namespace reference {

// Dense [channels, cells] maps of one pair and everything that decides its result.
struct Pair {
  int64_t channels;
  int64_t cells;
  std::vector<double> x;
  std::vector<double> y;
  xcos::Attention mode;
  std::vector<double> attention;  // weights or logits
  double temperature;
  double eps;

  double at_x(int64_t channel, int64_t cell) const { return x[size_t(channel * cells + cell)]; }
  double at_y(int64_t channel, int64_t cell) const { return y[size_t(channel * cells + cell)]; }
};

struct Result {
  double score = 0;
  std::vector<double> similarity;
  std::vector<double> weights;
  std::vector<double> x_norm;
  std::vector<double> y_norm;
};

inline Result forward(const Pair& p) {
  Result r;
  double total_product = 0;
  for (int64_t i = 0; i < p.cells; ++i) {
    double dot = 0, xx = 0, yy = 0;
    for (int64_t c = 0; c < p.channels; ++c) {
      dot += p.at_x(c, i) * p.at_y(c, i);
      xx += p.at_x(c, i) * p.at_x(c, i);
      yy += p.at_y(c, i) * p.at_y(c, i);
    }
    const double x_norm = std::sqrt(xx), y_norm = std::sqrt(yy);
    const double x_clamped = x_norm < p.eps ? p.eps : x_norm;
    const double y_clamped = y_norm < p.eps ? p.eps : y_norm;
    r.similarity.push_back(dot / (x_clamped * y_clamped));
    r.x_norm.push_back(x_norm);
    r.y_norm.push_back(y_norm);
    total_product += x_norm * y_norm;
  }
  double largest = -std::numeric_limits<double>::infinity();
  double total_exponential = 0;
  if (p.mode == xcos::Attention::logits) {
    for (double logit : p.attention) largest = logit > largest ? logit : largest;
    for (double logit : p.attention) total_exponential += std::exp((logit - largest) / p.temperature);
  }
  for (int64_t i = 0; i < p.cells; ++i) {
    const size_t k = size_t(i);
    double w = 1.0 / double(p.cells);
    if (p.mode == xcos::Attention::weights) w = p.attention[k];
    if (p.mode == xcos::Attention::logits)
      w = std::exp((p.attention[k] - largest) / p.temperature) / total_exponential;
    if (p.mode == xcos::Attention::norm && total_product != 0) w = r.x_norm[k] * r.y_norm[k] / total_product;
    r.weights.push_back(w);
    r.score += w * r.similarity[k];
  }
  return r;
}

// Each value with the sum of its terms' magnitudes, which is what rounding errors are proportional to.
struct Gradients {
  std::vector<double> x, x_magnitude;
  std::vector<double> y, y_magnitude;
  std::vector<double> attention, attention_magnitude;
};

// grad_similarity, grad_weights: [cells].
inline Gradients backward(const Pair& p, double grad_score, const std::vector<double>& grad_similarity,
                          const std::vector<double>& grad_weights) {
  const Result r = forward(p);
  const size_t cells = size_t(p.cells);
  const auto abs = [](double v) { return std::fabs(v); };
  // Step 1: through score = sum W S and the two direct gradients.
  std::vector<double> d_similarity(cells), d_similarity_magnitude(cells), d_weight(cells),
      d_weight_magnitude(cells);
  for (size_t i = 0; i < cells; ++i) {
    d_similarity[i] = grad_score * r.weights[i] + grad_similarity[i];
    d_similarity_magnitude[i] = abs(grad_score * r.weights[i]) + abs(grad_similarity[i]);
    d_weight[i] = grad_score * r.similarity[i] + grad_weights[i];
    d_weight_magnitude[i] = abs(grad_score) + abs(grad_weights[i]);
  }
  // Step 2: through W.
  Gradients g;
  g.attention.assign(cells, 0.0);
  g.attention_magnitude.assign(cells, 0.0);
  std::vector<double> d_product(cells, 0.0), d_product_magnitude(cells, 0.0);
  double mean = 0, mean_magnitude = 0, total_product = 0;
  for (size_t i = 0; i < cells; ++i) {
    mean += r.weights[i] * d_weight[i];
    mean_magnitude += abs(r.weights[i]) * d_weight_magnitude[i];
    total_product += r.x_norm[i] * r.y_norm[i];
  }
  for (size_t i = 0; i < cells; ++i) {
    const double difference = d_weight[i] - mean, magnitude = d_weight_magnitude[i] + mean_magnitude;
    if (p.mode == xcos::Attention::weights) {
      g.attention[i] = d_weight[i];
      g.attention_magnitude[i] = d_weight_magnitude[i];
    }
    if (p.mode == xcos::Attention::logits) {
      g.attention[i] = r.weights[i] * difference / p.temperature;
      g.attention_magnitude[i] = r.weights[i] * magnitude / p.temperature;
    }
    if (p.mode == xcos::Attention::norm && total_product != 0) {
      d_product[i] = difference / total_product;
      d_product_magnitude[i] = magnitude / total_product;
    }
  }
  // Step 3: through each cell's cosine and norms. First of the cell's own vector, then of the other.
  const auto through = [&](size_t k, double own, double other, double own_norm, double other_norm,
                           double& value, double& magnitude) {
    const double own_clamped = own_norm < p.eps ? p.eps : own_norm;
    const double other_clamped = other_norm < p.eps ? p.eps : other_norm;
    if (own_norm == 0) {  // by contract: a zero cell has no direction to move in
      value = magnitude = 0 * other;
      return;
    }
    const double across = other / (own_clamped * other_clamped);
    const double along = own_norm < p.eps ? 0.0 : own / (own_norm * own_norm);
    const double longer = other_norm * own / own_norm;
    value = d_similarity[k] * (across - r.similarity[k] * along) + d_product[k] * longer;
    magnitude = d_similarity_magnitude[k] * (abs(across) + abs(along)) + d_product_magnitude[k] * abs(longer);
  };
  g.x.resize(p.x.size());
  g.y.resize(p.y.size());
  g.x_magnitude.resize(p.x.size());
  g.y_magnitude.resize(p.y.size());
  for (size_t at = 0; at < p.x.size(); ++at) {
    const size_t k = at % cells;
    through(k, p.x[at], p.y[at], r.x_norm[k], r.y_norm[k], g.x[at], g.x_magnitude[at]);
    through(k, p.y[at], p.x[at], r.y_norm[k], r.x_norm[k], g.y[at], g.y_magnitude[at]);
  }
  return g;
}

}  // namespace reference
