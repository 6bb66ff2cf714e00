// Runs the real launchers of csrc/cuda, on the emulator or a GPU, and compares them with reference.h.
//
//   driver GROUP [--short] [--kernels]   runs a group of cases, or the first ones of each kind; status 0 when
//                                        all agree; --kernels: names what was launched
//   driver planted NAME
//   driver list                          names of groups and planted faults
#include "driver.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/xcos_score.h"
#include "cuda/grid_cosine.h"
#include "cuda/pair_plan.h"
#include "cuda/runtime.h"
#include "cuda/xcos_score.h"
#include "cuda_runtime.h"
#include "planted.h"
#include "reference.h"

namespace {

using namespace driver;
using xcos::Attention;

const char* const kModeNames[] = {"uniform", "norm", "weights", "logits"};

enum class Layout {
  contiguous,
  channels_last,
  gapped,
  gapped_last,
  shared,
  shared_last,
  unaligned,
  unaligned_last
};
constexpr int kLayouts = 8;
const char* const kLayoutNames[] = {"contiguous", "channels_last", "gapped",    "gapped_last",
                                    "shared",     "shared_last",   "unaligned", "unaligned_last"};

struct Strides {
  int64_t pair;
  int64_t channel;
  int64_t cell;
};

Strides strides_of(Layout layout, const xcos::PairShape& s) {
  const int64_t map = s.channels * s.cells;
  switch (layout) {
    case Layout::contiguous:
    case Layout::unaligned:
      return {map, s.cells, 1};
    case Layout::channels_last:
    case Layout::unaligned_last:
      return {map, 1, s.channels};
    case Layout::shared:
      return {0, s.cells, 1};
    case Layout::shared_last:
      return {0, 1, s.channels};
    case Layout::gapped:
      return {s.channels * (2 * s.cells + 1) + 3, 2 * s.cells + 1, 2};
    case Layout::gapped_last:
      return {s.cells * (2 * s.channels + 3) + 1, 2, 2 * s.channels + 3};
  }
  return {};
}

// A feature map in memory of its own.
struct Map {
  Memory memory;
  Strides strides;
  int64_t count;

  Map(const xcos::PairShape& s, Scalar scalar, Layout layout) : strides(strides_of(layout, s)) {
    const bool unaligned = layout == Layout::unaligned || layout == Layout::unaligned_last;
    count =
        (s.pairs - 1) * strides.pair + (s.channels - 1) * strides.channel + (s.cells - 1) * strides.cell + 1;
    memory = Memory(count, scalar, unaligned);
  }

  int64_t index(int64_t pair, int64_t channel, int64_t cell) const {
    return pair * strides.pair + channel * strides.channel + cell * strides.cell;
  }
  xcos::FeatureView view() const { return {memory.data(), strides.pair, strides.channel, strides.cell}; }
  xcos::MutableFeatureView mutable_view() const {
    return {memory.data(), strides.pair, strides.channel, strides.cell};
  }
};

struct Case {
  Scalar scalar = Scalar::f32;
  xcos::PairShape shape = {3, 32, 49};
  Layout a = Layout::contiguous;
  Layout b = Layout::contiguous;
  Layout grad_a = Layout::contiguous;  // never one of the shared ones
  Layout grad_b = Layout::contiguous;
  Attention mode = Attention::uniform;
  Scalar attention = Scalar::f32;
  bool one_attention = false;
  double temperature = 1.0;
  double eps = 1e-6;
  unsigned outputs = 7;    // score, similarity, attention
  unsigned incoming = 7;   // of the same
  unsigned gradients = 7;  // a, b, attention
  bool expanded_score = false;
  double scale = 1.0;  // of the features
  bool zero_cells = true;
  bool with_nan = false;
  uint64_t seed = 1;

  std::string name() const {
    char text[400];
    std::snprintf(text, sizeof(text),
                  "%s N%" PRId64 " C%" PRId64 " P%" PRId64
                  " a=%s b=%s ga=%s gb=%s %s/%s%s T%g eps%g out%u in%u grad%u%s%s x%g",
                  kScalarNames[int(scalar)], shape.pairs, shape.channels, shape.cells, kLayoutNames[int(a)],
                  kLayoutNames[int(b)], kLayoutNames[int(grad_a)], kLayoutNames[int(grad_b)],
                  kModeNames[int(mode)], kScalarNames[int(attention)], one_attention ? "(shared)" : "",
                  temperature, eps, outputs, incoming, gradients, expanded_score ? " expanded" : "",
                  with_nan ? " nan" : "", scale);
    return text;
  }
};

class Runner {
 public:
  explicit Runner(const Case& c) : case_(c), random_(c.seed) {
    const xcos::PairShape& s = c.shape;
    a_ = std::make_unique<Map>(s, c.scalar, c.a);
    b_ = std::make_unique<Map>(s, c.scalar, c.b);
    result_ = xcos::result_scalar(c.scalar);
    fill(*a_);
    fill(*b_);
    const bool given = c.mode == Attention::weights || c.mode == Attention::logits;
    if (given) {
      attention_ = Memory((c.one_attention ? 1 : s.pairs) * s.cells, c.attention, s.pairs % 2 == 0);
      std::normal_distribution<double> normal;
      const double spread =
          c.seed % 3 == 0 ? 200 : 3;  // of the logits; 200 overflows exp without the maximum
      for (int64_t i = 0; i < (c.one_attention ? 1 : s.pairs) * s.cells; ++i) {
        double value = c.mode == Attention::weights ? std::fabs(normal(random_)) : spread * normal(random_);
        if (c.mode == Attention::logits && i % s.cells != 0 && random_() % 11 == 0) value = -INFINITY;
        attention_.put(i, value);
      }
    }
    grad_score_ = Memory(c.expanded_score ? 1 : s.pairs, result_);
    grad_similarity_ = Memory(s.pairs * s.cells, result_);
    grad_weights_ = Memory(s.pairs * s.cells, result_);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < (c.expanded_score ? 1 : s.pairs); ++i) grad_score_.put(i, normal(random_));
    for (int64_t i = 0; i < s.pairs * s.cells; ++i) {
      grad_similarity_.put(i, normal(random_));
      grad_weights_.put(i, normal(random_));
    }

