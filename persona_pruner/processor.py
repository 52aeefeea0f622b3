"""What this processor can do. setup.py runs this file by itself: it imports nothing of the package."""

from functools import cache

# Instruction sets of the CPU modules, from best to least, with the processor flags (names of /proc/cpuinfo) that each
# build uses.
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni", "fma", "f16c"}
ISAS = {
    "amx": AVX512 | {"avx512_vbmi2", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    # For AMD: Intel's processors take two cycles for a dot product of bf16 pairs and two for each permute it needs, so
    # that plain AVX-512 is faster there.
    "avx512bf16": AVX512 | {"avx512_bf16", "AuthenticAMD"},
    "avx512": AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "baseline": set(),
}


@cache
def cpu_flags() -> frozenset[str]:
    """Feature names of this processor and its vendor's; empty where the system does not list them."""
    found: set[str] = set()
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith(("flags", "Features", "vendor_id")):
                    found.update(line.partition(":")[2].split())
                if not line.strip():  # the first processor ends here
                    break
    except OSError:
        pass
    return frozenset(found)
