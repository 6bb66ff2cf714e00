#include "cpu/xcos_matrix.h"

#include "cpu/pair_logits.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

constexpr int64_t kProbeBlock = 128;  // probes made ready at a time

// Where a pair's score goes: [probe * row + face * column].
template <typename A>
struct ScoreMatrix {
  A* data;
  int64_t row;
  int64_t column;
};

template <class P, typename T, int W>
class MatrixTask {
 public:
  MatrixTask(const MatrixProblem& m, const ScoreMatrix<typename P::Result>& out)
      : m_(m), out_(out), sizes_(sizes_of(m, P::kStep)), parameters_(m, sizes_) {
    tiles_ = (m.gallery.faces + P::kLanes - 1) / P::kLanes;
    blocks_ = (m.probes.faces + kProbeBlock - 1) / kProbeBlock;
  }

  int64_t steps() const { return tiles_ * blocks_; }

  // Steps are tiles of one block of probes after the other.
  void run(int64_t begin, int64_t end) const {
    FaceTile<P> tile(sizes_);
    PairWork<P> work(sizes_);
    const int64_t most = m_.probes.faces < kProbeBlock ? m_.probes.faces : kProbeBlock;
    ProbeBlock<P, T> probes(sizes_, most);
    int64_t block = -1, count = 0;
    for (int64_t step = begin; step < end; ++step) {
      if (step / tiles_ != block) {
        block = step / tiles_;
        const int64_t left = m_.probes.faces - block * kProbeBlock;
        count = left < kProbeBlock ? left : kProbeBlock;
        probes.prepare(m_, m_.probes, block * kProbeBlock, count);
      }
      const int64_t first = step % tiles_ * P::kLanes;
      tile.template pack<T>(m_, m_.gallery, first);
      Selection all(probes, tile);
      if constexpr (P::kFixed) {
        write_bad(all, count, probes, tile, block * kProbeBlock, first);
        for (int unit = all.next_unit(count, kNoUnit); unit != kNoUnit; unit = all.next_unit(count, unit)) {
          all.choose(count, unit);
          if (all.count == 0) continue;
          tile.template use_unit<T>(m_.gallery, unit);
          probes.use_unit(unit);
          score(all, tile, block * kProbeBlock, first, work);
        }
      } else {
        all.choose_all(count);
        score(all, tile, block * kProbeBlock, first, work);
      }
    }
  }

 private:
  using Lanes = uint32_t;  // a bit a lane

  // The probes of a block that meet a tile together, and the lanes whose scores count.
  struct Selection {
    Selection(const ProbeBlock<P, T>& probes_, const FaceTile<P>& tile_) : probes(probes_), tile(tile_) {}

    static Lanes first_lanes(int n) { return n >= 32 ? ~Lanes(0) : (Lanes(1) << n) - 1; }

    void choose_all(int64_t n) {
      count = n;
      for (int64_t i = 0; i < n; ++i) {
        index[i] = i;
        lanes[i] = first_lanes(tile.count());
      }
    }

    // The smallest unit above `after` that any face here has; kNoUnit: none.
    int next_unit(int64_t n, int after) const {
      int unit = kNoUnit;
      const auto see = [&](bool finite, int exponent) {
        if (finite && exponent > after && (unit == kNoUnit || exponent < unit)) unit = exponent;
      };
      for (int64_t i = 0; i < n; ++i) see(probes.finite(i), probes.exponent(i));
      for (int lane = 0; lane < tile.count(); ++lane) see(tile.finite(lane), tile.exponent(lane));
      return unit;
    }

    // Pairs whose larger unit is this one.
    void choose(int64_t n, int unit) {
      Lanes up_to = 0, exactly = 0;
      for (int lane = 0; lane < tile.count(); ++lane) {
        if (!tile.finite(lane) || tile.exponent(lane) > unit) continue;
        up_to |= Lanes(1) << lane;
        if (tile.exponent(lane) == unit) exactly |= Lanes(1) << lane;
      }
      count = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (!probes.finite(i) || probes.exponent(i) > unit) continue;
        const Lanes wanted = probes.exponent(i) == unit ? up_to : exactly;
        if (wanted == 0) continue;
        index[count] = i;
        lanes[count++] = wanted;
      }
    }

