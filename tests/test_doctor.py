"""What the doctor says must be so."""

import json
from pathlib import Path

import torch

from persona_pruner import doctor, models, ops


def test_report():
    found = doctor.report()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["transformers"].startswith("5.")
    assert doctor._version("no-such-package") == "not installed"
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["fast_bf16"] == (models.resolve_dtype("auto", "cpu") == torch.bfloat16)
    assert len(found["cuda"]["devices"]) == torch.cuda.device_count()
    has = torch.backends.cusparselt.is_available()
    assert found["cuda"]["cusparselt"].startswith("torch has" if has else "not in this torch")
    assert set(found["ops"]) == {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    assert set(found["ops"]["cpu"]) == {op.name for op in ops.OPS} >= {"masked_swiglu", "linear24", "select24"}


def test_linear24_has_no_backend_of_the_vendor():
    """The report says that cuSPARSELt is never called: so no backend may be it, and no code may name its op."""
    files = (Path(ops.__file__).parent).glob("*linear24*.py")
    assert not any("_cslt" in file.read_text() or "to_sparse_semi" in file.read_text() for file in files)
    assert {b.name for b in ops.linear24_op.backends} == {"cpu", "cuda", "triton", "reference"}


def test_states_are_those_that_dispatch_goes_by():
    for device, found in doctor.report()["ops"].items():
        for op in ops.OPS:
            assert set(found[op.name]) == {backend.name for backend in op.backends}
            for backend in op.backends:
                why = backend.unavailable(device)
                assert found[op.name][backend.name] == (why or "ready")
            assert found[op.name]["reference"] == "ready"
            assert device != "cpu" or found[op.name]["cpu"] == "ready"
