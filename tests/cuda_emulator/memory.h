// Device memory with what it holds beside it on the host. Writing goes to the host's side, which a launch
// uploads before it runs (upload_all); after a launch, reading fetches the device's side first.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "machine.h"

namespace driver {

// One allocation with two sides.
class Mirror {
 public:
  Mirror();
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  virtual ~Mirror();

  // What a launch finds on the device is what was written on the host.
  static void upload_all();

 protected:
  void before_reading() {
    if (seen_ != machine::launches) refresh();
  }
  void before_writing() {
    before_reading();
    dirty_ = true;
  }

 private:
  virtual void upload() = 0;
  virtual void fetch() = 0;
  void refresh();

  bool dirty_ = true;
  uint64_t seen_;  // the launch that the host's side is up to date with
};

// On the device exactly as large as what it holds (and the machine's guards, if it has any), so that
// AddressSanitizer or compute-sanitizer see the first byte beyond. Full of 0xff, a NaN of every type, until
// written.
class Storage : public Mirror {
 public:
  explicit Storage(size_t length);
  ~Storage() override;

  size_t length() const { return length_; }
  unsigned char* device() const { return device_ + guard_; }
  const unsigned char* read() {
    before_reading();
    return host_.data() + guard_;
  }
  unsigned char* write() {
    before_writing();
    return host_.data() + guard_;
  }

 private:
  void upload() override;
  void fetch() override;

  size_t guard_;
  size_t length_;
  std::vector<unsigned char> host_;
  unsigned char* device_ = nullptr;
};

// Memory of many gigabytes of which hardly anything is used: only touched pages have a side on the host.
class Sparse : public Mirror {
 public:
  explicit Sparse(size_t length);
  ~Sparse() override;

  void* device() const { return device_; }
  // An element of at most 8 bytes that does not cross a page.
  const void* read(size_t offset) {
    before_reading();
    return find(offset);
  }
  void* write(size_t offset) {
    before_writing();
    return find(offset);
  }

 private:
  static constexpr size_t kPage = 4096;
  unsigned char* find(size_t offset) {
    std::vector<unsigned char>& page = pages_[offset / kPage];
    if (page.empty()) page.assign(kPage, 0xff);
    return page.data() + offset % kPage;
  }
  size_t page_bytes(size_t page) const {
    return length_ - page * kPage < kPage ? length_ - page * kPage : kPage;
  }
  void upload() override;
  void fetch() override;

  size_t length_;
  std::map<size_t, std::vector<unsigned char>> pages_;
  unsigned char* device_ = nullptr;
};

// Values of a type that is none of the operators' scalars.
template <typename T>
class Array {
 public:
  Array() : Array(0) {}
  explicit Array(int64_t count) : storage_(std::make_shared<Storage>(size_t(count) * sizeof(T))) {}
  Array(int64_t count, T value) : Array(count) {
    for (int64_t i = 0; i < count; ++i) put(i, value);
  }

  T* data() const { return reinterpret_cast<T*>(storage_->device()); }
  int64_t size() const { return int64_t(storage_->length() / sizeof(T)); }
  T operator[](int64_t index) const {
    T value;
    std::memcpy(&value, storage_->read() + size_t(index) * sizeof(T), sizeof(T));
    return value;
  }
  void put(int64_t index, T value) const {
    std::memcpy(storage_->write() + size_t(index) * sizeof(T), &value, sizeof(T));
  }
  std::vector<unsigned char> copy() const {
    const unsigned char* at = storage_->read();
    return {at, at + storage_->length()};
  }
  const std::shared_ptr<Storage>& storage() const { return storage_; }

 private:
  std::shared_ptr<Storage> storage_;
};

}  // namespace driver