    problem_.shape = s;
    problem_.scalar = c.scalar;
    problem_.a = a_->view();
    problem_.b = b_->view();
    problem_.mode = c.mode;
    if (given) problem_.attention = {attention_.data(), c.attention, c.one_attention ? 0 : s.cells};
    problem_.temperature = c.temperature;
    problem_.eps = c.eps;
  }

  void run() {
    if (!take(key())) return;
    ++cases;
    current_case = case_.name();
    const std::vector<unsigned char> a_before = a_->memory.copy(), b_before = b_->memory.copy();
    plainly();
    Outputs first = launch();
    check(first);
    otherwise(case_.seed);
    Outputs second = launch();
    plainly();
    for (size_t k = 0; k < first.memories().size(); ++k) {
      if (first.memories()[k]->copy() != second.memories()[k]->copy()) {
        complain("output %zu depends on the order of threads or the number of blocks", k);
      }
    }
    if (a_->memory.copy() != a_before || b_->memory.copy() != b_before) complain("inputs were written to");
  }

 private:
  struct Outputs {
    Memory score, similarity, weights, grad_attention, cosine;
    std::unique_ptr<Map> grad_a, grad_b, cosine_grad_a;

    std::vector<const Memory*> memories() const {
      return {&score,          &similarity,     &weights, &grad_attention,
              &grad_a->memory, &grad_b->memory, &cosine,  &cosine_grad_a->memory};
    }
  };

  void fill(const Map& map) {
    const xcos::PairShape& s = case_.shape;
    std::normal_distribution<double> normal;
    for (int64_t n = 0; n < (map.strides.pair == 0 ? 1 : s.pairs); ++n) {
      const bool silent = case_.zero_cells && n % 5 == 4;  // a pair without any signal
      for (int64_t i = 0; i < s.cells; ++i) {
        const bool zero = silent || (case_.zero_cells && random_() % 7 == 0);
        for (int64_t c = 0; c < s.channels; ++c) {
          map.memory.put(map.index(n, c, i), zero ? 0.0 : case_.scale * normal(random_));
        }
      }
    }
    if (case_.with_nan && map.strides.pair != 0) {
      map.memory.put(map.index(s.pairs / 2, int64_t(random_() % uint64_t(s.channels)),
                               int64_t(random_() % uint64_t(s.cells))),
                     NAN);
    }
  }

  // Cases of one key take the same kernels, and the same way through them but for the attention.
  std::string key() const {
    Outputs o = outputs();
    auto a = xcos::cuda::access_of(problem_.a), b = xcos::cuda::access_of(problem_.b);
    auto grad_a = xcos::cuda::access_of(o.grad_a->mutable_view());
    auto grad_b = xcos::cuda::access_of(o.grad_b->mutable_view());
    const auto plan = xcos::cuda::plan_pairs(problem_, a, b, nullptr, nullptr, false);
    const auto backward = xcos::cuda::plan_pairs(problem_, a, b, &grad_a, &grad_b, false);
    const bool every_mode = case_.scalar == Scalar::f32;
    char text[100];
    std::snprintf(text, sizeof(text), "%d %d %d %d %d %d %d", int(case_.scalar),
                  every_mode ? int(case_.mode) : -1, plan.staged, plan.tuned, int(plan.layout.walk),
                  plan.general.along_channels, backward.tuned);
    return text;
  }

  static void expect_success(xcos::cuda::Status status, const char* what) {
    if (status != 0) complain("%s returned %d: %s", what, status, xcos::cuda::error_string(status));
  }

 public:
  Outputs outputs() const {
    const Case& c = case_;
    const xcos::PairShape& s = c.shape;
    Outputs o;
    o.score = Memory(s.pairs, result_);
    o.similarity = Memory(s.pairs * s.cells, result_);
    o.weights = Memory(s.pairs * s.cells, result_);
    o.grad_attention = Memory(s.pairs * s.cells, result_);
    o.cosine = Memory(s.pairs * s.cells, result_);
    o.grad_a = std::make_unique<Map>(s, c.scalar, c.grad_a);
    o.grad_b = std::make_unique<Map>(s, c.scalar, c.grad_b);
    o.cosine_grad_a = std::make_unique<Map>(s, c.scalar, c.grad_a);
    return o;
  }

