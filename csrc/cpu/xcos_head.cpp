// The layers are folded and brought into the kernels' order at every call, which costs a few microseconds and
// keeps nothing that could go stale; pairs are then worked on one by one, everything of a pair staying in the
// first-level cache.
#include "cpu/xcos_head.h"

#include <cmath>
#include <type_traits>

#include "cpu/head_amx.h"
#include "cpu/head_direct.h"
#include "cpu/pair_kernels.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

constexpr int64_t kHeadGrain = 2;  // pairs worth another thread's time

// Folds the batch norm of output `o` into a scale of its weights and a shift.
template <typename P>
XCOS_INLINE void fold(const HeadLayer& layer, int64_t o, float& scale, float& shift) {
  const auto value = [&](const void* data) { return load_one(static_cast<const P*>(data) + o); };
  scale = 1.0f;
  shift = value(layer.bias);
  if (layer.norm_variance == nullptr) return;
  scale = value(layer.norm_weight) /
          __builtin_sqrtf(value(layer.norm_variance) + static_cast<float>(layer.norm_eps));
  shift = (shift - value(layer.norm_mean)) * scale + value(layer.norm_bias);
}

// weight [hidden, in, 3, 3] to [in, taps, hidden], and the shifts.
template <typename P>
void pack_layer(const HeadLayer& layer, int64_t inputs, float* weight, float* shift) {
  const int64_t* s = layer.weight_strides;
  float scale[kHeadHidden];
  for (int64_t o = 0; o < kHeadHidden; ++o) fold<P>(layer, o, scale[o], shift[o]);
  const P* from = static_cast<const P*>(layer.weight);
  for (int64_t c = 0; c < inputs; ++c, from += s[1]) {
    for (int64_t y = 0; y < 3; ++y) {
      for (int64_t x = 0; x < 3; ++x, weight += kHeadHidden) {
        const P* at = from + y * s[2] + x * s[3];
        for (int64_t o = 0; o < kHeadHidden; ++o) weight[o] = load_one(at + o * s[0]) * scale[o];
      }
    }
  }
}

template <typename P>
void pack_parameters(const HeadProblem& p, float* out) {
  const int64_t channels = p.pair.shape.channels;
  const HeadLayout l = HeadLayout::of(channels);
  pack_layer<P>(p.embed, channels, out + l.embed, out + l.embed_shift);
  pack_layer<P>(p.first, 2 * kHeadHidden, out + l.first, out + l.first_shift);
  // One output: its inputs are what lies side by side.
  float scale;
  fold<P>(p.last, 0, scale, out[l.last_shift]);
  const int64_t* s = p.last.weight_strides;
  const P* last = static_cast<const P*>(p.last.weight);
  for (int64_t k = 0; k < kHeadTaps; ++k)
    for (int64_t c = 0; c < kHeadHidden; ++c)
      out[l.last + k * kHeadHidden + c] = load_one(last + c * s[1] + k / 3 * s[2] + k % 3 * s[3]) * scale;
  const HeadLayer* layers[] = {&p.embed, &p.first, &p.last};
  for (int i = 0; i < 3; ++i)
    out[l.slopes + i] =
        layers[i]->slope == nullptr ? 1.0f : load_one(static_cast<const P*>(layers[i]->slope));
}

void pack_parameters(const HeadProblem& p, float* out) {
  switch (p.parameters) {
    case Scalar::f16:
      return pack_parameters<F16>(p, out);
    case Scalar::bf16:
      return pack_parameters<BF16>(p, out);
    default:
      return pack_parameters<float>(p, out);
  }
}

// w += share * softmax(z / temperature).
XCOS_INLINE void add_softmax(float* z, int64_t cells, float inverse_temperature, float share, float* w) {
  float highest = z[0];
  for (int64_t i = 1; i < cells; ++i) highest = z[i] > highest ? z[i] : highest;
  // A NaN is not the largest, but reaches the sum.
  for (int64_t i = 0; i < cells; ++i) z[i] = exp_nonpositive((z[i] - highest) * inverse_temperature);
  const float scale = share / sum_cells<float>(cells, [&](int64_t i) { return z[i]; });
  for (int64_t i = 0; i < cells; ++i) w[i] += z[i] * scale;
}

// Pairs of features of type T, the layers computed by Engine.
template <class Engine, typename T>
class HeadTask {
 public:
  HeadTask(const HeadProblem& p, const XcosScoreOutputs& out, const Engine& engine)
      : p_(p), out_(out), engine_(engine) {}

