#include "cpu/xcos_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace xcos::cpu {
namespace {

template <typename A>
struct Candidate {
  A score;
  int64_t index;
};

template <typename A>
bool better(const Candidate<A>& a, const Candidate<A>& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

bool excluded(const TopkUpdate& u, int64_t probe, int64_t column) {
  if (u.exclude_mask != nullptr &&
      u.exclude_mask[probe * u.exclude_mask_stride + column * u.exclude_mask_step])
    return true;
  if (u.exclude_indices == nullptr) return false;
  const int64_t* list = u.exclude_indices + probe * u.exclude_stride;
  const int64_t index = u.first_index + column;
  for (int64_t i = 0; i < u.exclude_count; ++i)
    if (list[i] == index) return true;
  return false;
}

// One probe's list. Survivors gather behind the list until there are as many of them again, then the best k
// stay: each costs a constant on average.
template <typename A>
class List {
 public:
  List(const TopkUpdate& u, int64_t probe, std::vector<Candidate<A>>& memory)
      : u_(u), probe_(probe), kept_(memory), floor_(static_cast<A>(u.min_score)) {
    // A limit that A cannot hold is rounded up, never below.
    if (static_cast<double>(floor_) < u.min_score)
      floor_ = std::nextafter(floor_, std::numeric_limits<A>::infinity());
    kept_.clear();
    const A* values = static_cast<const A*>(u.values) + probe * u.k;
    const int64_t* indices = u.indices + probe * u.k;
    for (int64_t i = 0; i < u.k && indices[i] >= 0; ++i) kept_.push_back({values[i], indices[i]});
    if (static_cast<int64_t>(kept_.size()) == u.k) raise(kept_.back());
  }

  void merge() {
    const A* scores = static_cast<const A*>(u_.scores) + probe_ * u_.scores_stride;
    constexpr int64_t kBlock = 16;
    int64_t j = 0;
    for (; j + kBlock <= u_.count; j += kBlock) {
      int any = 0;
      for (int64_t i = 0; i < kBlock; ++i) any |= scores[j + i] >= floor_;
      if (any != 0) visit(scores, j, j + kBlock);
    }
    visit(scores, j, u_.count);
    if (changed_) finish();
  }

 private:
  void visit(const A* scores, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (!(scores[j] >= floor_)) continue;  // NaN is none
      const Candidate<A> candidate{scores[j], u_.first_index + j};
      if (full_ && !better(candidate, worst_)) continue;
      if (excluded(u_, probe_, j)) continue;
      kept_.push_back(candidate);
      changed_ = true;
      const auto room = static_cast<size_t>(u_.k + std::max<int64_t>(u_.k, 64));
      if (kept_.size() >= room) cut();
    }
  }

  void cut() {
    const auto last = kept_.begin() + (u_.k - 1);
    std::nth_element(kept_.begin(), last, kept_.end(), better<A>);
    kept_.resize(static_cast<size_t>(u_.k));
    raise(kept_.back());
  }

  void raise(const Candidate<A>& worst) {
    full_ = true;
    worst_ = worst;
    floor_ = std::max(floor_, worst.score);
  }

  void finish() {
    if (static_cast<int64_t>(kept_.size()) > u_.k) cut();
    std::sort(kept_.begin(), kept_.end(), better<A>);
    A* values = static_cast<A*>(u_.values) + probe_ * u_.k;
    int64_t* indices = u_.indices + probe_ * u_.k;
    for (size_t i = 0; i < kept_.size(); ++i) {
      values[i] = kept_[i].score;
      indices[i] = kept_[i].index;
    }
  }

  const TopkUpdate& u_;
  int64_t probe_;
  std::vector<Candidate<A>>& kept_;
  A floor_;
  bool full_ = false;
  bool changed_ = false;
  Candidate<A> worst_{};
};

template <typename A>
void update_range(int64_t begin, int64_t end, void* context) {
  const TopkUpdate& u = *static_cast<const TopkUpdate*>(context);
  std::vector<Candidate<A>> memory;
  memory.reserve(static_cast<size_t>(u.k + std::max<int64_t>(u.k, 64) + 1));
  for (int64_t probe = begin; probe < end; ++probe) List<A>(u, probe, memory).merge();
}

}  // namespace

void xcos_topk_update(const TopkUpdate& update, ParallelFor parallel_for) {
  if (update.probes == 0 || update.count == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / update.count);
  const RangeFunction function = update.scalar == Scalar::f64 ? update_range<double> : update_range<float>;
  parallel_for(0, update.probes, grain, function, const_cast<TopkUpdate*>(&update));
}

}  // namespace xcos::cpu
