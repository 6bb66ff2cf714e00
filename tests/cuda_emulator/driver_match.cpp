// grid_match and its gradients, against reference_match.h.
#include "cuda/grid_match.h"
#include "cuda_runtime.h"
#include "driver.h"
#include "layouts.h"
#include "reference_match.h"

namespace driver {
namespace {

using xcos::Match;

struct MatchCase {
  Scalar scalar = Scalar::f32;
  int64_t pairs = 3, channels = 32, height = 7, width = 7;
  Layout a = Layout::contiguous, b = Layout::contiguous, grad = Layout::contiguous;
  int radius = 1;
  Match match = Match::best;
  bool symmetric = true;
  double temperature = 0.2, eps = 1e-6;
  unsigned gradients = 3;  // a, b
  bool offsets = true;     // best only
  bool with_nan = false;
  bool zero_cells = true;
  uint64_t seed = 1;

  int64_t cells() const { return height * width; }
  std::string name() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "match %s N%" PRId64 " C%" PRId64 " %" PRId64 "x%" PRId64
                  " a=%s b=%s grad=%s r%d %s%s T%g eps%g grad%u%s seed%" PRIu64,
                  kScalarNames[int(scalar)], pairs, channels, height, width, kLayoutNames[int(a)],
                  kLayoutNames[int(b)], kLayoutNames[int(grad)], radius,
                  match == Match::best ? "best" : "soft", symmetric ? " symmetric" : "", temperature, eps,
                  gradients, with_nan ? " nan" : "", seed);
    return text;
  }
};