  // One launch after the other, as long as they succeed.
  int enqueue(const Outputs& o, xcos::cuda::Stream stream) const {
    const Case& c = case_;
    xcos::XcosScoreOutputs outputs = {};
    if (c.outputs & 1) outputs.score = o.score.data();
    if (c.outputs & 2) outputs.similarity = o.similarity.data();
    if (c.outputs & 4) outputs.attention = o.weights.data();
    int status = xcos::cuda::xcos_score(problem_, outputs, stream);
    expect_success(status, "xcos_score");
    if (status != 0) return status;

    xcos::XcosScoreGradients gradients = {};
    if (c.incoming & 1) gradients.score = grad_score_.data();
    gradients.score_stride = c.expanded_score ? 0 : 1;
    if (c.incoming & 2) gradients.similarity = grad_similarity_.data();
    if (c.incoming & 4) gradients.attention = grad_weights_.data();
    xcos::XcosScoreGradientOutputs wanted = {};
    if (c.gradients & 1) wanted.a = o.grad_a->mutable_view();
    if (c.gradients & 2) wanted.b = o.grad_b->mutable_view();
    if (c.gradients & 4) wanted.attention = o.grad_attention.data();
    status = xcos::cuda::xcos_score_backward(problem_, gradients, wanted, stream);
    expect_success(status, "xcos_score_backward");
    if (status != 0) return status;

    // grid_cosine must not look at the attention: hand it nonsense.
    xcos::PairProblem nonsense = problem_;
    nonsense.mode = Attention::logits;
    nonsense.attention = {reinterpret_cast<const void*>(8), Scalar::f64, 1};
    nonsense.temperature = -1;
    status = xcos::cuda::grid_cosine(nonsense, o.cosine.data(), stream);
    expect_success(status, "grid_cosine");
    if (status != 0) return status;
    status = xcos::cuda::grid_cosine_backward(nonsense, grad_similarity_.data(),
                                              o.cosine_grad_a->mutable_view(), {}, stream);
    expect_success(status, "grid_cosine_backward");
    return status;
  }

 private:
  Outputs launch() const {
    Outputs o = outputs();
    static_cast<void>(enqueue(o, nullptr));
    return o;
  }