    const ProbeBlock<P, T>& probes;
    const FaceTile<P>& tile;
    int64_t count = 0;
    int64_t index[kProbeBlock];
    Lanes lanes[kProbeBlock];
  };

  void score(const Selection& chosen, const FaceTile<P>& tile, int64_t first_probe, int64_t first,
             PairWork<P>& work) const {
    for (int64_t start = 0; start < chosen.count; start += kProbeGroup) {
      const int n = static_cast<int>(chosen.count - start < kProbeGroup ? chosen.count - start : kProbeGroup);
      const typename P::Word* features[kProbeGroup];
      for (int i = 0; i < n; ++i) features[i] = chosen.probes.features(chosen.index[start + i]);
      dot_all_cells<P>(sizes_, features, tile.features(), n, sizes_.cells, work.dots.get());
      for (int i = 0; i < n; ++i) {
        const int64_t probe = chosen.index[start + i];
        write(attend(chosen.probes, probe, tile, work.dots.get() + i * sizes_.cells, work),
              chosen.lanes[start + i], first_probe + probe, first);
      }
    }
  }

  typename P::Vector attend(const ProbeBlock<P, T>& probes, int64_t i, const FaceTile<P>& tile,
                            const typename P::Sum* dots, PairWork<P>& work) const {
    using V = typename P::Vector;
    using A = typename P::Result;
    V score = {};
    for (int64_t order = 0; order < sizes_.orders; ++order) {
      V total;
      const V largest =
          logits<P, W>(sizes_, parameters_, probes.projection(i), probes.bias(i), tile, order, work);
      score += weigh<P>(sizes_, parameters_, dots, largest, work, total);
    }
    return sizes_.orders == 2 ? score * A(0.5) : score;
  }

  // Pairs that fixed point cannot hold: NaN or infinity in one of the faces.
  void write_bad(const Selection& all, int64_t count, const ProbeBlock<P, T>& probes, const FaceTile<P>& tile,
                 int64_t first_probe, int64_t first) const {
    Lanes bad = 0;
    for (int lane = 0; lane < tile.count(); ++lane)
      if (!tile.finite(lane)) bad |= Lanes(1) << lane;
    const auto nan =
        broadcast_value<typename P::Vector>(std::numeric_limits<typename P::Result>::quiet_NaN());
    for (int64_t i = 0; i < count; ++i) {
      const Lanes lanes = probes.finite(i) ? bad : all.first_lanes(tile.count());
      if (lanes != 0) write(nan, lanes, first_probe + i, first);
    }
  }

  void write(typename P::Vector score, Lanes lanes, int64_t probe, int64_t first) const {
    typename P::Result* to = out_.data + probe * out_.row + first * out_.column;
    if (out_.column == 1 && lanes == Selection::first_lanes(P::kLanes)) return store<P::kLanes>(to, score);
    for (int lane = 0; lane < P::kLanes; ++lane)
      if ((lanes >> lane & 1) != 0) to[lane * out_.column] = score[lane];
  }

  const MatrixProblem& m_;
  ScoreMatrix<typename P::Result> out_;
  Sizes sizes_;
  PairParameters<P> parameters_;
  int64_t tiles_;
  int64_t blocks_;
};

template <class P, typename T, int W>
void run_tiles(const MatrixProblem& m, const ScoreMatrix<typename P::Result>& out, ParallelFor parallel_for) {
  const MatrixTask<P, T, W> task(m, out);
  parallel_for(
      0, task.steps(), 1,
      [](int64_t begin, int64_t end, void* context) {
        static_cast<const MatrixTask<P, T, W>*>(context)->run(begin, end);
      },
      const_cast<MatrixTask<P, T, W>*>(&task));
}

template <class P, typename T>
void run_width(const MatrixProblem& m, void* scores, ParallelFor parallel_for) {
  using A = typename P::Result;
  A* data = static_cast<A*>(scores);
  // Lanes belong to the side that fills them; a maximum and a product have no sides.
  if (m.gallery.faces < P::kLanes && m.probes.faces > m.gallery.faces) {
    MatrixProblem turned = m;
    turned.probes = m.gallery;
    turned.gallery = m.probes;
    const ScoreMatrix<A> out{data, 1, m.gallery.faces};
    if (m.width == 7) return run_tiles<P, T, 7>(turned, out, parallel_for);
    return run_tiles<P, T, 0>(turned, out, parallel_for);
  }
  const ScoreMatrix<A> out{data, m.gallery.faces, 1};
  if (m.width == 7) return run_tiles<P, T, 7>(m, out, parallel_for);
  return run_tiles<P, T, 0>(m, out, parallel_for);
}

template <typename T>
void run_half(const MatrixProblem& m, void* scores, ParallelFor parallel_for) {
#if defined(__AVX512VNNI__)
  run_width<Fixed16, T>(m, scores, parallel_for);
#else
  run_width<Real<float>, T>(m, scores, parallel_for);
#endif
}

}  // namespace

void xcos_matrix(const MatrixProblem& problem, void* scores, ParallelFor parallel_for) {
  if (problem.probes.faces == 0 || problem.gallery.faces == 0) return;
  switch (problem.scalar) {
    case Scalar::f32:
      return run_width<Real<float>, float>(problem, scores, parallel_for);
    case Scalar::f64:
      return run_width<Real<double>, double>(problem, scores, parallel_for);
    case Scalar::f16:
      return run_half<F16>(problem, scores, parallel_for);
    case Scalar::bf16:
      return run_half<BF16>(problem, scores, parallel_for);
  }
}

}  // namespace xcos::cpu::XCOS_ISA
