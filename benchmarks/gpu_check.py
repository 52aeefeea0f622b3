"""What can be known about the GPU kernels without a GPU: `python benchmarks/gpu_check.py [--short] [--json FILE]`.

Compiles every CUDA source with nvcc and the listed Triton kernels for every target, reads registers, spills and
instructions from the machine code, and counts memory traffic by running the kernels in tests/ptxsim. Exits with 1 on a
spill, a sparse kernel without sparse instructions, bank conflicts of a CUDA kernel, or decode that moves over 1.05
times the least bytes. `--short` compiles for sm_80 only and runs fewer cases. Times are never reported: nothing here
measures them.

A new op's CUDA source is found by itself. OPS holds what cannot be found: instructions that kernels must have, Triton
signatures, and cases for the simulator.
"""

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import gpusim  # noqa: E402

from persona_pruner.ops import _linear24_cuda, _native, pack_linear24, quantize24, select24  # noqa: E402

CUDA_TARGETS = ("80", "86", "89", "90", "100", "120")
TRITON_TARGETS = ("80", "90", "100", "gfx942")
COUNTED = {
    "sparse mma": r"[HIQ]MMA\.SP\.",
    "mma": r"\b(?:[HIQ]G?MMA(?!\.SP)|UTC\w*MMA)\b",
    "LDGSTS": r"\bLDGSTS\.",
    "LDSM": r"\bLDSM\.",
    "LDG.128": r"\bLDG\.\S*128",
    "spills": r"\b(?:LDL|STL)\b",
}
DECODE_LIMIT = 1.05
SELECT24 = importlib.import_module("persona_pruner.ops.select24")  # the name in the package is the function


@dataclass
class Op:
    """What one op adds.

    needs: kernel name pattern -> a column of COUNTED that must not be 0 there.
    triton(kernels): calls the launchers of kernels/<op>.py as typical calls of the op do; yields a label before each.
    simulated(short): runs kernels in ptxsim and returns rows of `traffic_row`.
    """

    needs: dict[str, str] = field(default_factory=dict)
    triton: Callable[[object], Iterator[str]] = lambda kernels: iter(())
    simulated: Callable[[bool], list[dict]] = lambda short: []


# ---- machine code


def cuobjdump() -> str:
    """From the CUDA toolkit, or the one that the triton wheel carries."""
    found = shutil.which("cuobjdump")
    if not found:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def inspect(cubin: Path) -> dict[str, dict]:
    """Kernel name -> registers, stack and static shared bytes, and the instruction counts of COUNTED."""
    usage = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    rows = {}
    for name, line in re.findall(r"Function (\S+):\n(.*REG:.*)", usage.stdout):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        rows[name] = {"registers": numbers["REG"], "stack": numbers["STACK"], "static shared": numbers["SHARED"]}
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in sass.split("Function : ")[1:]:
        name = part.split()[0]
        rows[name] |= {column: len(re.findall(pattern, part)) for column, pattern in COUNTED.items()}
    return rows


def cuda_rows(targets) -> list[dict]:
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "out.cubin"
                gpusim.nvcc(gpusim.ptx(source.stem, target), cubin, target, "-cubin")
                for name, row in sorted(inspect(cubin).items()):
                    rows.append({"op": source.stem, "kernel": name, "target": f"sm_{target}", **row})
    return rows


def triton_rows(targets) -> list[dict]:
    rows = []
    for op, entry in OPS.items():
        kernels = _native.triton_kernels(op)
        with gpusim.recorded(kernels) as calls:
            labels = []
            for label in entry.triton(kernels):
                labels += [label] * (len(calls) - len(labels))
        for label, (function, args, options) in zip(labels, calls, strict=True):
            for target in targets:
                compiled = gpusim.triton_compile(function, args, options, target)
                row = {"op": op, "kernel": f"triton {function.__name__} {label}"}
                row["target"] = target if target.startswith("gfx") else f"sm_{target}"
                rows.append(row | triton_inspect(compiled))
    return rows


def triton_inspect(compiled) -> dict:
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "out.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            return next(iter(inspect(cubin).values())) | {"static shared": shared}
    text = compiled.asm["amdgcn"]
    spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    return {"registers": registers, "static shared": shared, "mma": len(re.findall("v_mfma_", text)), "spills": spills}


# ---- traffic


def traffic_row(case, kernel, traffic, least) -> dict:
    """DRAM bytes (distinct sectors of 32 bytes) and bytes that reach the SMs, over the `least` an ideal kernel moves;
    32-byte sectors needed over those touched; shared-memory wavefronts over the fewest."""
    total = traffic.total
    return {
        "case": case,
        "kernel": kernel,
        "DRAM / least": total.unique / least,
        "L2 to SM / least": (total.read_bytes + total.write_bytes) / least,
        "reads coalesced": total.load.efficiency,
        "writes coalesced": total.store.efficiency,
        "bank conflicts": max((s.conflicts for s in traffic.shared.values()), default=1.0),
    }


