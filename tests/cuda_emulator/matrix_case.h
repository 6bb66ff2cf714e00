// A generated problem of the all-pairs operators: memory of its own, and the same in float64.
#pragma once

#include <string>

#include "core/xcos_matrix.h"
#include "driver.h"
#include "reference_matrix.h"

namespace driver {

struct MatrixCase {
  Scalar scalar = Scalar::f32;
  int64_t probes = 3;
  int64_t gallery = 5;
  int64_t channels = 32;
  int64_t hidden = 16;
  int64_t height = 7;
  int64_t width = 7;
  int64_t orders = 1;
  xcos::Normalize normalize = xcos::Normalize::softmax;
  double temperature = 1.0;
  double slope = 0.25;
  int64_t gap = 0;         // elements between faces
  bool unaligned = false;  // memory begins one element after an aligned address
  bool quantised = false;  // to few values, whose sums are exact: ties everywhere
  enum class Bad { none, feature, bias, projection } bad = Bad::none;  // NaN in one face of each side
  double logits = 1.0;                                                 // scale of bias and weight
  uint64_t seed = 1;

  std::string name() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "%s P%" PRId64 " G%" PRId64 " C%" PRId64 " hidden%" PRId64 " %" PRId64 "x%" PRId64
                  " orders%" PRId64 " %s T%g slope%g gap%" PRId64 "%s%s bad%d x%g seed%" PRIu64,
                  kScalarNames[int(scalar)], probes, gallery, channels, hidden, height, width, orders,
                  normalize == xcos::Normalize::softmax ? "softmax" : "min-shift", temperature, slope, gap,
                  unaligned ? " unaligned" : "", quantised ? " quantised" : "", int(bad), logits, seed);
    return text;
  }
};

// Faces in memory, each dense, with gaps between them.
struct Faces {
  int64_t faces = 0;
  int64_t size = 0;
  int64_t stride = 0;
  Memory memory;

  Faces() = default;
  Faces(int64_t faces_, int64_t size_, int64_t gap, Scalar scalar, bool unaligned)
      : faces(faces_), size(size_), stride(size_ + gap) {
    memory = Memory(faces == 0 ? 0 : (faces - 1) * stride + size, scalar, unaligned);
  }
  void put(int64_t face, int64_t at, double value) const { memory.put(face * stride + at, value); }
  reference::Values values() const {
    reference::Values all;
    for (int64_t face = 0; face < faces; ++face) {
      for (int64_t at = 0; at < size; ++at) all.push_back(memory.at(face * stride + at));
    }
    return all;
  }
};

struct MatrixData {
  struct Side {
    Faces features, projection, bias;
  };
  MatrixCase c;
  Scalar result;
  Side p, g;
  Memory weight, slope;
  reference::Matrix reference;
  xcos::MatrixProblem problem = {};

  explicit MatrixData(const MatrixCase& c_) : c(c_), result(xcos::result_scalar(c_.scalar)) {
    Random random(c.seed);
    const int64_t cells = c.height * c.width;
    fill(p, c.probes, cells, random);
    fill(g, c.gallery, cells, random);
    weight = Memory(c.hidden * 9, result);
    for (int64_t i = 0; i < c.hidden * 9; ++i) {
      weight.put(i, c.logits * draw(random, 0.5 / std::sqrt(double(c.hidden))));
    }
    slope = Memory(1, result);
    slope.put(0, c.slope);

    problem.channels = c.channels;
    problem.hidden = c.hidden;
    problem.height = c.height;
    problem.width = c.width;
    problem.orders = c.orders;
    problem.scalar = c.scalar;
    problem.probes = view(p);
    problem.gallery = view(g);
    problem.weight = weight.data();
    problem.slope = slope.data();
    problem.temperature = c.temperature;
    problem.normalize = c.normalize;

    reference.channels = c.channels;
    reference.hidden = c.hidden;
    reference.height = c.height;
    reference.width = c.width;
    reference.orders = c.orders;
    reference.p = {c.probes, p.features.values(), p.projection.values(), p.bias.values()};
    reference.g = {c.gallery, g.features.values(), g.projection.values(), g.bias.values()};
    for (int64_t i = 0; i < c.hidden * 9; ++i) reference.weight.push_back(weight.at(i));
    reference.slope = slope.at(0);
    reference.temperature = c.temperature;
    reference.normalize = c.normalize;
  }

  std::vector<std::vector<unsigned char>> copy() const {
    std::vector<std::vector<unsigned char>> all;
    for (const Side* side : {&p, &g}) {
      for (const Faces* faces : {&side->features, &side->projection, &side->bias}) {
        all.push_back(faces->memory.copy());
      }
    }
    return all;
  }

  // Sums of C and of 9 hidden rounded products, and of the cells.
  double tolerance() const {
    const double unit = result == Scalar::f64 ? 0x1p-52 : 0x1p-23;
    return unit * (8 + std::sqrt(double(c.channels + 9 * c.hidden + c.height * c.width)));
  }

 private:
  double draw(Random& random, double scale) const {
    if (c.quantised) return 0.5 * double(int64_t(random() % 5) - 2);
    return std::normal_distribution<double>(0.0, scale)(random);
  }

  void fill(Side& side, int64_t faces, int64_t cells, Random& random) const {
    side.features = Faces(faces, cells * c.channels, c.gap, c.scalar, c.unaligned);
    side.projection = Faces(faces, c.orders * c.hidden * cells, c.gap, c.scalar, c.unaligned);
    side.bias = Faces(faces, c.orders * cells, c.gap, result, c.unaligned);
    for (int64_t n = 0; n < faces; ++n) {
      for (int64_t i = 0; i < side.features.size; ++i) {
        side.features.put(n, i, draw(random, 1 / std::sqrt(double(c.channels))));
      }
      for (int64_t i = 0; i < side.projection.size; ++i) side.projection.put(n, i, draw(random, 1.0));
      for (int64_t i = 0; i < side.bias.size; ++i) side.bias.put(n, i, c.logits * draw(random, 1.0));
    }
    if (faces == 0 || c.bad == MatrixCase::Bad::none) return;
    const int64_t n = faces / 2;
    const Faces& bad = c.bad == MatrixCase::Bad::feature ? side.features
                       : c.bad == MatrixCase::Bad::bias  ? side.bias
                                                         : side.projection;
    bad.put(n, int64_t(random() % uint64_t(bad.size)), NAN);
  }

  static xcos::TemplateView view(const Side& s) {
    return {s.features.faces,    s.features.memory.data(), s.features.stride, s.projection.memory.data(),
            s.projection.stride, s.bias.memory.data(),     s.bias.stride};
  }
};

}  // namespace driver
