"""Stochastic rounding to bf16, and the sum of gradients that needs it.

    total <- bf16(total + x),   up with the probability of the remainder

Neighbours in bf16 lie 2^-8 to 2^-7 of a number apart. What is added again and again and is smaller than half of that,
as a micro batch's gradient to a sum or a step's change to a moment, would be lost each time if rounded to nearest. So
16 random bits are added below the last bit that is kept, and the sum is truncated: right on average. The bits are a
hash of the element's index with two keys made of the seed. There is no state, and equal inputs give equal bits. One
hash serves eight elements: a product of it is a word for each of them. AdamW rounds m by the upper bits of a word and v
by the lower ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import cdiv, check_no_gradient, check_same_device, check_tensor, launch, runs_kernel

LARGEST_BF16 = torch.finfo(torch.bfloat16).max
FACTOR, MULTIPLIER = 0x846CA68B, 0xC653279D
VERSION = 2  # of the bits that a seed gives, noted in checkpoints; 1 ended with commit f81400a


# ------------------------------------------------------------------------------------------------------------ reference
# int32 stands for uint32: sums and products wrap alike, and >> needs a mask.


def keys_of(seed: int) -> tuple[int, int]:
    """Two int32 from a seed: SplitMix64's finalizer (Steele et al. 2014), so that neighbouring seeds share nothing."""
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return _signed(z), _signed(z >> 32)


