"""Builds the native modules; everything else about the package is in pyproject.toml.

The CPU kernels are compiled once for each instruction set into a module of their own
(`persona_pruner._cpu_baseline`, `_cpu_avx2`, ...): one shared object never mixes code for two
processors, and Python imports the best one that the machine can run. The CUDA module
needs nvcc only, neither torch nor a GPU; PERSONA_PRUNER_CUDA=0 leaves it out.
"""

import copy
import os
import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni -mavx2 -mfma -mf16c"
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = AVX512.split()
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
    ISAS["amx"] = [*ISAS["avx512"], "-mavx512vbmi2", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
if (wanted := os.environ.get("PERSONA_PRUNER_ISAS", "all")) in ("native", "best"):
    processor = runpy.run_path("persona_pruner/processor.py")
    known, needs = processor["cpu_flags"](), processor["ISAS"]
    known |= {"AuthenticAMD"} if wanted == "native" else set()  # what is chosen on AMD only can be forced elsewhere
    able = [isa for isa in needs if isa in ISAS and needs[isa] <= known]
    ISAS = {isa: ISAS[isa] for isa in (able if wanted == "native" else able[:1])}
# The warnings left out: GCC 12 gives thousands for its own intrinsics.
OPTIONS = "-std=c++17 -O3 -g0 -fopenmp -fvisibility=hidden -ffp-contract=fast -Wno-uninitialized"
OPTIONS += " -Wno-maybe-uninitialized"
HEADERS = glob("csrc/*.h") + glob("csrc/cpu/*.h") + glob("csrc/cuda/*.cuh")
CUDA_ARCHS = os.environ.get("PERSONA_PRUNER_CUDA_ARCHS", "80 86 89 90 100 120").split()
NVCC = shutil.which("nvcc") if os.environ.get("PERSONA_PRUNER_CUDA", "1") != "0" else None


def cpu_extension(isa, flags):
    name = f"_cpu_{isa}"
    return Extension(
        f"persona_pruner.{name}",
        sorted(glob("csrc/cpu/*.cpp")),
        include_dirs=[pybind11.get_include(), "csrc"],
        define_macros=[("PP_MODULE", name)],
        extra_compile_args=[*OPTIONS.split(), *flags],
        extra_link_args=["-fopenmp"],
        depends=HEADERS,
    )


def at_once(compile, sources, rest):
    """The objects of all sources, compiled by as many compilers as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [path for paths in pool.map(lambda source: compile([source], **rest), sources) for path in paths]


class BuildExt(build_ext):
    def build_extension(self, ext):
        if not ext.name.endswith("_cuda"):
            own = copy.copy(self)
            own.build_temp = os.path.join(self.build_temp, ext.name)  # the same sources for each instruction set
            own.compiler = copy.copy(self.compiler)
            own.compiler.compile = lambda sources, **rest: at_once(self.compiler.compile, sources, rest)
            return build_ext.build_extension(own, ext)
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        includes = [f"-I{d}" for d in (*ext.include_dirs, *self.compiler.include_dirs)]
        options = [
            "-O3",
            "-std=c++17",
            "--threads",
            "0",
            "-DPP_MODULE=_cuda",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
        ]
        subprocess.check_call(
            [NVCC, "-shared", "-cudart", "static", *options, *codes, *includes, *ext.sources, "-o", target]
        )


extensions = [cpu_extension(isa, flags) for isa, flags in ISAS.items()]
cuda_sources = sorted(glob("csrc/cuda/*.cu"))
if NVCC and cuda_sources:
    include_dirs = [pybind11.get_include(), "csrc"]
    extensions.append(
        Extension("persona_pruner._cuda", ["csrc/bindings.cpp", *cuda_sources], include_dirs, depends=HEADERS)
    )

setup(
    packages=[
        *find_packages(include=["persona_pruner", "persona_pruner.*"]),
        "persona_pruner.kernels",
        "persona_pruner.benchmarks",
    ],
    package_dir={"persona_pruner.kernels": "kernels", "persona_pruner.benchmarks": "benchmarks"},
    package_data={"persona_pruner": ["data/*", "report/*.html", "serve/static/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt},
)
