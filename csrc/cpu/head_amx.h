// The two large layers of xcos_head on AMX, the matrix unit of Sapphire Rapids and later, at nearly the
// precision of fp32: every value is the sum of two bfloat16, its rounding and what that left over, and of the
// four products of two such values the three larger ones are added up in fp32. What is lost is about 2^-17 of
// each product.
//
// A row of a tile is a grid cell with 32 input channels, or with the 16 of either face. Cells lie in a frame
// with a zero behind every grid row and enough before and behind the grid, so that a tap of the convolution
// is the same tile some rows further on. Included only by xcos_head.cpp.
#pragma once

#include "cpu/head_direct.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define XCOS_HEAD_AMX

#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

// The file is compiled without AMX; the functions that use it say so and run only where HeadAmx::available().
#define XCOS_AMX __attribute__((target("amx-tile,amx-bf16")))

namespace xcos::cpu::XCOS_ISA {
namespace {

// What is left over of v when it has been rounded to bfloat16 `rounded` (as 16 values in 32-bit lanes, low).
XCOS_INLINE __m256i round_to_bf16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
XCOS_INLINE __m512 left_over(__m512 v, __m256i rounded) {
  return _mm512_sub_ps(v, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

// Lane i of both: x's value below y's, as two bfloat16, and the same of what they left over.
XCOS_INLINE void split_pairs(__m512 x, __m512 y, __m512i& high, __m512i& low) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  high = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  const __m512 x_left = _mm512_sub_ps(x, (__m512)_mm512_slli_epi32(high, 16));
  const __m512 y_left = _mm512_sub_ps(y, (__m512)_mm512_and_si512(high, _mm512_set1_epi32(~0xffff)));
  low = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(y_left, x_left));
}

// Rows to columns: 16 vectors of 16 32-bit lanes.
XCOS_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // v[4 g + j] has column 4 l + j of rows 4 g .. 4 g + 3 in its 128-bit lane l.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88),
                  b = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd),
                  d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// The arithmetic of HeadTask (xcos_head.cpp) on AMX.
class HeadAmx {
 public:
  static constexpr int kTileRows = 16;
  static constexpr int kRowBytes = 64;                   // of a tile: 32 bfloat16
  static constexpr int kInputs = 32;                     // of a tile
  static constexpr int64_t kMostRows = 4 * kTileRows;    // of the frame that belong to grid rows
  static constexpr int64_t kMostMargin = kMostRows + 1;  // of a grid of one row: its length + 2
  static constexpr int64_t kFrameRows = kMostRows + 2 * kMostMargin;

  // Cells of a frame, 32 bfloat16 each, and what they left over.
  struct Frame {
    alignas(64) uint16_t high[kFrameRows * kInputs];
    alignas(64) uint16_t low[kFrameRows * kInputs];
  };
  struct Work {
    Frame input;
    Frame embedded;  // channels of the first face, then of the second
    alignas(64) float sums[kMostRows * kHeadHidden];
    alignas(64) float hidden[kHeadMostCells * kHeadHidden];
  };

  // Whether this processor has the unit and the system lets this process use it.
  static bool available() {
    static const bool answer = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                               __builtin_cpu_supports("amx-bf16") && permitted();
    return answer;
  }
  static bool supports(const HeadProblem& p) {
    return p.pair.shape.channels % kInputs == 0 && p.height * (p.width + 1) <= kMostRows;
  }

  HeadAmx(const HeadProblem& p, const float* packed)
      : layout_(HeadLayout::of(p.pair.shape.channels)),
        packed_(packed),
        chunks_(p.pair.shape.channels / kInputs),
        height_(p.height),
        width_(p.width),
        cells_(p.pair.shape.cells),
        pitch_(p.width + 1),
        margin_(p.width + 2),
        weights_((chunks_ + 2) * kLayerValues) {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk)
      pack_weights(packed + layout_.embed + chunk * kInputs * kHeadTaps * kHeadHidden, 0, chunk);
    pack_weights(packed + layout_.first, 0, chunks_);
    if (p.symmetric) pack_weights(packed + layout_.first, kHeadHidden, chunks_ + 1);
    full_tiles_ = static_cast<int>((p.height * pitch_ - 1) / kTileRows);
    last_rows_ = static_cast<int>(p.height * pitch_ - full_tiles_ * kTileRows);
    last_is_edge_ = last_rows_ <= pitch_;
  }

