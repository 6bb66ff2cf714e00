// What the driver knows of the machine that runs the kernels: the emulator (emulator.cpp), or a GPU behind
// hooks
// (../cuda_native/native.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace machine {

#if defined(XCOS_CUDA_EMULATOR)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// Order in which the emulator gives the threads of a block their turns; results must not depend on it.
// forward and reverse: one warp after the other, each as far as barriers let it. shuffled: all threads in
// turn, in an order drawn anew every time. A GPU has its own order, another one each time.
enum class Order { forward, reverse, shuffled };

struct Settings {
  Order order = Order::forward;
  uint64_t seed = 1;         // of Order::shuffled
  bool refuse_next = false;  // the next launch fails with cudaErrorInvalidConfiguration, once
  int device = 0;            // emulator only
  int capability = 0;        // what launchers hear of the device; 0: the truth, which is 90 of the emulator
  int shared_bytes = 0;      // the same of the most that a block may ask for, which is 227 KB of the emulator
  int multiprocessors = 0;   // the same of their number, which is 132 of the emulator
};
extern Settings settings;

// The build defines XCOS_CUDA_MAX_GRID as this, so that a test can force kernels to loop over their pairs.
constexpr int64_t kNoLimit = 0x7fffffff;
extern int64_t max_grid;

extern uint64_t launches;
extern dim3 last_grid;
extern dim3 last_block;

// How often a kernel was granted less shared memory than it had been granted before.
extern uint64_t smaller_grants;

// What the launch that was refused last returned.
extern int refusal;

// Kernels that were launched, by name (or what stands for it in the emulator).
std::vector<std::string> kernels();

// Bytes on both sides of what the driver allocates that nobody may write.
size_t guard_bytes();

// Takes an argument of the command line that the driver does not know.
bool takes(const std::string& argument);

// Before the first use of the device; ends the program where there is none.
void begin();

}  // namespace machine
