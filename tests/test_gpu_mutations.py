"""The tests of the CUDA kernels can fail: each of these mistakes in linear24*.cuh is caught, and how.

PERSONA_PRUNER_SLOW=1 runs them all; the default run takes one, for each compiles the kernel anew.
"""

import functools
import importlib.util
import os
import tempfile
from pathlib import Path

import gpusim
import pytest
from ptxsim import Module, SimError

spec = importlib.util.spec_from_file_location("linear24_gpu_cases", Path(__file__).with_name("test_linear24_gpu.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

F16, I8, LARGE = cases.F16, cases.I8, cases.LARGE
DECODE = [(F16, 3, 61, 2056, 1, LARGE), (F16, 3, 64, 4096, 64, LARGE)]
TILES = [(F16, 40, 61, 64 * steps, 1, LARGE) for steps in (1, 2, 3, 4, 5)]
SPLIT = [(F16, 40, 65, 1400, 99, LARGE)]
INT8 = [(I8, 3, 61, 1040, 1, LARGE)]
ONE = [(F16, 1, 61, 136, 1, LARGE)]
WIDE = [(F16, 70, 61, 64, 1, LARGE)]
TAIL = [(F16, 40, 61, 200, 1, LARGE)]
ALIGNED = [(F16, 40, 64, 192, 1, LARGE)]  # rows of y on 16 bytes: its copy reads no single elements
# name: (text, replacement, cases of which one must catch it, how)
MUTATIONS = {
    "no wait in decode": ("copy_wait<1>();", "", DECODE, "async"),
    "wait one group too few in decode": ("copy_wait<1>();", "copy_wait<2>();", DECODE, "async"),
    "no wait in prefill": ("copy_wait<STAGES - 2>();", "", TILES, "async"),
    "wait one group too few in prefill": ("copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", TILES, "async"),
    "no barrier in the loop": ("__syncthreads();  // this stage", "// this stage", TILES, "race"),
    "no barrier before the sums": ("__syncthreads();  // the sums overlay", "// the sums overlay", DECODE, "race"),
    "no barrier after the sums": ("  __syncthreads();\n  const int n0", "  const int n0", DECODE, "race"),
    "no barrier before the tile": ("__syncthreads();  // the tile overlays", "// the tile overlays", TILES, "race"),
    "no barrier in the tile": ("  __syncthreads();\n  for (int i = thr", "  for (int i = thr", TILES, "race"),
    "selectors swapped": ('f32.f16.f16.f32", KS, "f"', 'f32.f16.f16.f32", 1 - KS, "f"', DECODE, "wrong"),
    "int8 metadata of the other step": (
        "word(e[ks % T::META], mt));\n        if",
        "word(e[1 - ks], mt));\n        if",
        INT8,
        "wrong",
    ),
    "tail of x not zero-filled": ('"r"(valid ? 16 : 0)', '"r"(16)', DECODE + TAIL, "NaN spreads"),
    "tail of x not cut off": ("const bool valid = at < xbytes;", "const bool valid = true;", ONE, "oob"),
    "tokens past M read": ("valid = m0 + token < o.M && at < xbytes;", "valid = at < xbytes;", TILES, "oob"),
    "tokens past M not zeroed": ("if (token >= o.M) {", "if (false) {", DECODE, "uninit"),
    "row blocks not clamped": (
        "min(n0 / ROWS + piece / PIECES<T>, row_blocks - 1)",
        "n0 / ROWS + piece / PIECES<T>",
        WIDE,
        "oob",
    ),
    "refill with the wrong piece": (
        "= load_stream(next + 32 * (mt * 2 + ks))",
        "= load_stream(next + 32 * mt)",
        DECODE,
        "wrong",
    ),
    "last CTA not awaited": ("last = before == splits - 1;", "last = true;", SPLIT, "y rewritten"),
    "counter does not wrap": ('"r"(splits - 1) : "memory"', '"r"(splits) : "memory"', SPLIT, "counter"),
    "no swizzle": ("((chunk ^ (token & 7)) << 4)", "(chunk << 4)", DECODE, "conflicts"),
    "sums 64 words apart": ("SUM_STRIDE = ROWS + 4", "SUM_STRIDE = ROWS", DECODE, "conflicts"),
    "tile rows BN apart": ("STRIDE = BN + 8;", "STRIDE = BN;", ALIGNED, "conflicts"),
}
CHEAP = ("no wait in prefill",)


@functools.cache
def compile_mutant(text, replacement):
    files = (gpusim.ROOT / "csrc" / "cuda").glob("linear24*.cuh")
    sources = {path.name: source for path in files if text in (source := path.read_text())}
    assert [s.count(text) for s in sources.values()] == [1], f"the kernel no longer has {text!r} exactly once"
    [(name, source)] = sources.items()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cuda"
        target.mkdir()
        for path in (gpusim.ROOT / "csrc" / "cuda").iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        (target / name).write_text(source.replace(text, replacement))
        gpusim.nvcc(target / "linear24.cu", Path(folder) / "out.ptx", "80", f"-I{folder}", "-lineinfo", "-ptx")
        return Module((Path(folder) / "out.ptx").read_text())


def outcome(case, module, how):
    """What the tests of test_linear24_gpu.py and the limits of benchmarks/gpu_check.py make of one case."""
    dtype, m, n, k, sms, shared = case
    x, weight, bias = cases.random_case(dtype, m, n, k)
    if how == "NaN spreads":
        x[0, 5] = float("nan")
    cases.host._COUNTERS.clear()
    found = set()
    for schedule in ("lockstep", "warps"):
        checks = {"schedule": schedule, "traffic": how in ("conflicts", "y rewritten"), "ptx": module}
        try:
            y, sim = cases.simulate(x, weight, bias, sms, shared, **checks)
        except SimError as error:
            return {error.kind}
        if how == "NaN spreads":
            found |= {how} if y[1:].isnan().any() else set()
            continue
        try:
            cases.assert_close(y, x, weight, bias)
        except AssertionError:
            found.add("wrong")
        if any(count.any() for count in cases.host._COUNTERS.values()):
            found.add("counter")
        if checks["traffic"]:
            traffic = sim.stats[-1][1].traffic
            found |= {"conflicts"} if max(s.conflicts for s in traffic.shared.values()) > 1.001 else set()
            found |= {"y rewritten"} if traffic.arg(2).store.bytes > y.nbytes else set()
    return found


@pytest.mark.skipif(gpusim.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_caught(name):
    if name not in CHEAP and not os.environ.get("PERSONA_PRUNER_SLOW"):
        pytest.skip("PERSONA_PRUNER_SLOW=1 tries every mistake")
    text, replacement, shapes, how = MUTATIONS[name]
    module = compile_mutant(text, replacement)
    found = set().union(*(outcome(case, module, how) for case in shapes))
    assert how in found, f"expected {how}, found {found or 'nothing'}"


@pytest.mark.skipif(gpusim.NVCC is None, reason="nvcc is not installed")
def test_the_kernel_as_it_is_shows_nothing():
    for case in [*DECODE, *ALIGNED, *INT8]:
        assert not outcome(case, None, "conflicts")
    assert not outcome(TAIL[0], None, "NaN spreads")
