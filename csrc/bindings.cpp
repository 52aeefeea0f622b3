// The CUDA module itself: collects the functions of every op linked into it.
#include "kernel.h"

PYBIND11_MODULE(PP_MODULE, m) {
  for (pp::Registrar add : pp::registrars()) add(m);
}