def _signed(x: int) -> int:
    return (x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def random_words_reference(index: Tensor, seed: int) -> Tensor:
    """A random word for each of the elements that index, int64, numbers: int32 of its shape.

    The hash lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/), with a key before its first product and
    another after its second, of index // 8: after 2^35 elements the words repeat. The second product makes eight words
    of it, by powers of a multiplier; the last step of the hash is left out. Two words of a hash are a lattice in the
    plane, and so are the lower 16 or 19 bits of two, and the upper ones of one with the lower ones of another. The
    multiplier was searched for: in all of these the shortest vector is at least 0.54 of the longest that there can be.
    So the upper bits are as good as independent. The lower 16 or 19 are as uniform, and the first 8 of them are too.
    """
    first, second = keys_of(seed)
    x = (index >> 3).int() ^ first
    x = (x ^ x >> 16 & 0xFFFF) * 0x7FEB352D
    x = x ^ x >> 15 & 0x1FFFF
    factors = [_signed(FACTOR * MULTIPLIER**k) for k in range(8)]
    return x * torch.tensor(factors, dtype=torch.int32, device=index.device)[index & 7] + second


def upper_bits(word: Tensor, bits: int) -> Tensor:
    """That many bits of a word, from its highest: 0 .. 2^bits - 1."""
    return word >> 32 - bits & (1 << bits) - 1


def lower_bits(word: Tensor, bits: int) -> Tensor:
    """That many bits of a word, to its lowest: 0 .. 2^bits - 1."""
    return word & (1 << bits) - 1


def to_bf16(x: Tensor, random: Tensor) -> Tensor:
    """fp32 that arithmetic has made, rounded to bf16: up with the probability of the remainder; random is 0 .. 65535.

    From bf16's largest on it truncates, so that finite stays finite, inf inf and NaN (quiet, out of arithmetic) NaN.
    """
    bits = x.view(torch.int32) + torch.where(x.abs() < LARGEST_BF16, random, 0)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


@torch.no_grad()
def add_rounded_reference_(total: Tensor, x: Tensor, *, seed: int) -> None:
    """The definition of ``add_rounded_``, in plain PyTorch."""
    random = random_words_reference(torch.arange(total.numel(), device=total.device), seed)
    total.copy_(to_bf16(total.float() + x.float(), upper_bits(random, 16).view(total.shape)))


# -------------------------------------------------------------------------------------------------------------- kernels

BLOCK, NUM_WARPS = 1024, 4  # eight elements a thread, 16 bytes of bf16
_LARGEST_BF16 = tl.constexpr(LARGEST_BF16)
_F, _M, _M2, _M4 = (tl.constexpr(x % 2**32) for x in (FACTOR, MULTIPLIER, MULTIPLIER**2, MULTIPLIER**4))


@triton.jit
def random_words(i_start, o_hash, first, second):
    """Words [..., 8] of the elements from i_start + 8 o_hash on, o_hash [..., 1].

    A thread that has all eight makes their hash once, and the powers of the multiplier are known when compiled.
    """
    b_x = (o_hash.to(tl.uint32) + (i_start >> 3).to(tl.uint32)) ^ first.to(tl.uint32, bitcast=True)
    b_x = (b_x ^ (b_x >> 16)) * 0x7FEB352D
    b_x = b_x ^ (b_x >> 15)
    o = tl.arange(0, 8)
    b_factor = _F * tl.where((o & 1) != 0, _M, 1).to(tl.uint32)
    b_factor *= tl.where((o & 2) != 0, _M2, 1).to(tl.uint32)
    b_factor *= tl.where((o & 4) != 0, _M4, 1).to(tl.uint32)
    return b_x * b_factor + second.to(tl.uint32, bitcast=True)


@triton.jit
def widened(b_x):
    """b_x in fp32. bf16 is the upper half of fp32: one shift or mask, where ptxas's conversion takes three for two."""
    if b_x.dtype == tl.bfloat16:
        return (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return b_x.to(tl.float32)


@triton.jit
def round_to_bf16(b_x, b_random):
    b_bits = b_x.to(tl.int32, bitcast=True) + tl.where(tl.abs(b_x) < _LARGEST_BF16, b_random, 0)
    return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["first_key", "second_key"])
def add_rounded_kernel(p_total, p_x, n, first_key, second_key, BLOCK: tl.constexpr):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    o_block = tl.arange(0, BLOCK)
    m = i_start + o_block < n
    b_random = random_words(i_start, tl.arange(0, BLOCK // 8)[:, None], first_key, second_key)
    b_random = tl.reshape(b_random, [BLOCK])
    b_sum = tl.load(p_total + i_start + o_block, mask=m, other=0.0).to(tl.float32)
    b_sum += tl.load(p_x + i_start + o_block, mask=m, other=0.0).to(tl.float32)
    tl.store(p_total + i_start + o_block, round_to_bf16(b_sum, (b_random >> 16).to(tl.int32)), mask=m)


@triton.jit
def add_wide_kernel(p_a, p_b, p_out, n, BLOCK: tl.constexpr):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    o_block = tl.arange(0, BLOCK)
    m = i_start + o_block < n
    b_sum = tl.load(p_a + i_start + o_block, mask=m, other=0.0).to(tl.float32)
    b_sum += tl.load(p_b + i_start + o_block, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + i_start + o_block, b_sum, mask=m)


# ----------------------------------------------------------------------------------------------------- public functions


def add_rounded_(total: Tensor, x: Tensor, *, seed: int) -> None:
    """``total += x`` in fp32, rounded stochastically to total's bf16: on average nothing is lost, however small x is.

    For gradients over micro batches. total bf16, x bf16 or fp32, contiguous and of one shape; seed as for ``adamw_``.
    6 bytes an element with a bf16 x. Raises TypeError for other dtypes, ValueError for shapes, strides or devices that
    do not fit, RuntimeError where a gradient is wanted.
    """
    check_tensor("total", total, (torch.bfloat16,))
    check_tensor("x", x, (torch.bfloat16, torch.float32), total.shape)
    check_same_device(total=total, x=x)
    check_no_gradient("torch.no_grad()", total=total, x=x)
    check_seed(seed)
    if total.numel() == 0:
        return
    if not runs_kernel(total):
        return add_rounded_reference_(total, x, seed=seed)
    torch.autograd.graph.increment_version(total)
    grid = (cdiv(total.numel(), BLOCK),)
    launch(add_rounded_kernel, grid, total, x, total.numel(), *keys_of(seed), BLOCK=BLOCK, num_warps=NUM_WARPS)


def add_wide(a: Tensor, b: Tensor) -> Tensor:
    """``a.float() + b.float()`` in one pass, which PyTorch has not: the fp32 sum of the gradients of two micro batches.

    a, b: bf16, contiguous and of one shape. 8 bytes an element. Raises as ``add_rounded_``.
    """
    check_tensor("a", a, (torch.bfloat16,))
    check_tensor("b", b, (torch.bfloat16,), a.shape)
    check_same_device(a=a, b=b)
    check_no_gradient("a.float() + b.float()", a=a, b=b)
    if not runs_kernel(a):
        return a.float() + b.float()
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    if a.numel():
        grid = (cdiv(a.numel(), BLOCK),)
        launch(add_wide_kernel, grid, a, b, out, a.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
