// xcos_head against reference_head.h.
#include "cuda/xcos_head.h"
#include "cuda_runtime.h"
#include "driver.h"
#include "layouts.h"
#include "reference_head.h"

namespace driver {
namespace {

struct HeadCase {
  Scalar scalar = Scalar::f32, parameters = Scalar::f32;
  int64_t pairs = 2, channels = 32, height = 7, width = 7;
  Layout a = Layout::contiguous, b = Layout::contiguous;
  bool symmetric = true, residual = false, weights_last = false, maps = true, with_nan = false;
  double temperature = 1, eps = 1e-6;
  uint64_t seed = 1;

  int64_t cells() const { return height * width; }
  std::string name() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "head %s parameters %s%s N%" PRId64 " C%" PRId64 " %" PRId64 "x%" PRId64
                  " a=%s b=%s%s%s%s T%g eps%g%s seed%" PRIu64,
                  kScalarNames[int(scalar)], kScalarNames[int(parameters)],
                  weights_last ? " channels_last" : "", pairs, channels, height, width, kLayoutNames[int(a)],
                  kLayoutNames[int(b)], symmetric ? " symmetric" : "", residual ? " residual" : "",
                  maps ? " maps" : "", temperature, eps, with_nan ? " nan" : "", seed);
    return text;
  }
};

// A layer in memory, and the same in float64 after rounding to the type it is kept in.
class Layer {
 public:
  Layer(const HeadCase& c, Random& random, int64_t outputs, int64_t inputs, bool norm)
      : inputs_(inputs), last_(c.weights_last) {
    reference.outputs = outputs;
    reference.inputs = inputs;
    const double spread = std::sqrt(2.0 / double(9 * inputs));
    weight_ = Memory(outputs * inputs * 9, c.parameters);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> positive(0.5, 2);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t k = 0; k < inputs; ++k)
        for (int64_t tap = 0; tap < 9; ++tap)
          reference.weight.push_back(put(weight_,
                                         last_ ? (o * 9 + tap) * inputs + k : (o * inputs + k) * 9 + tap,
                                         spread * normal(random)));
    const auto fill = [&](Memory& memory, std::vector<double>& values, const auto& draw) {
      memory = Memory(outputs, c.parameters);
      for (int64_t o = 0; o < outputs; ++o) values.push_back(put(memory, o, draw()));
    };
    const auto centred = [&] { return 0.3 * normal(random); };
    const auto around_one = [&] { return positive(random); };
    fill(bias_, reference.bias, centred);
    norm_ = norm;
    if (!norm) return;
    fill(norm_weight_, reference.norm_weight, around_one);
    fill(norm_bias_, reference.norm_bias, centred);
    fill(norm_mean_, reference.norm_mean, centred);
    fill(norm_variance_, reference.norm_variance, around_one);
    reference.norm_eps = 1e-3;
    slope_ = Memory(1, c.parameters);
    reference.slope = put(slope_, 0, 0.25);
  }

  xcos::HeadLayer view() const {
    xcos::HeadLayer out = {};
    out.weight = weight_.data();
    const int64_t dense[] = {inputs_ * 9, 9, 3, 1}, last[] = {inputs_ * 9, 1, 3 * inputs_, inputs_};
    std::copy_n(last_ ? last : dense, 4, out.weight_strides);
    out.bias = bias_.data();
    if (!norm_) return out;
    out.norm_weight = norm_weight_.data();
    out.norm_bias = norm_bias_.data();
    out.norm_mean = norm_mean_.data();
    out.norm_variance = norm_variance_.data();
    out.norm_eps = reference.norm_eps;
    out.slope = slope_.data();
    return out;
  }

  reference::HeadLayer reference;

 private:
  static double put(const Memory& memory, int64_t index, double value) {
    memory.put(index, value);
    return memory.at(index);
  }

  int64_t inputs_;
  bool last_, norm_;
  Memory weight_, bias_, norm_weight_, norm_bias_, norm_mean_, norm_variance_, slope_;
};