  reference::Pair pair(int64_t n) const {
    const xcos::PairShape& s = case_.shape;
    reference::Pair p = {s.channels, s.cells, {}, {}, case_.mode, {}, case_.temperature, case_.eps};
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t i = 0; i < s.cells; ++i) {
        p.x.push_back(a_->memory.at(a_->index(n, c, i)));
        p.y.push_back(b_->memory.at(b_->index(n, c, i)));
      }
    }
    if (problem_.attention.data != nullptr) {
      for (int64_t i = 0; i < s.cells; ++i)
        p.attention.push_back(attention_.at(n * problem_.attention.pair_stride + i));
    }
    return p;
  }

  void check(const Outputs& o) {
    const Case& c = case_;
    const xcos::PairShape& s = c.shape;
    const double tolerance = this->tolerance();

    for (int64_t n = 0; n < s.pairs; ++n) {
      const reference::Pair p = pair(n);
      const reference::Result r = reference::forward(p);
      double weight_sum = 0;
      for (double w : r.weights) weight_sum += std::fabs(w);
      if (c.outputs & 1) compare("score", n, 0, o.score.at(n), r.score, tolerance * (1 + weight_sum), 0);
      const double logit_error = c.mode == Attention::logits ? 30 / c.temperature : 1;  // of exp(x / T)
      for (int64_t i = 0; i < s.cells; ++i) {
        const int64_t at = n * s.cells + i;
        if (c.outputs & 2)
          compare("similarity", n, i, o.similarity.at(at), r.similarity[size_t(i)], tolerance, 0);
        if (c.outputs & 4) {
          compare("attention", n, i, o.weights.at(at), r.weights[size_t(i)], 0x1p-126,
                  tolerance * logit_error);
        }
        compare("cosine", n, i, o.cosine.at(at), r.similarity[size_t(i)], tolerance, 0);
      }

      std::vector<double> grad_similarity(size_t(s.cells), 0.0), grad_weights(size_t(s.cells), 0.0);
      std::vector<double> only_similarity;
      for (int64_t i = 0; i < s.cells; ++i) {
        if (c.incoming & 2) grad_similarity[size_t(i)] = grad_similarity_.at(n * s.cells + i);
        if (c.incoming & 4) grad_weights[size_t(i)] = grad_weights_.at(n * s.cells + i);
        only_similarity.push_back(grad_similarity_.at(n * s.cells + i));
      }
      const double grad_score = c.incoming & 1 ? grad_score_.at(c.expanded_score ? 0 : n) : 0.0;
      const reference::Gradients g = reference::backward(p, grad_score, grad_similarity, grad_weights);
      if (c.gradients & 1) check_map("grad_a", n, *o.grad_a, g.x, g.x_magnitude);
      if (c.gradients & 2) check_map("grad_b", n, *o.grad_b, g.y, g.y_magnitude);
      if (c.gradients & 4) {
        for (int64_t i = 0; i < s.cells; ++i) {
          compare("grad_attention", n, i, o.grad_attention.at(n * s.cells + i), g.attention[size_t(i)],
                  0x1p-120 + tolerance * g.attention_magnitude[size_t(i)] * logit_error, 0);
        }
      }
      reference::Pair plain = p;
      plain.mode = Attention::uniform;
      const std::vector<double> zeros(size_t(s.cells), 0.0);
      const reference::Gradients cosine = reference::backward(plain, 0.0, only_similarity, zeros);
      check_map("cosine_grad_a", n, *o.cosine_grad_a, cosine.x, cosine.x_magnitude);
    }
    check_unasked("score", o.score, s.pairs, c.outputs & 1);
    check_unasked("similarity", o.similarity, s.pairs * s.cells, c.outputs & 2);
    check_unasked("attention", o.weights, s.pairs * s.cells, c.outputs & 4);
    check_unasked("grad_attention", o.grad_attention, s.pairs * s.cells, c.gradients & 4);
    check_gaps("grad_a", *o.grad_a, c.gradients & 1);
    check_gaps("grad_b", *o.grad_b, c.gradients & 2);
    check_gaps("cosine_grad_a", *o.cosine_grad_a, true);
  }

  // Sums of C and of H W rounded products; generous, but far below any wrong term.
  double tolerance() const {
    const double unit = result_ == Scalar::f64 ? 0x1p-52 : 0x1p-23;
    return unit * (16 + std::sqrt(double(case_.shape.channels * case_.shape.cells)));
  }

  void check_map(const char* what, int64_t n, const Map& map, const std::vector<double>& expected,
                 const std::vector<double>& magnitude) {
    const xcos::PairShape& s = case_.shape;
    // Rounding of a gradient to the features' type.
    const double rounding = case_.scalar == Scalar::f16    ? 0x1p-11
                            : case_.scalar == Scalar::bf16 ? 0x1p-8
                                                           : 0.0;
    const double smallest = case_.scalar == Scalar::f16 ? 0x1p-24 : 0x1p-120;  // underflow
    const double relative = (case_.mode == Attention::logits ? 30 / case_.temperature : 1) * tolerance();
    // Which gradients of a pair with a NaN in it are NaN too, beyond those that must be, is nobody's
    // contract.
    const bool tainted = case_.with_nan && n == s.pairs / 2;
    for (int64_t i = 0; i < s.cells; ++i) {
      for (int64_t c = 0; c < s.channels; ++c) {
        const size_t at = size_t(c * s.cells + i);
        if (tainted && std::isnan(map.memory.at(map.index(n, c, i)))) continue;
        compare(what, n, int64_t(at), map.memory.at(map.index(n, c, i)), expected[at],
                relative * magnitude[at] + smallest, rounding);
      }
    }
  }

  void check_unasked(const char* what, const Memory& memory, int64_t count, bool asked) {
    if (asked) return;
    for (int64_t i = 0; i < count; ++i) {
      if (!memory.untouched(i)) return complain("%s was written without being asked for", what);
    }
  }

  // What lies between the elements of a gradient belongs to somebody else.
  void check_gaps(const char* what, const Map& map, bool asked) {
    const xcos::PairShape& s = case_.shape;
    std::vector<bool> owned(size_t(map.count), false);
    for (int64_t n = 0; asked && n < s.pairs; ++n) {
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t i = 0; i < s.cells; ++i) owned[size_t(map.index(n, c, i))] = true;
      }
    }
    for (int64_t k = 0; k < map.count; ++k) {
      if (!owned[size_t(k)] && !map.memory.untouched(k)) {
        return complain("%s: element %" PRId64 " between the gradient's was written", what, k);
      }
    }
  }

  Case case_;
  Random random_;
  Scalar result_;
  std::unique_ptr<Map> a_, b_;
  Memory attention_, grad_score_, grad_similarity_, grad_weights_;
  xcos::PairProblem problem_ = {};
};

void run(const Case& c) { Runner(c).run(); }

constexpr Attention kModes[] = {Attention::uniform, Attention::norm, Attention::weights, Attention::logits};

// Everything that a case may vary besides type and shape.
Case vary(Random& random, Case c) {
  constexpr Layout kOutputs[] = {Layout::contiguous,  Layout::channels_last, Layout::gapped,
                                 Layout::gapped_last, Layout::unaligned,     Layout::unaligned_last};
  c.a = Layout(random() % kLayouts);
  // As often as not both maps have one layout, as they have in practice.
  c.b = random() % 2 == 0 ? c.a : Layout(random() % kLayouts);
  c.grad_a = pick(random, kOutputs);
  c.grad_b = random() % 2 == 0 ? c.grad_a : pick(random, kOutputs);
  c.mode = pick(random, kModes);
  c.attention = pick(random, kScalars);
  c.one_attention = random() % 3 == 0;
  c.temperature = pick(random, {1.0, 0.25, 7.0});
  c.eps = pick(random, {1e-6, 1e-6, 2.0});
  c.outputs = 1 + unsigned(random() % 7);
  c.incoming = 1 + unsigned(random() % 7);
  c.gradients = 1 + unsigned(random() % 7);
  c.expanded_score = random() % 3 == 0;
  c.scale = pick(random, {1.0, 1.0, 0.03, 20.0});
  c.seed = random();
  return c;
}