  void run(int64_t begin, int64_t end) const {
    const int64_t cells = p_.pair.shape.cells;
    Scratch<float> scratch(cells);
    PairState<T, float> state(p_.pair, scratch);
    Buffer<typename Engine::Work> work(1);
    Buffer<float> staged(p_.pair.shape.channels * cells);
    const T *embedded_a = nullptr, *embedded_b = nullptr;
    alignas(64) float z[kHeadMostCells], norm_logits[kHeadMostCells], w[kHeadMostCells];
    const float inverse_temperature = 1.0f / positive<float>(p_.pair.temperature);
    const float eps = positive<float>(p_.pair.eps), temperature = static_cast<float>(p_.pair.temperature);
    engine_.begin(*work.get());
    for (int64_t n = begin; n < end; ++n) {
      state.compute(n, state.after(n, end), false);
      embed(p_.pair.a, state.a(n), 0, staged.get(), embedded_a, *work.get());
      embed(p_.pair.b, state.b(n), 1, staged.get(), embedded_b, *work.get());
      if (p_.residual) {
        for (int64_t i = 0; i < cells; ++i) {
          const float x = clamp_norm(state.cell.x_norm[i], eps), y = clamp_norm(state.cell.y_norm[i], eps);
          norm_logits[i] = temperature * (__builtin_logf(x) + __builtin_logf(y));
        }
      }
      for (int64_t i = 0; i < cells; ++i) w[i] = 0.0f;
      for (int order = 0; order < (p_.symmetric ? 2 : 1); ++order) {
        engine_.logits(order, *work.get(), z);
        if (p_.residual)
          for (int64_t i = 0; i < cells; ++i) z[i] += norm_logits[i];
        add_softmax(z, cells, inverse_temperature, p_.symmetric ? 0.5f : 1.0f, w);
      }
      write(n, state.cell.cosine, w);
    }
    engine_.end();
  }

 private:
  // embedded: the map that this side holds already, so that one face against many is embedded once.
  void embed(const FeatureView& view, const T* map, int side, float* staged, const T*& embedded,
             typename Engine::Work& work) const {
    if (embedded == map) return;
    embedded = map;
    const int64_t channels = p_.pair.shape.channels, cells = p_.pair.shape.cells;
    if constexpr (std::is_same_v<T, float>) {
      if (view.cell_stride == 1 || cells == 1) return engine_.embed(map, view.channel_stride, side, work);
    }
    float* to = staged;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < cells; ++i)
        *to++ = load_one(map + c * view.channel_stride + i * view.cell_stride);
    engine_.embed(staged, cells, side, work);
  }

  void write(int64_t n, const float* similarity, const float* w) const {
    const int64_t cells = p_.pair.shape.cells;
    static_cast<float*>(out_.score)[n] =
        sum_cells<float>(cells, [&](int64_t i) { return w[i] * similarity[i]; });
    if (out_.similarity != nullptr)
      memcpy(static_cast<float*>(out_.similarity) + n * cells, similarity, cells * sizeof(float));
    if (out_.attention != nullptr)
      memcpy(static_cast<float*>(out_.attention) + n * cells, w, cells * sizeof(float));
  }

  const HeadProblem& p_;
  const XcosScoreOutputs& out_;
  const Engine& engine_;
};

template <class Engine, typename T>
void run_pairs(const HeadProblem& p, const XcosScoreOutputs& out, const Engine& engine,
               ParallelFor parallel_for) {
  const HeadTask<Engine, T> task(p, out, engine);
  parallel_for(
      0, p.pair.shape.pairs, kHeadGrain,
      [](int64_t begin, int64_t end, void* context) {
        static_cast<const HeadTask<Engine, T>*>(context)->run(begin, end);
      },
      const_cast<HeadTask<Engine, T>*>(&task));
}

template <class Engine>
void run_types(const HeadProblem& p, const XcosScoreOutputs& out, const float* packed,
               ParallelFor parallel_for) {
  const Engine engine(p, packed);
  switch (p.pair.scalar) {
    case Scalar::f16:
      return run_pairs<Engine, F16>(p, out, engine, parallel_for);
    case Scalar::bf16:
      return run_pairs<Engine, BF16>(p, out, engine, parallel_for);
    default:
      return run_pairs<Engine, float>(p, out, engine, parallel_for);
  }
}

}  // namespace

void xcos_head(const HeadProblem& problem, const XcosScoreOutputs& outputs, ParallelFor parallel_for) {
  if (problem.pair.shape.pairs == 0) return;
  Buffer<float> packed(HeadLayout::of(problem.pair.shape.channels).size);
  pack_parameters(problem, packed.get());
#if defined(XCOS_HEAD_AMX)
  if (HeadAmx::supports(problem) && HeadAmx::available())
    return run_types<HeadAmx>(problem, outputs, packed.get(), parallel_for);
#endif
  run_types<HeadDirect>(problem, outputs, packed.get(), parallel_for);
}

}  // namespace xcos::cpu::XCOS_ISA
