"""AdamW on weights in two halves: exact halves, AdamW's arithmetic, honest rounding, nothing else touched.

The whole file runs the reference here and the kernels under TRITON_INTERPRET=1, in a process of its own that the last
test starts; on a GPU it runs the kernels too, and the full sizes.
"""

import json
import math

import pytest
import torch
from helpers import assert_close_to_truth, assert_passes_in_the_interpreter
from torch import Tensor

from bench import aot, convergence
from halny.kernels import adamw, dispatch, stochastic_rounding
from halny.kernels.adamw import GROUP, MOMENTS, adamw_, join, moment_bytes, new_moments, split
from halny.kernels.stochastic_rounding import (
    add_rounded_,
    add_wide,
    keys_of,
    random_words_reference,
    to_bf16,
    upper_bits,
)

SETTINGS = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
DTYPES = [torch.bfloat16, torch.float32]  # of gradients
each_format = pytest.mark.parametrize("moments", MOMENTS)
needs_kernels = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1: test_in_the_interpreter")
without_interpreter = pytest.mark.skipif(dispatch.INTERPRETED, reason="says nothing about kernels, and takes its time")


def scalars_of(step: int, lr=1e-2, beta1=0.9, beta2=0.95, gradient_scale=1.0, found_inf=0.0, **_) -> Tensor:
    return torch.tensor([lr, 1 - beta1**step, math.sqrt(1 - beta2**step), gradient_scale, found_inf])


