// What the all-pairs operators should compute, in float64, one plain loop after the other. Written from the
// contract in csrc/core/xcos_matrix.h, not from the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/xcos_matrix.h"

namespace reference {

using Values = std::vector<double>;

// One side's faces, dense.
struct Side {
  int64_t faces;
  Values features;    // [faces, cells, channels]
  Values projection;  // [faces, orders, hidden, cells]
  Values bias;        // [faces, orders, cells]
};

struct Matrix {
  int64_t channels, hidden, height, width, orders;
  Side p, g;
  Values weight;  // [hidden, 3, 3]
  double slope;
  double temperature;
  xcos::Normalize normalize;

  int64_t cells() const { return height * width; }
  double feature(const Side& s, int64_t face, int64_t cell, int64_t c) const {
    return s.features[size_t((face * cells() + cell) * channels + c)];
  }
  double projected(const Side& s, int64_t face, int64_t order, int64_t c, int64_t cell) const {
    return s.projection[size_t(((face * orders + order) * hidden + c) * cells() + cell)];
  }
  double bias(const Side& s, int64_t face, int64_t order, int64_t cell) const {
    return s.bias[size_t((face * orders + order) * cells() + cell)];
  }
  // Calls body(weight index, input cell) for the inputs of an output cell.
  template <class Body>
  void neighbours(int64_t cell, const Body& body) const {
    const int64_t row = cell / width, column = cell % width;
    for (int64_t k = 0; k < 9; ++k) {
      const int64_t r = row + k / 3 - 1, c = column + k % 3 - 1;
      if (r >= 0 && r < height && c >= 0 && c < width) body(k, r * width + c);
    }
  }
};

// One pair, with the sums of the magnitudes of what was added up.
struct MatrixPair {
  Values similarity;           // [cells]
  Values y;                    // [orders, cells]
  Values weights;              // [orders, cells]
  std::vector<double> scores;  // of each order
  double score = 0;
  double error = 0;     // of the score, for rounding errors of one unit in all terms
  double relative = 1;  // of a weight, the same
};

inline double larger(double u, double v) { return std::isnan(u) || u > v ? u : v; }

inline MatrixPair matrix_pair(const Matrix& m, int64_t p, int64_t g) {
  MatrixPair r;
  const int64_t cells = m.cells();
  double similarity_magnitude = 0;
  for (int64_t i = 0; i < cells; ++i) {
    double sum = 0, magnitude = 0;
    for (int64_t c = 0; c < m.channels; ++c) {
      const double term = m.feature(m.p, p, i, c) * m.feature(m.g, g, i, c);
      sum += term;
      magnitude += std::fabs(term);
    }
    r.similarity.push_back(sum);
    similarity_magnitude = std::fmax(similarity_magnitude, magnitude);
  }
  for (int64_t o = 0; o < m.orders; ++o) {
    Values z;
    double z_magnitude = 0;
    for (int64_t i = 0; i < cells; ++i) {
      double y = m.bias(m.p, p, o, i) + m.bias(m.g, g, o, i);
      double magnitude = std::fabs(m.bias(m.p, p, o, i)) + std::fabs(m.bias(m.g, g, o, i));
      m.neighbours(i, [&](int64_t k, int64_t j) {
        for (int64_t c = 0; c < m.hidden; ++c) {
          const double h = larger(m.projected(m.p, p, o, c, j), m.projected(m.g, g, o, c, j));
          y += m.weight[size_t(c * 9 + k)] * h;
          magnitude += std::fabs(m.weight[size_t(c * 9 + k)] * h);
        }
      });
      r.y.push_back(y);
      z.push_back(y > 0 ? y : m.slope * y);
      z_magnitude = std::fmax(z_magnitude, magnitude * std::fmax(1, std::fabs(m.slope)));
    }
    double extreme = z[0];
    const bool softmax = m.normalize == xcos::Normalize::softmax;
    for (double v : z) extreme = (softmax ? v > extreme : v < extreme) ? v : extreme;
    Values w;
    double total = 0;
    for (double v : z) w.push_back(softmax ? std::exp((v - extreme) / m.temperature) : v - extreme);
    for (double v : w) total += v;
    double score = 0, largest = 0;
    for (int64_t i = 0; i < cells; ++i) {
      const double weight = !softmax && total == 0 ? 1.0 / double(cells) : w[size_t(i)] / total;
      r.weights.push_back(weight);
      score += weight * r.similarity[size_t(i)];
      largest = std::fmax(largest, std::fabs(r.similarity[size_t(i)]));
    }
    r.scores.push_back(score);
    r.score += score / double(m.orders);
    const double relative = softmax ? 2 * z_magnitude / m.temperature
                                    : 2 * double(cells) * z_magnitude / (total == 0 ? 1 : total);
    r.error += ((relative + 1) * 2 * largest + similarity_magnitude) / double(m.orders);
    r.relative = std::fmax(r.relative, relative);
  }
  return r;
}

// A gradient with the sums of its terms' magnitudes, each times what rounding may do to the term.
struct Sum {
  Values value, error;
  void resize(int64_t count) {
    value.assign(size_t(count), 0.0);
    error.assign(size_t(count), 0.0);
  }
  void add(int64_t at, double term, double magnitude) {
    value[size_t(at)] += term;
    error[size_t(at)] += magnitude;
  }
};

struct SideSums {
  Sum features, projection, bias;
};

struct MatrixSums {
  SideSums p, g;
  Sum weight, slope;
};

// grad: [probes, gallery].
inline MatrixSums matrix_backward(const Matrix& m, const Values& grad) {
  MatrixSums s;
  const int64_t cells = m.cells();
  for (int side = 0; side < 2; ++side) {
    const int64_t faces = side == 0 ? m.p.faces : m.g.faces;
    SideSums& sums = side == 0 ? s.p : s.g;
    sums.features.resize(faces * cells * m.channels);
    sums.projection.resize(faces * m.orders * m.hidden * cells);
    sums.bias.resize(faces * m.orders * cells);
  }
  s.weight.resize(m.hidden * 9);
  s.slope.resize(1);
  for (int64_t p = 0; p < m.p.faces; ++p) {
    for (int64_t g = 0; g < m.g.faces; ++g) {
      const MatrixPair r = matrix_pair(m, p, g);
      const double incoming = grad[size_t(p * m.g.faces + g)];
      const double share = incoming / double(m.orders);
      double largest = 0;
      for (double v : r.similarity) largest = std::fmax(largest, std::fabs(v));
      for (int64_t o = 0; o < m.orders; ++o) {
        const double* w = &r.weights[size_t(o * cells)];
        const double* y = &r.y[size_t(o * cells)];
        for (int64_t i = 0; i < cells; ++i) {
          for (int64_t c = 0; c < m.channels; ++c) {
            const double a = m.feature(m.p, p, i, c), b = m.feature(m.g, g, i, c);
            const double factor = share * w[i], magnitude = std::fabs(factor) * r.relative;
            s.p.features.add((p * cells + i) * m.channels + c, factor * b, magnitude * std::fabs(b));
            s.g.features.add((g * cells + i) * m.channels + c, factor * a, magnitude * std::fabs(a));
          }
        }
        // dz, and from it dy.
        Values dz(static_cast<size_t>(cells)), magnitude(static_cast<size_t>(cells));
        if (m.normalize == xcos::Normalize::softmax) {
          for (int64_t i = 0; i < cells; ++i) {
            const double factor = share * w[i] / m.temperature;
            dz[size_t(i)] = factor * (r.similarity[size_t(i)] - r.scores[size_t(o)]);
            magnitude[size_t(i)] = std::fabs(factor) * 2 * largest * r.relative;
          }
        } else {
          Values z;
          for (int64_t i = 0; i < cells; ++i) z.push_back(y[i] > 0 ? y[i] : m.slope * y[i]);
          double smallest = z[0], total = 0, sum = 0, sum_magnitude = 0;
          for (double v : z) smallest = v < smallest ? v : smallest;
          for (double v : z) total += v - smallest;
          int64_t ties = 0;
          for (double v : z) ties += v == smallest;
          for (int64_t i = 0; i < cells && total != 0; ++i) {
            dz[size_t(i)] = share * (r.similarity[size_t(i)] - r.scores[size_t(o)]) / total;
            magnitude[size_t(i)] = std::fabs(share) * 2 * largest * r.relative / total;
            sum += dz[size_t(i)];
            sum_magnitude += magnitude[size_t(i)];
          }
          // The smallest share the gradient of what was subtracted.
          for (int64_t i = 0; i < cells; ++i) {
            if (z[size_t(i)] != smallest) continue;
            dz[size_t(i)] -= sum / double(ties);
            magnitude[size_t(i)] += sum_magnitude / double(ties);
          }
        }
        for (int64_t i = 0; i < cells; ++i) {
          const double slope = y[i] > 0 ? 1 : m.slope;
          const double dy = dz[size_t(i)] * slope, error = magnitude[size_t(i)] * std::fabs(slope);
          if (!(y[i] > 0)) {
            s.slope.add(0, dz[size_t(i)] * y[i], magnitude[size_t(i)] * std::fabs(y[i]));
          }
          s.p.bias.add((p * m.orders + o) * cells + i, dy, error);
          s.g.bias.add((g * m.orders + o) * cells + i, dy, error);
          m.neighbours(i, [&](int64_t k, int64_t j) {
            for (int64_t c = 0; c < m.hidden; ++c) {
              const double u = m.projected(m.p, p, o, c, j), v = m.projected(m.g, g, o, c, j);
              const double weight = m.weight[size_t(c * 9 + k)];
              // At a tie the second face's part takes it: the gallery's in order 0, the probe's in order 1.
              const bool probe = o == 0 ? u > v : !(v > u);
              Sum& sum = probe ? s.p.projection : s.g.projection;
              const int64_t face = probe ? p : g;
              sum.add(((face * m.orders + o) * m.hidden + c) * cells + j, dy * weight,
                      error * std::fabs(weight));
              const double h = probe ? u : v;
              s.weight.add(c * 9 + k, dy * h, error * std::fabs(h));
            }
          });
        }
      }
    }
  }
  return s;
}

}  // namespace reference
