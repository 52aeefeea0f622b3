// The Python module of the CPU ops, the only file of it that knows Python: every function takes integers by position.
#include <pybind11/pybind11.h>

#include "op.h"

namespace py = pybind11;

constexpr std::size_t kMost = 24;  // arguments

PYBIND11_MODULE(PP_MODULE, m) {
  for (const pp::Function& f : pp::functions()) {
    m.def(f.name, [f](const py::args& args) {
      if (args.size() != static_cast<std::size_t>(f.count) || args.size() > kMost) {
        throw py::type_error(std::string(f.name) + " takes " + std::to_string(f.count) + " integers");
      }
      int64_t values[kMost];
      for (std::size_t i = 0; i < args.size(); ++i) values[i] = args[i].cast<int64_t>();
      py::gil_scoped_release release;
      return f.call(values);
    });
  }
}
