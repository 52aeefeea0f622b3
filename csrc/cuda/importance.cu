// Launchers of masked_swiglu and column_sqnorm_; arguments as in csrc/cpu/importance.cpp, with a stream for the threads.
#include "importance.cuh"

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernel.h"

namespace pp {
namespace {

using namespace importance;
using Address = std::uintptr_t;

// 16-byte accesses need every row of every tensor to begin on 16 bytes.
bool aligned(std::initializer_list<Address> addresses, std::initializer_list<int64_t> strides, size_t size) {
  for (Address a : addresses)
    if (a % 16) return false;
  for (int64_t s : strides)
    if (s * int64_t(size) % 16) return false;
  return true;
}

// Calls body with a null pointer of the element type; the codes are those of persona_pruner/ops/importance.py.
template <class Body>
void by_dtype(int dtype, Body body) {
  if (dtype == 0) body((float*)nullptr);
  if (dtype == 1) body((__nv_bfloat16*)nullptr);
  if (dtype == 2) body((__half*)nullptr);
}

int64_t blocks(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }

unsigned grid(int64_t tokens, int64_t channels) { return (channels + kTile - 1) / kTile * blocks(tokens); }

cudaStream_t as_stream(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

void reduce(const float* partial, int rows, int64_t tokens, int64_t channels, float* assign, float* add_first,
            float* add_second, cudaStream_t stream) {
  add_blocks<<<(channels + kThreads - 1) / kThreads, kThreads, 0, stream>>>(partial, blocks(tokens), rows, channels,
                                                                            assign, add_first, add_second);
  check();
}

void masked_swiglu_forward(Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address mask, Address h,
                           int64_t tokens, int64_t channels, int dtype, int act, Address stream) {
  if (tokens == 0 || channels == 0) return;
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = 16 / sizeof(T);
    const bool wide = aligned({gate, up, mask, h}, {gate_stride, up_stride, channels}, sizeof(T));
    const auto run = act == kSilu ? (wide ? swiglu_forward<T, V, kSilu> : swiglu_forward<T, 1, kSilu>)
                                  : (wide ? swiglu_forward<T, V, kGeluTanh> : swiglu_forward<T, 1, kGeluTanh>);
    run<<<grid(tokens, channels), kThreads, 0, as_stream(stream)>>>(pointer<T>(gate), gate_stride, pointer<T>(up),
                                                                    up_stride, pointer<float>(mask), pointer<T>(h),
                                                                    tokens, channels);
    check();
  });
}

void masked_swiglu_backward(Address dh, int64_t dh_stride, Address gate, int64_t gate_stride, Address up,
                            int64_t up_stride, Address mask, Address d_gate, Address d_up, Address partial,
                            Address d_mask, Address taylor, Address fisher, int64_t tokens, int64_t channels, int dtype,
                            int act, Address stream) {
  if (channels == 0) return;
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = 16 / sizeof(T);
    const bool wide =
        aligned({dh, gate, up, mask, d_gate, d_up}, {dh_stride, gate_stride, up_stride, channels}, sizeof(T));
    const auto run = act == kSilu ? (wide ? swiglu_backward<T, V, kSilu> : swiglu_backward<T, 1, kSilu>)
                                  : (wide ? swiglu_backward<T, V, kGeluTanh> : swiglu_backward<T, 1, kGeluTanh>);
    if (tokens)
      run<<<grid(tokens, channels), kThreads, 0, as_stream(stream)>>>(
          pointer<T>(dh), dh_stride, pointer<T>(gate), gate_stride, pointer<T>(up), up_stride, pointer<float>(mask),
          pointer<T>(d_gate), pointer<T>(d_up), pointer<float>(partial), tokens, channels);
    check();
  });
  if (partial || d_mask)  // without tokens there are no partial sums, and d_mask is zero
    reduce(pointer<float>(partial), 2, tokens, channels, pointer<float>(d_mask), pointer<float>(taylor),
           pointer<float>(fisher), as_stream(stream));
}

void column_sqnorm(Address x, int64_t stride, Address partial, Address acc, int64_t tokens, int64_t channels, int dtype,
                   Address cuda_stream) {
  if (tokens == 0 || channels == 0) return;
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = 16 / sizeof(T);
    const auto run = aligned({x}, {stride, channels}, sizeof(T)) ? sqnorm<T, V> : sqnorm<T, 1>;
    run<<<grid(tokens, channels), kThreads, 0, as_stream(cuda_stream)>>>(pointer<T>(x), stride, pointer<float>(partial),
                                                                         tokens, channels);
    check();
  });
  reduce(pointer<float>(partial), 1, tokens, channels, nullptr, pointer<float>(acc), nullptr, as_stream(cuda_stream));
}

}  // namespace

PP_OP(importance) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("masked_swiglu_forward", &masked_swiglu_forward, no_gil);
  m.def("masked_swiglu_backward", &masked_swiglu_backward, no_gil);
  m.def("column_sqnorm", &column_sqnorm, no_gil);
}

}  // namespace pp