// The tuned shape: every type, layout and mode, aligned as torch aligns.
void group_tuned() {
  uint64_t seed = 1;
  for (Scalar scalar : kScalars) {
    for (Attention mode : kModes) {
      for (int layout = 0; layout < 4; ++layout) {
        Case c;
        c.scalar = scalar;
        c.mode = mode;
        c.attention = seed % 3 == 0 ? scalar : Scalar::f32;
        c.shape = {int64_t(1 + seed % 6), 32, 49};
        c.a = layout & 1 ? Layout::channels_last : Layout::contiguous;
        c.b = layout & 2 ? Layout::channels_last : Layout::contiguous;
        c.grad_a = c.a;
        c.grad_b = c.b;
        c.seed = seed++;
        run(c);
      }
      // One map against many; gradients wanted for one side, or for the attention, only.
      Random random(seed);
      for (unsigned gradients : {1u, 2u, 4u}) {
        Case c;
        c.scalar = scalar;
        c.mode = mode;
        c.shape.pairs = 5;
        c.a = Layout::shared;
        c.one_attention = true;
        c.gradients = gradients;
        c.incoming = gradients;
        c.outputs = gradients;
        c.seed = seed++;
        run(c);
      }
    }
  }
}

// Odd shapes, everything else at random: one half of the types a group.
void shapes(const std::vector<Scalar>& scalars, int rounds) {
  Random random(42 + uint64_t(scalars[0]));
  for (Scalar scalar : scalars) {
    for (int64_t channels : {1, 3, 31, 32, 33}) {
      for (int64_t cells : {1, 2, 31, 33, 49, 64, 65, 100}) {
        for (int round = 0; round < rounds; ++round) {
          Case c;
          c.scalar = scalar;
          c.shape = {1 + int64_t(random() % 6), channels, cells};
          run(vary(random, c));
        }
      }
    }
  }
}

void group_shapes_half() { shapes({Scalar::f16, Scalar::bf16}, 3); }
void group_shapes_full() { shapes({Scalar::f32, Scalar::f64}, 3); }

// Shapes around the limits of shared memory, of a warp, of a tile, of the vectors.
void group_sizes() {
  Random random(7);
  const int64_t list[][2] = {{512, 1}, {64, 49},  {128, 49}, {16, 4},   {8, 16},   {24, 50},   {40, 32},
                             {48, 7},  {96, 20},  {130, 3},  {256, 9},  {512, 49}, {100, 256}, {5, 257},
                             {3, 600}, {1, 1000}, {64, 196}, {8200, 1}, {2, 513},  {6000, 5},  {33, 300}};
  for (const auto& [channels, cells] : list) {
    for (Scalar scalar : kScalars) {
      Case c;
      c.scalar = scalar;
      c.shape = {1 + int64_t(random() % 2), channels, cells};
      run(vary(random, c));
    }
  }
}

// One block after another pair: what reductions leave in shared memory must not reach the next pair.
void group_rounds() {
  uint64_t seed = 3;  // multiples of 3: a grid of one block
  for (Scalar scalar : {Scalar::bf16, Scalar::f32, Scalar::f64}) {
    for (Attention mode : kModes) {
      Case c;
      c.scalar = scalar;
      c.shape = {12, 3, 300};
      c.mode = mode;
      c.zero_cells = seed % 9 == 0;
      c.seed = seed;
      seed += 3;
      run(c);
    }
  }
}

// Pairs enough for several rounds of every warp, and a batch that does not divide.
void group_many() {
  Random random(11);
  for (Scalar scalar : kScalars) {
    for (int64_t pairs : {1, 2, 4, 5, 37}) {
      Case c;
      c.scalar = scalar;
      c.shape = {pairs, 32, 49};
      run(vary(random, c));
      c.shape = {pairs, 9, 5};
      run(vary(random, c));
    }
  }
}

// More than a GPU has room for at once. Too slow to emulate.
void group_very_many() {
  Random random(17);
  for (Scalar scalar : kScalars) {
    for (const xcos::PairShape& shape : {xcos::PairShape{3000, 32, 49}, xcos::PairShape{400, 40, 260}}) {
      Case c;
      c.scalar = scalar;
      c.shape = shape;
      if (shortened) c.shape.pairs /= 10;
      run(c);
      run(vary(random, c));
    }
  }
}

void group_nan() {
  Random random(13);
  for (Scalar scalar : kScalars) {
    for (Attention mode : kModes) {
      for (int64_t cells : {49, 260}) {
        // The block-per-pair path is slow to emulate: one type a mode.
        if (cells == 260 && scalar != kScalars[int(mode)]) continue;
        Case c;
        c.scalar = scalar;
        c.shape = {3, cells == 49 ? 32 : 40, cells};
        c = vary(random, c);
        c.a = pick(random, {Layout::contiguous, Layout::channels_last, Layout::gapped});
        c.mode = mode;
        c.with_nan = true;
        run(c);
      }
    }
  }
}

