// Gradients of all pairs, against reference_matrix.h.
#include "cuda/xcos_matrix.h"
#include "cuda_runtime.h"
#include "driver.h"
#include "matrix_case.h"

namespace driver {
namespace {

using xcos::Normalize;

constexpr int kOutputs = 8;  // in the order of MatrixGradients
constexpr unsigned kAll = 255;

struct Outputs {
  Memory memory[kOutputs];
  int64_t count[kOutputs];
  Memory workspace;
  xcos::MatrixGradients gradients = {};

  Outputs(const MatrixData& data, const Memory& grad, unsigned wanted) {
    const reference::Matrix& m = data.reference;
    const int64_t cells = m.cells();
    const int64_t sizes[3] = {cells * m.channels, m.orders * m.hidden * cells, m.orders * cells};
    void* pointers[kOutputs];
    for (int n = 0; n < kOutputs; ++n) {
      const int64_t faces = n < 3 ? m.p.faces : m.g.faces;
      count[n] = n < 6 ? faces * sizes[n % 3] : n == 6 ? m.hidden * 9 : 1;
      memory[n] = Memory(count[n], n < 6 && n % 3 < 2 ? data.c.scalar : data.result);
      pointers[n] = wanted >> n & 1 ? memory[n].data() : nullptr;
    }
    gradients = {grad.data(), pointers[0], pointers[1], pointers[2], pointers[3],
                 pointers[4], pointers[5], pointers[6], pointers[7]};
    const int64_t bytes = xcos::cuda::xcos_matrix_backward_workspace(data.problem, gradients);
    if (bytes > 0) workspace = Memory(bytes / 4, Scalar::f32);
  }

