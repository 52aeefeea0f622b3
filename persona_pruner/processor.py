"""What this processor can do."""

from functools import cache


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