def linear24_case(dtype, m, n, k, sms, max_shared=163 * 1024):
    """One launch; `sms` and `max_shared` choose the kernel as on a device of that size."""
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    half = torch.float16 if dtype == torch.int8 else dtype
    values, meta = select24(dense.to(half), backend="reference")
    scales = None
    if dtype == torch.int8:
        values, scales = quantize24(values)
    weight, x = pack_linear24(values, meta, scales), torch.randn(m, k).to(half)
    module = gpusim.SimModule(races=False, uninit=False, traffic=True)
    blocks = _linear24_cuda.to_blocks(values, meta)
    _linear24_cuda.launch(module, x, blocks, weight, None, (sms, max_shared), 0, 0)
    kernel, stats = module.stats[-1]
    size = values.element_size()
    # W as packed, x as the kernel reads it (int8: quantized, with its scale), y; int8 has a scale a row
    least = n * k // 2 * size + n * k // 8 + m * k * size + m * n * 2 + (0 if scales is None else 4 * (n + m))
    splits = _linear24_cuda.plan(m, n, k * size, _linear24_cuda.TAG[dtype], sms, max_shared).splits
    label = f"{_linear24_cuda.TAG[dtype]} M {m} N {n} K {k}" + (f" splits {splits}" if splits > 1 else "")
    return traffic_row(label, kernel, stats.traffic, least)


def linear24_simulated(short):
    f16, bf16, i8 = torch.float16, torch.bfloat16, torch.int8
    cases = [(f16, 1, 256, 2048, 4), (f16, 8, 64, 8192, 4), (i8, 8, 128, 2048, 2), (f16, 64, 64, 256, 1)]
    if not short:
        cases += [(bf16, 8, 256, 2048, 4), (f16, 16, 256, 2048, 4), (f16, 32, 256, 2048, 4), (i8, 1, 256, 2048, 4)]
        cases += [(i8, 16, 256, 2048, 4), (i8, 32, 256, 2048, 4), (bf16, 64, 128, 512, 1), (i8, 64, 128, 512, 1)]
        cases += [(dtype, 128, 256, 256, sms) for dtype in (f16, bf16, i8) for sms in (99, 1)]
    return [linear24_case(*case) for case in cases]


