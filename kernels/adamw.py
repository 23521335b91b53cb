"""AdamW for weights that live once, in two halves, with moments in fp32, bf16 or 8 bits: one pass over memory.

    w <- w - lr wd w                                     Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    m <- m + (1 - b1) (g - m),   v <- b2 v + (1 - b2) g^2
    w <- w - (lr / c1) m / (sqrt(v) / c2 + eps),   c1 = 1 - b1^t,   c2 = sqrt(1 - b2^t)

**Weights.** A master weight is fp32, and the model computes with it rounded to bf16; kept apart, the two are 6 bytes.
But the fp32 weight *is* the bf16 weight and 16 bits more. ``split`` rounds it to the nearest bf16 and keeps its lower
16 bits, read as a signed number: the difference of the two bit patterns. The model's parameters are the high halves,
the optimizer's state the low ones, together 4 bytes, and ``join`` gives the fp32 weight back to the bit: nothing is
approximated. (Split SGD cuts the bits in two as well, but its model sees the truncated weight: Kalamkar et al. 2020,
https://arxiv.org/abs/2005.04680.)

**Stochastic rounding.** In a step v changes by at most a few times 1 - b2 of itself, 0.05 or 0.001, while neighbours in
bf16 lie 0.004 to 0.008 apart: rounded to nearest, v would hardly ever fall. So narrow moments are rounded up or down at
random, right on average (stochastic_rounding.py): of an element's random word the upper bits are for m, the lower ones
for v.

**Instructions.** With 8-bit moments a weight is 14 bytes, for which an H200 has time for 80 to 95 instructions, by its
clock: the kernel was as slow as its instructions, not its bytes. Now it takes 55, some of them roundabout. Weights are
put together two at a time, and codes are taken from words of four, and put into them, several at once by masks. A
group's power goes with the betas; v is kept over the factor of the square of m's new part, so that it is that square
and another one (``_root_unit``); a division is two products with 1 / sqrt, one instruction where div is eight; NaN is a
minimum of integers.

**8 bits.** A group of 256 consecutive elements of the flattened tensor shares an exponent, that of its largest element,
and an element is a small float beneath it: for m a sign, 4 bits of exponent and 3 of mantissa; for sqrt(v) 4 and 4. The
lowest exponent is that of evenly spaced numbers down to 0, as in IEEE formats, so rounding is unbiased to the bottom.
The root, because it is what divides, and has half of v's binades: 4 and 4 bits of it are as fine as 5 and 3 of v, and
reach further. Where the sizes of gradients in a group spread by factors of e^1.5 (a standard deviation), rounding adds
noise of 10 to 12% to the update; one bit less of exponent and one more of mantissa would halve that at e^0.5 and triple
it at e^1.5. (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861: blocks of 2048 scaled by their largest element, v
itself, the nearest of a table of 256 numbers.)

m and sqrt(v) are rounded apart, so m could outlive a sqrt(v) that became 0, and m / (0 + eps) would be thousands of
steps at once. Two guards: in a group that is not all 0 sqrt(v) is at least the smallest number of the group; and the
divisor is at least |m| times the least that sqrt(v) / |m| can be (``smallest_root``), which in exact arithmetic changes
nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import cdiv, check_same_device, check_tensor, launch, runs_kernel
from halny.kernels.stochastic_rounding import (
    LARGEST_BF16,
    check_seed,
    keys_of,
    lower_bits,
    random_words,
    random_words_reference,
    round_to_bf16,
    to_bf16,
    upper_bits,
    widened,
)

MOMENTS = ("fp32", "bf16", "8bit")
GROUP = 256  # elements that share one exponent in 8bit
CODE_TO_FP32, FP32_TO_CODE = 2.0**112, 2.0**-112  # the bias of fp32's exponents is 127, that of a code's 15

# Biased, of a group: 2^-95, beneath which the smallest number is 2^-113, no denormal of fp32; and what says that the
# largest is 2^127 or more, inf or NaN: all of such a group reads as NaN, so that it is noticed
LOWEST_EXPONENT, NAN_EXPONENT = 32, 255
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


# ----------------------------------------------------------------------------------------------------------- two halves


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.bfloat16()`` and what it lost: fp32 x -> (high bf16, low int16), bits of x == (bits of high << 16) + low.

    Exact for every finite x. high is rounded to nearest, ties away from zero (PyTorch's: to even); from 2^128 - 2^119
    on it is inf, as in any rounding to bf16, and join still gives x back. inf stays inf, a NaN becomes the quiet NaN.
    Raises TypeError if x is not fp32.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x must be an fp32 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    bits = x.detach().contiguous().view(torch.int32)
    bits = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)  # the lower 16 bits, read as a signed number


def join(high: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """The fp32 tensor that ``split`` took apart, to the bit; into ``out`` where that is given.

    Raises TypeError for other dtypes than bf16 and int16, ValueError for shapes or devices that differ.
    """
    _check_halves(high, low)
    x = ((high.detach().contiguous().view(torch.int16).int() << 16) + low).view(torch.float32)
    return x if out is None else out.copy_(x)


# -------------------------------------------------------------------------------------------------------------- moments


def new_moments(weight: Tensor, moments: str) -> dict[str, Tensor]:
    """Zeros for ``adamw_``: {"exp_avg", "exp_avg_sq"} of weight's shape, on its device.

    In 8bit they are uint8 codes, beside "exp_avg_exponents" and "exp_avg_sq_exponents", uint8 [ceil(numel / GROUP)].
    Raises ValueError for another ``moments`` than those of MOMENTS.
    """
    dtype = _dtype_of(moments)
    state = {name: torch.zeros(weight.shape, dtype=dtype, device=weight.device) for name in ("exp_avg", "exp_avg_sq")}
    if moments == "8bit":
        groups = cdiv(weight.numel(), GROUP)
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_exponents"] = torch.zeros(groups, dtype=dtype, device=weight.device)
    return state


def moment_bytes(n: int, moments: str) -> int:
    """Bytes of ``new_moments`` for n elements."""
    return 2 * n * _dtype_of(moments).itemsize + (2 * cdiv(n, GROUP) if moments == "8bit" else 0)


def _dtype_of(moments: str) -> torch.dtype:
    if moments not in MOMENTS:
        raise ValueError(f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[moments]


# ------------------------------------------------------------------------------------------------------------ reference
# int32 stands for uint32: sums and products wrap alike, and >> needs a mask.


def _encode(x: Tensor, unit: float, largest: Tensor, random: Tensor, mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """unit * x, fp32 [groups, GROUP], largest [groups] -> int32 codes, their sign in bit 11, and exponents [groups]."""
    dropped = 23 - mantissa_bits
    # one more where the largest would round up to the next power of two
    exponents = largest.view(torch.int32) + (1 << dropped) - 1 >> 23
    exponents = torch.where(exponents >= NAN_EXPONENT - 1, NAN_EXPONENT, exponents.clamp(min=LOWEST_EXPONENT))
    power = (254 - exponents << 23).view(torch.float32)[:, None] * unit
    # The second product brings the exponent to 15 .. 0 in fp32, where 0 is that of denormals, evenly spaced
    bits = (x * power * FP32_TO_CODE).view(torch.int32)
    return upper_bits(bits + random, 32 - dropped), exponents


def _parts(moments: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A moment, or sqrt(v) for 8bit's exp_avg_sq, as two fp32 factors [numel]: less than 2, and its group's power."""
    stored = moments[name].flatten()
    if stored.dtype != torch.uint8:
        return stored.float(), torch.ones((), device=stored.device)
    codes = stored.int()
    bits = codes << 19 if name == "exp_avg_sq" else (codes & 0x7F) << 20 | (codes & 0x80) << 24
    exponents = moments[f"{name}_exponents"].int().clamp(min=LOWEST_EXPONENT)
    power = torch.where(exponents == NAN_EXPONENT, float("nan"), (exponents << 23).view(torch.float32))
    return bits.view(torch.float32) * CODE_TO_FP32, power.repeat_interleave(GROUP)[: stored.numel()]


