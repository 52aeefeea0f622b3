"""The base model as the fleet runs it: flat weights, ops, and a cache in blocks; no transformers module takes part.

Activations are float32 and weights are read in their own type. Between embedding and logits a layer is three or four
ops: norm_linear (norm, q, k and v in one matrix), paged_attention_ (rotary embedding, cache, attention), norm_linear
(output projection, residual) and subset_ffn (norm, FFN, residual).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from persona_pruner import models, ops
from persona_pruner.errors import InputError
from persona_pruner.fleet.memory import Arena
from persona_pruner.nn import SparseLinear24
from persona_pruner.ops.paged_attention import BLOCK
from persona_pruner.ops.plan import Plan

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# A step of few tokens is planned: its native calls are noted once and then made in one. SmolLM2-135M, one thread of an
# EPYC with AVX2, 2026-11-28: 30 ms a token instead of 37 in bfloat16, 20 instead of 23 in int8. With more tokens that
# share is small, and a plan keeps every tensor between two layers, 0.3 MB a token.
MOST_PLANNED = 4  # tokens
PLANS = 8  # the latest used


@dataclass
class Matrix:
    """A weight [N, K], float32 scales [N] where it is int8, and a bias float32 [N] or None."""

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, parts: list[nn.Module], dtype: torch.dtype, transposed: bool = False) -> "Matrix":
        """The weights of linear layers (or an embedding) under each other."""
        weight = torch.cat([p.weight.detach() for p in parts])
        weight = weight.T if transposed else weight
        biases = [getattr(p, "bias", None) for p in parts]
        bias = None
        if any(b is not None for b in biases):
            sizes = [p.weight.shape[0] for p in parts]
            bias = torch.cat([weight.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)])
            bias = bias.detach().float()
        if dtype != torch.int8:
            return cls(weight.to(dtype), None, bias)
        return cls(*ops.quantize24(weight), bias)

    def kept(self, arena: Arena) -> "Matrix":
        """The same with its weight in the arena."""
        return replace(self, weight=arena.copy(self.weight))

    def rows(self, index: Tensor) -> Tensor:
        """float32 [n, K]: some rows of it."""
        rows = self.weight.index_select(0, index).float()
        return rows if self.scales is None else rows * self.scales.index_select(0, index)[:, None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.scales, self.bias) if t is not None)


@dataclass
class Layer:
    """One transformer block; norms are float32 [H], the last two None except in Gemma 3."""

    qkv: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix
    down_t: Matrix  # its bias is that of the output, [H]
    channels: Tensor  # [C, 3, H]: the weights of the last three are views of it
    attention_norm: Tensor
    ffn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    after_attention: Tensor | None
    after_ffn: Tensor | None
    rotary: int  # which of the decoder's tables
    window: int | None


@dataclass
class Batch:
    """New tokens of several conversations. `last`: those whose logits are wanted; segments: [layers, S, 3] for
    subset_ffn, with `channels` for all layers together."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int32 [T]
    rows: Tensor  # int32 [T]
    tables: Tensor  # int32 [R, W]
    last: Tensor  # int64 [n]
    channels: Tensor  # int32
    segments: Tensor


@dataclass
class Step:
    """A planned step: what is copied in before it runs, and the logits it leaves, until it runs again."""

    plan: Plan
    x: Tensor
    batch: Batch
    logits: Tensor

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        self.x.copy_(x)
        for name in ("positions", "rows", "tables", "segments"):
            getattr(self.batch, name).copy_(getattr(batch, name))
        self.plan.run()
        return self.logits


