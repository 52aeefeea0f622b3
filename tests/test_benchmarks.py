"""Benchmarks from the command: small, real runs; no time is asserted."""

import csv
import json

import pytest
import torch

from persona_pruner.benchmarks import bench_generate
from persona_pruner.benchmarks.bench_search import Plain
from persona_pruner.cli import main
from persona_pruner.nn.sparse import packed_layers, sparsify_
from persona_pruner.ops import _native
from persona_pruner.packing import pack
from persona_pruner.search import ste
from persona_pruner.search.masks import choose
from persona_pruner.search.scores import Context, channel_scores
from persona_pruner.testing import tiny_examples, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("threads", [1, 2])
def test_multiply_adds_are_done(threads):
    """The loop once had no result and was compiled to nothing: its peak was nine times the unit's."""
    total = torch.empty(1)
    lanes = _native.cpu_module().multiply_add(total.data_ptr(), 20_000, threads)
    assert total.item() == pytest.approx(10 * lanes * threads, rel=1e-3)  # every lane tends to 1
    lanes = _native.cpu_module().multiply_add(total.data_ptr(), 0, threads)
    assert total.item() == pytest.approx(45 * lanes * threads)


def test_bench_writes_what_it_measured(tmp_path, capsys):
    files = ["--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")]
    before = torch.get_num_threads()
    try:
        main(["bench", "linear24", "--short", "--tokens", "1", "--budget", "0.01", "--threads", "1",
              "--plot", str(tmp_path / "a.png"), *files])  # fmt: skip
    except SystemExit as end:
        assert not end.code
    finally:
        torch.set_num_threads(before)
    assert "goal" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    written = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == len(written["rows"]) > 0 and written["machine"]["isa"] == _native.cpu_isa()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_plain_search_and_ours_find_the_same_mask(loss):
    """The yardstick shares no attention, no packing and no kernel with the search, and does the same."""
    model, examples = tiny_model(), tiny_examples(9)
    settings = ste.Settings(0.5, loss=loss, steps=6, lr=0.3, budget=60)
    teacher = ste.teacher_states(model, examples, 60)
    start = ste.start(channel_scores("random", Context(model)), "layer")
    losses = []
    plain = Plain(model, examples, micro=3)
    theirs = plain.search(start, settings, teacher, lambda masks, loss: losses.append(loss))
    before = choose(start.scores, 0.5)
    ours = ste.search(model, examples, start, settings, teacher)
    assert losses == pytest.approx(start.losses, rel=2e-3)
    assert sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)) <= 2
    assert sum(int((a != b).sum()) for a, b in zip(ours, before, strict=True)) > 10


def test_plain_fisher_scores_are_like_ours():
    model, examples = tiny_model(), tiny_examples(60)
    packs = pack(examples, 400)
    ours, theirs = channel_scores("fisher", Context(model, packs)), Plain(model, examples, 4).fisher(packs)
    for a, b in zip(ours, theirs, strict=True):  # labels are drawn anew, so that only the ranking is alike
        assert torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1] > 0.8


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "nothing"])
    assert end.value.code == 2 and "linear24" in capsys.readouterr().err


def test_bench_generate(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    found, before = tmp_path / "a.json", torch.get_num_threads()
    arguments = [
        "--model",
        str(tmp_path / "tiny"),
        "--threads",
        "1",
        "--tokens",
        "8",
        "--rounds",
        "1",
        "--json",
        str(found),
    ]
    try:
        main(["bench", "generate", *arguments])
    except SystemExit as end:
        assert not end.code
    finally:
        torch.set_num_threads(before)
    assert "same choice at" in capsys.readouterr().out
    written = json.loads(found.read_text())
    sizes = {row["form"]: row["block MB"] for row in written["rows"]}
    assert sizes["dense fp32"] == 2 * sizes["dense bf16"] > sizes["2:4 bf16"] > sizes["2:4 int8"] > 0
    assert written["machine"]["tokens"]["all"] == 4 * 8 and 0 < written["machine"]["int8 layer error"] < 0.02


def test_bench_generate_notices_wrong_tokens_and_layers():
    packed = tiny_model(dtype=torch.bfloat16)
    sparsify_(packed, dtype=torch.int8)
    assert bench_generate.check_layers(packed) < 0.02
    assert bench_generate.compare_tokens(packed, packed, [[1, 2, 3]], 4)["texts"] == 1
    other = tiny_model(seed=1, dtype=torch.bfloat16)
    with pytest.raises(SystemExit, match="steps apart"):
        bench_generate.compare_tokens(packed, other, [[1, 2, 3]], 8)
    layer = next(iter(packed_layers(packed).values()))
    twice = 2 * layer.dequantize()
    layer.dequantize = twice.to
    with pytest.raises(SystemExit, match="off by"):
        bench_generate.check_layers(packed)
