// What every CUDA op includes: it registers itself, so a new op is one new source file. (CPU ops: cpu/op.h)
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace pp {

namespace py = pybind11;

using Registrar = void (*)(py::module_&);

inline std::vector<Registrar>& registrars() {
  static std::vector<Registrar> list;
  return list;
}

// Tensors arrive as the integer of Tensor.data_ptr(); the Python side has checked dtype, size and layout.
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace pp

// PP_OP(name) { m.def("name", ...); } adds functions to the module that this source is linked into.
#define PP_OP(op)                                                                   \
  static void pp_register_##op(pybind11::module_& m);                               \
  static const bool pp_registered_##op = (pp::registrars().push_back(pp_register_##op), true); \
  static void pp_register_##op(pybind11::module_& m)