class Runner {
 public:
  explicit Runner(const HeadCase& c)
      : case_(c),
        random_(c.seed),
        a_(c, c.a),
        b_(c, c.b),
        embed_(c, random_, xcos::kHeadHidden, c.channels, true),
        first_(c, random_, xcos::kHeadHidden, 2 * xcos::kHeadHidden, true),
        last_(c, random_, 1, xcos::kHeadHidden, !c.residual) {
    fill(a_);
    fill(b_);
    problem_.pair.shape = {c.pairs, c.channels, c.cells()};
    problem_.pair.scalar = c.scalar;
    problem_.pair.a = a_.view();
    problem_.pair.b = b_.view();
    problem_.pair.temperature = c.temperature;
    problem_.pair.eps = c.eps;
    problem_.height = c.height;
    problem_.width = c.width;
    problem_.parameters = c.parameters;
    problem_.embed = embed_.view();
    problem_.first = first_.view();
    problem_.last = last_.view();
    problem_.symmetric = c.symmetric;
    problem_.residual = c.residual;
  }

  const xcos::HeadProblem& problem() const { return problem_; }

  void run() {
    const std::string parameters = std::to_string(int(case_.parameters));
    if (!take(parameters + kScalarNames[int(case_.scalar)] + (case_.symmetric ? " symmetric" : ""))) return;
    ++cases;
    current_case = case_.name();
    const auto a_before = a_.memory.copy(), b_before = b_.memory.copy();
    plainly();
    const Outputs first = launch();
    check(first);
    otherwise(case_.seed);
    const Outputs second = launch();
    plainly();
    if (first.score.copy() != second.score.copy() || first.similarity.copy() != second.similarity.copy() ||
        first.attention.copy() != second.attention.copy())
      complain("an output depends on the order of threads or the number of blocks");
    if (a_.memory.copy() != a_before || b_.memory.copy() != b_before) complain("inputs were written to");
  }

  struct Outputs {
    Memory score, similarity, attention;
  };

  Outputs outputs() const {
    const int64_t cells = case_.maps ? case_.pairs * case_.cells() : 0;
    return {Memory(case_.pairs, Scalar::f32), Memory(cells, Scalar::f32), Memory(cells, Scalar::f32)};
  }

  int enqueue(const Outputs& o, xcos::cuda::Stream stream) const {
    return xcos::cuda::xcos_head(problem_,
                                 {o.score.data(), case_.maps ? o.similarity.data() : nullptr,
                                  case_.maps ? o.attention.data() : nullptr},
                                 stream);
  }

