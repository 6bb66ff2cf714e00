// xcos_head in float64, one plain loop after the other; written from the contract in csrc/core/xcos_head.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

// A 3x3 convolution, its batch norm (variance empty: none) and its activation (slope 1: none).
struct HeadLayer {
  int64_t outputs, inputs;
  std::vector<double> weight, bias, norm_weight, norm_bias, norm_mean, norm_variance;
  double norm_eps = 0, slope = 1;

  std::vector<double> operator()(const std::vector<double>& x, int64_t height, int64_t width) const {
    const int64_t cells = height * width;
    std::vector<double> y;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < cells; ++i) {
        double sum = bias[size_t(o)];
        for (int64_t c = 0; c < inputs; ++c) {
          for (int64_t k = 0; k < 9; ++k) {
            const int64_t row = i / width + k / 3 - 1, column = i % width + k % 3 - 1;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            sum += weight[size_t((o * inputs + c) * 9 + k)] * x[size_t(c * cells + row * width + column)];
          }
        }
        if (!norm_variance.empty())
          sum = (sum - norm_mean[size_t(o)]) / std::sqrt(norm_variance[size_t(o)] + norm_eps) *
                    norm_weight[size_t(o)] +
                norm_bias[size_t(o)];
        y.push_back(sum > 0 ? sum : sum * slope);
      }
    }
    return y;
  }
};

struct Head {
  int64_t channels, height, width;
  HeadLayer embed, first, last;
  bool symmetric, residual;
  double temperature, eps;
};

struct HeadResult {
  double score = 0;
  std::vector<double> similarity, attention;
};

// x, y: [channels, cells].
inline HeadResult head(const Head& h, const std::vector<double>& x, const std::vector<double>& y) {
  const int64_t cells = h.height * h.width;
  HeadResult r;
  r.attention.assign(size_t(cells), 0.0);
  std::vector<double> norms;
  const auto clamped = [&](double v) { return v < h.eps ? h.eps : v; };
  for (int64_t i = 0; i < cells; ++i) {
    double dot = 0, xx = 0, yy = 0;
    for (int64_t c = 0; c < h.channels; ++c) {
      const double u = x[size_t(c * cells + i)], v = y[size_t(c * cells + i)];
      dot += u * v;
      xx += u * u;
      yy += v * v;
    }
    const double a = clamped(std::sqrt(xx)), b = clamped(std::sqrt(yy));
    r.similarity.push_back(dot / (a * b));
    norms.push_back(h.residual ? h.temperature * (std::log(a) + std::log(b)) : 0);
  }
  const std::vector<double> embedded[] = {h.embed(x, h.height, h.width), h.embed(y, h.height, h.width)};
  const int orders = h.symmetric ? 2 : 1;
  for (int order = 0; order < orders; ++order) {
    std::vector<double> both = embedded[order];
    both.insert(both.end(), embedded[1 - order].begin(), embedded[1 - order].end());
    std::vector<double> z = h.last(h.first(both, h.height, h.width), h.height, h.width);
    double highest = -INFINITY, total = 0;
    for (int64_t i = 0; i < cells; ++i) {
      z[size_t(i)] = (z[size_t(i)] + norms[size_t(i)]) / h.temperature;
      highest = std::fmax(highest, z[size_t(i)]);
    }
    for (double& v : z) total += v = std::exp(v - highest);
    for (int64_t i = 0; i < cells; ++i) r.attention[size_t(i)] += z[size_t(i)] / total / orders;
  }
  for (int64_t i = 0; i < cells; ++i) r.score += r.attention[size_t(i)] * r.similarity[size_t(i)];
  return r;
}

}  // namespace reference
