// From torch's current device and stream to the kernels' launchers. A library built with CUDA code also runs
// on a torch without CUDA: the one symbol that such a torch lacks is weak, and never called there.
#pragma once

#if defined(XCOS_WITH_CUDA)

#include <torch/csrc/stable/accelerator.h>

#include "cuda/runtime.h"
#include "ops/tensors.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace xcos::ops {

// Makes t's device current for its lifetime and knows that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    check(&aoti_torch_get_current_cuda_stream != nullptr,
          "xcos_ext: a CUDA tensor came, but the running torch has no CUDA support");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(const char* op, cuda::Status status) {
  check(status == 0, op, ": CUDA error ", status, ": ", cuda::error_string(status));
}

}  // namespace xcos::ops

#endif  // XCOS_WITH_CUDA
