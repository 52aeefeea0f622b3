"""Benchmarks, one `bench_<op>.py` an op, installed as `persona_pruner.benchmarks`: `persona-pruner bench <op>`.

gpu_check.py is not one of them: it needs tests/, and so a checkout.
"""