  int enqueue(const MatrixData& data, xcos::cuda::Stream stream) const {
    return xcos::cuda::xcos_matrix_backward(data.problem, gradients, workspace.data(), stream);
  }
};

Outputs launch(const MatrixData& data, const Memory& grad, unsigned wanted) {
  Outputs out(data, grad, wanted);
  const int status = out.enqueue(data, nullptr);
  if (status != 0) complain("xcos_matrix_backward returned %d", status);
  return out;
}

Memory draw_grad(const MatrixData& data) {
  Random random(data.c.seed + 1);
  const int64_t pairs = data.c.probes * data.c.gallery;
  Memory grad(pairs, data.result);
  for (int64_t i = 0; i < pairs; ++i) grad.put(i, std::normal_distribution<double>()(random));
  return grad;
}

void run(const MatrixCase& c, unsigned wanted = kAll) {
  if (!take(std::string(kScalarNames[int(c.scalar)]) + (c.normalize == Normalize::softmax ? " softmax" : "") +
            (c.height * c.width > 64 ? " large" : "") + (c.probes * c.gallery == 0 ? " empty" : ""))) {
    return;
  }
  ++cases;
  current_case = c.name() + " wanted " + std::to_string(wanted);
  const MatrixData data(c);
  const auto before = data.copy();
  const Memory grad = draw_grad(data);
  reference::Values incoming;
  for (int64_t i = 0; i < c.probes * c.gallery; ++i) incoming.push_back(grad.at(i));
  const reference::MatrixSums s = reference::matrix_backward(data.reference, incoming);
  const reference::Sum* const sums[kOutputs] = {&s.p.features,   &s.p.projection, &s.p.bias, &s.g.features,
                                                &s.g.projection, &s.g.bias,       &s.weight, &s.slope};
  const char* const names[kOutputs] = {
      "probe_features",     "probe_projection", "probe_bias", "gallery_features",
      "gallery_projection", "gallery_bias",     "weight",     "slope"};
  plainly();
  const Outputs out = launch(data, grad, wanted);
  const double tolerance = 4 * data.tolerance() * (1 + std::sqrt(double(c.probes + c.gallery)));
  for (int n = 0; n < kOutputs; ++n) {
    const bool half = n < 6 && n % 3 < 2 && xcos::scalar_size(c.scalar) == 2;
    const double rounding = !half ? 0 : c.scalar == Scalar::f16 ? 0x1p-11 : 0x1p-8;
    const double smallest = half && c.scalar == Scalar::f16 ? 0x1p-24 : 0x1p-120;
    for (int64_t i = 0; i < out.count[n]; ++i) {
      if ((wanted >> n & 1) == 0) {
        if (!out.memory[n].untouched(i)) return complain("%s was written unasked", names[n]);
        continue;
      }
      compare(names[n], 0, i, out.memory[n].at(i), sums[n]->value[size_t(i)],
              tolerance * sums[n]->error[size_t(i)] + smallest, rounding);
    }
  }
  otherwise(c.seed);
  const Outputs again = launch(data, grad, wanted);
  plainly();
  for (int n = 0; n < kOutputs; ++n) {
    if (again.memory[n].copy() != out.memory[n].copy()) {
      complain("%s depends on the order of threads or the number of blocks", names[n]);
    }
  }
  if (data.copy() != before) complain("inputs were written to");
}

MatrixCase vary(Random& random, MatrixCase c) {
  c.orders = 1 + int64_t(random() % 2);
  c.normalize = random() % 2 == 0 ? Normalize::softmax : Normalize::min_shift;
  c.temperature = pick(random, {1.0, 0.5, 3.0});
  c.slope = pick(random, {0.25, 0.25, 0.5, -0.5});
  c.gap = int64_t(random() % 3) * 5;
  c.unaligned = random() % 3 == 0;
  c.quantised = random() % 3 == 0;
  c.seed = random();
  return c;
}

// Every type and mode at 32x7x7, then shapes around chunks of faces and the limit of shared memory.
void group_matrix_backward() {
  Random random(3);
  for (Scalar scalar : kScalars) {
    for (Normalize normalize : {Normalize::softmax, Normalize::min_shift}) {
      MatrixCase c;
      c.scalar = scalar;
      c.probes = 2;
      c.gallery = 3;
      c = vary(random, c);
      c.normalize = normalize;
      run(c);
    }
    MatrixCase c;
    c.scalar = scalar;
    c.channels = 4;
    c.hidden = 3;
    c.height = 3;
    c.width = 4;
    c.probes = 18;
    c.gallery = 17;
    run(vary(random, c));
    c.height = 1;
    c.width = 1;
    c.probes = 1;
    c.gallery = 33;
    run(vary(random, c));
    c.channels = 3;
    c.hidden = 2;
    c.height = 17;
    c.width = 19;
    c.probes = 2;
    c.gallery = 1;
    run(vary(random, c));
    // One output at a time.
    for (int n = 0; n < kOutputs; n += scalar == Scalar::f32 ? 1 : 3) {
      MatrixCase one;
      one.scalar = scalar;
      one.channels = 8;
      one.hidden = 4;
      one.height = 2;
      one.width = 3;
      run(vary(random, one), 1u << n);
    }
    // Sides without faces: zeros.
    MatrixCase empty;
    empty.scalar = scalar;
    empty.height = empty.width = 2;
    empty.probes = 0;
    run(empty);
    empty.probes = 3;
    empty.gallery = 0;
    run(empty);
  }
}

// The reference's gradients against differences of its own scores.
void group_matrix_reference() {
  for (Normalize normalize : {Normalize::softmax, Normalize::min_shift}) {
    for (int64_t orders : {1, 2}) {
      MatrixCase c;
      c.scalar = Scalar::f64;
      c.probes = 2;
      c.gallery = 3;
      c.channels = 4;
      c.hidden = 3;
      c.height = 3;
      c.width = 2;
      c.orders = orders;
      c.normalize = normalize;
      c.temperature = 0.7;
      c.seed = 5 + uint64_t(orders);
      current_case = "reference " + c.name();
      ++cases;
      reference::Matrix m = MatrixData(c).reference;
      const reference::Values grad = {1.0, -0.5, 2.0, 0.25, -1.5, 0.75};
      const reference::MatrixSums s = reference::matrix_backward(m, grad);
      const auto objective = [&] {
        double sum = 0;
        for (int64_t n = 0; n < 6; ++n) {
          sum += grad[size_t(n)] * reference::matrix_pair(m, n / 3, n % 3).score;
        }
        return sum;
      };
      const auto check = [&](const char* what, double& variable, double gradient, int64_t at) {
        const double saved = variable, h = 1e-6;
        variable = saved + h;
        const double up = objective();
        variable = saved - h;
        const double down = objective();
        variable = saved;
        compare(what, 0, at, (up - down) / (2 * h), gradient, 1e-7, 1e-6);
      };
      const auto check_all = [&](const char* what, reference::Values& values, const reference::Sum& sum) {
        for (size_t i = 0; i < values.size(); ++i) check(what, values[i], sum.value[i], int64_t(i));
      };
      check_all("probe features", m.p.features, s.p.features);
      check_all("probe projection", m.p.projection, s.p.projection);
      check_all("probe bias", m.p.bias, s.p.bias);
      check_all("gallery features", m.g.features, s.g.features);
      check_all("gallery projection", m.g.projection, s.g.projection);
      check_all("gallery bias", m.g.bias, s.g.bias);
      check_all("weight", m.weight, s.weight);
      check("slope", m.slope, s.slope.value[0], 0);
    }
  }
}

}  // namespace

void add_matrix_backward_tasks(std::vector<Task>& all, int variant) {
  for (Scalar scalar : {Scalar::f16, Scalar::f32}) {
    MatrixCase c;
    c.scalar = scalar;
    c.probes = 2 + variant;
    c.gallery = 4 - variant;
    c.height = 7 + 3 * variant;
    const auto data = std::make_shared<MatrixData>(c);
    const Memory grad = draw_grad(*data);
    const auto out = std::make_shared<Outputs>(*data, grad, kAll);
    Task task = {
        "backward " + c.name(), [=](auto stream) { return grad.data(), out->enqueue(*data, stream); }, {}};
    for (const Memory& memory : out->memory) task.outputs.push_back(memory.storage());
    all.push_back(std::move(task));
  }
}

Groups matrix_backward_groups() {
  return {{"matrix_backward", group_matrix_backward}, {"matrix_reference", group_matrix_reference}};
}

}  // namespace driver