  // Before and after a thread's use of an engine.
  XCOS_AMX void begin(Work& work) const {
    const size_t used = static_cast<size_t>(2 * margin_ + height_ * pitch_) * kRowBytes;
    for (Frame* frame : {&work.input, &work.embedded}) {
      memset(frame->high, 0, used);
      memset(frame->low, 0, used);
    }
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool last = tile == kLastSums || tile == kLastInput;
      config.row_bytes[tile] = kRowBytes;
      config.rows[tile] = static_cast<uint8_t>(last ? last_rows_ : kTileRows);
    }
    written();
    _tile_loadconfig(&config);
  }
  XCOS_AMX void end() const { _tile_release(); }

  // E of one face. map: F, its cells side by side; side 0: the first face.
  XCOS_AMX void embed(const float* map, int64_t channel_stride, int side, Work& work) const {
    clear_sums();
    for (int64_t chunk = 0; chunk < chunks_; ++chunk, map += kInputs * channel_stride) {
      pack_input(map, channel_stride, work.input);
      convolve(work.input, weights_.get() + chunk * kLayerValues);
    }
    store_sums(work.sums);
    const __m512 shift = _mm512_loadu_ps(packed_ + layout_.embed_shift);
    const __m512 slope = _mm512_set1_ps(packed_[layout_.slopes]);
    for (int64_t r = 0, row = 0; r < height_; ++r, ++row) {
      for (int64_t q = 0; q < width_; ++q, ++row) {
        const __m512 v = activated(_mm512_load_ps(work.sums + row * kHeadHidden), shift, slope);
        const __m256i high = round_to_bf16(v);
        const int64_t at = (margin_ + row) * kInputs + side * kHeadHidden;
        _mm256_store_si256(reinterpret_cast<__m256i*>(work.embedded.high + at), high);
        _mm256_store_si256(reinterpret_cast<__m256i*>(work.embedded.low + at),
                           round_to_bf16(left_over(v, high)));
      }
    }
  }

  // g of every cell; order 1: with the faces exchanged.
  XCOS_AMX void logits(int order, Work& work, float* out) const {
    clear_sums();
    convolve(work.embedded, weights_.get() + (chunks_ + order) * kLayerValues);
    store_sums(work.sums);
    const __m512 shift = _mm512_loadu_ps(packed_ + layout_.first_shift);
    const __m512 slope = _mm512_set1_ps(packed_[layout_.slopes + 1]);
    float* hidden = work.hidden;
    for (int64_t r = 0, row = 0; r < height_; ++r, ++row) {
      for (int64_t q = 0; q < width_; ++q, ++row, hidden += kHeadHidden)
        _mm512_store_ps(hidden, activated(_mm512_load_ps(work.sums + row * kHeadHidden), shift, slope));
    }
    last_layer(layout_, packed_, height_, width_, work.hidden, out);
  }

 private:
  static constexpr int64_t kTileValues = kTileRows * kInputs;
  static constexpr int64_t kLayerValues = 2 * kHeadTaps * kTileValues;  // high and low
  static constexpr int kLastSums = 3;                                   // tiles whose rows are the last ones
  static constexpr int kLastInput = 5;

  static bool permitted() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }

  // GCC's tile instructions do not say that they read memory: what was stored before must not be put off.
  static XCOS_INLINE void written() { asm volatile("" ::: "memory"); }

  static XCOS_INLINE __m512 activated(__m512 sum, __m512 shift, __m512 slope) {
    const __m512 v = _mm512_add_ps(sum, shift);
    const __mmask16 positive_lanes = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_mul_ps(v, static_cast<__mmask16>(~positive_lanes), v, slope);
  }

  // [32 inputs, taps, hidden] to tiles, a tap's high one before its low one; `turn`: inputs begin there and
  // go around.
  void pack_weights(const float* from, int turn, int64_t layer) {
    uint16_t* to = weights_.get() + layer * kLayerValues;
    for (int tap = 0; tap < kHeadTaps; ++tap, to += 2 * kTileValues) {
      for (int row = 0; row < kTileRows; ++row) {
        const float* x = from + ((2 * row + turn) % kInputs * kHeadTaps + tap) * kHeadHidden;
        __m512i high, low;
        split_pairs(_mm512_loadu_ps(x), _mm512_loadu_ps(x + kHeadTaps * kHeadHidden), high, low);
        _mm512_store_si512(to + row * kInputs, high);
        _mm512_store_si512(to + kTileValues + row * kInputs, low);
      }
    }
  }

  // 32 channels of a map into the frame.
  void pack_input(const float* map, int64_t stride, Frame& frame) const {
    int64_t cell = 0, r = 0, q = 0;
    for (; cell + 16 <= cells_; cell += 16) {
      __m512i high[16], low[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        const float* x = map + 2 * k * stride + cell;
        split_pairs(_mm512_loadu_ps(x), _mm512_loadu_ps(x + stride), high[k], low[k]);
      }
      transpose(high);
      transpose(low);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t at = (margin_ + r * pitch_ + q) * kInputs;
        _mm512_store_si512(frame.high + at, high[i]);
        _mm512_store_si512(frame.low + at, low[i]);
        if (++q == width_) q = 0, ++r;
      }
    }
    for (; cell < cells_; ++cell) {
      alignas(64) float even[16], odd[16];
      for (int k = 0; k < 16; ++k) {
        even[k] = map[2 * k * stride + cell];
        odd[k] = map[(2 * k + 1) * stride + cell];
      }
      __m512i high, low;
      split_pairs(_mm512_load_ps(even), _mm512_load_ps(odd), high, low);
      const int64_t at = (margin_ + r * pitch_ + q) * kInputs;
      _mm512_store_si512(frame.high + at, high);
      _mm512_store_si512(frame.low + at, low);
      if (++q == width_) q = 0, ++r;
    }
  }

  // Tiles 0 to 3: sums of 16 rows of the frame each, the last one's in tile 3; 4, 5: inputs; 6, 7: weights.
  XCOS_AMX static XCOS_INLINE void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  XCOS_AMX XCOS_INLINE void store_sums(float* sums) const {
    constexpr int64_t kTile = kTileRows * kHeadHidden;
    if (full_tiles_ > 0) _tile_stored(0, sums, kRowBytes);
    if (full_tiles_ > 1) _tile_stored(1, sums + kTile, kRowBytes);
    if (full_tiles_ > 2) _tile_stored(2, sums + 2 * kTile, kRowBytes);
    _tile_stored(3, sums + full_tiles_ * kTile, kRowBytes);
  }

