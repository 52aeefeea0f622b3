"""What the doctor says must be so."""

import json

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
    assert set(found["ops"]) == {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    assert set(found["ops"]["cpu"]) == {op.name for op in ops.OPS} >= {"masked_swiglu", "linear24", "select24"}


def test_states_are_those_that_dispatch_goes_by():
    for device, found in doctor.report()["ops"].items():
        for op in ops.OPS:
            assert set(found[op.name]) == {backend.name for backend in op.backends}
            for backend in op.backends:
                why = backend.unavailable(device)
                assert found[op.name][backend.name] == (why or "ready")
            assert found[op.name]["reference"] == "ready"
            assert device != "cpu" or found[op.name]["cpu"] == "ready"