def _read(moments: dict[str, Tensor], name: str) -> Tensor:
    """A moment as fp32 [numel], or sqrt(v) for 8bit's exp_avg_sq."""
    x, power = _parts(moments, name)
    return x * power


def _in_8_bits(m: Tensor, root: Tensor, unit: float, random: Tensor) -> dict[str, Tensor]:
    """m and unit times root, fp32 [numel], as 8bit moments hold them."""
    n = m.numel()
    m, root, random = (torch.nn.functional.pad(x, (0, -n % GROUP)).view(-1, GROUP) for x in (m, root, random))
    largest_m = m.abs().nan_to_num(0.0, torch.inf).amax(1)  # where m is NaN, so is the root
    largest_root = root.abs().amax(1) * unit
    m_codes, m_exponents = _encode(m, 1.0, largest_m, upper_bits(random, 20), 3)
    m_codes = m_codes & 0x7F | m_codes >> 4 & 0x80
    v_codes, v_exponents = _encode(root, unit, largest_root, lower_bits(random, 19), 4)
    # Not 0 beside a number: m may be rounded up, and m / (0 + eps) would be a thousand steps at once
    v_codes = torch.maximum(v_codes, (largest_root != 0).int()[:, None])
    m_exponents = torch.where(largest_root.isnan(), NAN_EXPONENT, m_exponents)
    stored = {"exp_avg": m_codes.flatten()[:n], "exp_avg_sq": v_codes.flatten()[:n]}
    stored |= {"exp_avg_exponents": m_exponents, "exp_avg_sq_exponents": v_exponents}
    return {name: x.to(torch.uint8) for name, x in stored.items()}


