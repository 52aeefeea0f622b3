"""What the benchmarks share: limits of the machine, contestants that take turns, tables in files."""

import csv
import json
import os
import random
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from persona_pruner.ops import _native


def machine() -> dict:
    """What a number must be read with: processor, cores, instruction set of our kernels, torch, date."""
    name = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = (line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        name = next((value.strip() for key, value in rows if key.strip() == "model name"), name)
    found = {"processor": name, "cores": os.cpu_count(), "isa": _native.cpu_isa(), "L3": last_cache()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"torch": torch.__version__, "date": date.today().isoformat()}


def last_cache() -> int:
    """Bytes of the last-level cache; 64 MB where the system does not say."""
    for level in (3, 2):
        path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
        if path.exists():
            return int(path.read_text().strip().rstrip("K")) << 10
    return 64 << 20


# Ways to read memory, (streams a thread, bytes of prefetch): the best differs between processors.
READS = [(1, 0), (2, 0), (4, 4096), (8, 4096)]


def read(data: torch.Tensor, way: tuple[int, int]) -> None:
    """Reads a CPU tensor once, on torch's threads."""
    _native.cpu_module().read_memory(data.data_ptr(), data.nbytes, *way, torch.get_num_threads())


def limits(threads: int, device: str = "cpu") -> dict:
    """Measured now: GB/s of reading memory, in the best of READS ("read"), and GFLOP/s of float32 multiply-adds.

    On a GPU: a copy of 0.5 GB, and a bfloat16 matrix product of 8192.
    """
    if device == "cuda":
        a, b = torch.empty(2, 1 << 29, dtype=torch.uint8, device=device)
        c = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        seconds = turns({"copy": [lambda: b.copy_(a)], "product": [lambda: c @ c]}, 1.0, device=device)
        return {"GB/s": 2 * a.numel() / seconds["copy"] / 1e9, "GFLOP/s": 2 * 8192**3 / seconds["product"] / 1e9}
    module, count = _native.cpu_module(), 500_000
    data = torch.ones(max(4 * last_cache(), 256 << 20), dtype=torch.uint8)
    forms = {way: [lambda way=way: read(data, way)] for way in READS}
    total = torch.empty(1)
    lanes = module.multiply_add(total.data_ptr(), 1, threads)
    forms["fma"] = [lambda: module.multiply_add(total.data_ptr(), count, threads)]
    seconds = turns(forms, 1.0)
    flops = 2 * 10 * lanes * count * threads / seconds.pop("fma")
    best = min(seconds, key=seconds.get)
    return {"GB/s": data.nbytes / seconds[best] / 1e9, "read": best, "GFLOP/s": flops / 1e9}


def turns(forms: dict, budget: float, hot: bool = False, device: str = "cpu", before=None) -> dict:
    """Median seconds of a call of each form. forms: name -> calls, one for each copy of its data.

    The forms take turns and each round is the next copy's. hot: a turn calls the first copy four times and the first of
    these is not counted. before() runs before each call, untimed. At least 5 rounds, then as many as fit into `budget`
    seconds, up to 101. Every round has an order of its own: who comes after a form that sweeps the caches finds its
    code in memory, and pays up to 0.2 ms.
    """
    times, begun, order = {name: [] for name in forms}, time.perf_counter(), random.Random(0)
    for i in range(102):
        if i > 5 and time.perf_counter() - begun > budget:
            break
        for name, calls in order.sample(list(forms.items()), len(forms)):
            call = calls[0 if hot else i % len(calls)]
            for repeat in range(4 if hot else 1):
                if before:
                    before()
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                if i and (repeat or not hot):  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def write(rows: list[dict], about: dict, csv_path: str | None, json_path: str | None) -> None:
    """The rows as CSV (columns of all rows together) and, with `about`, as JSON."""
    if csv_path:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(csv_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    if json_path:
        Path(json_path).write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")