def linear24_triton(kernels):
    n, k = 256, 1024
    pairs = {1: torch.int16, 2: torch.int32, 4: torch.int64}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        whole, pair = dtype == torch.int8, pairs[dtype.itemsize]
        scales = torch.empty(n) if whole else None
        values, meta = torch.empty(n, k // 4, dtype=pair), torch.empty(n, k // 32, dtype=torch.int32)
        for m, splits in ((16, 1), (64, 2)):
            y = torch.empty(m, n, dtype=torch.float16 if whole else dtype)
            partial = torch.empty(splits, m, n, dtype=torch.int32 if whole else torch.float32) if splits > 1 else None
            x = torch.empty(m, k, dtype=dtype)
            kernels.linear24(x, values, meta, y[0], scales, scales, y, partial)
            yield f"{str(dtype)[6:]} M {m} splits {splits}"


def select24_triton(kernels):
    for kind, bits in (("f32", torch.int32), ("f16", torch.int16), ("bf16", torch.int16)):
        weight, values = torch.empty(64, 1024, dtype=bits), torch.empty(64, 512, dtype=bits)
        meta, nan = torch.empty(64, 128, dtype=torch.uint8), torch.empty(1, dtype=torch.int32)
        kernels.select24(weight, kind, torch.empty(1024), values, meta, nan)
        yield kind


def select24_simulated(short):
    rows = []
    for dtype in (torch.bfloat16,) if short else (torch.float32, torch.float16, torch.bfloat16):
        n, k = 32, 2048
        weight, scale = torch.randn(n, k).to(dtype), torch.rand(k)
        values, meta = weight.new_empty(n, k // 2), torch.empty(n, k // 8, dtype=torch.uint8)
        module = gpusim.SimModule(races=False, uninit=False, traffic=True)
        nan = torch.zeros(1, dtype=torch.int32)
        SELECT24.launch(module, weight, SELECT24.NATIVE[dtype], scale, values, meta, nan, 0, 0)
        kernel, stats = module.stats[0]
        least = sum(t.nbytes for t in (weight, scale, values, meta))
        rows.append(traffic_row(f"{str(dtype)[6:]} N {n} K {k}", kernel, stats.traffic, least))
    return rows


def subset_ffn_triton(kernels):
    """A decode step of SmolLM2's shape and one with many rows."""
    width, hidden = 1536, 576
    for kind, x_type in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
                         (torch.float16, torch.float16), (torch.float32, torch.float32),
                         (torch.int8, torch.float32), (torch.int8, torch.bfloat16)):  # fmt: skip
        weights = torch.empty(width, 3, hidden, dtype=kind).unbind(1)
        scales = [torch.empty(width) if kind == torch.int8 else None] * 3
        channels = torch.empty(width // 2, dtype=torch.int32)
        for rows in (1, 64):
            limit = kernels.rows_of(rows)
            tiles = torch.empty(-(-rows // limit), 4, dtype=torch.int32)
            x, h = torch.empty(rows, hidden, dtype=x_type), torch.empty(rows, width // 2, dtype=x_type)
            partial = torch.empty(4, rows, hidden)
            kernels.subset_ffn(x, weights, scales, (None, None), channels, tiles, h, partial, False, limit)
            yield f"{str(kind)[6:]} x {str(x_type)[6:]} rows {rows}"


def subset_ffn_simulated(short):
    """Decode of one row on half the channels, of weights whose rows lie together."""
    op, found = importlib.import_module("persona_pruner.ops.subset_ffn"), []
    kernels = _native.triton_kernels("subset_ffn")
    width, hidden = 256, 192
    for kind in (torch.bfloat16,) if short else (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        size, scales = width * hidden, (torch.rand(width),) * 3 if kind == torch.int8 else (None,) * 3
        weights = torch.randint(-5, 5, (width, 3, hidden)).to(kind).unbind(1)
        channels = torch.randperm(width)[: width // 2].sort().values.int()
        simulated = {name: gpusim.SimJit(getattr(kernels, name), traffic=True) for name in ("_hidden", "_down")}
        before = {name: getattr(kernels, name) for name in simulated}
        try:
            vars(kernels).update(simulated)
            segments = torch.tensor([[1, 0, len(channels)]])
            x = torch.randn(1, hidden)
            op._triton_run(x, weights, channels, segments, "silu", scales, (None,) * 3, None, 0.0, None)
        finally:
            vars(kernels).update(before)
        lists = 4 * len(channels) + 16
        for (name, jit), matrices in zip(simulated.items(), (2, 1), strict=True):
            least = matrices * size // 2 * kind.itemsize + lists + 4 * (hidden + len(channels))
            least += 0 if scales[0] is None or name == "_down" else 12 * len(channels)
            found.append(traffic_row(f"decode {str(kind)[6:]}", f"triton {name}", jit.stats[0].traffic, least))
    return found


OPS = {
    "linear24": Op(
        needs={
            "linear24_(decode|prefill)": "sparse mma",
            "linear24_prefill": "LDGSTS",
            "linear24_decode": "LDG.128",
            "_product (?!float32)": "mma",
        },
        triton=linear24_triton,
        simulated=linear24_simulated,
    ),
    "select24": Op(triton=select24_triton, simulated=select24_simulated),
    "subset_ffn": Op(
        needs={"x (bfloat16|float16) rows": "mma"}, triton=subset_ffn_triton, simulated=subset_ffn_simulated
    ),
}


# ---- report


def problems(code, traffic) -> list[str]:
    found = []
    for row in code:
        where = f"{row['kernel']} on {row['target']}"
        if row["spills"]:
            found.append(f"{where}: {row['spills']} accesses to spilled registers")
        for pattern, column in OPS.get(row["op"], Op()).needs.items():
            if re.search(pattern, row["kernel"]) and not row[column]:
                found.append(f"{where}: no {column} instruction")
    for row in traffic:
        if row["bank conflicts"] > 1.001 and not row["kernel"].startswith("triton"):  # Triton places its own data
            found.append(f"{row['kernel']}, {row['case']}: bank conflicts, {row['bank conflicts']:.2f}")
        if "decode" in row["kernel"] + row["case"] and row["DRAM / least"] > DECODE_LIMIT:
            found.append(f"{row['kernel']}, {row['case']}: {row['DRAM / least']:.3f} times the least bytes")
    return found


def table(rows) -> str:
    """Markdown; the columns are those of the first row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        lines.append([f"{v:.3f}" if isinstance(v, float) else str(v) for v in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="sm_80 only, fewer cases")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    if gpusim.NVCC is None:
        parser.error("nvcc is not installed")
    code = cuda_rows(("80",) if args.short else CUDA_TARGETS) + triton_rows(("80",) if args.short else TRITON_TARGETS)
    traffic = [{"op": op, **row} for op, entry in OPS.items() for row in entry.simulated(args.short)]
    found = problems(code, traffic)
    print(table(code), table(traffic), sep="\n\n")
    print("\n" + ("\n".join(found) or "no problems found"))
    if args.json:
        args.json.write_text(json.dumps({"code": code, "traffic": traffic, "problems": found}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
