"""Mistral: a decoder-only transformer with grouped queries, a sliding attention window, RMSNorm, RoPE and SwiGLU.

    Jiang et al. 2023, https://arxiv.org/abs/2310.06825

Two things differ from the textbook for speed, neither in meaning: the query, key and value projections are one matrix
(``qkv``), and so are the MLP's gate and up projections (``gate_up``). model/convert.py maps both to Hugging Face's.

Suffixes name the shapes: b batch, t position, d model width, h query heads + 2 key/value heads, c channels of one head,
f MLP width (both halves of a packed gate_up), v vocabulary, z packed h * c.
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halny.kernels.attention import check_documents, document_ids, plan_attention, planned_attention
from halny.kernels.dispatch import autocast_dtype, can_check_values, check_integer
from halny.kernels.embedding import embedding
from halny.kernels.linear_cross_entropy import counted_cross_entropy, linear_cross_entropy
from halny.kernels.recompute_linear import add_rms_norm_linear, rms_norm_linear, swiglu_linear
from halny.kernels.rms_norm import add_rms_norm, rms_norm
from halny.kernels.rope import rope_qkv, rope_split_qkv_, rope_tables
from halny.kernels.swiglu import swiglu


@dataclass(frozen=True)
class MistralConfig:
    """The architecture. Raises ValueError, naming field and value, for one that cannot be built."""

    vocab_size: int = 32000
    dim: int = 4096  # width of the residual stream
    n_layers: int = 32
    n_heads: int = 32  # query heads
    n_kv_heads: int = 8  # key/value heads, each serving n_heads / n_kv_heads query heads
    head_dim: int = 128
    hidden_dim: int = 14336  # width of the MLP
    window: int | None = 4096  # a query sees this many keys, itself included; None for all before it
    max_seq_len: int = 32768
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    bos_id: int | None = 1  # of the tokenizer; the model itself does not use them
    eos_id: int | None = 2

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.window is not None and (
            isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1
        ):
            raise ValueError(f"window must be None or a positive integer, got {self.window!r}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")


PRESETS: dict[str, MistralConfig] = {
    # for tests: every dimension different, head_dim * n_heads != dim, a window below the context
    "test": MistralConfig(
        vocab_size=256, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=112, window=24,
        max_seq_len=512,
    ),
    # for the first run: trains on two CPU cores in a minute with the real 32,000-token vocabulary
    "tiny": MistralConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=384, window=64, max_seq_len=1024
    ),
    # for one small GPU: 1.11 billion parameters
    "mistral-1b": MistralConfig(dim=2048, n_layers=18, n_heads=16, n_kv_heads=4, hidden_dim=7168),
    # Mistral-7B-v0.1: 7,241,732,096 parameters
    "mistral-7b": MistralConfig(),
}  # fmt: skip


class Embedding(nn.Embedding):
    def forward(self, tokens):
        return embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_btd, residual_btd):
        """(norm(x + residual), x + residual); residual None stands for zero."""
        if residual_btd is None:
            return rms_norm(x_btd, self.weight, self.eps), x_btd
        return add_rms_norm(x_btd, residual_btd, self.weight, self.eps)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a fused operation that reads the module's weight computes what a call of the module would.

    Not so for an adapter in its place, a parametrization, FSDP of its own, a bias, a hook or another forward.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and module.__dict__["_parameters"].get("bias") is None
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def normed_linear(norm: nn.Module, linear: nn.Module, x_btd, residual_btd, recompute: bool):
    """(linear(norm(x + residual)), x + residual); residual None stands for zero."""
    if not (recompute and is_plain(norm, RMSNorm) and is_plain(linear, nn.Linear)):
        normed_btd, residual_btd = norm(x_btd, residual_btd)
        return linear(normed_btd), residual_btd
    if residual_btd is None:
        return rms_norm_linear(x_btd, norm.weight, linear.weight, norm.eps), x_btd
    return add_rms_norm_linear(x_btd, residual_btd, norm.weight, linear.weight, norm.eps)


class Attention(nn.Module):
    def __init__(self, config: MistralConfig, recompute: bool):
        super().__init__()
        self.recompute = recompute
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x_btd, residual_btd, norm, cos, sin, positions_bt, attention_plan):
        """(attention's output, x + residual); norm makes this module's input of that sum."""
        qkv_btz, residual_btd = normed_linear(norm, self.qkv, x_btd, residual_btd, self.recompute)
        heads = self.n_heads, self.n_kv_heads
        if is_plain(self.qkv, nn.Linear):
            q, k, v = rope_split_qkv_(qkv_btz, cos, sin, *heads, positions_bt)
        else:  # what something else has made may be what it needs for its backward
            qkv_bthc = rope_qkv(qkv_btz.unflatten(2, (-1, self.head_dim)), cos, sin, *heads, positions_bt)
            q, k, v = qkv_bthc.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        return self.out(planned_attention(q, k, v, attention_plan).flatten(2)), residual_btd


class MLP(nn.Module):
    def __init__(self, config: MistralConfig, recompute: bool):
        super().__init__()
        self.recompute = recompute
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x_btd, residual_btd, norm):
        """(the MLP's output, x + residual); norm makes this module's input of that sum."""
        gate_up_btf, residual_btd = normed_linear(norm, self.gate_up, x_btd, residual_btd, self.recompute)
        if self.recompute and is_plain(self.down, nn.Linear):
            return swiglu_linear(gate_up_btf, self.down.weight), residual_btd
        return self.down(swiglu(gate_up_btf)), residual_btd


class Block(nn.Module):
    def __init__(self, config: MistralConfig, recompute: bool):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, recompute)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config, recompute)

    def forward(self, x_btd, residual_btd, cos, sin, positions_bt, attention_plan):
        """(x, residual): what this layer adds to the residual stream, and the stream before that is added.

        So each addition is made by the norm that follows it, in the same pass over memory, the last in the next layer.
        """
        attended_btd, residual_btd = self.attention(
            x_btd, residual_btd, self.attention_norm, cos, sin, positions_bt, attention_plan
        )
        attended_btd = attended_btd.to(residual_btd.dtype)  # they differ under autocast only
        x_btd, residual_btd = self.mlp(attended_btd, residual_btd, self.mlp_norm)
        return x_btd.to(residual_btd.dtype), residual_btd


class Mistral(nn.Module):
    """The model. Built under ``torch.device("meta")`` it holds no memory: shard it, ``to_empty``, ``init_weights``.

    recompute: the backward recomputes the outputs of norms and SwiGLU instead of keeping them (recompute_linear.py),
    where kernels run: the same loss, 94 kB instead of 139 kB a token a layer at 7B in bf16. The default, because a
    third less memory costs only 45 kB more traffic a token a layer (at an H200's copy bandwidth 10 ns of some 3.4 us),
    and no matrix product.
    """

    def __init__(self, config: MistralConfig, recompute: bool = True):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, recompute) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.weight_names = {name for name, _ in self.named_parameters()}  # before anything wraps or replaces a part
        table = (config.max_seq_len, config.head_dim // 2)
        self.register_buffer("rope_cos", torch.empty(table, dtype=torch.float32), persistent=False)
        self.register_buffer("rope_sin", torch.empty(table, dtype=torch.float32), persistent=False)
        if not self.head.weight.is_meta:
            self.init_weights(seed=int(torch.randint(2**31, ())))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        restart_positions: bool = True,
        reduction: str = "sum",
    ):
        """Logits, or with labels the loss and its counts.

        tokens: int [B, T]. labels: int [B, T], labels[b, t] the target of position t (the model does not shift), -100
        ignored. cu_seqlens, max_seqlen: packed documents as ``halny.kernels.attention`` takes them; attention stays
        inside each document, and RoPE positions restart with it unless restart_positions is False. RoPE being relative,
        that changes results by rounding only, which is smaller for the smaller angles.

        Returns logits [B, T, V] in the compute dtype; or, with labels, ``LinearCrossEntropy(loss, n_tokens,
        n_correct)`` with the SUM of the losses over the targets, fp32; with reduction="none" the loss of each, [B, T],
        0 where there is none. Raises ValueError for a T beyond config.max_seq_len, token ids or labels outside the
        vocabulary, or cu_seqlens or max_seqlen that do not fit.
        """
        tokens = self._check(tokens, cu_seqlens, max_seqlen)
        B, T = tokens.shape
        positions_bt = None
        if cu_seqlens is not None and restart_positions:
            document_bt = document_ids(cu_seqlens, B, T)
            positions_bt = torch.arange(B * T, device=tokens.device).view(B, T) - cu_seqlens[document_bt]

        x_btd = self.embed(tokens)
        if self.rope_cos.is_meta and not x_btd.is_meta:  # after load_state_dict(..., assign=True)
            self.init_buffers()
        attention_plan = plan_attention(
            B,
            T,
            self.config.head_dim,
            autocast_dtype(x_btd),
            x_btd.device,
            window=self.config.window,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        residual_btd = None
        for layer in self.layers:
            x_btd, residual_btd = layer(x_btd, residual_btd, self.rope_cos, self.rope_sin, positions_bt, attention_plan)
        x_btd, _ = self.norm(x_btd, residual_btd)
        if labels is None:
            return self.head(x_btd)
        if is_plain(self.head, nn.Linear):
            return linear_cross_entropy(x_btd, self.head.weight, labels, reduction=reduction)
        return counted_cross_entropy(self.head(x_btd), labels, reduction=reduction)

    def _check(self, tokens: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
        """The tokens as int64, or an error that names what is wrong."""
        check_integer("tokens", tokens)
        tokens = tokens.long()
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, T], got {tuple(tokens.shape)}")
        B, T = tokens.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"tokens has T = {T}, beyond the model's max_seq_len of {self.config.max_seq_len}")
        if can_check_values(tokens) and (tokens.min() < 0 or tokens.max() >= self.config.vocab_size):
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise ValueError(f"tokens must lie in 0 .. {self.config.vocab_size - 1} (the vocabulary), got {wrong}")
        check_documents(cu_seqlens, max_seqlen, B, T, tokens=tokens)
        return tokens

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights as a pure function of seed, on any device, sharded over any number of ranks.

        Normal with standard deviation 0.02 (Mistral's), divided by sqrt(2 * n_layers) in the two matrices that write
        into the residual stream (Radford et al. 2019, GPT-2), so that its variance does not grow with depth; norms 1.
        """
        for name, parameter in self.weights().items():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            std = 0.02
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std /= (2 * self.config.n_layers) ** 0.5
            local, first_row = local_rows(parameter)
            _fill_normal(local, first_row, std, seed, name)
        self.init_buffers()

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Fill the RoPE tables, which are fp32 whatever the weights are, where the weights are."""
        device = self.embed.weight.device
        if device.type == "meta":
            return
        tables = rope_tables(self.config.max_seq_len, self.config.head_dim, self.config.rope_theta)
        for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
            held = getattr(self, name)
            if held.device == device and held.dtype == table.dtype:
                held.copy_(table)
            else:
                setattr(self, name, table.to(device))

    def _apply(self, fn, recurse=True):
        """``to``, ``half``, ``cuda`` and ``to_empty`` all come here: the tables are made again, in fp32."""
        super()._apply(fn, recurse)
        self.init_buffers()
        return self

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that they have without wrappers; ValueError if they are not this model's."""
        weights = dict(named_weights(self))
        if weights.keys() != self.weight_names:
            unexpected = sorted(weights.keys() - self.weight_names)
            missing = sorted(self.weight_names - weights.keys())
            raise ValueError(
                f"the model's parameters are not those of a Mistral: unexpected {unexpected[:3]}, missing {missing[:3]}"
                f", {len(unexpected)} and {len(missing)} in all; merge adapters into the weights, or remove them, first"
            )
        return weights

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_new: int, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Continue tokens int [1, T] by n_new tokens: [1, T + n_new], greedy at temperature 0.

        For a look at a sample: one whole forward pass a token, no key/value cache, over the tokens and as many
        positions behind them, which none of them sees, as make the length a multiple of 128: on a GPU cuDNN makes a
        plan for each length that it meets, which takes longer than the pass. A collective under FSDP; every rank
        draws the same token, because each has the same logits and the same seed. Raises ValueError for other shapes
        and a negative temperature.
        """
        if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [1, T] with at least one token, got {tuple(tokens.shape)}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n_new):
            seen = tokens[:, -self.config.max_seq_len :]
            last = seen.shape[1] - 1
            length = min(-(-seen.shape[1] // 128) * 128, self.config.max_seq_len)
            logits_v = self(F.pad(seen, (0, length - seen.shape[1])))[0, last].float().cpu()
            if temperature == 0:
                new = logits_v.argmax()
            else:
                new = torch.multinomial((logits_v / temperature).softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, new.view(1, 1).to(tokens)], dim=1)
        return tokens


# What torch.compile, activation checkpointing and DistributedDataParallel put into the names of what they wrap
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "module")


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` with the names that they would have without wrappers."""
    for name, parameter in model.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), parameter


def unwrapped(model: nn.Module) -> Mistral:
    """The Mistral inside wrappers; TypeError if there is none."""
    inner = model
    while not isinstance(inner, Mistral):
        held = [getattr(inner, name) for name in WRAPPERS if isinstance(getattr(inner, name, None), nn.Module)]
        if not held:
            raise TypeError(f"model must be a Mistral, or one wrapped by torch.compile or the like, got {type(model)}")
        inner = held[0]
    return inner


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a parameter and the number of the first of them, for FSDP's sharding along dimension 0."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    # The one place that knows how torch places uneven shards; private, but what DCP itself calls, in 2.11 to 2.13.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local().data
    if tuple(local.shape) != tuple(shape) or any(offset[1:]):
        raise RuntimeError(f"{parameter.placements} shards more than dimension 0, which FSDP is not asked to do")
    return local, offset[0]


ROWS_A_BLOCK = 512  # rows of a weight drawn by one generator: enough to be fast, few enough to be cut by any sharding


def _fill_normal(local: Tensor, first_row: int, std: float, seed: int, name: str) -> None:
    """Draw rows first_row.. of the normal matrix that (seed, name) stand for, whatever the sharding.

    Each block of rows has a generator of its own, seeded by (seed, name, block), so a rank draws only blocks it owns a
    part of. Drawn on the CPU, blocks in parallel: the same bits on every device, 7 billion of them in seconds.
    """
    n_rows, n_columns = local.shape
    name_hash = zlib.crc32(name.encode())

    def draw(block: int) -> None:
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + name_hash) * 1_000_003 + block) % 2**63)
        values = torch.empty(ROWS_A_BLOCK, n_columns).normal_(0.0, std, generator=generator)
        start, end = block * ROWS_A_BLOCK, (block + 1) * ROWS_A_BLOCK
        low, high = max(start, first_row), min(end, first_row + n_rows)
        local[low - first_row : high - first_row].copy_(values[low - start : high - start])

    if n_rows:
        blocks = range(first_row // ROWS_A_BLOCK, (first_row + n_rows - 1) // ROWS_A_BLOCK + 1)
        with ThreadPoolExecutor() as pool:
            list(pool.map(draw, blocks))