class Runner {
 public:
  explicit Runner(const MatchCase& c)
      : case_(c), random_(c.seed), a_(c, c.a), b_(c, c.b), result_(xcos::result_scalar(c.scalar)) {
    fill(a_);
    fill(b_);
    grad_ = Memory(c.pairs * c.cells(), result_);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < c.pairs * c.cells(); ++i) grad_.put(i, normal(random_));
    problem_.pair.shape = {c.pairs, c.channels, c.cells()};
    problem_.pair.scalar = c.scalar;
    problem_.pair.a = a_.view();
    problem_.pair.b = b_.view();
    problem_.pair.eps = c.eps;
    problem_.height = c.height;
    problem_.width = c.width;
    problem_.radius = c.radius;
    problem_.match = c.match;
    problem_.temperature = c.temperature;
    problem_.symmetric = c.symmetric;
  }

  void run() {
    if (!take(key())) return;
    ++cases;
    current_case = case_.name();
    const auto a_before = a_.memory.copy(), b_before = b_.memory.copy();
    plainly();
    const Outputs first = launch();
    check(first);
    otherwise(case_.seed);
    const Outputs second = launch();
    plainly();
    if (first.similarity.copy() != second.similarity.copy() ||
        first.offsets.copy() != second.offsets.copy() ||
        first.grad_a->memory.copy() != second.grad_a->memory.copy() ||
        first.grad_b->memory.copy() != second.grad_b->memory.copy())
      complain("an output depends on the order of threads or the number of blocks");
    if (a_.memory.copy() != a_before || b_.memory.copy() != b_before) complain("inputs were written to");
  }

  struct Outputs {
    Memory similarity;
    Array<int8_t> offsets;
    Array<unsigned char> workspace;
    std::unique_ptr<Map> grad_a, grad_b;
  };

  Outputs outputs() const {
    const MatchCase& c = case_;
    const bool offsets = c.match == Match::best && c.offsets;
    Outputs o;
    o.similarity = Memory(c.pairs * c.cells(), result_);
    o.offsets = Array<int8_t>(offsets ? c.pairs * (c.symmetric ? 2 : 1) * 2 * c.cells() : 0, int8_t(99));
    o.workspace = Array<unsigned char>(xcos::cuda::grid_match_backward_workspace(problem_));
    o.grad_a = std::make_unique<Map>(c, c.grad);
    o.grad_b = std::make_unique<Map>(c, c.grad);
    return o;
  }

  int enqueue(const Outputs& o, xcos::cuda::Stream stream) const {
    const unsigned wanted = case_.gradients;
    const int status = xcos::cuda::grid_match(
        problem_, {o.similarity.data(), o.offsets.size() > 0 ? o.offsets.data() : nullptr}, stream);
    if (status != 0) return status;
    return xcos::cuda::grid_match_backward(problem_, grad_.data(),
                                           wanted & 1 ? o.grad_a->mutable_view() : xcos::MutableFeatureView{},
                                           wanted & 2 ? o.grad_b->mutable_view() : xcos::MutableFeatureView{},
                                           o.workspace.size() > 0 ? o.workspace.data() : nullptr, stream);
  }

 private:
  // Of the kernels, the direction of matching, and where maps and tables are kept.
  std::string key() const {
    const bool large = case_.channels * case_.cells() * xcos::scalar_size(case_.scalar) > 16 * 1024;
    const bool workspace = xcos::cuda::grid_match_backward_workspace(problem_) > 0;
    return std::string(kScalarNames[int(case_.scalar)]) + (case_.match == Match::best ? " best" : " soft") +
           (case_.symmetric ? " symmetric" : "") + (large ? " large" : "") + (workspace ? " workspace" : "");
  }

  void fill(const Map& map) {
    std::normal_distribution<double> normal;
    for (int64_t n = 0; n < (map.pair == 0 ? 1 : case_.pairs); ++n) {
      for (int64_t i = 0; i < case_.cells(); ++i) {
        const bool zero = case_.zero_cells && random_() % 9 == 0;
        for (int64_t c = 0; c < case_.channels; ++c)
          map.memory.put(map.index(n, c, i), zero ? 0 : normal(random_));
      }
    }
    if (case_.with_nan && map.pair != 0)
      map.memory.put(map.index(case_.pairs / 2, int64_t(random_() % uint64_t(case_.channels)),
                               int64_t(random_() % uint64_t(case_.cells()))),
                     NAN);
  }

  Outputs launch() const {
    Outputs o = outputs();
    workspace_used = workspace_used || o.workspace.size() > 0;
    const int status = enqueue(o, nullptr);
    if (status != 0) complain("grid_match or its backward pass returned %d", status);
    return o;
  }

  void check(const Outputs& o) {
    const MatchCase& c = case_;
    const int64_t cells = c.cells();
    const double unit = result_ == Scalar::f64 ? 0x1p-52 : 0x1p-23;
    const double tolerance =
        unit * (16 + 4 * std::sqrt(double(c.channels)) + (c.match == Match::soft ? 30 / c.temperature : 0));
    for (int64_t n = 0; n < c.pairs; ++n) {
      reference::MatchPair p = {c.channels,  c.height,      c.width, c.radius, c.match == Match::best,
                                c.symmetric, c.temperature, c.eps,   {},       {}};
      for (int64_t k = 0; k < c.channels; ++k) {
        for (int64_t i = 0; i < cells; ++i) {
          p.x.push_back(a_.memory.at(a_.index(n, k, i)));
          p.y.push_back(b_.memory.at(b_.index(n, k, i)));
        }
      }
      reference::MatchResult r = reference::match(p);
      for (int64_t i = 0; i < cells; ++i)
        compare("similarity", n, i, o.similarity.at(n * cells + i), r.similarity[size_t(i)], tolerance, 0);
      const bool tainted = c.with_nan && n == c.pairs / 2;
      if (o.offsets.size() > 0) {
        std::vector<int64_t> choices[2];
        for (int direction = 0; direction < (c.symmetric ? 2 : 1); ++direction) {
          const int64_t at = (n * (c.symmetric ? 2 : 1) + direction) * 2 * cells;
          for (int64_t i = 0; i < cells; ++i) {
            const int down = o.offsets[at + i], right = o.offsets[at + cells + i];
            const int64_t row = i / c.width + down, column = i % c.width + right;
            const bool inside = row >= 0 && row < c.height && column >= 0 && column < c.width &&
                                std::abs(down) <= c.radius && std::abs(right) <= c.radius;
            if (!inside) {
              complain("offset of cell %" PRId64 " leads out of its neighbourhood", i);
              choices[direction].push_back(i);
              continue;
            }
            choices[direction].push_back(row * c.width + column);
            const double got = r.of(p, direction, i, row * c.width + column);
            compare("chosen cosine", n, i, got, r.matched[direction][size_t(i)], tolerance, 0);
          }
        }
        // A choice between neighbours that differ by rounding is the kernel's.
        r = reference::match(p, choices);
      }
      std::vector<double> grad;
      for (int64_t i = 0; i < cells; ++i) grad.push_back(grad_.at(n * cells + i));
      const reference::MatchGradients g = reference::match_backward(p, r, grad);
      for (int side = 0; side < 2; ++side) {
        if (!(c.gradients & (1u << side))) continue;
        const Map& map = side == 0 ? *o.grad_a : *o.grad_b;
        const std::vector<double>&expected = side == 0 ? g.x : g.y,
              &terms = side == 0 ? g.x_magnitude : g.y_magnitude;
        const double rounding = c.scalar == Scalar::f16 ? 0x1p-11 : c.scalar == Scalar::bf16 ? 0x1p-8 : 0;
        for (int64_t k = 0; k < c.channels; ++k) {
          for (int64_t i = 0; i < cells; ++i) {
            const double got = map.memory.at(map.index(n, k, i));
            if (tainted && (std::isnan(got) || std::isnan(expected[size_t(k * cells + i)]))) continue;
            compare(
                side == 0 ? "grad_a" : "grad_b", n, k * cells + i, got, expected[size_t(k * cells + i)],
                4 * tolerance * terms[size_t(k * cells + i)] + (c.scalar == Scalar::f16 ? 0x1p-24 : 0x1p-120),
                rounding);
          }
        }
      }
    }
    for (int side = 0; side < 2; ++side) {
      const Map& map = side == 0 ? *o.grad_a : *o.grad_b;
      std::vector<bool> owned(size_t(map.count), false);
      for (int64_t n = 0; n < c.pairs && (c.gradients & (1u << side)); ++n)
        for (int64_t k = 0; k < c.channels; ++k)
          for (int64_t i = 0; i < cells; ++i) owned[size_t(map.index(n, k, i))] = true;
      for (int64_t k = 0; k < map.count; ++k)
        if (!owned[size_t(k)] && !map.memory.untouched(k))
          return complain("an element between a gradient's was written");
    }
  }

  MatchCase case_;
  Random random_;
  Map a_, b_;
  Scalar result_;
  Memory grad_;
  xcos::MatchProblem problem_ = {};

 public:
  static inline bool workspace_used = false;
};

