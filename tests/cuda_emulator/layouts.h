// Maps of pairs in the layouts that operators read in place, for the drivers of grid_match and xcos_head.

#pragma once

#include "driver.h"

namespace driver {

enum class Layout { contiguous, channels_last, gapped, shared, unaligned };
inline const char* const kLayoutNames[] = {"contiguous", "channels_last", "gapped", "shared", "unaligned"};

// A map with what lies between its elements.
struct Map {
  Memory memory;
  int64_t count, pair, channel, cell;

  template <typename Case>
  Map(const Case& c, Layout layout) {
    const int64_t cells = c.cells(), size = c.channels * cells;
    pair = layout == Layout::shared ? 0 : size;
    channel = cells;
    cell = 1;
    if (layout == Layout::channels_last) {
      channel = 1;
      cell = c.channels;
    }
    if (layout == Layout::gapped) {
      cell = 2;
      channel = 2 * cells + 1;
      pair = c.channels * channel + 3;
    }
    count = (c.pairs - 1) * pair + (c.channels - 1) * channel + (cells - 1) * cell + 1;
    memory = Memory(count, c.scalar, layout == Layout::unaligned);
  }
  int64_t index(int64_t n, int64_t c, int64_t i) const { return n * pair + c * channel + i * cell; }
  xcos::FeatureView view() const { return {memory.data(), pair, channel, cell}; }
  xcos::MutableFeatureView mutable_view() const { return {memory.data(), pair, channel, cell}; }
};

}  // namespace driver
