// One kernel launch with a readable error, for all CUDA ops.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pp {

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Launches on the device and stream that PyTorch uses. `shared` bytes past 48 KB are asked for; the runtime remembers
// the wish, and setting it again costs less than a table of what was set.
inline void launch(const void* kernel, const char* op, dim3 grid, int threads, int shared, void** args, int device,
                   std::uintptr_t stream) {
  check(cudaSetDevice(device), op);
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), op);
  check(cudaLaunchKernel(kernel, grid, dim3(threads), args, shared, reinterpret_cast<cudaStream_t>(stream)), op);
}

}  // namespace pp
