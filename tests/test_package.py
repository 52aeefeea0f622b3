"""The house: who may import whom, what importing costs, and what a wheel contains."""

import ast
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import persona_pruner
from persona_pruner.ops import _native

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "persona_pruner"
# Each unit (a module or a folder of the package) imports from lines above its own, or from itself.
ORDER = [
    {"errors", "memory", "__version__"},
    {"prefix_attention", "files", "config", "processor"},
    {"card_files"},
    {"persona"},
    {"models", "packing", "progress", "executors"},
    {"ops"},
    {"nn"},
    {"synthesis", "search", "formats", "compat"},
    {"fleet"},
    {"runtime", "workspace", "doctor", "testing"},
    {"evaluation"},
    {"report", "generic"},
    {"pace"},
    {"material"},
    {"pipeline"},
    {"many", "serve"},
    {"study"},
    {"cli"},
]
RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}


def imports(path):
    """Modules of the package that a file imports, at its top or within functions: "nn.mlp", "errors", ..."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "persona_pruner":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("persona_pruner."):
                inside = node.module.removeprefix("persona_pruner.")
                yield inside
                yield from (f"{inside}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("persona_pruner.") for a in node.names if "persona_pruner" in a.name)


def sources():
    for path in PACKAGE.rglob("*.py"):
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if unit != "__init__":
            yield path, unit


def test_imports_point_one_way():
    wrong = []
    for path, unit in sources():
        assert unit in RANK, f"{unit} has no place in ORDER"
        for module in imports(path):
            other = module.split(".")[0]
            if other != unit and RANK[other] >= RANK[unit]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_only_tests_and_benchmarks_import_testing():
    assert not [path for path, _ in sources() if any(m.split(".")[0] == "testing" for m in imports(path))]


def test_only_ops_knows_kernels_and_native_modules():
    names = {"kernels", "_cpu_baseline", "_cpu_avx2", "_cpu_avx512", "_cuda"}
    for path, unit in sources():
        text = path.read_text(encoding="utf-8")
        found = {m.split(".")[0] for m in imports(path)} & names
        found |= {name for name in names if f"persona_pruner.{name}" in text or "persona_pruner._cpu_" in text}
        assert unit == "ops" or not found, f"{path} knows {found}"
        if unit != "ops":
            assert not [m for m in imports(path) if m.startswith("ops._native") and unit != "doctor"]


def loaded_by(*modules):
    names = {"torch", "transformers", "triton", "matplotlib", "typer", "kernels"}
    code = f"import sys; import {', '.join(modules)}; print(*{names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_is_quick():
    assert loaded_by("persona_pruner", "persona_pruner.errors", "persona_pruner.persona") == set()


def test_stages_do_not_load_transformers_or_triton():
    units = sorted(unit for unit in RANK if (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").exists())
    units = [f"persona_pruner.{unit}" for unit in units if unit not in ("__version__", "cli", "report", "serve")]
    assert loaded_by(*units) <= {"torch"}


def test_public_names():
    assert set(persona_pruner.__all__) >= {"Persona", "PersonaFile", "sculpt", "load_model", "ops"}
    for name in persona_pruner.__all__:
        assert getattr(persona_pruner, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = persona_pruner.nonsense


# Which files a wheel holds does not depend on what is in the modules, and compiling them takes minutes.
EMPTY_OBJECTS = """#!/bin/sh
for word; do [ "$last" = -o ] && out=$word; last=$word; done
case " $* " in *" -c "*) exec g++ -x c++ -c /dev/null -o "$out" ;; *) exec g++ "$@" ;; esac
"""


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the package is not known")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("isas", ["all", "native", "best"])
def test_a_wheel_holds_the_whole_package(tmp_path, isas):
    names = tracked()
    for name in names:  # a copy: setuptools would put what it builds beside the sources and mix old with new
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    compiler = tmp_path / "c++"
    compiler.write_text(EMPTY_OBJECTS)
    compiler.chmod(0o755)
    environment = {**os.environ, "PERSONA_PRUNER_CUDA": "0", "CC": str(compiler), "CXX": str(compiler)}
    environment["PERSONA_PRUNER_ISAS"] = isas
    command = [sys.executable, "-P", "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"]
    built = subprocess.run(
        [*command, "-w", tmp_path / "out"], cwd=tmp_path / "source", env=environment, capture_output=True
    )
    assert built.returncode == 0, built.stderr.decode()[-3000:]
    (wheel,) = (tmp_path / "out").glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for name in names if name.startswith("persona_pruner/")}
    expected |= {f"persona_pruner/{name}" for name in names if name.startswith(("kernels/", "benchmarks/"))}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    native = {name for name in inside if name.endswith(".so")}
    assert inside - native == expected
    if "x86_64" in suffix or isas != "all":
        known = _native.cpu_flags() | ({"AuthenticAMD"} if isas == "native" else set())
        able = [isa for isa, needs in _native.ISAS.items() if isas == "all" or needs <= known]
        assert native == {f"persona_pruner/_cpu_{isa}{suffix}" for isa in (able[:1] if isas == "best" else able)}


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86")
@pytest.mark.parametrize(("isa", "allowed"), [("baseline", "xmm"), ("avx2", "ymm")])
def test_a_module_holds_code_of_its_instruction_set_only(isa, allowed):
    """Objects of one source for two instruction sets once met in one folder, and modules were linked from a mixture."""
    (module,) = Path(persona_pruner.__file__).parent.glob(f"_cpu_{isa}.*")
    code = subprocess.run(["objdump", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    assert "%" + allowed in code
    for wider in {"xmm": ("%ymm", "%zmm"), "ymm": ("%zmm",)}[allowed]:
        assert wider not in code
