// Scores of all pairs, against reference_matrix.h.
#include "cuda/matrix_mma.h"
#include "cuda/xcos_matrix.h"
#include "cuda_runtime.h"
#include "driver.h"
#include "matrix_case.h"

namespace driver {
namespace {

using xcos::Normalize;

Memory launch(const MatrixData& data) {
  Memory scores(data.c.probes * data.c.gallery, data.result);
  const xcos::cuda::Status status = xcos::cuda::xcos_matrix(data.problem, scores.data(), nullptr);
  if (status != 0) complain("xcos_matrix returned %d: %s", status, xcos::cuda::error_string(status));
  return scores;
}

void run(const MatrixCase& c, bool tensor_cores = false) {
  ++cases;
  current_case = c.name();
  MatrixData data(c);
  if (xcos::cuda::matrix_mma_takes(data.problem) != tensor_cores) complain("takes the wrong path");
  if (tensor_cores) {
    // What tensor cores multiply is of the features' type, the weights too.
    for (double& w : data.reference.weight) {
      unsigned char bits[2];
      set(c.scalar, bits, 0, w);
      w = get(c.scalar, bits, 0);
    }
  }
  const auto before = data.copy();
  emulator::settings.order = emulator::Order::forward;
  const Memory scores = launch(data);
  for (int64_t p = 0; p < c.probes; ++p) {
    for (int64_t g = 0; g < c.gallery; ++g) {
      const reference::MatrixPair pair = reference::matrix_pair(data.reference, p, g);
      const double got = scores.at(p * c.gallery + g);
      compare("score", p, g, got, pair.score, data.tolerance() * pair.error, 0);
      const bool bad = c.bad != MatrixCase::Bad::none && (p == c.probes / 2 || g == c.gallery / 2);
      if (std::isnan(got) != bad) complain("score[%d, %d]: NaN where none belongs, or none", int(p), int(g));
    }
  }
  // Another order of the threads and another number of blocks must give the same bits.
  emulator::settings.order = c.seed % 2 == 0 ? emulator::Order::reverse : emulator::Order::shuffled;
  emulator::settings.seed = c.seed;
  emulator::max_grid = 1 + int64_t(c.seed % 3);
  if (launch(data).copy() != scores.copy()) {
    complain("the scores depend on the order of threads or the number of blocks");
  }
  emulator::max_grid = 0x7fffffff;
  emulator::settings.order = emulator::Order::forward;
  if (data.copy() != before) complain("inputs were written to");
}

MatrixCase vary(Random& random, MatrixCase c) {
  c.orders = 1 + int64_t(random() % 2);
  c.normalize = random() % 2 == 0 ? Normalize::softmax : Normalize::min_shift;
  c.temperature = pick(random, {1.0, 0.25, 7.0});
  c.slope = pick(random, {0.25, 0.25, 0.0, 1.5, -0.5});
  c.gap = int64_t(random() % 3) * 5;
  c.unaligned = random() % 3 == 0;
  c.quantised = random() % 4 == 0;
  c.logits = pick(random, {1.0, 1.0, 20.0});
  c.seed = random();
  return c;
}

// The plain path: every type and mode, shapes around its strips, chunks and tiles.
void group_matrix_plain() {
  emulator::settings.capability = 75;
  Random random(1);
  const int64_t shapes[][4] = {{32, 16, 7, 7}, {1, 1, 1, 1},  {3, 5, 2, 9},   {9, 8, 1, 8},  {8, 17, 5, 17},
                               {31, 9, 9, 1},  {7, 3, 3, 16}, {20, 1, 4, 10}, {5, 4, 11, 33}};
  const int64_t counts[][2] = {{1, 1}, {3, 33}, {17, 2}};
  uint64_t round = 0;
  for (const auto& [channels, hidden, height, width] : shapes) {
    for (Scalar scalar : kScalars) {
      MatrixCase c;
      c.scalar = scalar;
      c.channels = channels;
      c.hidden = hidden;
      c.height = height;
      c.width = width;
      c.probes = counts[round % 3][0];
      c.gallery = counts[round % 3][1];
      if (channels == 5) c.probes = c.gallery = 2;
      ++round;
      run(vary(random, c));
    }
  }
  emulator::settings.capability = 90;
}

// NaN in one face of each side stays in the pairs of these faces; magnitudes that overflow an exponential do
// not.
void group_matrix_nan() {
  uint64_t seed = 1;
  for (Scalar scalar : kScalars) {
    for (Normalize normalize : {Normalize::softmax, Normalize::min_shift}) {
      for (MatrixCase::Bad bad :
           {MatrixCase::Bad::feature, MatrixCase::Bad::bias, MatrixCase::Bad::projection}) {
        MatrixCase c;
        c.scalar = scalar;
        c.normalize = normalize;
        c.bad = bad;
        c.height = 3;
        c.orders = 1 + int64_t(seed % 2);
        c.logits = 100;
        c.seed = seed++;
        // Unaligned features keep halves off the tensor cores.
        c.unaligned = true;
        run(c);
        if (xcos::scalar_size(scalar) != 2) continue;
        c.unaligned = false;
        run(c, true);
      }
    }
  }
}

// The tensor cores' path: the tuned shape and others, groups of probes and tiles that do not fill, every
// mode.
void group_matrix_mma() {
  Random random(2);
  const int64_t shapes[][4] = {{32, 16, 7, 7}, {32, 16, 7, 7}, {32, 16, 7, 7}, {16, 32, 3, 8},
                               {48, 16, 1, 1}, {64, 16, 2, 5}, {32, 16, 8, 3}, {16, 48, 4, 2}};
  const int64_t counts[][2] = {{1, 1}, {5, 17}, {4, 16}, {9, 3}, {3, 35}};
  uint64_t round = 0;
  for (Scalar scalar : {Scalar::f16, Scalar::bf16}) {
    for (const auto& [channels, hidden, height, width] : shapes) {
      MatrixCase c;
      c.scalar = scalar;
      c.channels = channels;
      c.hidden = hidden;
      c.height = height;
      c.width = width;
      c.probes = counts[round % 5][0];
      c.gallery = counts[round % 5][1];
      ++round;
      c = vary(random, c);
      c.gap = c.gap > 0 ? 8 : 0;
      c.unaligned = false;
      run(c, true);
    }
    // More groups than warps; a device whose blocks have little shared memory; one with hardly enough.
    MatrixCase c;
    c.scalar = scalar;
    c.probes = 39;
    c.gallery = 18;
    c.seed = 6;
    run(c, true);
    emulator::settings.shared_bytes = 99 * 1024;
    c.probes = 13;
    c.orders = 1;
    run(c, true);
    emulator::settings.shared_bytes = 64 * 1024;
    c.probes = 3;
    run(c, false);
    emulator::settings.shared_bytes = 227 * 1024;
    // What this path leaves to the other.
    for (int n = 0; n < 5; ++n) {
      MatrixCase other;
      other.scalar = scalar;
      other.height = 2;
      if (n == 0) other.channels = 24;
      if (n == 1) other.hidden = 8;
      if (n == 2) other.width = 9;
      if (n == 3) other.gap = 4;
      if (n == 4) other.unaligned = true;
      run(other, false);
    }
  }
}

void group_matrix_launch() {
  current_case = "matrix launch";
  const uint64_t before = emulator::launches;
  xcos::MatrixProblem nothing = {};
  nothing.channels = nothing.hidden = nothing.height = nothing.width = nothing.orders = 1;
  nothing.scalar = Scalar::f32;
  nothing.temperature = 1;
  nothing.gallery.faces = 3;
  float value = 0;
  expect(xcos::cuda::xcos_matrix(nothing, &value, nullptr) == 0, "no probes");
  nothing.gallery.faces = 0;
  nothing.probes.faces = 3;
  expect(xcos::cuda::xcos_matrix(nothing, &value, nullptr) == 0, "no gallery");
  expect(emulator::launches == before, "nothing was launched");
  for (Scalar scalar : kScalars) {
    MatrixCase c;
    c.scalar = scalar;
    const MatrixData data(c);
    Memory scores(15, data.result);
    emulator::settings.next_launch = cudaErrorInvalidConfiguration;
    expect(xcos::cuda::xcos_matrix(data.problem, scores.data(), nullptr) == cudaErrorInvalidConfiguration,
           "the launch error is returned");
    expect(cudaPeekAtLastError() == cudaSuccess, "the launch error is not left for others to find");
  }
}

}  // namespace

Groups matrix_groups() {
  return {{"matrix_launch", group_matrix_launch},
          {"matrix_mma", group_matrix_mma},
          {"matrix_nan", group_matrix_nan},
          {"matrix_plain", group_matrix_plain}};
}

}  // namespace driver
