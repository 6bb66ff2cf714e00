// Running top-k lists, against sorting everything.
#include <limits>

#include "cuda/xcos_topk.h"
#include "cuda_runtime.h"
#include "driver.h"

namespace driver {
namespace {

struct TopkCase {
  Scalar scalar = Scalar::f32;
  int64_t probes = 2;
  int64_t count = 100;  // of all blocks together
  int64_t k = 10;
  int64_t values = 0;  // different scores; 0: hardly any two are equal
  double min_score = -std::numeric_limits<double>::infinity();
  int64_t excluded = 0;  // indices a probe
  int mask = 0;          // 0: none, 1: one for all probes, 2: one each, 3: one each, every second element
  bool with_nan = false;
  int64_t first_index = 0;
  std::vector<int64_t> blocks;  // ends of the blocks; empty: one
  bool ascending = false;       // the worst case: every score enters the list
  uint64_t seed = 1;

  std::string name() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "topk %s P%" PRId64 " M%" PRId64 " k%" PRId64 " values%" PRId64 " min%g excluded%" PRId64
                  " mask%d nan%d first%" PRId64 " blocks%zu ascending%d seed%" PRIu64,
                  kScalarNames[int(scalar)], probes, count, k, values, min_score, excluded, mask, with_nan,
                  first_index, blocks.size(), ascending, seed);
    return text;
  }
};

struct Lists {
  Memory values;
  Array<int64_t> indices;

  explicit Lists(const TopkCase& c) : values(c.probes * c.k, c.scalar), indices(c.probes * c.k, int64_t{-1}) {
    for (int64_t i = 0; i < c.probes * c.k; ++i) values.put(i, -std::numeric_limits<double>::infinity());
  }
};

// Scores and what is left out of them.
class Runner {
 public:
  explicit Runner(const TopkCase& c)
      : case_(c),
        ends_(c.blocks.empty() ? std::vector<int64_t>{c.count} : c.blocks),
        stride_(c.count + 3),
        step_(c.mask == 3 ? 2 : 1),
        mask_stride_(c.mask <= 1 ? 0 : c.count * step_ + 1),
        scores_((c.probes - 1) * stride_ + c.count, c.scalar),
        exclude_(c.probes * (c.excluded + 1)),
        mask_(c.probes * (c.count * step_ + 1)) {
    const double infinity = std::numeric_limits<double>::infinity();
    Random random(c.seed);
    for (int64_t i = 0; i < mask_.size(); ++i) mask_.put(i, random() % 3 == 0);
    for (int64_t p = 0; p < c.probes; ++p) {
      for (int64_t j = 0; j < c.count; ++j) {
        double score = std::normal_distribution<double>()(random);
        if (c.values > 0) score = double(random() % uint64_t(c.values)) / 4 - 1;
        if (c.ascending) score = double(j);
        if (random() % 50 == 0) score = random() % 2 == 0 ? -infinity : infinity;
        if (c.with_nan && random() % 3 == 0) score = NAN;
        scores_.put(p * stride_ + j, score);
      }
      for (int64_t e = 0; e < c.excluded; ++e) {
        exclude_.put(p * (c.excluded + 1) + e, c.first_index + int64_t(random() % uint64_t(c.count + 5)));
      }
    }
  }

  int enqueue(const Lists& lists, bool backwards, xcos::cuda::Stream stream) const {
    const TopkCase& c = case_;
    for (size_t n = 0; n < ends_.size(); ++n) {
      const size_t block = backwards ? ends_.size() - 1 - n : n;
      const int64_t begin = block == 0 ? 0 : ends_[block - 1];
      xcos::TopkUpdate u = {};
      u.scalar = c.scalar;
      u.probes = c.probes;
      u.count = ends_[block] - begin;
      u.scores = static_cast<const char*>(scores_.data()) + begin * xcos::scalar_size(c.scalar);
      u.scores_stride = stride_;
      u.first_index = c.first_index + begin;
      u.k = c.k;
      u.min_score = c.min_score;
      u.values = lists.values.data();
      u.indices = lists.indices.data();
      if (c.excluded > 0) u.exclude_indices = exclude_.data();
      u.exclude_count = c.excluded;
      u.exclude_stride = c.excluded + 1;
      if (c.mask > 0) u.exclude_mask = mask_.data() + begin * step_;
      u.exclude_mask_stride = mask_stride_;
      u.exclude_mask_step = step_;
      const int status = xcos::cuda::xcos_topk_update(u, stream);
      if (status != 0) return status;
    }
    return 0;
  }

  void run() const {
    const TopkCase& c = case_;
    if (!take(std::string(kScalarNames[int(c.scalar)]) + (c.k > 512 ? " long" : "") +
              (c.mask > 0 ? " mask" : "") + (c.blocks.empty() ? "" : " blocks"))) {
      return;
    }
    ++cases;
    current_case = c.name();
    plainly();
    const Lists lists = launch(false);
    for (int64_t p = 0; p < c.probes; ++p) check(lists, p);
    // Neither the order of threads, nor of blocks, nor the grid matters.
    otherwise(c.seed, 2);
    const Lists again = launch(true);
    plainly();
    if (again.indices.copy() != lists.indices.copy() || again.values.copy() != lists.values.copy()) {
      complain("the lists depend on the order of threads or blocks");
    }
  }

