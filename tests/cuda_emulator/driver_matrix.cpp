// Scores of all pairs, against reference_matrix.h.
#include <array>

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
  const bool tuned = c.channels == 32 && c.hidden == 16 && c.height == 7 && c.width == 7;
  if (!take(std::string(kScalarNames[int(c.scalar)]) + (tensor_cores ? tuned ? " tuned" : " products" : "") +
            (c.normalize == Normalize::softmax ? " softmax " : " ") + std::to_string(c.orders))) {
    return;
  }
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
  plainly();
  const Memory scores = launch(data);
  // Of very many pairs some, from all over the place.
  const int64_t step = 1 + c.probes * c.gallery / 20000;
  for (int64_t p = 0; p < c.probes; ++p) {
    for (int64_t g = p % step; g < c.gallery; g += step) {
      const reference::MatrixPair pair = reference::matrix_pair(data.reference, p, g);
      const double got = scores.at(p * c.gallery + g);
      compare("score", p, g, got, pair.score, data.tolerance() * pair.error, 0);
      const bool bad = c.bad != MatrixCase::Bad::none && (p == c.probes / 2 || g == c.gallery / 2);
      if (std::isnan(got) != bad) complain("score[%d, %d]: NaN where none belongs, or none", int(p), int(g));
    }
  }
  otherwise(c.seed);
  if (launch(data).copy() != scores.copy()) {
    complain("the scores depend on the order of threads or the number of blocks");
  }
  plainly();
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
  machine::settings.capability = 75;
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
  machine::settings.capability = 0;
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
    machine::settings.device = 1;
    machine::settings.shared_bytes = 99 * 1024;
    c.probes = 13;
    c.orders = 1;
    run(c, true);
    machine::settings.device = 2;
    machine::settings.shared_bytes = 64 * 1024;
    c.probes = 3;
    run(c, false);
    machine::settings.device = 0;
    machine::settings.shared_bytes = 0;
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

// More than a GPU has room for at once: several rounds of its blocks, and of every block. Too slow to
// emulate.
void group_matrix_many() {
  for (Scalar scalar : kScalars) {
    MatrixCase c;
    c.scalar = scalar;
    c.probes = 70;
    c.gallery = shortened ? 60 : 2100;
    c.normalize = int(scalar) % 2 == 0 ? Normalize::softmax : Normalize::min_shift;
    run(c, xcos::scalar_size(scalar) == 2);
    c.probes = shortened ? 100 : 1030;
    c.gallery = 33;
    c.orders = 2;
    run(c, xcos::scalar_size(scalar) == 2);
  }
}

// Shared memory is granted to a kernel, not to a launch: a grant for a small problem must not take from a
// large one, which another thread may be about to launch.
void group_matrix_grants() {
  current_case = "matrix grants";
  const uint64_t before = machine::smaller_grants;
  machine::settings.multiprocessors = 1;  // full blocks
  for (int device : {0, 1}) {
    machine::settings.device = device;
    for (Scalar scalar : {Scalar::f16, Scalar::bf16}) {
      for (int64_t probes :
           {17, 1, 9}) {  // as many warps, and so as much shared memory, as there are groups of 4
        MatrixCase c;
        c.scalar = scalar;
        c.probes = probes;
        c.gallery = 1;
        c.orders = 2;
        ++cases;
        static_cast<void>(launch(MatrixData(c)));
      }
    }
  }
  machine::settings.device = 0;
  machine::settings.multiprocessors = 0;
  expect(machine::smaller_grants == before, "no kernel is granted less than before");
}

void group_matrix_launch() {
  current_case = "matrix launch";
  const uint64_t before = machine::launches;
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
  expect(machine::launches == before, "nothing was launched");
  for (Scalar scalar : kScalars) {
    MatrixCase c;
    c.scalar = scalar;
    const MatrixData data(c);
    Memory scores(15, data.result);
    machine::settings.refuse_next = true;
    expect_refused(xcos::cuda::xcos_matrix(data.problem, scores.data(), nullptr));
    expect(cudaPeekAtLastError() == cudaSuccess, "the launch error is not left for others to find");
  }
  // 64 x 64 faces: 4 tiles, 16 groups of probes. Few multiprocessors get full blocks of eight warps, many
  // smaller ones.
  MatrixCase c;
  c.scalar = Scalar::f16;
  c.probes = c.gallery = 64;
  c.height = c.width = 1;
  const MatrixData data(c);
  Memory scores(64 * 64, data.result);
  for (const auto& [multiprocessors, blocks, threads] :
       {std::array<unsigned, 3>{1, 8, 256}, {16, 16, 128}, {31, 16, 128}, {32, 32, 64}, {132, 32, 64}}) {
    machine::settings.multiprocessors = int(multiprocessors);
    expect(xcos::cuda::xcos_matrix(data.problem, scores.data(), nullptr) == 0, "64 x 64 faces");
    expect(machine::last_grid.x == blocks && machine::last_block.x == threads,
           "as many blocks as there is room for");
  }
  machine::settings.multiprocessors = 0;
}

}  // namespace

void add_matrix_tasks(std::vector<Task>& all, int variant) {
  // On the tensor cores each variant takes another amount of shared memory, by its warps or its layout.
  for (Scalar scalar : {Scalar::f16, Scalar::bf16, Scalar::f32}) {
    for (bool tuned : {true, false}) {
      MatrixCase c;
      c.scalar = scalar;
      c.probes = 5 + 11 * variant;
      c.gallery = 18 + variant;
      c.orders = tuned ? 2 : 1;
      if (!tuned) {
        c.hidden = 16 * (1 + variant);
        c.height = 8 - variant;
      }
      const auto data = std::make_shared<MatrixData>(c);
      const bool tensor_cores = xcos::scalar_size(scalar) == 2;
      if (xcos::cuda::matrix_mma_takes(data->problem) != tensor_cores) complain("takes the wrong path");
      const Memory scores(c.probes * c.gallery, data->result);
      all.push_back(
          {"matrix " + c.name(),
           [=](auto stream) { return xcos::cuda::xcos_matrix(data->problem, scores.data(), stream); },
           {scores.storage()}});
    }
  }
}

Groups matrix_groups() {
  Groups groups = {{"matrix_grants", group_matrix_grants},
                   {"matrix_launch", group_matrix_launch},
                   {"matrix_mma", group_matrix_mma},
                   {"matrix_nan", group_matrix_nan},
                   {"matrix_plain", group_matrix_plain}};
  if (!machine::kEmulated) groups["matrix_many"] = group_matrix_many;
  return groups;
}

}  // namespace driver
