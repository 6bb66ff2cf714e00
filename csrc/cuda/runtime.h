// What the CUDA half of the library says about itself. Needs no CUDA headers.
#pragma once

#include <cstdint>
#include <vector>

namespace xcos::cuda {

// A cudaStream_t. The legacy default stream is null, as in CUDA itself.
using Stream = void*;

// A cudaError_t; 0 is success.
using Status = int32_t;

// CUDA's own description of a status.
const char* error_string(Status status);

// Compute capabilities with code in this build, ascending: 75, 80, 90, ...
std::vector<int> compiled_architectures();

}  // namespace xcos::cuda
