#pragma once

namespace machine {

// While it lives, launches go straight to CUDA: from several threads, or into a graph. What was written on
// the host is on the device before.
class Passive {
 public:
  Passive();
  ~Passive();
};

}  // namespace machine