def fp32_of(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def stored(gradient: Tensor, moments: str, seed: int = 0) -> dict[str, Tensor]:
    """What a step keeps of m = gradient and of v = gradient^2: with both betas 0 the moments are those themselves."""
    high, low = split(torch.zeros(gradient.shape))
    state = new_moments(high, moments)
    settings = SETTINGS | dict(beta1=0.0, beta2=0.0)
    adamw_(high, low, gradient, state, scalars_of(1, beta1=0.0, beta2=0.0), **settings, seed=seed)
    return state


def read(state: dict[str, Tensor], name: str) -> Tensor:
    return adamw._read(state, name)


# ---------------------------------------------------------------------------------------------------------- two halves


def test_halves_are_exact():
    """All upper halves with telling lower ones, and a million bit patterns at random."""
    lows = torch.tensor([0, 1, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    every = ((torch.arange(2**16)[:, None] << 16) + lows).flatten()
    bits = torch.cat([every, torch.randint(2**32, (2**20,))]).to(torch.int32)
    x = bits.view(torch.float32)
    high, low = split(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    back = join(high, low)
    nan = x.isnan()
    assert torch.equal(back[~nan].view(torch.int32), bits[~nan])
    assert back[nan].isnan().all() and high[nan].isnan().all() and nan.sum() > 1000

    infinite = x.isinf()
    assert torch.equal(high[infinite].float(), x[infinite]) and not low[infinite].any()
    # rounded to nearest: PyTorch's, but for ties, which go away from zero instead of to even
    tie = bits & 0xFFFF == 0x8000
    assert torch.equal(high[~tie & ~nan], x[~tie & ~nan].bfloat16())
    tie &= ~nan & ~infinite
    assert tie.sum() > 60000 and (high[tie].float().abs() > x[tie].abs()).all()


def test_halves_of_the_extremes():
    x = fp32_of(0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000)
    high, low = split(x)
    assert torch.equal(join(high, low).view(torch.int32), x.view(torch.int32))
    assert high[6:].isinf().all()  # the largest numbers of fp32 round to inf in bf16
    out = torch.empty(10)
    assert join(high, low, out=out) is out and torch.equal(out.view(torch.int32), x.view(torch.int32))


# -------------------------------------------------------------------------------------------------- AdamW's arithmetic


def run_torch(weight: Tensor, gradients: list[Tensor], dtype: torch.dtype, lr: float) -> list[Tensor]:
    p = torch.nn.Parameter(weight.to(dtype, copy=True))  # the optimizer works in place
    settings = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, lr=lr)
    optimizer = torch.optim.AdamW([p], fused=True, **settings)
    for g in gradients:
        p.grad = g.to(dtype)
        optimizer.step()
    return [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]


@pytest.mark.parametrize("n", [255, 257, 4096])  # of fewer, PyTorch's error may be next to nothing by chance
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_moments_follow_torch(n, dtype):
    """Over 50 steps the error against fp64 is at most twice that of torch.optim.AdamW(fused=True) in fp32."""
    weight = torch.randn(n)
    sizes = torch.exp(2 * torch.randn(n))
    gradients = [(torch.randn(n) * sizes).to(dtype) for _ in range(50)]
    (high, low), state = split(weight), new_moments(weight, "fp32")
    for step, g in enumerate(gradients, start=1):
        adamw_(high, low, g, state, scalars_of(step), **SETTINGS, seed=step)
    ours = [join(high, low), state["exp_avg"], state["exp_avg_sq"]]
    same, truth = (run_torch(weight, gradients, d, 1e-2) for d in (torch.float32, torch.float64))
    for name, *three in zip(("weight", "exp_avg", "exp_avg_sq"), ours, same, truth, strict=True):
        assert_close_to_truth(*three, name=name)
    assert (truth[0] - weight).abs().median() > 0.01  # they moved
    assert (same[0] - truth[0]).abs().max() < 1e-5  # so the bound is one of fp32


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_coarse_moments_stay_near_fp32(moments):
    """One weight differs by its rounding noise; their mean, over which noise cancels, by next to nothing."""
    n = 8192 if not dispatch.INTERPRETED else 2048
    weight = torch.zeros(n)
    drift = torch.where(torch.arange(n) % 2 == 0, 1.0, 0.2)
    results = {}
    for name in ("fp32", moments):
        torch.manual_seed(1)
        (high, low), state = split(weight), new_moments(weight, name)
        for step in range(1, 41):
            g = (drift + 0.5 * torch.randn(n)).bfloat16()
            adamw_(high, low, g, state, scalars_of(step), **SETTINGS, seed=step)
        results[name] = join(high, low)
    moved = results["fp32"].abs().mean()
    mean_error = (results[moments].mean() - results["fp32"].mean()).abs() / moved
    rms_error = (results[moments] - results["fp32"]).square().mean().sqrt() / moved
    most = {"bf16": (1e-3, 0.01), "8bit": (5e-3, 0.1)}[moments]
    assert mean_error <= most[0] and rms_error <= most[1], (mean_error, rms_error)


@each_format
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_found_inf_changes_nothing(moments, value):
    (high, low), state = split(torch.randn(300)), new_moments(torch.empty(300), moments)
    adamw_(high, low, torch.randn(300), state, scalars_of(1), **SETTINGS, seed=1)
    tensors = {"high": high, "low": low} | state
    before = {name: x.clone() for name, x in tensors.items()}
    adamw_(high, low, torch.full((300,), value), state, scalars_of(2, found_inf=1.0), **SETTINGS, seed=2)
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())
    adamw_(high, low, torch.full((300,), 0.5), state, scalars_of(2), **SETTINGS, seed=2)
    assert not torch.equal(low, before["low"]) and not torch.equal(state["exp_avg"], before["exp_avg"])


@each_format
def test_the_gradient_is_scaled(moments):
    gradient, results = torch.randn(300), []
    for scale, factor in ((0.25, 1.0), (1.0, 0.25)):
        (high, low), state = split(torch.ones(300)), new_moments(torch.empty(300), moments)
        adamw_(high, low, gradient * factor, state, scalars_of(1, gradient_scale=scale), **SETTINGS, seed=1)
        results.append([high, low, *state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_format
def test_a_gradient_that_is_not_finite_shows(moments):
    """Without found_inf it goes where it would in torch.optim.AdamW, and is never taken for a number."""
    for value in (float("nan"), float("inf")):
        (high, low), state = split(torch.ones(600)), new_moments(torch.empty(600), moments)
        gradient = torch.ones(600)
        gradient[300] = value
        for step in (1, 2):
            adamw_(high, low, gradient, state, scalars_of(step), **SETTINGS, seed=step)
        w = join(high, low)
        assert w[300].isnan() and high[300].isnan() and not read(state, "exp_avg")[300].isfinite()
        assert w[:256].isfinite().all() and w[512:].isfinite().all()  # other groups know nothing of it


def test_nan_of_any_kind_stays_one():
    """Weights whose lower half would carry into the sign, as a GPU's own NaN has it; a second moment that is lost."""
    for moments in MOMENTS:
        high = torch.full((300,), -(2**15), dtype=torch.int16).view(torch.bfloat16)
        low = torch.full((300,), -1, dtype=torch.int16)
        assert join(high, low).isnan().all() and not high.isnan().any()
        adamw_(high, low, torch.ones(300), new_moments(high, moments), scalars_of(1), **SETTINGS, seed=0)
        assert high.isnan().all()
    (high, low), state = split(torch.ones(300)), new_moments(torch.empty(300), "8bit")
    state["exp_avg_sq_exponents"][0] = adamw.NAN_EXPONENT
    adamw_(high, low, torch.ones(300), state, scalars_of(1), **SETTINGS, seed=0)
    assert high[:256].isnan().all() and high[256:].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- rounding


@without_interpreter
def test_random_bits():
    """Uniform, and neither neighbouring elements, m and v, halves nor seeds know of each other: all within 5 sigma.

    Of the 20 bits that are used for m and the 19 for v, of whose lower ones neighbours do know: 8 of them are compared.
    Eight elements share a hash, so that their eighth is what is independent by design.
    """
    n = 2**20
    index = torch.arange(n)
    words = [random_words_reference(index + start, seed) for start, seed in ((0, 7), (0, 8), (2**34, 7))]
    (m, v), *others = ((word, word << 13) for word in words)  # the used bits of both are the upper ones now
    sigma = 0.5 / (n / 8) ** 0.5

    def farthest(word: Tensor, bits: int) -> float:
        """From a half: the share of ones at each of the upper bits."""
        return max(abs(((word >> bit) & 1).sum().item() / n - 0.5) for bit in range(32 - bits, 32))

    for word, used, compared in ((m, 20, 20), (v, 19, 8)):
        assert farthest(word, used) < 5 * sigma
        neighbours = [x.roll(places) for x in (m, v) for places in (*range(1, 9), 256)]
        halves = (word >> 10 & 0x3FF000) | (word << 10)  # the upper 20 bits, turned by 10
        for other in (*(x for pair in others for x in pair), *neighbours, v if word is m else m, halves):
            assert farthest(word ^ other, compared) < 5 * sigma
    assert len({keys_of(seed) for seed in (-1, 0, 1, 2**31, 2**63, 2**64 - 2)}) == 6


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.9])
def test_rounding_to_bf16_is_unbiased(fraction):
    """The mean of many is within 5 sigma of the value: a thirtieth of what truncation would make of it, or less."""
    n = 2**18 if not dispatch.INTERPRETED else 2**15
    ulp = 2.0**-7
    x = torch.full((n,), -(1 + fraction * ulp))
    total = torch.zeros(n, dtype=torch.bfloat16)
    add_rounded_(total, x, seed=3)
    assert set(total.tolist()) == {-1.0, -1.0 - ulp}
    sigma = ulp * (fraction * (1 - fraction) / n) ** 0.5
    assert (total.double().mean() + 1 + fraction * ulp).abs() < 5 * sigma

    # another seed rounds independently: equal as often as chance has it
    other = torch.zeros(n, dtype=torch.bfloat16)
    add_rounded_(other, x, seed=4)
    chance = fraction**2 + (1 - fraction) ** 2
    assert abs((total == other).double().mean() - chance) < 5 * (chance * (1 - chance) / n) ** 0.5


def test_rounding_keeps_what_bf16_holds():
    x = torch.tensor([0.0, -0.0, 1.0, -3.0, 2.0**-133, float("inf"), -float("inf")])
    total = torch.zeros(7, dtype=torch.bfloat16)
    total[1] = -0.0
    for seed in range(20):
        again = total.clone()
        add_rounded_(again, x, seed=seed)
        assert torch.equal(again.float(), x) and torch.equal(again.signbit(), x.signbit())


def test_rounding_never_makes_an_inf():
    largest = torch.finfo(torch.bfloat16).max
    total = torch.full((4096,), largest, dtype=torch.bfloat16)
    add_rounded_(total, torch.full((4096,), 1e36), seed=0)  # the sum is nearer to 2^128 than to the largest of bf16
    assert (total == largest).all()
    add_rounded_(total, total.clone(), seed=0)
    assert total.isinf().all()  # the sum itself is
    add_rounded_(total, -total.clone(), seed=0)
    assert total.isnan().all()


def test_many_small_gradients_add_up():
    n = 1024
    x = torch.full((n,), 2.0**-12)  # a sixteenth of what bf16 can tell apart at 1
    total, plain = torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    steps = 1000 if not dispatch.INTERPRETED else 200
    for seed in range(steps):
        add_rounded_(total, x if seed % 2 else x.bfloat16(), seed=seed)
        plain += x
    assert (plain == 1).all()
    # each rounding has a variance below ulp * |x|, so the mean of n sums one below steps * ulp * |x| / n
    sigma = (steps * 2.0**-7 * 2.0**-12 / n) ** 0.5
    assert abs(total.double().mean() - 1 - steps * 2.0**-12) < 5 * sigma


# -------------------------------------------------------------------------------------------------------------- formats


@each_format
def test_bytes_are_those_of_the_tensors(moments):
    for shape in ((1,), (255,), (256,), (257,), (3, 1000)):
        state = new_moments(torch.empty(shape, dtype=torch.bfloat16), moments)
        assert all(not x.any() for x in state.values())
        assert state["exp_avg"].shape == shape and state["exp_avg_sq"].shape == shape
        assert moment_bytes(math.prod(shape), moments) == sum(x.numel() * x.element_size() for x in state.values())
    assert {m: moment_bytes(2560, m) for m in MOMENTS} == {"fp32": 20480, "bf16": 10240, "8bit": 5140}


@pytest.mark.parametrize("exponent", [-94, -40, 0, 1, 60, 100])
@pytest.mark.parametrize("name, exponent_bits, mantissa_bits", [("exp_avg", 4, 3), ("exp_avg_sq", 4, 4)])
def test_eight_bits_hold_every_small_float(name, exponent_bits, mantissa_bits, exponent):
    """Each of them survives rounding, whatever the random bits; written down here from the definition."""
    e, f = torch.meshgrid(torch.arange(2**exponent_bits), torch.arange(2**mantissa_bits), indexing="ij")
    fraction = f / 2**mantissa_bits
    x = torch.where(e == 0, fraction * 2.0**-14, (1 + fraction) * 2.0 ** (e - 15)).double()
    x = torch.cat([x.flatten(), -x.flatten()])[-GROUP:] if name == "exp_avg" else x.flatten()
    assert len(x.unique()) == (255 if name == "exp_avg" else 256)
    x = (x * 2.0**exponent).float()
    expected = x
    if name == "exp_avg_sq":
        if abs(exponent) > 40:
            return  # the square of a gradient leaves fp32
        assert x[0] == 0
        expected = x.clone()
        expected[0] = x[1]  # the floor
    for seed in range(3):
        assert torch.equal(read(stored(x, "8bit", seed), name), expected)


def test_a_root_beside_a_number_is_not_zero():
    """It is the smallest number of its group, whatever the seed; a group of zeros stays one."""
    g = torch.zeros(3 * GROUP)
    g[GROUP + 5] = -1.0
    for seed in range(3):
        root = read(stored(g, "8bit", seed), "exp_avg_sq").view(3, GROUP)
        assert not root[0].any() and not root[2].any() and root[1, 5] == 1
        assert (root[1, :5] == 2.0**-18).all() and (root[1, 6:] == 2.0**-18).all()


@pytest.mark.parametrize("moments, relative", [("fp32", (0, 0)), ("bf16", (2**-7, 2**-7)), ("8bit", (2**-3, 2**-4))])
def test_relative_error_of_a_moment(moments, relative):
    """A moment is never farther off than a step of its format; 8bit's, down to 2^-14 of the group's largest."""
    n = 40 * GROUP + 77
    g = torch.randn(n) * torch.exp(2 * torch.randn(n))
    state = stored(g, moments)
    m, v = read(state, "exp_avg"), read(state, "exp_avg_sq")
    squares = g.abs() if moments == "8bit" else g * g  # what v is kept as
    groups = torch.nn.functional.pad(g.abs(), (0, -n % GROUP)).view(-1, GROUP).amax(1)
    largest = groups.repeat_interleave(GROUP)[:n]
    for x, truth, most in ((m, g, relative[0]), (v, squares, relative[1])):
        # beneath 2^-14 of the power of two above the largest, numbers are evenly spaced
        spacing = most * torch.maximum(truth.abs(), largest * 2.0**-13) if moments == "8bit" else most * truth.abs()
        error = (x - truth).abs()
        assert (error <= spacing + 1e-6 * truth.abs()).all()
        assert moments == "fp32" or (error > 0.5 * spacing).any()  # stochastic, so farther than nearest would be


def test_eight_bits_are_unbiased():
    """An element of any size below its group's largest is right on average, m down to nothing."""
    for size in (0.9, 0.0123, 2.0**-13.3, 2.0**-18.7, 2.0**-25):
        rows = 2048 if not dispatch.INTERPRETED else 128
        g = torch.full((rows, GROUP), size)
        g[:, 7] = 1.5
        n = rows * (GROUP - 1)
        state = stored(g, "8bit")
        for name, bits in (("exp_avg", 3), ("exp_avg_sq", 4)):
            got = read(state, name).view(g.shape)
            assert (got[:, 7] == 1.5).all()
            got = torch.cat([got[:, :7], got[:, 8:]], 1)
            step = 2.0 ** (max(math.floor(math.log2(size)), -14) - bits)
            if name == "exp_avg_sq" and size < step:
                assert (got == step).all()  # the floor
                continue
            share = size / step % 1
            sigma = step * (share * (1 - share) / n) ** 0.5
            assert abs(got.double().mean() - size) < 5 * sigma + 1e-6 * size
            assert not (got == got[0, 0]).all() or share < 1e-3


def test_neighbours_are_rounded_independently():
    """Of eight elements that share a hash and the next eight, m and v: any two go up together as often as by chance."""
    rows = 512 if not dispatch.INTERPRETED else 64
    g = torch.full((rows, GROUP), 1 + 0.3 * 2.0**-4)  # 0.15 of a step for m, 0.3 for sqrt(v)
    state = stored(g, "8bit", seed=11)
    up = torch.stack([read(state, name).view(-1, 16) > g[0, 0] for name in ("exp_avg", "exp_avg_sq")], 1).flatten(1)
    up = up.double()  # [rows * GROUP / 16, m and v of sixteen neighbours]
    share = torch.tensor([0.15] * 16 + [0.3] * 16).double()
    deviation = (share * (1 - share)).sqrt()
    scaled = (up - share) / deviation
    assert (scaled.mean(0).abs() < 5 / len(up) ** 0.5).all()
    correlation = scaled.T @ scaled / len(up) - torch.eye(32)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5 / len(up) ** 0.5


@each_format
def test_without_a_learning_rate_weights_stay(moments):
    """Also where a gradient has always been 0; the moments go on."""
    weight, g = torch.randn(600), torch.randn(600)
    g[::3] = 0
    (high, low), state = split(weight), new_moments(weight, moments)
    adamw_(high, low, g, state, scalars_of(1, lr=0.0), **SETTINGS, seed=1)
    assert torch.equal(join(high, low), weight) and read(state, "exp_avg").any()


@each_format
def test_zeros_stay_zeros(moments):
    (high, low), state = split(torch.ones(600)), new_moments(torch.empty(600), moments)
    for step in (1, 2, 3):
        adamw_(high, low, torch.zeros(600), state, scalars_of(step), **SETTINGS, seed=step)
    assert not read(state, "exp_avg").any() and not read(state, "exp_avg_sq").any()
    torch.testing.assert_close(join(high, low), torch.full((600,), (1 - 1e-2 * 0.1) ** 3))


@each_format
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_updates_are_bounded(moments, beta2):
    """Gradients of every size in one group, most of them now and then: no weight moves farther than exact AdamW could.

    m and sqrt(v) are rounded apart; a sqrt(v) that became 0, or far too small, would make a huge step.
    """
    settings = SETTINGS | dict(beta2=beta2, weight_decay=0.0)
    n, lr = 4 * GROUP, 1e-3
    sizes = 2.0 ** -torch.linspace(0, 45, n).view(-1, 4).T.flatten()  # every group has the whole range
    (high, low), state = split(torch.zeros(n)), new_moments(torch.empty(n), moments)
    before, farthest = join(high, low), 0.0
    for step in range(1, 61):
        g = sizes * torch.randn(n) * (torch.rand(n) < (0.2 if step < 40 else 0.02))
        adamw_(high, low, g, state, scalars_of(step, lr=lr, beta2=beta2), **settings, seed=step)
        now = join(high, low)
        _, c1, c2, _, _ = scalars_of(step, beta2=beta2).tolist()
        bound = lr * c2 / c1 / adamw.smallest_root(0.9, beta2)
        farthest = max(farthest, (now - before).abs().max().item() / bound)
        before = now
        assert now.isfinite().all()
        if moments == "8bit":
            assert (read(state, "exp_avg_sq")[read(state, "exp_avg") != 0] > 0).all()
    assert 0.1 < farthest <= 1 + 1e-3


def test_smallest_root_is_the_least():
    """No history of gradients makes sqrt(v) / |m| smaller; the one of Cauchy and Schwarz's equality reaches it."""
    for beta1, beta2 in ((0.9, 0.95), (0.9, 0.999), (0.5, 0.9)):
        k = torch.arange(400.0, dtype=torch.float64)
        worst = (beta1 / beta2) ** k  # g of k steps ago
        m = (1 - beta1) * (beta1**k * worst).sum()
        v = (1 - beta2) * (beta2**k * worst.square()).sum()
        assert math.isclose(v.sqrt() / m, adamw.smallest_root(beta1, beta2), rel_tol=1e-6)
    assert adamw.smallest_root(0.9, 0.8) == adamw.smallest_root(0.9, 0.0) == 0.0


@each_format
def test_tiny_and_huge_gradients(moments):
    """Denormals and 2^60 beside each other: finite, and as AdamW has it, every first step is lr long."""
    g = torch.tensor([1e-45, -1e-40, 1e-30, 1e-12, 1.0, 2.0**60, 0.0] * 50)
    (high, low), state = split(torch.zeros(350)), new_moments(torch.empty(350), moments)
    for step in (1, 2, 3):
        adamw_(high, low, g, state, scalars_of(step), **SETTINGS | dict(weight_decay=0.0), seed=step)
        assert read(state, "exp_avg").isfinite().all() and read(state, "exp_avg_sq").isfinite().all()
        w = join(high, low)
        assert w.isfinite().all()
        if step == 1:
            torch.testing.assert_close(w.view(50, 7)[0, 4:], torch.tensor([-1e-2, -1e-2, 0.0]))


# --------------------------------------------------------------------------------------------- same bits, no other ones


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_the_seed_decides(moments):
    def two_steps(seed):
        torch.manual_seed(0)
        (high, low), state = split(torch.randn(1000)), new_moments(torch.empty(1000), moments)
        for step in (1, 2):
            adamw_(high, low, torch.randn(1000).bfloat16(), state, scalars_of(step), **SETTINGS, seed=seed)
        return [high, low, *state.values()]

    first, again, other = two_steps(5), two_steps(5), two_steps(6)
    # m and v are rounded by bits of their own: where one is rounded up, the other is as often as elsewhere
    g = torch.full((2**14,), 1 + 0.3 * (2.0**-7 if moments == "bf16" else 2.0**-4))
    state = stored(g, moments, seed=5)
    m, v = read(state, "exp_avg") > g, read(state, "exp_avg_sq") > (g * g if moments == "bf16" else g)
    expected = m.double().mean() * v.double().mean()
    assert 0.1 < m.double().mean() < 0.9 and 0.1 < v.double().mean() < 0.9
    assert ((m & v).double().mean() - expected).abs() < 5 * 0.5 / len(g) ** 0.5
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first[:4], other[:4], strict=True))