void run(const MatchCase& c) { Runner(c).run(); }

MatchCase vary(Random& random, MatchCase c) {
  constexpr Layout kInputs[] = {Layout::contiguous, Layout::contiguous, Layout::channels_last,
                                Layout::gapped,     Layout::shared,     Layout::unaligned};
  constexpr Layout kOutputs[] = {Layout::contiguous, Layout::channels_last, Layout::gapped,
                                 Layout::unaligned};
  c.a = pick(random, kInputs);
  c.b = pick(random, kInputs);
  c.grad = pick(random, kOutputs);
  c.match = random() % 2 == 0 ? Match::best : Match::soft;
  c.symmetric = random() % 3 != 0;
  c.temperature = pick(random, {0.05, 0.2, 3.0});
  c.eps = pick(random, {1e-6, 1e-6, 2.0});
  c.gradients = 1 + unsigned(random() % 3);
  // Without offsets the reference could differ in a choice, which fp64 settles.
  c.offsets = c.scalar != Scalar::f64 || random() % 2 == 0;
  c.seed = random();
  return c;
}

// Usual grids: every type, all shapes around a warp and the window.
void group_match() {
  Random random(3);
  const int64_t sizes[][4] = {{32, 7, 7, 1}, {32, 7, 7, 2}, {5, 3, 5, 1},  {17, 1, 9, 2},
                              {3, 1, 1, 1},  {8, 4, 4, 3},  {31, 2, 2, 7}, {33, 5, 2, 1},
                              {16, 9, 8, 1}, {2, 12, 3, 2}, {32, 7, 7, 7}};
  for (Scalar scalar : kScalars) {
    for (const auto& [channels, height, width, radius] : sizes) {
      for (int round = 0; round < 2; ++round) {
        MatchCase c;
        c.scalar = scalar;
        c.pairs = 1 + int64_t(random() % 4);
        c.channels = channels;
        c.height = height;
        c.width = width;
        c.radius = int(radius);
        run(vary(random, c));
      }
    }
  }
}

// Maps or tables beyond shared memory: features from global memory, the table in the workspace.
void group_match_large() {
  Random random(5);
  const int64_t sizes[][4] = {{300, 7, 7, 1}, {4, 20, 21, 1}, {3, 14, 14, 3}, {2, 30, 30, 1}, {600, 3, 3, 1}};
  for (Scalar scalar : kScalars) {
    for (const auto& [channels, height, width, radius] : sizes) {
      MatchCase c;
      c.scalar = scalar;
      c.pairs = 2;
      c.channels = channels;
      c.height = height;
      c.width = width;
      c.radius = int(radius);
      run(vary(random, c));
    }
  }
  expect(Runner::workspace_used, "some case needs a workspace");
}

void group_match_nan() {
  Random random(7);
  for (Scalar scalar : kScalars) {
    for (Match match : {Match::best, Match::soft}) {
      MatchCase c;
      c.scalar = scalar;
      c = vary(random, c);
      c.a = pick(random, {Layout::contiguous, Layout::channels_last});
      c.match = match;
      c.with_nan = true;
      run(c);
    }
  }
}