@torch.no_grad()
def adamw_reference_(
    high: Tensor, low: Tensor, gradient: Tensor, moments: dict[str, Tensor], scalars: Tensor,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int,
) -> None:  # fmt: skip
    """The definition of ``adamw_``, in plain PyTorch, with the same random bits.

    In the interpreter the kernel gives the same to the bit. On a GPU, whose root and division are approximate and whose
    products and sums fuse, m, v and w are within a few ulp of fp32 before they are rounded and split; so of the stored
    bf16 and 8-bit numbers one in some ten thousand is its neighbour.
    """
    lr, c1, c2, gradient_scale, found_inf = scalars.unbind()
    dtype = moments["exp_avg"].dtype
    random = random_words_reference(torch.arange(high.numel(), device=high.device), seed)
    unit = _root_unit(beta1, beta2) if dtype == torch.uint8 else 1.0
    w, g = join(high, low).flatten(), gradient.float().flatten()
    (m, m_power), (v, v_power) = _parts(moments, "exp_avg"), _parts(moments, "exp_avg_sq")

    w = w - lr * weight_decay * w
    if dtype == torch.uint8:
        g = g * (gradient_scale * (1 - beta1))
        m = m * (beta1 * m_power) + g
        old_root = v * (beta2**0.5 / unit * v_power)
        v = g * g + old_root * old_root
    else:  # finer than beta1 in fp32, which is a few parts of 1 - beta1 in ten millions off
        g = g * gradient_scale
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
    root = v.double().sqrt().float()  # rounded to nearest, which PyTorch's fp32 root is not always on a CPU
    divisor = root
    if dtype == torch.uint8:
        divisor = torch.maximum(root, m.abs() * (smallest_root(beta1, beta2) / unit))
    # Quotients by the square of 1 / sqrt, which is an instruction of GPUs; never by 0, though eps be next to nothing
    inverse_step = _inverse_root(lr * c2)  # inf if lr is 0: not times a divisor that may be 0 too
    inverse_step = inverse_step * c1 * inverse_step
    least = (c2 * eps).clamp(min=SMALLEST_NORMAL) * inverse_step
    y = _inverse_root(divisor * (inverse_step * unit).clamp(max=LARGEST_BF16) + least)
    w = w - m * y * y

    new_high, new_low = split(w)
    new = {"high": new_high, "low": new_low}
    if dtype == torch.uint8:
        new |= _in_8_bits(m, root, unit, random)
    elif dtype == torch.bfloat16:
        new |= {"exp_avg": to_bf16(m, upper_bits(random, 16)), "exp_avg_sq": to_bf16(v, lower_bits(random, 16))}
    else:
        new |= {"exp_avg": m, "exp_avg_sq": v}
    skip = found_inf != 0
    for name, old in ({"high": high, "low": low} | moments).items():
        old.copy_(torch.where(skip, old, new[name].view(old.shape)))


