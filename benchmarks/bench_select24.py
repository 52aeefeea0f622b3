"""Times select24 against what one would write without it.

    persona-pruner bench select24 --threads 1 2 --csv out.csv

"loop": Python over rows and groups of four, torch.topk and a mask for each group, as published 2:4 scripts do; it is
timed on a part of the groups and the time of all of them is that of the part times the number of parts. "topk": one
vectorised torch.topk over all groups, with gather and packed metadata. Results are compared before anything is timed,
bit for bit but for ties; the peers take turns with ours on weights that rotate through twice the last-level cache.
"share of bandwidth" counts the least bytes, weight in, values and metadata out, against memory read in the same turns.
"""

import argparse

import torch

from persona_pruner.benchmarks import common
from persona_pruner.ops import select24

SHAPES = [(1536, 576), (8192, 2048), (2048, 8192), (8192, 3072)]
LOOP_GROUPS = 2000


def loop(weight, scale, groups):
    """Kept values and positions of the first `groups` groups, one after the other."""
    kept, places = [], []
    for g in range(groups):
        row, c = divmod(4 * g, weight.shape[1])
        group = weight[row, c : c + 4]
        best = torch.topk(group.abs().float() * scale[c : c + 4], 2).indices.sort().values
        kept.append(group[best])
        places.append(best)
    return torch.stack(kept), torch.stack(places)


def topk(weight, scale):
    """values [N, K/2] and meta [N, K/8] by one topk (ties in no particular order); K a multiple of 8."""
    rows, cols = weight.shape
    score = (weight.abs().float() * scale).view(rows, cols // 4, 4)
    kept = score.topk(2, dim=-1, sorted=False).indices.sort(dim=-1).values
    values = weight.view(rows, cols // 4, 4).gather(-1, kept).view(rows, cols // 2)
    nibble = (kept[..., 0] | kept[..., 1] << 2).to(torch.uint8)
    return values, nibble[:, 0::2] | nibble[:, 1::2] << 4


def check(weight, scale):
    """Ours against the reference, bit for bit, and against topk and the loop, which break ties as they like."""
    values, meta = select24(weight, scale)
    for name, other in (("reference", select24(weight, scale, backend="reference")), ("topk", topk(weight, scale))):
        same = min((a == b).double().mean().item() for a, b in zip((values, meta), other, strict=True))
        if same < (1 if name == "reference" else 0.99):
            raise SystemExit(f"select24 {list(weight.shape)} agrees with {name} in {same:.4f} only; nothing is timed")
    kept, places = loop(weight, scale, 64)
    nibble = (places[:, 0] | places[:, 1] << 2).view(-1, 2)
    ours = meta.flatten()[:32]
    if ((nibble[:, 0] | nibble[:, 1] << 4) != ours).sum() > 1 or (kept.flatten() != values.flatten()[:128]).sum() > 4:
        raise SystemExit("select24 differs from the loop; nothing is timed")


def measure(n, k, dtype, budget, way):
    generator = torch.Generator().manual_seed(n + k)
    weight, scale = torch.randn(n, k, generator=generator).to(dtype), torch.rand(k, generator=generator) + 0.5
    check(weight, scale)
    copies = [weight] + [weight.clone() for _ in range(max(1, 2 * common.last_cache() // weight.nbytes))]
    part = min(LOOP_GROUPS, n * k // 4)
    values, meta = select24(weight, scale)
    least = weight.nbytes + values.nbytes + meta.nbytes
    forms = {
        "select24": [lambda w=w: select24(w, scale) for w in copies],
        "topk": [lambda w=w: topk(w, scale) for w in copies],
        "loop": [lambda w=w: loop(w, scale, part) for w in copies],
    }
    forms["read"] = [lambda w=w: common.read(w, way) for w in copies]
    seconds = common.turns(forms, budget)
    seconds["loop"] *= n * k // 4 / part
    return seconds, (least / seconds["select24"]) / (weight.nbytes / seconds.pop("read"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "bench select24", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for a shape and dtype")
    parser.add_argument("--short", action="store_true", help="two shapes, half a second each")
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--json", help="write the same with the machine to this file")
    args = parser.parse_args(arguments)
    if args.short:
        args.budget = 0.5
    about, rows = {"machine": common.machine()}, []
    print(", ".join(f"{key} {value}" for key, value in about["machine"].items()))
    for threads in args.threads:
        torch.set_num_threads(threads)
        way = common.limits(threads)["read"]
        for dtype in (torch.bfloat16, torch.float32):
            for n, k in SHAPES[: 2 if args.short else None]:
                seconds, share = measure(n, k, dtype, args.budget, way)
                row = {"threads": threads, "dtype": str(dtype)[6:], "N": n, "K": k}
                row |= {f"{name} ms": round(1e3 * s, 3) for name, s in seconds.items()}
                row |= {
                    f"{peer} over select24": round(seconds[peer] / seconds["select24"], 1) for peer in ("topk", "loop")
                }
                row["share of bandwidth"] = round(share, 2)
                rows.append(row)
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(f"over topk: {min(r['topk over select24'] for r in rows)}x at least; goal 5")
    print(f"over the loop (extrapolated): {min(r['loop over select24'] for r in rows)}x at least; goal 20")
    common.write(rows, about, args.csv, args.json)


if __name__ == "__main__":
    main()