// Offsets beyond 2^31 elements, from pair to pair or from channel to channel of one pair, on both paths.
void group_large() {
  struct Large {
    xcos::PairShape shape;
    bool by_channel;
  };
  const int64_t stride = (int64_t{1} << 31) + 16;
  for (const Large& large : {Large{{3, 32, 49}, false}, Large{{1, 3, 49}, true}, Large{{3, 2, 13000}, false},
                             Large{{1, 3, 13000}, true}}) {
    ++cases;
    const xcos::PairShape& shape = large.shape;
    current_case = std::string("large ") + (large.by_channel ? "channel" : "pair") + " stride, " +
                   std::to_string(shape.cells) + " cells";
    const Strides far = {large.by_channel ? 0 : stride, large.by_channel ? stride : shape.cells, 1};
    const size_t bytes = size_t(2 * stride + shape.channels * shape.cells) * 2;
    Sparse a(bytes), grad(bytes);
    const auto index = [&](int64_t n, int64_t c, int64_t i) { return n * far.pair + c * far.channel + i; };
    Map b(shape, Scalar::f16, Layout::contiguous);
    std::vector<reference::Pair> pairs;
    Random random(3);
    std::normal_distribution<double> normal;
    for (int64_t n = 0; n < shape.pairs; ++n) {
      reference::Pair p = {shape.channels, shape.cells, {}, {}, Attention::uniform, {}, 1.0, 1e-6};
      for (int64_t c = 0; c < shape.channels; ++c) {
        for (int64_t i = 0; i < shape.cells; ++i) {
          const size_t at = size_t(index(n, c, i)) * 2;
          set(Scalar::f16, a.write(at), 0, normal(random));
          set(Scalar::f16, grad.write(at), 0, NAN);
          b.memory.put(b.index(n, c, i), normal(random));
          p.x.push_back(get(Scalar::f16, a.read(at), 0));
          p.y.push_back(b.memory.at(b.index(n, c, i)));
        }
      }
      pairs.push_back(p);
    }
    xcos::PairProblem problem = {};
    problem.shape = shape;
    problem.scalar = Scalar::f16;
    problem.a = {a.device(), far.pair, far.channel, far.cell};
    problem.b = b.view();
    problem.temperature = 1;
    problem.eps = 1e-6;
    Memory score(shape.pairs, Scalar::f32), incoming(1, Scalar::f32);
    incoming.put(0, double(shape.cells));
    if (xcos::cuda::xcos_score(problem, {score.data(), nullptr, nullptr}, nullptr) != 0)
      complain("forward failed");
    const xcos::XcosScoreGradients gradients = {incoming.data(), 0, nullptr, nullptr};
    const xcos::XcosScoreGradientOutputs wanted = {
        {grad.device(), far.pair, far.channel, far.cell}, {}, nullptr};
    if (xcos::cuda::xcos_score_backward(problem, gradients, wanted, nullptr) != 0)
      complain("backward failed");
    const std::vector<double> zeros(size_t(shape.cells), 0.0);
    for (int64_t n = 0; n < shape.pairs; ++n) {
      const reference::Pair& p = pairs[size_t(n)];
      compare("score", n, 0, score.at(n), reference::forward(p).score, 1e-5, 0);
      const reference::Gradients g = reference::backward(p, double(shape.cells), zeros, zeros);
      for (int64_t c = 0; c < shape.channels; ++c) {
        for (int64_t i = 0; i < shape.cells; ++i) {
          const size_t at = size_t(c * shape.cells + i);
          compare("grad", n, int64_t(at), get(Scalar::f16, grad.read(size_t(index(n, c, i)) * 2), 0), g.x[at],
                  1e-5 * g.x_magnitude[at] + 0x1p-24, 0x1p-11);
        }
      }
    }
  }
}

// Launch geometry and errors: the limits of a launch, and what launchers make of a refusal.
void group_launch() {
  current_case = "launch";
  check_limits();

  // Nothing to do: no launch, no look at any pointer.
  const uint64_t before = machine::launches;
  xcos::PairProblem problem = {};
  problem.shape = {0, 32, 49};
  problem.scalar = Scalar::f32;
  problem.temperature = 1;
  problem.eps = 1e-6;
  float value = 0;
  const xcos::XcosScoreOutputs outputs = {&value, &value, &value};
  const xcos::MutableFeatureView view = {&value, 1, 1, 1};
  expect(xcos::cuda::xcos_score(problem, outputs, nullptr) == 0, "no pairs, forward");
  expect(xcos::cuda::xcos_score_backward(problem, {}, {view, view, &value}, nullptr) == 0,
         "no pairs, backward");
  expect(xcos::cuda::grid_cosine(problem, &value, nullptr) == 0, "no pairs, grid_cosine");
  expect(xcos::cuda::grid_cosine_backward(problem, &value, view, view, nullptr) == 0,
         "no pairs, grid_cosine_backward");
  problem.shape.pairs = 1;
  expect(xcos::cuda::xcos_score(problem, {}, nullptr) == 0, "no outputs, forward");
  expect(xcos::cuda::xcos_score_backward(problem, {}, {}, nullptr) == 0, "no outputs, backward");
  expect(machine::launches == before, "nothing was launched");

  // A refused launch is returned once and leaves nothing behind.
  Map a({2, 32, 49}, Scalar::f32, Layout::contiguous);
  problem.shape.pairs = 2;
  problem.a = problem.b = a.view();
  const Memory scores(2, Scalar::f32);
  const xcos::XcosScoreOutputs only_scores = {scores.data(), nullptr, nullptr};
  machine::settings.refuse_next = true;
  expect_refused(xcos::cuda::xcos_score(problem, only_scores, nullptr));
  expect(cudaPeekAtLastError() == cudaSuccess, "the launch error is not left for others to find");
  expect(std::string(xcos::cuda::error_string(9)) == "invalid configuration argument", "error_string");
  expect(xcos::cuda::compiled_architectures().empty() == machine::kEmulated, "architectures if from nvcc");

  // Few enough pairs for one block: no idle warps. Many: the grid stays within the limit.
  expect(xcos::cuda::xcos_score(problem, only_scores, nullptr) == 0, "two pairs");
  expect(machine::last_grid.x == 1 && machine::last_block.x == 64, "two pairs take two warps");
}

