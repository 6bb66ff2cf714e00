#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "driver.h"

namespace driver {
namespace {

constexpr unsigned char kGuard = 0xa5;

std::set<Mirror*>& mirrors() {
  static std::set<Mirror*> all;
  return all;
}

// A fault of a kernel shows in the next call, and nothing works after it.
void demand(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "FAILED %s: %s: %s\n", current_case.c_str(), what, cudaGetErrorString(error));
  std::fflush(nullptr);
  std::_Exit(1);
}

unsigned char* allocate(size_t bytes) {
  void* at = nullptr;
  if (bytes == 0) return nullptr;
  demand(cudaMalloc(&at, bytes), "cudaMalloc");
  return static_cast<unsigned char*>(at);
}

}  // namespace

Mirror::Mirror() : seen_(machine::launches) { mirrors().insert(this); }

Mirror::~Mirror() { mirrors().erase(this); }

void Mirror::upload_all() {
  for (Mirror* mirror : mirrors()) {
    if (mirror->dirty_) mirror->upload();
    mirror->dirty_ = false;
  }
}

void Mirror::refresh() {
  // Dirty: nobody has launched anything that saw it.
  if (!dirty_) fetch();
  seen_ = machine::launches;
}

Storage::Storage(size_t length)
    : guard_(machine::guard_bytes()), length_(length), host_(guard_ + length + guard_, kGuard) {
  std::fill_n(host_.begin() + long(guard_), length, 0xff);
  device_ = allocate(host_.size());
}

Storage::~Storage() {
  if (guard_ > 0) before_reading();  // the guards of what nobody has read
  demand(cudaFree(device_), "cudaFree");
}

void Storage::upload() {
  if (host_.empty()) return;
  demand(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice), "upload");
}

void Storage::fetch() {
  if (host_.empty()) return;
  demand(cudaMemcpy(host_.data(), device_, host_.size(), cudaMemcpyDeviceToHost), "fetch");
  const auto is_guard = [](unsigned char byte) { return byte == kGuard; };
  if (!std::all_of(host_.begin(), host_.begin() + long(guard_), is_guard) ||
      !std::all_of(host_.end() - long(guard_), host_.end(), is_guard)) {
    complain("bytes beside %zu bytes of memory were written", length_);
  }
}

Sparse::Sparse(size_t length) : length_(length) {
  void* at = nullptr;
  if (cudaMalloc(&at, length) != cudaSuccess) {
    std::fprintf(stderr, "no device memory of %zu bytes\n", length);
    std::exit(77);
  }
  device_ = static_cast<unsigned char*>(at);
}

Sparse::~Sparse() { demand(cudaFree(device_), "cudaFree"); }

void Sparse::upload() {
  for (const auto& [page, bytes] : pages_) {
    demand(cudaMemcpy(device_ + page * kPage, bytes.data(), page_bytes(page), cudaMemcpyHostToDevice),
           "upload");
  }
}

void Sparse::fetch() {
  for (auto& [page, bytes] : pages_) {
    demand(cudaMemcpy(bytes.data(), device_ + page * kPage, page_bytes(page), cudaMemcpyDeviceToHost),
           "fetch");
  }
}

}  // namespace driver