@each_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 257, 1023, 4096, 5003])
def test_nothing_else_is_touched_and_the_kernel_is_the_reference(moments, dtype, n, launches):
    """Bit for bit in the interpreter, specials included; what lies beyond the last element stays as it was."""
    poisoned = []

    def at_the_head_of_more(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 1031,), 77, dtype=x.dtype)
        buffer[: x.numel()] = x
        poisoned.append(buffer)
        return buffer[: x.numel()]

    weight = torch.randn(n)
    state = {name: at_the_head_of_more(x) for name, x in new_moments(weight, moments).items()}
    high, low = (at_the_head_of_more(x) for x in split(weight))
    expected = [high.clone(), low.clone(), {name: x.clone() for name, x in state.items()}]
    for step in (1, 2, 3):
        g = torch.randn(n) * torch.exp(4 * torch.randn(n))
        g[:: 17 + step] = 0
        if step == 3 and n > 1024:
            g[300], g[700], g[-1], g[-2] = 1e-42, float("nan"), float("inf"), 1e30
        g = at_the_head_of_more(g.to(dtype))
        before = g.clone()
        scalars = scalars_of(step, gradient_scale=0.37)
        adamw_(high, low, g, state, scalars, **SETTINGS, seed=step)
        adamw.adamw_reference_(expected[0], expected[1], before, expected[2], scalars, **SETTINGS, seed=step)
        assert torch.equal(g.nan_to_num(), before.nan_to_num())
    assert launches["adamw_kernel"] == (3 if dispatch.INTERPRETED else 0)
    for ours, reference in zip((high, low, *state.values()), (*expected[:2], *expected[2].values()), strict=True):
        assert torch.equal(ours.isnan(), reference.isnan())
        assert torch.equal(ours.nan_to_num(), reference.nan_to_num())
    assert all((buffer[-1031:] == 77).all() for buffer in poisoned)