def _inverse_root(x: Tensor) -> Tensor:
    return 1 / x.double().sqrt().float()


def _root_unit(beta1: float, beta2: float) -> float:
    """What sqrt(v) is counted in, so that v <- b2 v + ((1 - b1) g)^2."""
    return (1 - beta2) ** 0.5 / (1 - beta1)


def smallest_root(beta1: float, beta2: float) -> float:
    """The least that sqrt(v) / |m| can be, whatever the gradients; 0 if there is no such bound.

    By Cauchy and Schwarz |m| / sqrt(v) is at most (1 - b1) / sqrt(1 - b2) * sqrt(sum of (b1^2 / b2)^k).
    """
    return max(0.0, (1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5 / (1 - beta1) if beta2 else 0.0


# -------------------------------------------------------------------------------------------------------------- kernels
# A program takes BLOCK consecutive elements, as [BLOCK / GROUP, GROUP]. Each of 128 threads has 8 in a row, 16 bytes of
# bf16, and a group is one warp's: its largest is found among a thread's own, then the warp's. With fp32 moments each of
# 256 threads has 4, 16 bytes of those: with 8, values would pass through shared memory from the layout of one width to
# that of the other. With 8-bit moments and another limit on registers, or none, ptxas loads the weights only when m and
# v are computed, and a thread waits for memory twice.

BLOCK, NUM_WARPS, NUM_WARPS_FP32 = 1024, 4, 8
MOST_REGISTERS = {torch.float32: None, torch.bfloat16: None, torch.uint8: 56}
_GROUP, _CODE_TO_FP32, _FP32_TO_CODE = (tl.constexpr(x) for x in (GROUP, CODE_TO_FP32, FP32_TO_CODE))
_LOWEST_EXPONENT, _NAN_EXPONENT = tl.constexpr(LOWEST_EXPONENT), tl.constexpr(NAN_EXPONENT)
_LARGEST_BF16, _SMALLEST_NORMAL = tl.constexpr(LARGEST_BF16), tl.constexpr(SMALLEST_NORMAL)


@triton.jit
def _even_odd(b_x):
    """[rows, columns] -> two [rows, columns / 2]: neighbours are one thread's, so nothing moves."""
    return tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))


@triton.jit
def _interleaved(b_even, b_odd):
    return tl.reshape(tl.join(b_even, b_odd), [b_even.shape[0], b_even.shape[1] * 2])