#define XCOS_HEAD_TILE(sums, input, at)       \
  _tile_loadd(input, high + (at), kRowBytes); \
  _tile_dpbf16ps(sums, input, 6);             \
  _tile_dpbf16ps(sums, input, 7);             \
  _tile_loadd(input, low + (at), kRowBytes);  \
  _tile_dpbf16ps(sums, input, 6);
  // The taps of one layer, added to the sums.
  XCOS_AMX XCOS_INLINE void convolve(const Frame& frame, const uint16_t* weights) const {
    written();
    for (int64_t tap = 0; tap < kHeadTaps; ++tap, weights += 2 * kTileValues) {
      const int64_t first = (margin_ + (tap / 3 - 1) * pitch_ + tap % 3 - 1) * kInputs;
      const uint16_t *high = frame.high + first, *low = frame.low + first;
      _tile_loadd(6, weights, kRowBytes);
      _tile_loadd(7, weights + kTileValues, kRowBytes);
      if (full_tiles_ > 0) {
        XCOS_HEAD_TILE(0, 4, 0)
      }
      if (full_tiles_ > 1) {
        XCOS_HEAD_TILE(1, 4, kTileValues)
      }
      if (full_tiles_ > 2) {
        XCOS_HEAD_TILE(2, 4, 2 * kTileValues)
      }
      if (tap < 6 || !last_is_edge_) {  // the last grid row has nothing below it
        XCOS_HEAD_TILE(3, 5, full_tiles_ * kTileValues)
      }
    }
  }
#undef XCOS_HEAD_TILE

  HeadLayout layout_;
  const float* packed_;
  int64_t chunks_;
  int64_t height_;
  int64_t width_;
  int64_t cells_;
  int64_t pitch_;   // rows of the frame from a grid row to the next
  int64_t margin_;  // of them before the first
  int full_tiles_;
  int last_rows_;
  bool last_is_edge_;  // the last tile holds cells of the last grid row only
  Buffer<uint16_t> weights_;
};

}  // namespace
}  // namespace xcos::cpu::XCOS_ISA

#undef XCOS_AMX
#endif
