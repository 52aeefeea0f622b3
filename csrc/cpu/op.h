// What every CPU op includes: it registers its functions itself, so a new op is one new source file.
// No Python header here: pybind11's alone takes 5 of the 6 seconds that such a file would take to compile.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace pp {

// A function of integers (sizes, strides, flags, addresses of tensors) that returns nothing or a number.
struct Function {
  const char* name;
  int count;                          // of its arguments
  int64_t (*call)(const int64_t*);
};

inline std::vector<Function>& functions() {
  static std::vector<Function> list;
  return list;
}

template <auto function, class Result, class... Args, std::size_t... I>
constexpr Function describe(const char* name, Result (*)(Args...), std::index_sequence<I...>) {
  return {name, sizeof...(Args), [](const int64_t* a) -> int64_t {
            if constexpr (std::is_void_v<Result>) {
              function(static_cast<Args>(a[I])...);
              return 0;
            } else {
              return static_cast<int64_t>(function(static_cast<Args>(a[I])...));
            }
          }};
}

template <auto function, class Result, class... Args>
bool add(const char* name, Result (*type)(Args...)) {
  functions().push_back(describe<function>(name, type, std::index_sequence_for<Args...>()));
  return true;
}

// Tensors arrive as the integer of Tensor.data_ptr(); the Python side has checked dtype, size and layout.
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace pp

// PP_OP("name", function) makes function(...) callable from Python under that name; the GIL is released meanwhile.
#define PP_JOIN(a, b) a##b
#define PP_LINE(a, b) PP_JOIN(a, b)
#define PP_OP(name, ...) static const bool PP_LINE(pp_added_, __LINE__) = pp::add<&__VA_ARGS__>(name, &__VA_ARGS__)
