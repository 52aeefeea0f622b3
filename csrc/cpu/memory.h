// Memory of the kernels' own: for one call, or kept by a thread.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace pp {
namespace {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that begins at a cache line: a vector of 64 bytes that straddles two lines is loaded at less than half the speed.
template <class T>
std::unique_ptr<T[], Free> aligned(int64_t count) {
  void* p = std::aligned_alloc(64, round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  if (!p && count) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

// Memory that stays with the thread: a decode step would ask the system for the same pages again and again. It begins at a
// cache line, as do rows of padded() floats in it: vectors that straddle two lines cost subset_ffn a tenth of its time.
template <int which>
inline float* scratch(int64_t floats) {
  constexpr std::uintptr_t kLine = 64;
  static thread_local std::vector<float> memory;
  const int64_t room = floats + kLine / sizeof(float);
  if (static_cast<int64_t>(memory.size()) < room) memory.resize(room);
  return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
}

}  // namespace
}  // namespace pp