// Decisions of the plan that no result shows.
void group_plan() {
  current_case = "plan";
  // The eight lanes that a 16-byte access of shared memory serves at a time must be in different bank groups.
  for (int chunks = 1; chunks <= 96; ++chunks) {
    const int shift = xcos::cuda::rotation_shift_of(chunks);
    for (int step = 0; step < chunks; ++step) {
      for (int first = 0; first < 32; first += 8) {
        unsigned banks = 0;
        for (int cell = first; cell < first + 8; ++cell) {
          const int chunk = (step + (cell >> shift) % chunks) % chunks;
          banks |= 1u << (cell * chunks + chunk) % 8;
        }
        if (banks != 0xffu && chunks % 2 == 0)
          return complain("bank conflicts with %d chunks a cell", chunks);
      }
    }
  }
  const auto plan_of = [](Scalar scalar, xcos::PairShape shape, Layout layout) {
    Map map(shape, scalar, layout);
    xcos::PairProblem problem = {};
    problem.shape = shape;
    problem.scalar = scalar;
    problem.a = problem.b = map.view();
    auto a = xcos::cuda::access_of(problem.a), b = xcos::cuda::access_of(problem.b);
    return xcos::cuda::plan_pairs(problem, a, b, nullptr, nullptr, true);
  };
  using xcos::cuda::Walk;
  for (Scalar scalar : kScalars) {
    const auto plan = plan_of(scalar, {9, 32, 49}, Layout::contiguous);
    expect(plan.staged && plan.tuned && plan.layout.walk == Walk::words, "32x7x7 is tuned");
    expect(plan.shared_bytes <= xcos::cuda::kStagedBytes && plan.layout.warps >= 1, "a block fits");
    const auto last = plan_of(scalar, {9, 32, 49}, Layout::channels_last);
    expect(last.tuned && last.layout.walk == Walk::chunks, "32x7x7 channels_last is tuned");
    expect(!plan_of(scalar, {9, 32, 49}, Layout::unaligned).tuned, "unaligned maps are not");
    expect(plan_of(scalar, {9, 32, 49}, Layout::gapped).staged, "gapped maps are staged");
    expect(!plan_of(scalar, {9, 512, 196}, Layout::contiguous).staged, "large maps are not staged");
  }
  expect(plan_of(Scalar::f16, {9, 32, 49}, Layout::contiguous).layout.warps == 4,
         "four warps of halves a block");
  const auto huge = plan_of(Scalar::f32, {2, 3, 112 * 112}, Layout::contiguous);
  expect(huge.general.parts > 1 && huge.blocks == 2 * huge.general.parts, "large grids are shared out");
}

template <typename T>
unsigned bits_of(T value) {
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
T from_bits(unsigned bits) {
  const uint16_t narrow = uint16_t(bits);
  T value;
  std::memcpy(&value, &narrow, sizeof(value));
  return value;
}

// The conversions the emulator stands in for, all of them; natively CUDA's own.
void group_conversions() {
  current_case = "conversions";
  for (int bf = 0; bf < 2; ++bf) {
    const auto widen = [&](unsigned bits) {
      return bf ? __bfloat162float(from_bits<__nv_bfloat16>(bits)) : __half2float(from_bits<__half>(bits));
    };
    const auto narrow = [&](float v) {
      return bf ? bits_of(__float2bfloat16_rn(v)) : bits_of(__float2half_rn(v));
    };
    const unsigned infinity = bf ? 0x7f80 : 0x7c00;
    expect(std::isinf(widen(infinity)) && std::isnan(widen(infinity + 1)), "infinity and NaN");
    expect(widen(bf ? 0x3f80 : 0x3c00) == 1.0f && widen(bf ? 0xc000 : 0xc000) == -2.0f, "1 and -2");
    expect((narrow(NAN) & 0x7fffu) > infinity, "NaN stays NaN");
    for (unsigned bits = 0; bits < infinity; ++bits) {
      const float low = widen(bits);
      if (narrow(low) != bits || narrow(-low) != (bits | 0x8000u))
        return complain("%#x does not survive", bits);
      if (bits + 1 == infinity) continue;
      const float high = widen(bits + 1), middle = low + (high - low) / 2;
      const unsigned even = bits % 2 == 0 ? bits : bits + 1;
      if (narrow(middle) != even) return complain("a tie above %#x does not go to even", bits);
      if (narrow(std::nextafter(middle, 0.0f)) != bits) return complain("below the tie above %#x", bits);
      if (narrow(std::nextafter(middle, INFINITY)) != bits + 1)
        return complain("above the tie above %#x", bits);
    }
  }
  expect(bits_of(__float2half_rn(65519.0f)) == 0x7bff && bits_of(__float2half_rn(65520.0f)) == 0x7c00,
         "overflow to infinity");
}

// The reference's gradients against differences of its own forward pass.
void group_reference() {
  Random random(5);
  std::normal_distribution<double> normal;
  for (Attention mode : kModes) {
    for (double eps : {1e-6, 2.0}) {
      current_case = std::string("reference ") + kModeNames[int(mode)];
      ++cases;
      reference::Pair p = {4, 6, {}, {}, mode, {}, 0.7, eps};
      std::vector<double> grad_similarity, grad_weights;
      for (int i = 0; i < 24; ++i) {
        p.x.push_back(normal(random));
        p.y.push_back(normal(random));
      }
      for (int i = 0; i < 6; ++i) {
        if (mode == Attention::weights || mode == Attention::logits) p.attention.push_back(normal(random));
        grad_similarity.push_back(normal(random));
        grad_weights.push_back(normal(random));
      }
      const double grad_score = 1.7;
      const auto objective = [&] {
        const reference::Result r = reference::forward(p);
        double value = grad_score * r.score;
        for (size_t i = 0; i < 6; ++i)
          value += grad_similarity[i] * r.similarity[i] + grad_weights[i] * r.weights[i];
        return value;
      };
      const reference::Gradients g = reference::backward(p, grad_score, grad_similarity, grad_weights);
      const auto check = [&](const char* what, std::vector<double>& variable,
                             const std::vector<double>& gradient) {
        for (size_t i = 0; i < variable.size(); ++i) {
          const double saved = variable[i], h = 1e-6;
          variable[i] = saved + h;
          const double up = objective();
          variable[i] = saved - h;
          const double down = objective();
          variable[i] = saved;
          compare(what, 0, int64_t(i), (up - down) / (2 * h), gradient[i], 1e-7, 1e-6);
        }
      };
      check("x", p.x, g.x);
      check("y", p.y, g.y);
      if (!p.attention.empty()) check("attention", p.attention, g.attention);
    }
  }
}

const Groups kPairGroups = {
    {"conversions", group_conversions},
    {"large", group_large},
    {"launch", group_launch},
    {"many", group_many},
    {"nan", group_nan},
    {"plan", group_plan},
    {"reference", group_reference},
    {"rounds", group_rounds},
    {"shapes_full", group_shapes_full},
    {"shapes_half", group_shapes_half},
    {"sizes", group_sizes},
    {"tuned", group_tuned},
};

void list(const Groups& groups) {
  for (const auto& [name, function] : groups) std::printf("%s\n", name.c_str());
  for (const std::string& name : planted_names()) std::printf("planted %s\n", name.c_str());
}

}  // namespace