@triton.jit
def _every_fourth(b_x):
    """The first, second, third and last of each four elements."""
    b_even, b_odd = _even_odd(b_x)
    b_0, b_2 = _even_odd(b_even)
    b_1, b_3 = _even_odd(b_odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def _fours(b_0, b_1, b_2, b_3):
    return _interleaved(_interleaved(b_0, b_2), _interleaved(b_1, b_3))


@triton.jit
def _joined(b_high, b_low):
    """``join``. Two weights at once are words as they were loaded, and take four instructions."""
    b_even, b_odd = _even_odd(b_high.to(tl.uint16, bitcast=True))
    b_high = (b_even.to(tl.uint32) | (b_odd.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
    b_even, b_odd = _even_odd(b_low.to(tl.uint16, bitcast=True))
    b_low = (b_even.to(tl.uint32) | (b_odd.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
    b_bits = _interleaved((b_high << 16) + ((b_low << 16) >> 16), (b_high & -0x10000) + (b_low >> 16))
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_codes(p, i_start, o_block, o_word, n, WHOLE: tl.constexpr):
    """As words of four codes each."""
    if WHOLE:
        return tl.load(p.to(tl.pointer_type(tl.uint32)) + i_start // 4 + o_word)
    b_codes = tl.load(p + i_start + o_block, mask=i_start + o_block < n, other=0).to(tl.uint32)
    b_0, b_1, b_2, b_3 = _every_fourth(b_codes)
    return b_0 | (b_1 << 8) | (b_2 << 16) | (b_3 << 24)


@triton.jit
def _store_codes(p, b_words, i_start, o_block, o_word, n, found_inf, WHOLE: tl.constexpr):
    if WHOLE:
        m = tl.zeros_like(o_word) + found_inf == 0.0
        tl.store(p.to(tl.pointer_type(tl.uint32)) + i_start // 4 + o_word, b_words, mask=m)
    else:
        m = (i_start + o_block < n) & (tl.zeros_like(o_block) + found_inf == 0.0)
        b_codes = _fours(b_words, b_words >> 8, b_words >> 16, b_words >> 24)
        tl.store(p + i_start + o_block, b_codes.to(tl.uint8), mask=m)


@triton.jit
def _power_of(b_exponents):
    b_exponents = b_exponents.to(tl.int32)
    b_power = (b_exponents << 23) | tl.where(b_exponents == _NAN_EXPONENT, 1, 0)
    return b_power.to(tl.float32, bitcast=True)


@triton.jit
def _decoded_m(b_words):
    """The codes' bits in their places of fp16, two in a word; of those of fp32 they would be one more product away."""
    b_even = ((b_words << 8) & 0x80008000) | ((b_words << 7) & 0x3F803F80)
    b_odd = (b_words & 0x80008000) | ((b_words >> 1) & 0x3F803F80)
    b_halves = _fours(b_even, b_odd, b_even >> 16, b_odd >> 16).to(tl.uint16)
    return b_halves.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _decoded_root(b_words):
    """The codes' bits in their places of fp32, times 2^112."""
    PLACES: tl.constexpr = 0xFF << 19
    b_bits = _fours(
        (b_words << 19) & PLACES, (b_words << 11) & PLACES, (b_words << 3) & PLACES, (b_words >> 5) & PLACES
    )
    return b_bits.to(tl.float32, bitcast=True) * _CODE_TO_FP32


@triton.jit
def _largest_bits(b_x):
    """[rows, 1]: of a thread's own, then of the warp, as integers: that is one instruction, and NaN is the largest."""
    b_bits = tl.max(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 8, 8]), 2).to(tl.uint32, bitcast=True)
    b_bits = (b_bits & 0x7FFFFFFF).to(tl.int32, bitcast=True)  # a CPU's NaN may have a sign
    return tl.max(b_bits, 1, keep_dims=True).to(tl.uint32, bitcast=True)


@triton.jit
def _scaled(b_x, unit, b_largest, MANTISSA_BITS: tl.constexpr):
    """The bits that a code is the upper ones of, and exponents [rows, 1]."""
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    b_exponents = ((b_largest + ((1 << DROPPED) - 1)) >> 23).to(tl.int32)
    b_exponents = tl.where(b_exponents >= _NAN_EXPONENT - 1, _NAN_EXPONENT, tl.maximum(b_exponents, _LOWEST_EXPONENT))
    b_power = ((254 - b_exponents) << 23).to(tl.float32, bitcast=True) * unit
    return (b_x * b_power * _FP32_TO_CODE).to(tl.uint32, bitcast=True), b_exponents


@triton.jit
def _encoded_m(b_bits):
    """Words of four codes: of each the sign, bit 31, and bits 26 to 20."""
    b_0, b_1, b_2, b_3 = _every_fourth(b_bits)
    b_even, b_odd = (b_0 >> 16) | (b_2 & 0xFFFF0000), (b_1 >> 16) | (b_3 & 0xFFFF0000)
    b_even = (b_even & 0x80008000) | ((b_even << 4) & 0x7FFF7FFF)
    b_odd = (b_odd & 0x80008000) | ((b_odd << 4) & 0x7FFF7FFF)
    return ((b_even >> 8) & 0x00FF00FF) | (b_odd & 0xFF00FF00)


@triton.jit
def _encoded_root(b_bits):
    """Words of four codes: of each bits 26 to 19."""
    b_0, b_1, b_2, b_3 = _every_fourth(b_bits)
    return ((b_0 >> 19) & 0xFF) | ((b_1 >> 11) & 0xFF00) | ((b_2 >> 3) & 0xFF0000) | ((b_3 << 5) & 0xFF000000)


@triton.jit(do_not_specialize=["first_key", "second_key"])
def adamw_kernel(
    p_high, p_low, p_gradient, p_m, p_v, p_m_exponents, p_v_exponents, p_scalars,
    n, first_key, second_key,
    beta1, one_minus_beta1, beta2, one_minus_beta2, unit, root_factor, eps, weight_decay, smallest_root,
    EIGHT_BITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """unit is that of sqrt(v), of which root_factor and smallest_root are multiples."""
    lr = tl.load(p_scalars)
    c1 = tl.load(p_scalars + 1)
    c2 = tl.load(p_scalars + 2)
    gradient_scale = tl.load(p_scalars + 3)
    found_inf = tl.load(p_scalars + 4)

    ROWS: tl.constexpr = BLOCK // _GROUP
    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    o_row = tl.arange(0, ROWS)[:, None]
    o_block = o_row * _GROUP + tl.arange(0, _GROUP)[None, :]
    m = tl.full(o_block.shape, True, tl.int1) if WHOLE else i_start + o_block < n
    b_high = tl.load(p_high + i_start + o_block, mask=m, other=0.0)
    b_low = tl.load(p_low + i_start + o_block, mask=m, other=0)
    b_gradient = tl.load(p_gradient + i_start + o_block, mask=m, other=0.0)
    if EIGHT_BITS:
        o_word = o_row * (_GROUP // 4) + tl.arange(0, _GROUP // 4)[None, :]
        b_old_m = _load_codes(p_m, i_start, o_block, o_word, n, WHOLE)
        b_old_v = _load_codes(p_v, i_start, o_block, o_word, n, WHOLE)
        i_group = i_start // _GROUP + o_row
        m_group = tl.full(o_row.shape, True, tl.int1) if WHOLE else i_group * _GROUP < n
        b_old_m_exponents = tl.load(p_m_exponents + i_group, mask=m_group, other=0)
        b_old_v_exponents = tl.load(p_v_exponents + i_group, mask=m_group, other=0)
    else:
        b_old_m = tl.load(p_m + i_start + o_block, mask=m, other=0)
        b_old_v = tl.load(p_v + i_start + o_block, mask=m, other=0)

    # A mask and no branch, so that all loads are under way at once. Added to zeros, because a scalar condition is no
    # mask in the interpreter (triton 3.9: "ufunc 'bitwise_and' not supported")
    m_store = m & (tl.zeros_like(o_block) + found_inf == 0.0)
    b_w = _joined(b_high, b_low)
    b_g = widened(b_gradient)
    if EIGHT_BITS:
        b_g = b_g * (gradient_scale * one_minus_beta1)
        b_m = _decoded_m(b_old_m) * (beta1 * _power_of(b_old_m_exponents)) + b_g
        b_old_root = _decoded_root(b_old_v) * (root_factor * _power_of(b_old_v_exponents))
        b_v = b_g * b_g + b_old_root * b_old_root
    else:
        b_m, b_v, b_g = b_old_m.to(tl.float32), b_old_v.to(tl.float32), b_g * gradient_scale
        b_m = b_m + one_minus_beta1 * (b_g - b_m)
        b_v = beta2 * b_v + one_minus_beta2 * b_g * b_g
    b_root = tl.sqrt(b_v)
    b_divisor = b_root
    if EIGHT_BITS:
        b_divisor = tl.maximum(b_root, tl.abs(b_m) * smallest_root, propagate_nan=tl.PropagateNan.ALL)
    inverse_step = tl.rsqrt(lr * c2)  # inf if lr is 0: not times a divisor that may be 0 too
    inverse_step = inverse_step * c1 * inverse_step
    least = tl.maximum(c2 * eps, _SMALLEST_NORMAL) * inverse_step
    b_y = tl.rsqrt(b_divisor * tl.minimum(inverse_step * unit, _LARGEST_BF16) + least)
    b_w = b_w - lr * weight_decay * b_w
    b_w = b_w - b_m * b_y * b_y

    # A GPU's NaN is 0x7FFFFFFF, which rounds to -0
    b_bits = tl.minimum(b_w.to(tl.int32, bitcast=True), 0x7FC00000)
    b_new_high = (b_bits + 0x8000) >> 16
    tl.store(p_high + i_start + o_block, b_new_high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=m_store)
    tl.store(p_low + i_start + o_block, b_bits.to(tl.int16), mask=m_store)
    o_hash = o_row * (_GROUP // 8) + tl.arange(0, _GROUP // 8)[None, :]
    b_random = tl.reshape(random_words(i_start, o_hash[:, :, None], first_key, second_key), [ROWS, _GROUP])
    if EIGHT_BITS:
        b_largest_root = _largest_bits(b_root.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True) * unit
        b_largest_root = b_largest_root.to(tl.uint32, bitcast=True)
        b_bits, b_v_exponents = _scaled(b_root, unit, b_largest_root, 4)
        # Not 0 beside a number: m may be rounded up, and m / (0 + eps) would be a thousand steps at once
        b_least_bits = tl.where(b_largest_root == 0, 0, 1 << 19).to(tl.uint32)
        b_words = _encoded_root(tl.maximum(b_bits + (b_random & 0x7FFFF), b_least_bits))
        _store_codes(p_v, b_words, i_start, o_block, o_word, n, found_inf, WHOLE)
        # Among floats, whose sign is dropped at no cost; that may pass over a NaN, but there the root is NaN too
        b_bits, b_m_exponents = _scaled(b_m, 1.0, _largest_bits(tl.abs(b_m)), 3)
        b_words = _encoded_m(b_bits + (b_random >> 12))
        _store_codes(p_m, b_words, i_start, o_block, o_word, n, found_inf, WHOLE)
        b_m_exponents = tl.where(b_largest_root > 0x7F800000, _NAN_EXPONENT, b_m_exponents)
        # A warp's exponent is stored by the thread whose place in the warp is the group's in the program: along a row
        # addresses follow each other, which makes Triton leave the warp its row. Else it goes by shared memory
        o_lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [ROWS, 32])
        m_lane = (o_lane == o_row) & m_group & (tl.zeros_like(o_lane) + found_inf == 0.0)
        i_lane = i_start // _GROUP + o_lane
        tl.store(p_v_exponents + i_lane, tl.broadcast_to(b_v_exponents, [ROWS, 32]).to(tl.uint8), mask=m_lane)
        tl.store(p_m_exponents + i_lane, tl.broadcast_to(b_m_exponents, [ROWS, 32]).to(tl.uint8), mask=m_lane)
    elif p_m.dtype.element_ty == tl.float32:
        tl.store(p_m + i_start + o_block, b_m, mask=m_store)
        tl.store(p_v + i_start + o_block, b_v, mask=m_store)
    else:
        tl.store(p_m + i_start + o_block, round_to_bf16(b_m, (b_random >> 16).to(tl.int32)), mask=m_store)
        tl.store(p_v + i_start + o_block, round_to_bf16(b_v, (b_random & 0xFFFF).to(tl.int32)), mask=m_store)


# ----------------------------------------------------------------------------------------------------- public functions


def adamw_(
    high: Tensor, low: Tensor, gradient: Tensor, moments: dict[str, Tensor], scalars: Tensor,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int,
) -> None:  # fmt: skip
    """One step of ``torch.optim.AdamW`` for one tensor, whose fp32 weights are ``join(high, low)``, in place.

    high bf16, low int16, gradient bf16 or fp32, all contiguous and of one shape; moments as ``new_moments`` makes them.
    scalars: fp32 [5] on their device, so that nothing is read back and nothing waits: lr, 1 - beta1^t,
    sqrt(1 - beta2^t), what the gradient is multiplied by (the clip), and found_inf: unless that is 0, nothing at all is
    changed. Arithmetic is fp32; with fp32 moments a step is that of AdamW(fused=True) but for last bits. bf16 and 8bit
    moments are rounded stochastically: seed (any integer) and an element's index decide how, and equal inputs give
    equal bits; take another seed for every tensor and step. Bytes a weight with a bf16 gradient: 26 with fp32 moments,
    18 with bf16, 14 + 4/256 with 8bit. No autograd: it does not record the change, but counts it, so that a graph that
    has saved high refuses to go on with it.

    Raises TypeError for other dtypes or a moments that is none, ValueError for shapes, strides, devices or numbers that
    do not fit.
    """
    _check(high, low, gradient, moments, scalars, beta1, beta2, eps, weight_decay, seed)
    if high.numel() == 0:
        return
    settings = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, seed=seed)
    if not runs_kernel(high):
        return adamw_reference_(high, low, gradient, moments, scalars, **settings)
    torch.autograd.graph.increment_version(high)
    m, v = moments["exp_avg"], moments["exp_avg_sq"]
    eight_bits = m.dtype == torch.uint8
    unit = _root_unit(beta1, beta2) if eight_bits else 1.0
    # Four codes are a word, and no program has elements that are not there
    whole = eight_bits and high.numel() % BLOCK == 0 and m.data_ptr() % 4 == 0 and v.data_ptr() % 4 == 0
    launch(
        adamw_kernel, (cdiv(high.numel(), BLOCK),),
        high, low, gradient, m, v, moments.get("exp_avg_exponents", m), moments.get("exp_avg_sq_exponents", v), scalars,
        high.numel(), *keys_of(seed),
        beta1, 1 - beta1, beta2, 1 - beta2, unit, beta2**0.5 / unit,
        eps, weight_decay, smallest_root(beta1, beta2) / unit,
        EIGHT_BITS=eight_bits, WHOLE=whole, BLOCK=BLOCK,
        num_warps=NUM_WARPS_FP32 if m.dtype == torch.float32 else NUM_WARPS,
        maxnreg=MOST_REGISTERS[m.dtype],
    )  # fmt: skip


def _check_halves(high: Tensor, low: Tensor) -> None:
    for name, x, dtype in (("high", high, torch.bfloat16), ("low", low, torch.int16)):
        if not isinstance(x, Tensor) or x.dtype != dtype:
            raise TypeError(f"{name} must be a tensor of {dtype}, got {getattr(x, 'dtype', type(x).__name__)}")
    if high.shape != low.shape:
        raise ValueError(f"low must have high's shape {tuple(high.shape)}, got {tuple(low.shape)}")
    check_same_device(high=high, low=low)


def _check(high, low, gradient, moments, scalars, beta1, beta2, eps, weight_decay, seed) -> None:
    check_tensor("high", high, (torch.bfloat16,))
    check_tensor("low", low, (torch.int16,), high.shape)
    check_tensor("gradient", gradient, (torch.bfloat16, torch.float32), high.shape)
    check_tensor("scalars", scalars, (torch.float32,), torch.Size([5]))
    if not isinstance(moments, dict) or not {"exp_avg", "exp_avg_sq"} <= moments.keys():
        raise TypeError("moments must be a dict with exp_avg and exp_avg_sq, as new_moments makes it")
    dtype = moments["exp_avg"].dtype
    for name in ("exp_avg", "exp_avg_sq"):
        check_tensor(f"moments[{name!r}]", moments[name], (torch.float32, torch.bfloat16, torch.uint8), high.shape)
        if moments[name].dtype != dtype:
            raise TypeError(f"moments must all have one dtype, got {dtype} and {moments[name].dtype}")
    if dtype == torch.uint8:
        for name in ("exp_avg_exponents", "exp_avg_sq_exponents"):
            shape = torch.Size([cdiv(high.numel(), GROUP)])
            check_tensor(f"moments[{name!r}]", moments.get(name), (torch.uint8,), shape)
    check_same_device(high=high, low=low, gradient=gradient, scalars=scalars, **moments)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), got {beta!r}")
    if not eps > 0:  # 0 / (0 + 0) where a gradient has always been 0
        raise ValueError(f"eps must be above 0, got {eps!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}")
    check_seed(seed)