@needs_kernels
def test_codes_are_the_same_one_by_one_and_in_words(launches):
    """A whole number of programs moves four codes at once; any other, or codes that begin anywhere, go one by one."""
    n = 2 * adamw.BLOCK
    weight, gradients = torch.randn(n + 1), torch.randn(2, n + 1)
    results = []
    for size, offset in ((n, 0), (n + 1, 0), (n, 3)):
        (high, low), state = split(weight[:size]), new_moments(weight[:size], "8bit")
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(size + offset, dtype=torch.uint8)[offset:]
        for step, g in enumerate(gradients, start=1):
            adamw_(high, low, g[:size].contiguous(), state, scalars_of(step), **SETTINGS, seed=step)
        results.append([x[:n] for x in (high, low, state["exp_avg"], state["exp_avg_sq"])])
    assert launches["adamw_kernel"] == 6
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@without_interpreter
def test_words_are_moved_where_they_can_be():
    """An address that 4 does not divide is none of a word, and a GPU would stop there."""
    n = 2 * adamw.BLOCK
    for size, offset, whole in ((n, 0, True), (n, 4, True), (n, 3, False), (n + 8, 0, False)):
        high = torch.empty(size, dtype=torch.bfloat16, device="meta")
        state = new_moments(high, "8bit")
        state["exp_avg_sq"] = torch.empty(size + offset, dtype=torch.uint8, device="meta")[offset:]
        scalars = torch.empty(5, device="meta")
        arguments = (high, high.to(torch.int16), high, state, scalars)
        (launch,) = aot.launches_of(lambda arguments=arguments: adamw_(*arguments, **SETTINGS, seed=0))
        assert launch.constants["WHOLE"] == whole, (size, offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1025, 5000])
