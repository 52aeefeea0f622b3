"""SliceGPT: the residual stream is rotated onto its principal components and the last of them are cut off."""

import copy

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.packing import hidden_states
from persona_pruner.search.baselines.size import budget, parameters
from persona_pruner.search.scores import Context

STEP = 8  # the width of the sliced stream is a multiple of this where it can be


class UnitNorm(nn.Module):
    """RMSNorm without weights, of a stream that has lost dimensions: the mean square is over the `full` width."""

    def __init__(self, full: int, eps: float):
        super().__init__()
        self.full, self.eps = full, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.full + self.eps)).to(x.dtype)


class SlicedBlock(nn.Module):
    """A block on the sliced stream: its attention and MLP read and write rotated coordinates, and the shortcuts turn
    the stream into the coordinates of what comes next. The first block has `enter`, which takes the embedding in."""

    def __init__(self, block: nn.Module, norm: UnitNorm, shortcuts: list[nn.Linear], enter: nn.Linear | None):
        super().__init__()
        self.self_attn, self.mlp, self.norm, self.enter = block.self_attn, block.mlp, norm, enter
        self.past_attention, self.past_mlp = shortcuts
        for name in ("attention_type", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x = hidden_states if self.enter is None else self.enter(hidden_states)
        x = self.past_attention(x) + self.self_attn(hidden_states=self.norm(x), **kwargs)[0]
        return self.past_mlp(x) + self.mlp(self.norm(x))


class Leave(nn.Module):
    """The final norm: out of the sliced stream, back to the coordinates that the head knows, times the old weights."""

    def __init__(self, norm: UnitNorm, back: nn.Linear):
        super().__init__()
        self.norm, self.back = norm, back

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.norm(x))


def _linear(weight: Tensor, like: Tensor, bias: Tensor | None = None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(like.dtype).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(like.dtype), requires_grad=False)
    return new


def norms(model: nn.Module) -> list[nn.Module]:
    """The norms that read the residual stream, in order: two a block and the last one. Raises InputError for blocks of
    another build."""
    blocks = models.decoder_layers(model)
    if any(hasattr(block, "pre_feedforward_layernorm") for block in blocks) or not hasattr(
        blocks[0], "post_attention_layernorm"
    ):
        raise InputError(
            f"SliceGPT needs blocks with one norm before attention and MLP, not {type(blocks[0]).__name__}"
        )
    pairs = ((block.input_layernorm, block.post_attention_layernorm) for block in blocks)
    return [norm for pair in pairs for norm in pair] + [model.get_decoder().norm]


@torch.no_grad()
def rotations(context: Context) -> list[Tensor]:
    """Q of every norm, float32 [d, d]: eigenvectors, largest first, of the sum over tokens of x x^T, where x is what
    the norm gives before its weights."""
    found = norms(context.model)
    device = found[0].weight.device
    width = found[0].weight.numel()
    sums = [torch.zeros(width, width, device=device) for _ in found]
    unit = UnitNorm(width, found[0].variance_epsilon)

    def add(acc: Tensor, x: Tensor) -> None:
        rows = unit(x.float()).reshape(-1, width)
        acc += rows.T @ rows

    hooks = [
        norm.register_forward_pre_hook(lambda _, args, acc=acc: add(acc, args[0]))
        for norm, acc in zip(found, sums, strict=True)
    ]
    try:
        for batch in context.packs:
            hidden_states(context.model, batch.to(device))
            context.step(1)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.linalg.eigh(acc.double())[1].flip(1).float() for acc in sums]


@torch.no_grad()
def sliced(model: nn.Module, turns: list[Tensor], width: int) -> nn.Module:
    """A copy of the model whose stream keeps the first `width` coordinates of every rotation; with the full width it
    computes what the model computes."""
    out = copy.deepcopy(model)
    blocks, like = models.decoder_layers(out), model.get_input_embeddings().weight
    gains = [norm.weight.float() for norm in norms(out)]
    full, eps = len(turns[0]), norms(out)[0].variance_epsilon
    cut = [turn[:, :width] for turn in turns]

    def reading(linear: nn.Linear, place: int) -> nn.Linear:
        return _linear((linear.weight.float() * gains[place]) @ cut[place], like, linear.bias)

    def writing(linear: nn.Linear, place: int) -> nn.Linear:
        bias = None if linear.bias is None else linear.bias.float() @ cut[place]
        return _linear(cut[place].T @ linear.weight.float(), like, bias)

    new = []
    for number, block in enumerate(blocks):
        place = 2 * number
        attention, mlp = block.self_attn, block.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, reading(getattr(attention, name), place))
        attention.o_proj = writing(attention.o_proj, place + 1)
        mlp.gate_proj, mlp.up_proj = reading(mlp.gate_proj, place + 1), reading(mlp.up_proj, place + 1)
        mlp.down_proj = writing(mlp.down_proj, place + 2)
        shortcuts = [_linear(cut[p + 1].T @ cut[p], like) for p in (place, place + 1)]
        enter = None if number else _linear(cut[0].T, like)
        new.append(SlicedBlock(block, UnitNorm(full, eps), shortcuts, enter))
    decoder = out.get_decoder()
    decoder.layers = nn.ModuleList(new)
    decoder.norm = Leave(UnitNorm(full, eps), _linear(gains[-1][:, None] * cut[-1], like))
    return out.eval()


def stream_width(model: nn.Module, ratio: float) -> int:
    """The widest stream whose model, shortcuts and all, stays within the budget of the ratio."""
    full = norms(model)[0].weight.numel()
    linears = parameters(model) - sum(norm.weight.numel() for norm in norms(model))
    shortcuts = 2 * len(models.decoder_layers(model))

    def size(width: int) -> int:
        return linears * width // full + shortcuts * width * width + 2 * full * width

    step = STEP if full > 8 * STEP else 1
    fitting = [w for w in range(step, full, step) if size(w) <= budget(model, ratio)]
    if not fitting:
        raise InputError(f"SliceGPT cannot reach ratio {ratio} with a stream of {full}")
    return fitting[-1]


def prune(context: Context, ratio: float) -> nn.Module:
    """SliceGPT (Ashkboos et al., ICLR 2024): norm weights are folded into the linears, the stream is turned by the
    principal components of each norm's output, and all but the first `width` of them are deleted from weights and
    stream; each shortcut carries Q_i^T Q_{i+1}. Simplified: the components are those of the dense model rather than of
    the model sliced so far, and the embedding table and head stay as they are, with one matrix behind and one before
    them, which computes the same as slicing the tables. Those matrices and the shortcuts count as parameters."""
    return sliced(context.model, rotations(context), stream_width(context.model, ratio))