// The reference's gradients against differences of its own forward pass.
void group_match_reference() {
  Random random(5);
  std::normal_distribution<double> normal;
  for (int kind = 0; kind < 8; ++kind) {
    current_case = "match reference";
    ++cases;
    reference::MatchPair p = {
        4, 3, 2, 1, (kind & 1) == 0, (kind & 2) != 0, 0.3, (kind & 4) != 0 ? 2.0 : 1e-6, {}, {}};
    std::vector<double> grad;
    for (int i = 0; i < 24; ++i) {
      p.x.push_back(normal(random));
      p.y.push_back(normal(random));
    }
    for (int i = 0; i < 6; ++i) grad.push_back(normal(random));
    const auto objective = [&] {
      const reference::MatchResult r = reference::match(p);
      double value = 0;
      for (size_t i = 0; i < 6; ++i) value += grad[i] * r.similarity[i];
      return value;
    };
    const reference::MatchGradients g = reference::match_backward(p, reference::match(p), grad);
    for (int side = 0; side < 2; ++side) {
      std::vector<double>& variable = side == 0 ? p.x : p.y;
      for (size_t i = 0; i < variable.size(); ++i) {
        const double saved = variable[i], h = 1e-6;
        variable[i] = saved + h;
        const double up = objective();
        variable[i] = saved - h;
        const double down = objective();
        variable[i] = saved;
        compare("gradient", side, int64_t(i), (up - down) / (2 * h), (side == 0 ? g.x : g.y)[i], 1e-7, 1e-6);
      }
    }
  }
}

void group_match_launch() {
  current_case = "match launch";
  const uint64_t before = machine::launches;
  xcos::MatchProblem problem = {};
  problem.pair.shape = {0, 32, 49};
  problem.pair.scalar = Scalar::f32;
  problem.pair.eps = 1e-6;
  problem.height = problem.width = 7;
  problem.radius = 1;
  problem.temperature = 1;
  float value = 0;
  const xcos::MutableFeatureView view = {&value, 1, 1, 1};
  expect(xcos::cuda::grid_match(problem, {&value, nullptr}, nullptr) == 0, "no pairs, forward");
  expect(xcos::cuda::grid_match_backward(problem, &value, view, view, nullptr, nullptr) == 0,
         "no pairs, backward");
  problem.pair.shape.pairs = 1;
  expect(xcos::cuda::grid_match_backward(problem, &value, {}, {}, nullptr, nullptr) == 0, "no gradients");
  expect(machine::launches == before, "nothing was launched");
  expect(xcos::cuda::grid_match_backward_workspace(problem) == 0, "usual grids need no workspace");
  problem.pair.shape = {1 << 20, 32, 112 * 112};
  problem.height = problem.width = 112;
  expect(xcos::cuda::grid_match_backward_workspace(problem) <= int64_t{128} << 20,
         "a workspace is at most 128 MB");

  MatchCase c;
  const Map a(c, Layout::contiguous);
  problem.pair.shape = {3, 32, 49};
  problem.height = problem.width = 7;
  problem.pair.a = problem.pair.b = a.view();
  const Memory similarity(3 * 49, Scalar::f32);
  machine::settings.refuse_next = true;
  expect_refused(xcos::cuda::grid_match(problem, {similarity.data(), nullptr}, nullptr));
  expect(cudaPeekAtLastError() == cudaSuccess, "the launch error is not left for others to find");
  expect(xcos::cuda::grid_match(problem, {similarity.data(), nullptr}, nullptr) == 0, "three pairs");
  expect(machine::last_grid.x == 3 && machine::last_block.x == 64,
         "a block of two warps for each of 7x7 pairs");
}

}  // namespace

void add_match_tasks(std::vector<Task>& all, int variant) {
  for (Scalar scalar : {Scalar::f16, Scalar::f32}) {
    for (Match match : {Match::best, Match::soft}) {
      MatchCase c;
      c.scalar = scalar;
      c.match = match;
      c.pairs = 2 + 5 * variant;
      c.height = 7 + 2 * variant;
      const auto runner = std::make_shared<Runner>(c);
      const auto o = std::make_shared<Runner::Outputs>(runner->outputs());
      all.push_back({c.name(),
                     [=](auto stream) { return runner->enqueue(*o, stream); },
                     {o->similarity.storage(), o->offsets.storage(), o->grad_a->memory.storage(),
                      o->grad_b->memory.storage()}});
    }
  }
}

Groups match_groups() {
  return {{"match", group_match},
          {"match_large", group_match_large},
          {"match_launch", group_match_launch},
          {"match_nan", group_match_nan},
          {"match_reference", group_match_reference}};
}

}  // namespace driver