def test_the_sum_is_the_reference(dtype, n, launches):
    buffer = torch.full((n + 1031,), 77.0, dtype=torch.bfloat16)
    buffer[:n] = torch.randn(n)
    total, x = buffer[:n], torch.randn(n).to(dtype)
    expected = total.clone()
    add_rounded_(total, x, seed=9)
    stochastic_rounding.add_rounded_reference_(expected, x, seed=9)
    assert torch.equal(total, expected) and (buffer[n:] == 77).all()
    assert launches["add_rounded_kernel"] == (1 if dispatch.INTERPRETED else 0)
    if dtype == torch.bfloat16:
        wide = add_wide(total, x)
        assert wide.dtype == torch.float32 and torch.equal(wide, total.float() + x.float())
        assert launches["add_wide_kernel"] == (1 if dispatch.INTERPRETED else 0)


@without_interpreter
def test_a_large_odd_size_in_other_shapes():
    """1,000,003 elements; a matrix is its flattened self, bit for bit."""
    for shape in ((1_000_003,), (40, 77, 5)):
        weight, g = torch.randn(shape), torch.randn(shape).bfloat16()
        results = []
        for view in (shape, (math.prod(shape),)):
            high, low = (x.view(view) for x in split(weight))
            state = new_moments(high, "8bit")
            adamw_(high, low, g.view(view), state, scalars_of(1), **SETTINGS, seed=1)
            results.append([x.flatten() for x in (high, low, *state.values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_and_meta_tensors():
    for moments in MOMENTS:
        (high, low), state = split(torch.empty(0)), new_moments(torch.empty(0), moments)
        adamw_(high, low, torch.empty(0), state, scalars_of(1), **SETTINGS, seed=0)
        weight = torch.empty(300, device="meta")
        (high, low), state = split(weight), new_moments(weight, moments)
        adamw_(high, low, weight, state, torch.empty(5, device="meta"), **SETTINGS, seed=0)  # reads no value
    add_rounded_(torch.empty(0).bfloat16(), torch.empty(0), seed=0)


def test_parameters_are_updated_in_place():
    """High halves are the model's parameters: leaves that require gradients."""
    high, low = split(torch.ones(10))
    p = torch.nn.Parameter(high)
    adamw_(p, low, torch.ones(10), new_moments(p, "bf16"), scalars_of(1), **SETTINGS, seed=0)
    assert p.is_leaf and p.requires_grad and (p < 1).all()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(high=torch.zeros(300)), TypeError, "high must be a tensor of torch.bfloat16, got torch.float32"),
        (dict(low=torch.zeros(300)), TypeError, "low must be a tensor of torch.int16"),
        (dict(low=torch.zeros(299, dtype=torch.int16)), ValueError, r"low must have shape \(300,\), got \(299,\)"),
        (dict(gradient=torch.zeros(300, dtype=torch.float16)), TypeError, "gradient must be a tensor of"),
        (dict(gradient=None), TypeError, "gradient must be a tensor of .*, got NoneType"),
        (dict(gradient=torch.zeros(600)[::2]), ValueError, "gradient must be contiguous, got strides"),
        (dict(gradient=torch.zeros(300, device="meta")), ValueError, "gradient is on meta, but high is on cpu"),
        (dict(scalars=torch.zeros(4)), ValueError, r"scalars must have shape \(5,\)"),
        (dict(scalars=torch.zeros(5, dtype=torch.float64)), TypeError, "scalars must be a tensor of torch.float32"),
        (dict(moments={}), TypeError, "moments must be a dict with exp_avg and exp_avg_sq"),
        (dict(moments=new_moments(torch.empty(299), "bf16")), ValueError, "moments\\['exp_avg'\\] must have shape"),
        (dict(moments=new_moments(torch.empty(300), "bf16") | {"exp_avg": torch.zeros(300)}), TypeError, "one dtype"),
        (dict(moments={k: torch.zeros(300, dtype=torch.uint8) for k in ("exp_avg", "exp_avg_sq")}), TypeError,
         "moments\\['exp_avg_exponents'\\] must be a tensor of torch.uint8, got NoneType"),
        (dict(beta1=1.0), ValueError, r"beta1 must be in \[0, 1\), got 1.0"),
        (dict(beta2=-0.1), ValueError, "beta2 must be in"),
        (dict(eps=0.0), ValueError, "eps must be above 0, got 0.0"),
        (dict(weight_decay=float("nan")), ValueError, "weight_decay must be at least 0, got nan"),
        (dict(seed=1.0), TypeError, "seed must be an integer, got 1.0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(wrong, error, message):
    high, low = split(torch.ones(300))
    arguments = dict(high=high, low=low, gradient=torch.ones(300), moments=new_moments(high, "8bit"))
    arguments |= dict(scalars=scalars_of(1), seed=0) | SETTINGS
    with pytest.raises(error, match=message):
        adamw_(**arguments | wrong)
    assert (high == 1).all()


def test_bad_arguments_of_the_others_are_refused():
    bf16 = torch.zeros(4, dtype=torch.bfloat16)
    for call, error, message in (
        (lambda: split(bf16), TypeError, "x must be an fp32 tensor, got torch.bfloat16"),
        (lambda: join(bf16, bf16), TypeError, "low must be a tensor of torch.int16, got torch.bfloat16"),
        (lambda: join(bf16, torch.zeros(5, dtype=torch.int16)), ValueError, "low must have"),
        (lambda: new_moments(bf16, "fp8"), ValueError, "moments must be one of fp32, bf16, 8bit, got 'fp8'"),
        (lambda: moment_bytes(4, "int8"), ValueError, "moments must be one of"),
        (lambda: add_rounded_(torch.zeros(4), bf16, seed=0), TypeError, "total must be a tensor of torch.bfloat16"),
        (lambda: add_rounded_(bf16, torch.zeros(5), seed=0), ValueError, "x must have shape"),
        (lambda: add_rounded_(bf16, torch.zeros(4), seed=None), TypeError, "seed must be an integer"),
        (lambda: add_wide(bf16, torch.zeros(4)), TypeError, "b must be a tensor of torch.bfloat16"),
        (lambda: add_wide(bf16, bf16[:3]), ValueError, "b must have shape"),
    ):
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------------------------------------------- kernels on a GPU


@without_interpreter
def test_a_new_seed_compiles_nothing():
    for kernel in (adamw.adamw_kernel, stochastic_rounding.add_rounded_kernel):
        by_name = {p.name: p for p in kernel.params}
        assert by_name["first_key"].do_not_specialize and by_name["second_key"].do_not_specialize
    assert all(-(2**31) <= key < 2**31 for seed in range(1000) for key in keys_of(seed))  # always an int32


@pytest.mark.gpu
@each_format
def test_full_size_on_a_gpu(moments, launches):
    """Mistral-7B's gate and up projection: the reference's result but for a few neighbours, without a wait."""
    torch.manual_seed(0)
    weight = torch.randn(28672, 4096, device="cuda") * 0.02
    (high, low), state = split(weight), new_moments(weight, moments)
    expected = [high.clone(), low.clone(), {name: x.clone() for name, x in state.items()}]
    for step in (1, 2):
        g = (torch.randn_like(weight) * 1e-3).bfloat16()
        scalars = scalars_of(step).cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            adamw_(high, low, g, state, scalars, **SETTINGS, seed=step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        adamw.adamw_reference_(*expected[:2], g, expected[2], scalars, **SETTINGS, seed=step)
        # rounding differs by a step of the format for one element in thousands; start the next step from equal moments
        for name in ("exp_avg", "exp_avg_sq"):
            ours, reference = state[name], expected[2][name]
            assert (ours != reference).float().mean() < (1 if moments == "fp32" else 1e-3)
            # A step of the coarsest format, 3 bits of mantissa, is an eighth. 8bit's lowest codes are evenly spaced:
            # 2^-14 of the group's power of two over 2^3 for m and 2^4 for sqrt(v), and that power is at most the
            # group's largest element, or 1 / 15 more where the largest is near to the next one
            spacing = {"exp_avg": 2.0**-17, "exp_avg_sq": 2.0**-18}[name]
            largest = read(expected[2], name).abs().max().item()
            atol = 16 / 15 * spacing * largest if moments == "8bit" else 1e-9
            torch.testing.assert_close(read(state, name), read(expected[2], name), rtol=0.13, atol=atol)
        # fused products, approximate root and division: a few ulp of fp32
        torch.testing.assert_close(join(high, low), join(*expected[:2]), rtol=1e-6, atol=1e-8)
        for name, x in state.items():
            x.copy_(expected[2][name])
        high.copy_(expected[0])
        low.copy_(expected[1])
    assert launches["adamw_kernel"] == 2


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements():
    """The last elements of tensors that an int32 cannot count."""
    n, tail = 2**31 + 3 * GROUP + 5, 3 * GROUP + 5
    total = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros_like(total)
    x[-tail:] = torch.randn(tail, device="cuda")
    total[-tail:] = torch.randn(tail, device="cuda")
    index = torch.arange(n - tail, n, device="cuda")
    random = random_words_reference(index, 3)
    expected = to_bf16(total[-tail:].float() + x[-tail:].float(), upper_bits(random, 16))
    add_rounded_(total, x, seed=3)
    assert torch.equal(total[-tail:], expected) and not total[: 2**20].any()

    low, state = torch.zeros(n, dtype=torch.int16, device="cuda"), new_moments(total, "8bit")
    small = [total[-tail:].clone(), low[-tail:].clone(), new_moments(total[-tail:], "8bit")]
    scalars = scalars_of(1).cuda()
    adamw_(total, low, x, state, scalars, **SETTINGS, seed=1)
    adamw.adamw_reference_(*small[:2], x[-tail:].clone(), small[2], scalars, **SETTINGS, seed=1)
    # a few ulp of fp32, as in the test above
    torch.testing.assert_close(join(total[-tail:], low[-tail:]), join(*small[:2]), rtol=1e-6, atol=1e-8)
    assert torch.equal(state["exp_avg_exponents"][-4:], small[2]["exp_avg_exponents"])
    codes, expected = state["exp_avg"][-tail:].int(), small[2]["exp_avg"].int()
    assert (codes - expected).abs().max() <= 1  # the same but for other random bits, since the index is another


# ---------------------------------------------------------------------------------------------------------- convergence


@without_interpreter
def test_convergence_runs_and_tells(tmp_path, capsys):
    """Two seeds of four steps: every optimizer starts from the same loss, and the summary is that of the runs."""
    threads = torch.get_num_threads()
    try:
        assert convergence.main(["--steps", "4", "--seeds", "2", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "convergence.json").read_text())
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    runs = {(r["optimizer"], r["seed"]): r for r in result["runs"]}
    assert len(runs) == 2 * len(convergence.OPTIMIZERS)
    for (name, seed), run in runs.items():
        assert len(run["losses"]) == 4 and run["held_out"][-1][0] == 4
        # ties are rounded another way in the halves
        assert math.isclose(run["losses"][0], runs["fp32 AdamW", seed]["losses"][0], rel_tol=1e-4), name
    rows = {row["optimizer"]: row for row in result["summary"]}
    final = [[runs[name, seed]["held_out"][-1][1] for seed in (0, 1)] for name in ("8bit", "fp32 AdamW")]
    assert math.isclose(rows["8bit"]["held_out_loss"], sum(final[0]) / 2)
    assert math.isclose(rows["8bit"]["difference"], sum(final[0]) / 2 - sum(final[1]) / 2, abs_tol=1e-12)
    assert rows["fp32 AdamW"]["difference"] == 0
    table = capsys.readouterr().out
    assert all(f"\n| {name} |" in table for name in convergence.OPTIMIZERS)


@without_interpreter
def test_in_the_interpreter():
    """This file again, where CPU tensors run the kernels."""
    assert_passes_in_the_interpreter(__file__)
