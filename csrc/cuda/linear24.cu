// Launches of linear24 for Python. Every kernel has a plain name, for profilers and for the tests, which run its PTX.
#include "cuda/linear24_decode.cuh"
#include "cuda/linear24_prefill.cuh"

#include <tuple>

#include "cuda/launch.cuh"
#include "kernel.h"

namespace {

using namespace pp::linear24;

#define PP_PARAMS                                                                                                   \
  const uint4 *w, const char *x, void *y, const void *bias, const float *row_scale, const float *token_scale,        \
      void *partial, unsigned *count, int M, int N, int xbytes, int kind
#define PP_OUT Out{y, bias, row_scale, token_scale, partial, count, M, N, kind}

#define PP_DECODE(TYPE, TAG, NT)                                                                                    \
  extern "C" __global__ void __launch_bounds__(DECODE_WARPS<NT> * 32) linear24_decode_##TAG##_##NT(PP_PARAMS) {      \
    decode<TYPE, NT>(w, x, PP_OUT, xbytes);                                                                         \
  }
#define PP_PREFILL(TYPE, TAG, BM, BN)                                                                               \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS<BN>) linear24_prefill_##TAG##_##BM##x##BN(PP_PARAMS) { \
    prefill<TYPE, BM, BN>(w, x, PP_OUT, xbytes);                                                                    \
  }
#define PP_ALL(TYPE, TAG)         \
  PP_DECODE(TYPE, TAG, 1)         \
  PP_DECODE(TYPE, TAG, 2)         \
  PP_DECODE(TYPE, TAG, 4)         \
  PP_PREFILL(TYPE, TAG, 64, 64)   \
  PP_PREFILL(TYPE, TAG, 128, 128) \
  PP_PREFILL(TYPE, TAG, 128, 256)

PP_ALL(Half, f16)
PP_ALL(Bfloat, bf16)
PP_ALL(Int8, i8)

#define PP_QUANTIZE(TYPE, TAG)                                                                                      \
  extern "C" __global__ void linear24_quantize_##TAG(const TYPE* x, int8_t* q, float* scale, int K, int xbytes) {    \
    quantize<TYPE>(x, q, scale, K, xbytes);                                                                         \
  }
PP_QUANTIZE(float, f32)
PP_QUANTIZE(__half, f16)
PP_QUANTIZE(__nv_bfloat16, bf16)

struct Kernel {
  const char* name;
  const void* function;
};

#define PP_ROW(NAME) {#NAME, (const void*)linear24_##NAME}
#define PP_ROWS(TAG)                                                                                                \
  PP_ROW(decode_##TAG##_1), PP_ROW(decode_##TAG##_2), PP_ROW(decode_##TAG##_4), PP_ROW(prefill_##TAG##_64x64),       \
      PP_ROW(prefill_##TAG##_128x128), PP_ROW(prefill_##TAG##_128x256)

const Kernel KERNELS[] = {PP_ROWS(f16),         PP_ROWS(bf16),        PP_ROWS(i8),
                          PP_ROW(quantize_f32), PP_ROW(quantize_f16), PP_ROW(quantize_bf16)};

}  // namespace

PP_OP(linear24) {
  namespace py = pybind11;
  m.def("linear24_kernels", [] {
    py::dict index;
    for (const Kernel& k : KERNELS) index[py::str(k.name)] = &k - KERNELS;
    return index;
  });
  m.def(
      "linear24",
      [](int kernel, std::tuple<int, int, int> grid, int threads, int shared, std::uintptr_t w, std::uintptr_t x,
         std::uintptr_t y, std::uintptr_t bias, std::uintptr_t row_scale, std::uintptr_t token_scale,
         std::uintptr_t partial, std::uintptr_t count, int M, int N, int xbytes, int kind, int device,
         std::uintptr_t stream) {
        void* args[] = {&w, &x, &y, &bias, &row_scale, &token_scale, &partial, &count, &M, &N, &xbytes, &kind};
        const auto [gx, gy, gz] = grid;
        pp::launch(KERNELS[kernel].function, "linear24", dim3(gx, gy, gz), threads, shared, args, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear24_quantize",
      [](int kernel, std::uintptr_t x, std::uintptr_t q, std::uintptr_t scale, int M, int K, int xbytes, int device,
         std::uintptr_t stream) {
        void* args[] = {&x, &q, &scale, &K, &xbytes};
        pp::launch(KERNELS[kernel].function, "linear24", dim3(M), 256, 0, args, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
}
