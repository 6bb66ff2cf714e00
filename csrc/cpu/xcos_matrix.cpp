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
      if constexpr (P::kFixed) {
        tile.template fit<T>(m_.gallery, probes.exponent());
        probes.use_unit(tile.exponent());
      }
      for (int64_t i = 0; i < count; i += kProbeGroup) {
        const int n = static_cast<int>(count - i < kProbeGroup ? count - i : kProbeGroup);
        score(probes, i, n, tile, block * kProbeBlock + i, first, work);
      }
    }
  }

 private:
  void score(const ProbeBlock<P, T>& probes, int64_t in_block, int count, const FaceTile<P>& tile,
             int64_t probe, int64_t first, PairWork<P>& work) const {
    const typename P::Word* features[kProbeGroup];
    for (int i = 0; i < count; ++i) features[i] = probes.features(in_block + i);
    dot_all_cells<P>(sizes_, features, tile.features(), count, sizes_.cells, work.dots.get());
    for (int i = 0; i < count; ++i)
      write(attend(probes, in_block + i, tile, work.dots.get() + i * sizes_.cells, work), tile, probe + i,
            first);
  }

  typename P::Vector attend(const ProbeBlock<P, T>& probes, int64_t i, const FaceTile<P>& tile,
                            const typename P::Sum* dots, PairWork<P>& work) const {
    using V = typename P::Vector;
    using A = typename P::Result;
    V score = {};
    if (P::kFixed && !probes.finite(i)) return score + std::numeric_limits<A>::quiet_NaN();
    for (int64_t order = 0; order < sizes_.orders; ++order) {
      V total;
      const V largest =
          logits<P, W>(sizes_, parameters_, probes.projection(i), probes.bias(i), tile, order, work);
      score += weigh<P>(sizes_, parameters_, dots, largest, work, total);
    }
    return sizes_.orders == 2 ? score * A(0.5) : score;
  }

  void write(typename P::Vector score, const FaceTile<P>& tile, int64_t probe, int64_t first) const {
    using A = typename P::Result;
    if constexpr (P::kFixed) {
      if (!tile.all_finite())
        for (int lane = 0; lane < P::kLanes; ++lane)
          if (!tile.finite(lane)) score[lane] = std::numeric_limits<A>::quiet_NaN();
    }
    A* to = out_.data + probe * out_.row + first * out_.column;
    if (out_.column == 1 && tile.count() == P::kLanes) return store<P::kLanes>(to, score);
    for (int lane = 0; lane < tile.count(); ++lane) to[lane * out_.column] = score[lane];
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