namespace driver {

void add_pair_tasks(std::vector<Task>& all, int variant) {
  for (Scalar scalar : {Scalar::f16, Scalar::f32}) {
    for (bool tuned : {true, false}) {
      Case c;
      c.scalar = scalar;
      c.shape = tuned ? xcos::PairShape{3 + 17 * variant, 32, 49}
                      : xcos::PairShape{2 + variant, 40 + variant, 260 - 31 * variant};
      c.mode = tuned ? Attention::norm : Attention::logits;
      c.zero_cells = false;
      c.seed = uint64_t(1 + variant);
      const auto runner = std::make_shared<Runner>(c);
      const auto outputs = std::make_shared<decltype(runner->outputs())>(runner->outputs());
      Task task = {"pairs " + c.name(), [=](auto stream) { return runner->enqueue(*outputs, stream); }, {}};
      for (const Memory* memory : outputs->memories()) task.outputs.push_back(memory->storage());
      all.push_back(std::move(task));
    }
  }
}

std::vector<Task> tasks(int variant) {
  std::vector<Task> all;
  for (const auto add : {add_pair_tasks, add_head_tasks, add_match_tasks, add_matrix_tasks,
                         add_matrix_backward_tasks, add_topk_tasks}) {
    add(all, variant);
  }
  return all;
}

}  // namespace driver

int main(int argc, char** argv) {
  Groups groups = kPairGroups;
  if (!machine::kEmulated) groups["very_many"] = group_very_many;
  for (const Groups& more : {matrix_groups(), matrix_backward_groups(), topk_groups(), match_groups(),
                             head_groups(), own_groups()}) {
    groups.insert(more.begin(), more.end());
  }
  std::vector<std::string> words;
  bool kernels = false;
  for (int n = 1; n < argc; ++n) {
    const std::string word = argv[n];
    if (word == "--short") {
      shortened = true;
    } else if (word == "--kernels") {
      kernels = true;
    } else if (!machine::takes(word)) {
      words.push_back(word);
    }
  }
  if (words == std::vector<std::string>{"list"}) {
    list(groups);
    return 0;
  }
  const std::vector<std::string> faults = planted_names();
  if (words.size() == 2 && words[0] == "planted" &&
      std::find(faults.begin(), faults.end(), words[1]) != faults.end()) {
    machine::begin();
    current_case = "planted " + words[1];
    run_planted(words[1]);
    if (failures > 0) return 9;  // a GPU's guards have seen it
    std::printf("planted fault %s went undetected\n", words[1].c_str());
    return 0;
  }
  const auto found = words.size() == 1 ? groups.find(words[0]) : groups.end();
  if (found == groups.end()) {
    std::fprintf(stderr, "usage: %s list | GROUP [--short] [--kernels] | planted NAME\n", argv[0]);
    return 2;
  }
  machine::begin();
  const auto start = std::chrono::steady_clock::now();
  found->second();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (kernels) {
    for (const std::string& name : machine::kernels()) std::printf("kernel %s\n", name.c_str());
  }
  std::printf("%s: %" PRId64 " cases, %" PRId64 " failures, %.2f s\n", found->first.c_str(), cases, failures,
              seconds);
  return failures == 0 ? 0 : 1;
}