 private:
  Lists launch(bool backwards) const {
    Lists lists(case_);
    const int status = enqueue(lists, backwards, nullptr);
    if (status != 0) complain("xcos_topk_update returned %d", status);
    return lists;
  }

  bool excluded(int64_t p, int64_t j) const {
    const TopkCase& c = case_;
    if (c.mask > 0 && mask_[p * mask_stride_ + j * step_]) return true;
    for (int64_t e = 0; e < c.excluded; ++e) {
      if (exclude_[p * (c.excluded + 1) + e] == c.first_index + j) return true;
    }
    return false;
  }

  void check(const Lists& lists, int64_t p) const {
    const TopkCase& c = case_;
    std::vector<std::pair<double, int64_t>> best;  // sorts by ascending negated score, then index
    for (int64_t j = 0; j < c.count; ++j) {
      const double score = scores_.at(p * stride_ + j);
      if (std::isnan(score) || score < c.min_score || excluded(p, j)) continue;
      best.push_back({-score, c.first_index + j});
    }
    std::sort(best.begin(), best.end());
    best.resize(size_t(c.k), {std::numeric_limits<double>::infinity(), -1});
    for (int64_t i = 0; i < c.k; ++i) {
      const double value = lists.values.at(p * c.k + i);
      const int64_t index = lists.indices[p * c.k + i];
      if (value != -best[size_t(i)].first || index != best[size_t(i)].second) {
        complain("entry [%d, %d] is (%g, %" PRId64 "), expected (%g, %" PRId64 ")", int(p), int(i), value,
                 index, -best[size_t(i)].first, best[size_t(i)].second);
      }
    }
  }

  TopkCase case_;
  std::vector<int64_t> ends_;
  int64_t stride_, step_, mask_stride_;
  Memory scores_;
  Array<int64_t> exclude_;
  Array<bool> mask_;
};

void run(const TopkCase& c) { Runner(c).run(); }

void group_topk() {
  const double infinity = std::numeric_limits<double>::infinity();
  uint64_t seed = 1;
  for (Scalar scalar : {Scalar::f32, Scalar::f64}) {
    // k below, at and above the count; ties; NaN; thresholds; exclusions; blocks.
    for (int64_t k : {1, 10, 130}) {
      for (int64_t values : {0, 6}) {
        TopkCase c;
        c.scalar = scalar;
        c.k = k;
        c.values = values;
        c.seed = seed++;
        run(c);
        c.with_nan = true;
        c.min_score = 0.25;
        c.excluded = 3;
        c.first_index = int64_t{1} << 40;
        c.blocks = {1, 40, 100};
        c.seed = seed++;
        run(c);
        c.mask = 1 + int(seed % 3);
        c.min_score = -infinity;
        c.seed = seed++;
        run(c);
      }
    }
    // More than the buffer holds, all of them better than what is in the list.
    TopkCase c;
    c.scalar = scalar;
    c.probes = 1;
    c.count = 5000;
    c.k = 700;
    c.ascending = true;
    c.seed = seed++;
    run(c);
    c.k = 2048;
    c.ascending = false;
    c.values = 40;
    c.blocks = {4097, 5000};
    c.mask = 2;
    c.seed = seed++;
    run(c);
  }
  current_case = "topk refusals";
  xcos::TopkUpdate u = {};
  u.scalar = Scalar::f32;
  const uint64_t before = machine::launches;
  expect(xcos::cuda::xcos_topk_update(u, nullptr) == 0, "no probes");
  u.probes = u.count = 1;
  u.k = 2049;
  expect(xcos::cuda::xcos_topk_update(u, nullptr) == cudaErrorInvalidValue, "k beyond the limit");
  u.k = 0;
  expect(xcos::cuda::xcos_topk_update(u, nullptr) == cudaErrorInvalidValue, "k = 0");
  u.k = 1;
  u.scalar = Scalar::f16;
  expect(xcos::cuda::xcos_topk_update(u, nullptr) == cudaErrorInvalidValue, "scores of halves");
  expect(machine::launches == before, "nothing was launched");
}

}  // namespace

void add_topk_tasks(std::vector<Task>& all, int variant) {
  for (Scalar scalar : {Scalar::f32, Scalar::f64}) {
    TopkCase c;
    c.scalar = scalar;
    c.probes = 2 + 3 * variant;
    c.count = 900 + 700 * variant;
    c.k = 10 + 300 * variant;
    const auto runner = std::make_shared<Runner>(c);
    const auto lists = std::make_shared<Lists>(c);
    all.push_back({c.name(),
                   [=](auto stream) { return runner->enqueue(*lists, false, stream); },
                   {lists->values.storage(), lists->indices.storage()}});
  }
}

Groups topk_groups() { return {{"topk", group_topk}}; }

}  // namespace driver
