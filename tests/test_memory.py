"""What a process does with the memory that it frees. In a process of its own, since it is the whole process's."""

import subprocess
import sys

import pytest

from persona_pruner import memory

CODE = """
import resource, torch
from persona_pruner.memory import kept_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults(tensors=6):  # of so many tensors of 8 MB, alive together and then gone
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2 << 20) for _ in range(tensors)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
@kept_memory()
def work():
    rounds = [faults() for _ in range(8)]  # the heap grows in the first ones: a tensor seldom fits where one was
    return rounds[-1], resident()

again, held = work()
print(again, held - resident())
"""


@pytest.mark.skipif(not memory._glibc(), reason="the C library is not glibc: its allocator cannot be told")
def test_freed_memory_stays_within_the_context_and_goes_at_its_end():
    out = subprocess.run([sys.executable, "-P", "-c", CODE], capture_output=True, text=True, check=True).stdout
    faults, given_back = map(int, out.split())
    assert faults < 2048  # pages of one tensor; with what glibc does by itself 12,277
    assert given_back > 40e6


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.kept_memory():
        memory.trim()