class Decoder:
    """The weights of a base model and their use. `model` is a causal LM of transformers; with `consume` its layers are
    given up one after the other, so that both never stand in memory whole. Raises InputError for other families and for
    packed weights."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, consume: bool = False):
        if type(model).__name__ not in FAMILIES:
            raise InputError(f"the fleet runs {', '.join(FAMILIES)}, not {type(model).__name__}")
        if dtype not in DTYPES:
            raise InputError(f"the fleet keeps weights in float32, bfloat16, float16 or int8, not {dtype}")
        if any(isinstance(module, SparseLinear24) for module in model.modules()):
            raise InputError("the fleet reads dense weights; packed 2:4 layers run in transformers' generate")
        config = model.config.get_text_config()
        decoder, layers = model.get_decoder(), models.decoder_layers(model)
        self.act, self.widths = models.activation(model), models.widths(model)
        self.eps, self.context = config.rms_norm_eps, config.max_position_embeddings
        self.kv_heads = config.num_key_value_heads
        attention = layers[0].self_attn
        self.head, self.scale = attention.head_dim, attention.scaling
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise InputError(f"{type(model).__name__} caps its attention scores, which the fleet does not")
        self.cap = getattr(config, "final_logit_softcapping", None)
        self._window = getattr(config, "sliding_window", None)  # of Mistral, whose layers do not say
        # Weights and batches are made here and fit: the backends are called without the checks of the public ops.
        self._backends = [
            op.ready(model.get_input_embeddings().weight.device)[0]
            for op in (ops.norm_linear_op, ops.paged_attention_op, ops.subset_ffn_op)
        ]
        self._steps: OrderedDict[tuple, Step] = OrderedDict()
        self.dtype = dtype
        self.kv_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        self.device = model.get_input_embeddings().weight.device
        self._gemma = "Gemma" in type(model).__name__
        arena = Arena(self.device)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.embedding_scale = float(embedding.embed_scale.to(embedding.weight.dtype)) if self._gemma else 1.0
        self.embedding = Matrix.of([embedding], dtype).kept(arena)
        self.output = self.embedding if head.weight is embedding.weight else Matrix.of([head], dtype).kept(arena)
        self.final_norm = self._norm(decoder.norm)
        kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * len(layers))
        self._rotary_kinds = sorted(set(kinds)) if self._gemma else [None]
        self.rotary: list[tuple[Tensor, Tensor]] = []
        self._rotary = decoder.rotary_emb
        self.room(min(self.context, 2048))
        self.layers = []
        for layer, kind in zip(layers, kinds, strict=True):
            self.layers.append(self._layer(layer, self._rotary_kinds.index(kind) if self._gemma else 0, arena))
            if consume:
                layer.mlp = layer.self_attn = None

    def _norm(self, norm: nn.Module) -> Tensor:
        weight = norm.weight.detach().float()
        return weight + 1 if self._gemma else weight.clone()

    def _layer(self, layer: nn.Module, rotary: int, arena: Arena) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qk = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        ffn = [Matrix.of([p], self.dtype) for p in (mlp.gate_proj, mlp.up_proj)]
        ffn.append(Matrix.of([mlp.down_proj], self.dtype, transposed=True))
        # The three rows of a channel next to each other, as subset_ffn likes them.
        rows = arena.copy(torch.stack([m.weight for m in ffn], 1))
        ffn_norm = layer.pre_feedforward_layernorm if self._gemma else layer.post_attention_layernorm
        after = (layer.post_attention_layernorm, layer.post_feedforward_layernorm) if self._gemma else ()
        return Layer(
            Matrix.of([attention.q_proj, attention.k_proj, attention.v_proj], self.dtype).kept(arena),
            Matrix.of([attention.o_proj], self.dtype).kept(arena),
            *(replace(m, weight=weight) for m, weight in zip(ffn, rows.unbind(1), strict=True)),
            rows,
            self._norm(layer.input_layernorm),
            self._norm(ffn_norm),
            *(None if norm is None else self._norm(norm) for norm in qk),
            *(map(self._norm, after) if after else (None, None)),
            rotary,
            getattr(attention, "sliding_window", self._window),
        )

    def room(self, length: int) -> None:
        """Rotary tables for positions below `length`, at least."""
        if self.rotary and len(self.rotary[0][0]) >= length:
            return
        self.rotary = []
        place = torch.arange(length, device=self.device)[None]
        for kind in self._rotary_kinds:
            like = torch.empty(1, dtype=torch.float32, device=self.device)
            cos, sin = self._rotary(like, place, *([kind] if kind else []))
            half = self.head // 2
            self.rotary.append((cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        matrices = {id(m): m for m in (self.embedding, self.output)}
        total = sum(m.nbytes for m in matrices.values())
        return total + sum(m.nbytes for la in self.layers for m in (la.qkv, la.out, la.gate, la.up, la.down_t))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the key/value cache, over all layers."""
        return 2 * len(self.layers) * self.kv_heads * self.head * BLOCK * self.kv_dtype.itemsize

    def cache(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Keys [layers, blocks, Hkv, d, 16] and values [layers, blocks, Hkv, 16, d]; pages are used as written."""
        shape = len(self.layers), blocks, self.kv_heads
        new = {"dtype": self.kv_dtype, "device": self.device}
        return torch.empty(*shape, self.head, BLOCK, **new), torch.empty(*shape, BLOCK, self.head, **new)

    @torch.inference_mode()
    def arrange(self, moves: Sequence[Tensor]) -> None:
        """FFN channel i of a layer becomes what channel moves[layer][i] was, int64 [C]; in place."""
        for layer, move in zip(self.layers, moves, strict=True):
            move = move.to(self.device)
            of_channels = [m.scales for m in (layer.gate, layer.up, layer.down_t)]
            for tensor in (layer.channels, *of_channels, layer.gate.bias, layer.up.bias):
                if tensor is not None:
                    tensor.copy_(tensor[move])
        self._steps.clear()

    @torch.inference_mode()
    def forward(self, batch: Batch, keys: Tensor, values: Tensor) -> Tensor:
        """Logits float32 [n, V] of the tokens batch.last, which the next call may write over; keys and values of all
        tokens are in the cache afterwards."""
        x = self.embedding.rows(batch.tokens)
        if self.embedding_scale != 1:
            x *= self.embedding_scale
        if self._plannable(batch):
            logits = self._step(batch, keys, values).run(x, batch)
        else:
            logits = self._through(x, batch, keys, values, *(b.run for b in self._backends))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _plannable(self, batch: Batch) -> bool:
        """Whether the step is nothing but native calls, and small: the next token of a few conversations."""
        count = len(batch.tokens)
        return count == len(batch.last) <= MOST_PLANNED and not self._gemma and all(b.call for b in self._backends)

    def _step(self, batch: Batch, keys: Tensor, values: Tensor) -> Step:
        shapes = (len(batch.tokens), batch.tables.shape, batch.segments.shape, len(self.rotary[0][0]))
        key = (*shapes, id(batch.channels), keys.data_ptr(), torch.get_num_threads())
        if key not in self._steps:
            copies = {name: getattr(batch, name).clone() for name in ("positions", "rows", "tables", "segments")}
            plan, own = Plan(), replace(batch, **copies)
            x = torch.empty(len(batch.tokens), self.embedding.weight.shape[1])
            logits = self._through(x, own, keys, values, *(plan.adding(b.call) for b in self._backends))
            self._steps[key] = Step(plan, x, own, logits)
        self._steps.move_to_end(key)
        while len(self._steps) > PLANS:
            self._steps.popitem(last=False)
        return self._steps[key]

    def _through(
        self, x: Tensor, batch: Batch, keys, values, linear: Callable, attend: Callable, ffn: Callable
    ) -> Tensor:
        """Logits, before they are capped, with the backends' functions for the three ops."""

        def product(x: Tensor, matrix: Matrix, norm: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
            return linear(x, matrix.weight, matrix.bias, matrix.scales, norm, self.eps, residual)

        for number, layer in enumerate(self.layers):
            gate, up, down = layer.gate, layer.up, layer.down_t
            attended = attend(
                product(x, layer.qkv, layer.attention_norm), *self.rotary[layer.rotary], batch.positions, batch.rows,
                batch.tables, keys[number], values[number], self.scale, layer.window, layer.q_norm, layer.k_norm,
                self.eps,
            )  # fmt: skip
            if layer.after_attention is None:
                x = product(attended, layer.out, residual=x)
            else:
                x = x + ops.rms_norm(product(attended, layer.out), layer.after_attention, self.eps)
            y = ffn(
                x, (gate.weight, up.weight, down.weight), batch.channels, batch.segments[number], self.act,
                (gate.scales, up.scales, down.scales), (gate.bias, up.bias, down.bias), layer.ffn_norm, self.eps,
                x if layer.after_ffn is None else None,
            )  # fmt: skip
            x = y if layer.after_ffn is None else x + ops.rms_norm(y, layer.after_ffn, self.eps)
        x = x if len(batch.last) == len(x) else x[batch.last]
        return product(x, self.output, self.final_norm)
