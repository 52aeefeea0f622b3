// The Python module of the CPU ops, the only file of it that knows Python: every function takes integers by position.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "op.h"

namespace py = pybind11;

constexpr std::size_t kMost = 24;  // arguments

// Makes many calls at once: in each line of `calls` the number of a function and its arguments.
void sequence(const py::array_t<int64_t, py::array::c_style>& calls) {
  if (calls.ndim() != 2 || calls.shape(1) != kMost + 1) {
    throw py::type_error("sequence takes lines of " + std::to_string(kMost + 1) + " integers");
  }
  const std::size_t known = pp::functions().size();
  for (py::ssize_t i = 0; i < calls.shape(0); ++i) {
    if (static_cast<std::size_t>(calls.at(i, 0)) >= known) throw py::index_error("sequence: there is no such function");
  }
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < calls.shape(0); ++i) {
    const int64_t* line = calls.data(i, 0);
    pp::functions()[line[0]].call(line + 1);
  }
}

PYBIND11_MODULE(PP_MODULE, m) {
  py::list names;
  for (const pp::Function& f : pp::functions()) names.append(f.name);
  m.attr("names") = names;
  m.attr("most_arguments") = kMost;
  m.def("sequence", sequence);
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