 private:
  void fill(const Map& map) {
    std::normal_distribution<double> normal;
    for (int64_t n = 0; n < (map.pair == 0 ? 1 : case_.pairs); ++n) {
      for (int64_t i = 0; i < case_.cells(); ++i) {
        const bool zero = random_() % 9 == 0;
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
    const int status = enqueue(o, nullptr);
    if (status != 0) complain("xcos_head returned %d", status);
    return o;
  }

  void check(const Outputs& o) const {
    const HeadCase& c = case_;
    const int64_t cells = c.cells();
    const reference::Head head = {
        c.channels,      c.height,    c.width,    embed_.reference, first_.reference,
        last_.reference, c.symmetric, c.residual, c.temperature,    c.eps};
    for (int64_t n = 0; n < c.pairs; ++n) {
      std::vector<double> x, y;
      for (int64_t k = 0; k < c.channels; ++k) {
        for (int64_t i = 0; i < cells; ++i) {
          x.push_back(a_.memory.at(a_.index(n, k, i)));
          y.push_back(b_.memory.at(b_.index(n, k, i)));
        }
      }
      const reference::HeadResult r = reference::head(head, x, y);
      // Logits are of the order of 1; what they lose reaches W in units of the temperature.
      const double cosine = 0x1p-23 * (16 + 4 * std::sqrt(double(c.channels)));
      const double weight = 0x1p-23 * (16 + 8 * std::sqrt(double(c.channels))) * (1 + 1 / c.temperature);
      double absolute = 0;
      for (const double w : r.attention) absolute += std::fabs(w);
      compare("score", n, 0, o.score.at(n), r.score, cosine + weight * absolute, 0);
      if (!c.maps) continue;
      for (int64_t i = 0; i < cells; ++i) {
        compare("similarity", n, i, o.similarity.at(n * cells + i), r.similarity[size_t(i)], cosine, 0);
        compare("attention", n, i, o.attention.at(n * cells + i), r.attention[size_t(i)], weight * 1e-3,
                weight);
      }
    }
  }

  HeadCase case_;
  Random random_;
  Map a_, b_;
  Layer embed_, first_, last_;
  xcos::HeadProblem problem_ = {};
};

constexpr Scalar kHeadScalars[] = {Scalar::f32, Scalar::f16, Scalar::bf16};

HeadCase vary(Random& random, HeadCase c) {
  constexpr Layout kInputs[] = {Layout::contiguous, Layout::contiguous, Layout::channels_last,
                                Layout::gapped,     Layout::shared,     Layout::unaligned};
  c.a = pick(random, kInputs);
  c.b = pick(random, kInputs);
  c.parameters = pick(random, kHeadScalars);
  c.symmetric = random() % 2 == 0;
  c.residual = random() % 2 == 0;
  c.weights_last = random() % 3 == 0;
  c.maps = random() % 4 != 0;
  c.temperature = pick(random, {0.3, 1.0, 4.0});
  c.eps = pick(random, {1e-6, 1e-6, 2.0});
  c.seed = random();
  return c;
}

// All types, grids from one cell to 64 in a row or a column, and channels around a chunk of 16.
void group_head() {
  Random random(11);
  const int64_t sizes[][3] = {{32, 7, 7}, {32, 7, 7},  {5, 3, 5},  {17, 1, 9}, {1, 1, 1},
                              {8, 4, 4},  {15, 2, 2},  {33, 8, 8}, {16, 9, 7}, {3, 64, 1},
                              {4, 1, 64}, {20, 21, 3}, {48, 7, 7}, {2, 32, 2}, {32, 6, 8}};
  for (Scalar scalar : kHeadScalars) {
    for (const auto& [channels, height, width] : sizes) {
      HeadCase c;
      c.scalar = scalar;
      c.pairs = 1 + int64_t(random() % 3);
      c.channels = channels;
      c.height = height;
      c.width = width;
      Runner(vary(random, c)).run();
    }
  }
  for (int kind = 0; kind < 4; ++kind) {
    HeadCase c;
    c.symmetric = (kind & 1) != 0;
    c.residual = (kind & 2) != 0;
    c.seed = uint64_t(kind);
    Runner(c).run();
  }
}

void group_head_nan() {
  Random random(13);
  for (Scalar scalar : kHeadScalars) {
    HeadCase c;
    c.scalar = scalar;
    c.pairs = 3;
    c = vary(random, c);
    c.a = pick(random, {Layout::contiguous, Layout::channels_last});
    c.with_nan = true;
    Runner(c).run();
  }
}

void group_head_launch() {
  current_case = "head launch";
  HeadCase c;
  c.pairs = 3;
  const Runner runner(c);
  xcos::HeadProblem problem = runner.problem();
  const Memory score(3, Scalar::f32);
  const xcos::XcosScoreOutputs outputs = {score.data(), nullptr, nullptr};
  const uint64_t before = machine::launches;
  problem.pair.shape.pairs = 0;
  expect(xcos::cuda::xcos_head(problem, outputs, nullptr) == 0 && machine::launches == before,
         "nothing is launched for no pairs");
  problem.pair.shape.pairs = 3;
  machine::settings.refuse_next = true;
  expect_refused(xcos::cuda::xcos_head(problem, outputs, nullptr));
  expect(cudaPeekAtLastError() == cudaSuccess, "the launch error is not left for others to find");
  expect(xcos::cuda::xcos_head(problem, outputs, nullptr) == 0, "three pairs");
  expect(machine::launches == before + 2 || machine::launches == before + 1, "one launch");
  expect(machine::last_grid.x == 3 && machine::last_block.x == 256, "a block of eight warps a pair");
}

}  // namespace

void add_head_tasks(std::vector<Task>& all, int variant) {
  for (Scalar scalar : {Scalar::f16, Scalar::f32}) {
    HeadCase c;
    c.scalar = scalar;
    c.pairs = 2 + 9 * variant;
    c.height = 7 - variant;
    const auto runner = std::make_shared<Runner>(c);
    const auto o = std::make_shared<Runner::Outputs>(runner->outputs());
    all.push_back({c.name(),
                   [=](auto stream) { return runner->enqueue(*o, stream); },
                   {o->score.storage(), o->similarity.storage(), o->attention.storage()}});
  }
}

Groups head_groups() {
  return {{"head", group_head}, {"head_launch", group_head_launch}, {"head_nan", group_head_nan}};
}

}  // namespace driver
