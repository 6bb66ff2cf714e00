// grid_match in float64, one plain loop after the other; written from the contract in csrc/core/grid_match.h.
// Its gradients are checked against differences of its own forward pass (group match_reference).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace reference {

struct MatchPair {
  int64_t channels, height, width;
  int64_t radius;
  bool best, symmetric;
  double temperature, eps;
  std::vector<double> x, y;  // [channels, cells]

  int64_t cells() const { return height * width; }
  bool near(int64_t i, int64_t j) const {
    return std::llabs(i / width - j / width) <= radius && std::llabs(i % width - j % width) <= radius;
  }
  static double norm(const std::vector<double>& v, int64_t channels, int64_t cells, int64_t cell) {
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += v[size_t(c * cells + cell)] * v[size_t(c * cells + cell)];
    return std::sqrt(sum);
  }
};

struct MatchGradients {
  std::vector<double> x, y;
  std::vector<double> x_magnitude, y_magnitude;  // sums of the terms' magnitudes
};

struct MatchResult {
  std::vector<double> cosine;          // [cells of x, cells of y]
  std::vector<double> x_norm, y_norm;  // not clamped
  std::vector<double> probability[2];  // [own cells, other cells] of both directions: p, or 1 at the choice
  std::vector<double> matched[2];      // S of both directions
  std::vector<double> similarity;

  double of(const MatchPair& p, int direction, int64_t own, int64_t other) const {
    return cosine[size_t(direction == 0 ? own * p.cells() + other : other * p.cells() + own)];
  }
};

// choices: for best, both directions' chosen cells, [own cells] each; empty: the first largest.
inline MatchResult match(const MatchPair& p, const std::vector<int64_t> choices[2] = nullptr) {
  const int64_t n = p.cells();
  MatchResult r;
  for (int64_t i = 0; i < n; ++i) {
    r.x_norm.push_back(MatchPair::norm(p.x, p.channels, n, i));
    r.y_norm.push_back(MatchPair::norm(p.y, p.channels, n, i));
  }
  const auto clamped = [&](double v) { return v < p.eps ? p.eps : v; };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < p.channels; ++c) dot += p.x[size_t(c * n + i)] * p.y[size_t(c * n + j)];
      r.cosine.push_back(dot / (clamped(r.x_norm[size_t(i)]) * clamped(r.y_norm[size_t(j)])));
    }
  }
  r.similarity.assign(size_t(n), 0.0);
  for (int direction = 0; direction < (p.symmetric ? 2 : 1); ++direction) {
    r.probability[direction].assign(size_t(n * n), 0.0);
    for (int64_t own = 0; own < n; ++own) {
      double largest = -std::numeric_limits<double>::infinity();
      int64_t chosen = -1;
      bool bad = false;
      for (int64_t other = 0; other < n; ++other) {
        if (!p.near(own, other)) continue;
        const double c = r.of(p, direction, own, other);
        if (std::isnan(c) && !bad) {
          bad = true;
          chosen = other;
        }
        if (!bad && c > largest) {
          largest = c;
          chosen = other;
        }
      }
      double result = 0;
      if (p.best) {
        if (choices != nullptr) chosen = choices[direction][size_t(own)];
        r.probability[direction][size_t(own * n + chosen)] = 1;
        result = bad ? NAN : r.of(p, direction, own, chosen);
      } else {
        double total = 0;
        for (int64_t other = 0; other < n; ++other)
          if (p.near(own, other))
            total += std::exp((r.of(p, direction, own, other) - largest) / p.temperature);
        for (int64_t other = 0; other < n; ++other) {
          if (!p.near(own, other)) continue;
          const double weight = std::exp((r.of(p, direction, own, other) - largest) / p.temperature) / total;
          r.probability[direction][size_t(own * n + other)] = weight;
          result += weight * r.of(p, direction, own, other);
        }
      }
      r.matched[direction].push_back(result);
      r.similarity[size_t(own)] += p.symmetric ? result / 2 : result;
    }
  }
  return r;
}

inline MatchGradients match_backward(const MatchPair& p, const MatchResult& r,
                                     const std::vector<double>& grad) {
  const int64_t n = p.cells();
  std::vector<double> d(size_t(n * n), 0.0), magnitude(size_t(n * n), 0.0);  // dL/dcosine
  for (int direction = 0; direction < (p.symmetric ? 2 : 1); ++direction) {
    for (int64_t own = 0; own < n; ++own) {
      for (int64_t other = 0; other < n; ++other) {
        if (!p.near(own, other)) continue;
        const double weight = r.probability[direction][size_t(own * n + other)];
        const double c = r.of(p, direction, own, other);
        const double slope = p.best ? 0 : (c - r.matched[direction][size_t(own)]) / p.temperature;
        const double share = p.symmetric ? 0.5 : 1.0;
        const size_t at = size_t(direction == 0 ? own * n + other : other * n + own);
        d[at] += share * grad[size_t(own)] * weight * (1 + slope);
        magnitude[at] += std::fabs(share * grad[size_t(own)] * weight) * (p.best ? 1 : 1 + 2 / p.temperature);
      }
    }
  }
  MatchGradients g;
  g.x.assign(p.x.size(), 0.0);
  g.y.assign(p.y.size(), 0.0);
  g.x_magnitude.assign(p.x.size(), 0.0);
  g.y_magnitude.assign(p.y.size(), 0.0);
  const auto clamped = [&](double v) { return v < p.eps ? p.eps : v; };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (!p.near(i, j)) continue;
      const size_t at = size_t(i * n + j);
      const double x_norm = r.x_norm[size_t(i)], y_norm = r.y_norm[size_t(j)];
      const double scale = 1 / (clamped(x_norm) * clamped(y_norm));
      for (int64_t c = 0; c < p.channels; ++c) {
        const double x = p.x[size_t(c * n + i)], y = p.y[size_t(c * n + j)];
        const auto add = [&](double own, double other, double own_norm, double& value, double& terms) {
          if (own_norm == 0) return;  // by contract
          const double along = own_norm < p.eps ? 0 : r.cosine[at] * own / (own_norm * own_norm);
          value += d[at] * (other * scale - along);
          terms += magnitude[at] * (std::fabs(other * scale) + std::fabs(along));
        };
        add(x, y, x_norm, g.x[size_t(c * n + i)], g.x_magnitude[size_t(c * n + i)]);
        add(y, x, y_norm, g.y[size_t(c * n + j)], g.y_magnitude[size_t(c * n + j)]);
      }
    }
  }
  return g;
}

}  // namespace reference
