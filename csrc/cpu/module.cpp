// The Python module of the CPU ops: every function takes integers by position.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "op.h"

namespace {

constexpr int kMost = 24;  // arguments

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* f = static_cast<const pp::Function*>(PyCapsule_GetPointer(self, nullptr));
  if (count != f->count) return PyErr_Format(PyExc_TypeError, "%s takes %d integers, got %zd", f->name, f->count, count);
  int64_t values[kMost];
  for (Py_ssize_t i = 0; i < count; ++i) {
    values[i] = PyLong_AsLongLong(args[i]);
    if (values[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  int64_t result;
  Py_BEGIN_ALLOW_THREADS;
  result = f->call(values);
  Py_END_ALLOW_THREADS;
  return PyLong_FromLongLong(result);
}

int fill(PyObject* module) {
  static std::vector<PyMethodDef> methods;
  if (methods.empty()) {
    for (const auto& f : pp::functions()) methods.push_back({f.name, (PyCFunction)(void (*)())call, METH_FASTCALL, nullptr});
  }
  for (std::size_t i = 0; i < methods.size(); ++i) {
    PyObject* self = PyCapsule_New(&pp::functions()[i], nullptr, nullptr);
    PyObject* function = self ? PyCFunction_New(&methods[i], self) : nullptr;
    Py_XDECREF(self);
    if (!function || PyModule_AddObjectRef(module, methods[i].ml_name, function)) return -1;
    Py_DECREF(function);
  }
  return 0;
}

}  // namespace

#define PP_STRING(x) #x
#define PP_NAME(x) PP_STRING(x)
#define PP_INIT(x) PP_LINE(PyInit_, x)

PyMODINIT_FUNC PP_INIT(PP_MODULE)() {
  static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void*)fill}, {0, nullptr}};
  static PyModuleDef module{PyModuleDef_HEAD_INIT, PP_NAME(PP_MODULE), nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
