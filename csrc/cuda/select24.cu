// Launches of select24 for Python.
#include "cuda/select24.cuh"

#include "cuda/launch.cuh"
#include "kernel.h"

namespace {

constexpr int THREADS = 256;

#define PP_SELECT(TYPE, TAG, GROUPS)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) select24_##TAG##_##GROUPS(                                 \
      const TYPE* w, const float* col_scale, TYPE* values, uint8_t* meta, int* nan, int N, int K) {                \
    pp::select24::select<TYPE, GROUPS>(w, col_scale, values, meta, nan, N, K);                                     \
  }
PP_SELECT(float, f32, 1)
PP_SELECT(__half, f16, 1)
PP_SELECT(__half, f16, 2)
PP_SELECT(__nv_bfloat16, bf16, 1)
PP_SELECT(__nv_bfloat16, bf16, 2)

struct Kernel {
  const char* name;
  const void* function;
};
const Kernel KERNELS[] = {
    {"f32_1", (const void*)select24_f32_1},   {"f16_1", (const void*)select24_f16_1},
    {"f16_2", (const void*)select24_f16_2},   {"bf16_1", (const void*)select24_bf16_1},
    {"bf16_2", (const void*)select24_bf16_2},
};

}  // namespace

PP_OP(select24) {
  namespace py = pybind11;
  m.def("select24_kernels", [] {
    py::dict index;
    for (const Kernel& k : KERNELS) index[py::str(k.name)] = &k - KERNELS;
    return index;
  });
  m.def(
      "select24",
      [](int kernel, int blocks, std::uintptr_t w, std::uintptr_t col_scale, std::uintptr_t values, std::uintptr_t meta,
         std::uintptr_t nan, int N, int K, int device, std::uintptr_t stream) {
        void* args[] = {&w, &col_scale, &values, &meta, &nan, &N, &K};
        pp::launch(KERNELS[kernel].function, "select24", dim3(blocks), THREADS, 0, args, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
}
