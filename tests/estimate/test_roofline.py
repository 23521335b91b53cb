"""model/estimate/roofline.py against published figures, brute-force counts and PyTorch's own FLOP counter."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from halny.kernels.adamw import MOMENTS, new_moments
from halny.kernels.attention import attention_mask
from halny.model.estimate import machines, roofline, sizes
from halny.model.estimate.memory import (
    activation_bytes_per_token,
    gathered_parameter_bytes,
    logits_bytes,
    memory_estimate,
    memory_moments,
    moment_bytes,
    optimizer_bytes,
    parameter_bytes,
    saved_activations,
)
from halny.model.estimate.work import ALONE, Layout, Work
from halny.model.mistral import PRESETS, Mistral, MistralConfig

MISTRAL_7B = PRESETS["mistral-7b"]
FSDP = Layout(256)


def mask_count(seq_len: int, window: int | None) -> int:
    return sum(1 for i in range(seq_len) for j in range(seq_len) if j <= i and (window is None or i - window < j))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = Mistral(config)
    assert sizes.parameters(config) == sum(p.numel() for p in model.parameters())
    multiplied = (p for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    assert sizes.matmul_parameters(config) == sum(p.numel() for p in multiplied)


def test_published_figures_of_mistral_7b():
    assert sizes.parameters(MISTRAL_7B) == 7_241_732_096
    assert sizes.matmul_parameters(MISTRAL_7B) == 7_110_393_856
    assert roofline.flops_per_token(MISTRAL_7B, 4096) == pytest.approx(45.884e9, rel=1e-4)
    assert roofline.palm_flops_per_token(MISTRAL_7B, 4096) == pytest.approx(49.893e9, rel=1e-4)
    # 9,200 tokens/s on a GH200 = 422 TFLOP/s = 42.7 % of the data sheet's peak
    peak = machines.peak_flops("NVIDIA GH200 120GB")
    assert machines.mfu(9200, roofline.flops_per_token(MISTRAL_7B, 4096), peak) == pytest.approx(0.427, abs=5e-4)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("window", [None, 1, 2, 6, 7, 8, 63, 64, 65])
def test_attention_keys_count_the_mask(seq_len, window):
    assert roofline.attention_keys([seq_len], window) == mask_count(seq_len, window)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 17, 1000])
@pytest.mark.parametrize("rows", [[[16], [16]], [[5, 1, 10], [1] * 16], [[1, 15], [15, 1]], [[7, 9], [16]]])
def test_attention_flops_of_documents_count_the_mask(rows, window):
    """Against the mask that the reference attention uses, pair by pair."""
    lengths = [length for row in rows for length in row]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pairs = int(attention_mask(16, window, cu_seqlens, len(rows), "cpu").sum())
    assert roofline.attention_keys(lengths, window) == pairs
    assert roofline.attention_keys(cu_seqlens.diff(), window) == pairs  # tensors' and numpy's integers will do
    config = MistralConfig(dim=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=10, window=window)
    assert roofline.attention_flops(config, lengths) == 3 * pairs * 3 * 4 * 2 * (2 * 10)  # layers, heads, products
    matmuls = 6 * sizes.matmul_parameters(config) * sum(lengths)
    assert roofline.batch_flops(config, lengths) == matmuls + roofline.attention_flops(config, lengths)


def test_attention_keys_of_long_documents():
    """Exact integers: 2^31 pairs and more, given as int32."""
    n = 100_000
    assert roofline.attention_keys(np.array([n, n], dtype=np.int32), None) == n * (n + 1)
    assert roofline.attention_keys([n], 4096) == 4096 * 4097 // 2 + (n - 4096) * 4096
    assert roofline.attention_keys([], 4096) == 0
    # Mistral-7B at 32,768: its window leaves 23.4 % of the pairs that causal order admits
    share = roofline.attention_keys([32_768], 4096) / roofline.attention_keys([32_768], None)
    assert share == pytest.approx(0.2343, abs=1e-4)


@pytest.mark.parametrize("window", [None, 5, 32])
def test_attention_flops_count_the_mask(window):
    config = MistralConfig(dim=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=10, window=window)
    pairs = mask_count(32, window) * config.n_heads * config.n_layers  # (query, key) pairs of one sequence
    forward = pairs * 2 * (2 * config.head_dim)  # q . k and weight * v: a multiply and an add a channel each
    assert roofline.attention_flops(config, [32]) == 3 * forward
    without = 32 * roofline.flops_per_token(config, 32) - roofline.attention_flops(config, [32])
    assert without == 32 * 6 * sizes.matmul_parameters(config)


@pytest.mark.parametrize("preset", ["test", "tiny"])
def test_flops_are_those_that_pytorch_counts(preset):
    config, B, T = PRESETS[preset], 2, 48
    model = Mistral(config)
    tokens = torch.randint(config.vocab_size, (B, T))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).loss.backward()
    # The reference attention multiplies the whole square and masks afterwards: PaLM's attention, without the embedding.
    embedding = 6 * (sizes.parameters(config) - sizes.matmul_parameters(config))
    assert counter.get_total_flops() == B * T * (roofline.palm_flops_per_token(config, T) - embedding)


def test_activation_bytes_of_mistral_7b():
    assert sum(saved_activations(MISTRAL_7B).values()) == 139_400
    assert activation_bytes_per_token(MISTRAL_7B) == 32 * 139_400
    assert activation_bytes_per_token(MISTRAL_7B, recompute=True) == 32 * 94_344
    rstd_and_lse = 4 + 4 + 4 * MISTRAL_7B.n_heads  # fp32 whatever the compute dtype
    assert sum(saved_activations(MISTRAL_7B, 4).values()) == 2 * (139_400 - rstd_and_lse) + rstd_and_lse


def test_memory_of_mistral_7b():
    many = memory_moments(Work(MISTRAL_7B, 4, 4096), FSDP)
    loss, last = many["loss"], many["backward of the last layer"]
    assert (
        loss.parameters + loss.optimizer
        == 12 * 7_241_732_096 / 256
        == 3 * many["reduction of the root group"].gradients
    )
    assert last.gathered_parameters == 2 * (2 * 32000 * 4096 + 4096 + 2 * (218_103_808 + 2 * 4096))
    assert last.gathered_parameters - loss.gathered_parameters == 2 * sizes.layer_parameters(MISTRAL_7B)
    stream = 2 * 16_384 * 4096
    assert loss.logits == 4096 * 32000 * 2 + 32000 * 4096 * 4 + stream  # a chunk, the fp32 weight gradient, d_hidden
    rounding = many["backward of the loss"]
    assert loss.logits - rounding.logits == rounding.working == 2 * 32000 * 4096
    assert loss.activations - rounding.activations == stream
    one_chunk = memory_moments(Work(MISTRAL_7B, 1, 2048), FSDP)  # whose gradient needs no rounding
    assert "backward of the loss" not in one_chunk
    assert last.activations == 32 * 94_344 * 16_384 == loss.activations - 2 * stream - 4 * 16_384
    assert last.working == 16_384 * 2 * (4096 + 4 * 14_336) + 2 * 32000 * 4096  # SwiGLU's backward, the head's gradient
    assert memory_estimate(Work(MISTRAL_7B, 4, 4096), FSDP) == last
    assert all(moment.total <= last.total == pytest.approx(53.5e9, rel=1e-3) for moment in many.values())

    # A sequence of 4,096 has less activations a layer than a layer has weights: the peak comes with the gradients
    few = memory_moments(Work(MISTRAL_7B, 1, 4096), FSDP)
    third = few["backward of the third layer from the end"]
    assert third == memory_estimate(Work(MISTRAL_7B, 1, 4096), FSDP)
    assert third.activations == 30 * 94_344 * 4096
    assert third.working - few["backward of the last layer"].working == 2 * 4 * sizes.layer_parameters(MISTRAL_7B)

    whole = memory_estimate(
        Work(MISTRAL_7B, 4, 4096, recompute=False, whole_logits=True), FSDP
    )  # all as PyTorch has it
    assert whole.logits == 3 * 4 * 16384 * 32000 + stream
    assert whole.activations == pytest.approx(73.1e9 + 2 * stream, rel=1e-3)
    kept = memory_estimate(Work(MISTRAL_7B, 4, 4096, recompute=False), FSDP)
    assert kept.total < whole.total - 3e9
    swiglu = 2 * 14_336 * 16_384  # its output, gone where it was kept, and not recomputed
    assert last.working - kept.working == swiglu - 2 * 14_336 * 4096  # the weight's gradient is there instead
    assert kept.activations - last.activations == 32 * (139_400 - 94_344) * 16_384 - swiglu
    one = memory_estimate(Work(MISTRAL_7B, 1, 4096), Layout())
    assert one.parameters + one.gradients + one.optimizer == 16 * 7_241_732_096  # the 116e9 that one H200 holds
    assert one.total < machines.GPUS["NVIDIA H200"].memory_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_the_model(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = Mistral(config)
    shapes = [(*p.shape, 1)[:2] for p in model.layers[0].parameters()]
    assert sorted(shapes) == sorted(sizes.layer_shapes(config))
    root = [(*p.shape, 1)[:2] for n, p in model.named_parameters() if not n.startswith("layers")]
    assert sorted(root) == sorted(sizes.root_shapes(config))
    assert sizes.padded_numel(sizes.layer_shapes(config), 1) == sizes.layer_parameters(config)


def test_row_kernel_bytes():
    """Counted kernel by kernel for the 7B: d = 4096, f = 14336, 32 + 16 heads of 128 in qkv, two bytes each."""
    norms, rope, swiglu = 2 * 4096 * (4 + 4), 2 * 2 * 40 * 128, 2 * 3 * 14_336
    last = 2 * 2 * 4096  # the final norm's 4d, less the 2d that the first does not add
    rstd, weight = 65 * 4 * 16_384, 65 * 2 * 4096
    forward, backward = roofline.row_kernel_bytes(MISTRAL_7B, 16_384, recompute=False, programs=264)
    assert forward == 16_384 * (32 * (norms + rope + swiglu) + last) + rstd + weight
    gradients = 65 * 4096 * (2 * 4 * 264 + 2)  # written and read a program, their sum rounded
    rope_back, swiglu_back = 2 * 2 * 48 * 128, 2 * 5 * 14_336  # v's gradient is packed with the others
    assert backward == 16_384 * (32 * (norms + rope_back + swiglu_back) + last) + rstd + weight + gradients
    more = roofline.row_kernel_bytes(MISTRAL_7B, 16_384, programs=264)
    assert more == (forward, backward + 32 * 16_384 * 45_056)  # the 45 kB of kernels/recompute_linear.py


def test_memory_at_the_edges():
    config = PRESETS["test"]
    n = sizes.parameters(config)
    shapes = 2 * sizes.layer_shapes(config) + sizes.root_shapes(config)
    fullest = sum(-(-rows // 7) * columns for rows, columns in shapes)  # rank 0, whose share of rows is rounded up
    assert parameter_bytes(config, 7) == 4 * fullest > 4 * n / 7
    assert parameter_bytes(config, 1) == 4 * n
    assert optimizer_bytes(config, 1) == 8 * n
    one_layer = MistralConfig(n_layers=1)  # no second layer to gather
    assert gathered_parameter_bytes(one_layer, 4) == 4 * sizes.parameters(one_layer)
    assert logits_bytes(config, 10, 2, chunk_rows=2048) == 2 * 10 * 256 + 2 * 256 * 48  # one chunk: no sum
    assert logits_bytes(config, 10, 2, chunk_rows=5) == 2 * 5 * 256 + 4 * 256 * 48


def test_memory_of_one_rank():
    """Bytes a weight: 4, and of moments; gradients 2, or summed 4 or 2, there before the backward from the 2nd on."""
    n, head = sizes.parameters(MISTRAL_7B), 32_000 * 4096
    for moments, size, summed in (("fp32", 8, 4), ("bf16", 4, 4), ("8bit", 2 + 2 / 256, 2)):
        for accumulation, before, after in ((1, 0, 2), (2, 2, summed), (3, summed, summed)):
            parts = memory_moments(Work(MISTRAL_7B, 4, 4096, accumulation, moments=moments), ALONE)
            for part in parts.values():
                assert (part.parameters, part.gathered_parameters) == (4 * n, 0)
                assert part.optimizer == pytest.approx(size * n, abs=500)  # norms' last groups of 256 are whole
            last = parts["backward of the last layer"]
            end = parts["gradient of the embedding"]
            assert parts["loss"].gradients == before * n
            assert end.gradients == after * n + (2 * head if 0 < before < after else 0)  # two sums of the embedding's
            assert end.working == (2 * head if before else 0)
            assert last.gradients == before * (n - head) + after * head
            assert (last.activations, last.working) == (32 * 94_344 * 16_384, 16_384 * 2 * (4096 + 4 * 14_336))
            peak = memory_estimate(Work(MISTRAL_7B, 4, 4096, accumulation, moments=moments), ALONE)
            assert peak == max(parts.values(), key=lambda part: part.total)
    sharded = memory_moments(Work(MISTRAL_7B, 4, 4096), FSDP)["loss"]
    assert (sharded.activations, sharded.logits) == (parts["loss"].activations, parts["loss"].logits)
    with pytest.raises(ValueError, match="moments must be one of fp32, bf16, 8bit, got 'fp8'"):
        memory_estimate(Work(MISTRAL_7B, 2, 4096, moments="fp8"), ALONE)
    config = PRESETS["test"]
    for moments in MOMENTS:
        held = sum(x.nbytes for p in Mistral(config).parameters() for x in new_moments(p, moments).values())
        assert moment_bytes(config, moments) == held


def test_peaks_are_matched_by_exact_name_only():
    assert machines.peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert machines.peak_flops("NVIDIA H100 PCIe") == 756.5e12
    assert machines.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    for grace_hopper in ("NVIDIA GH200 120GB", "NVIDIA GH200 480GB", "NVIDIA GH200 144G HBM3e"):
        assert machines.peak_flops(grace_hopper) == 989.5e12
    for unknown in ("", "H100", "NVIDIA H100", "NVIDIA A100", "nvidia h200", "NVIDIA H200 ", "NVIDIA GH200", "cpu"):
        assert machines.peak_flops(unknown) is None


def test_peak_override():
    assert machines.peak_flops("anything", 500) == 500e12
    assert machines.peak_flops("NVIDIA H200", override_tflops=700.5) == 700.5e12
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="override_tflops"):
            machines.peak_flops("NVIDIA H200", wrong)
    assert machines.mfu(9200, 45.9e9, None) is None
    assert machines.mfu(1000, 50e9, 100e12) == 0.5


def test_gpu_table_is_plausible():
    """Against slips of a digit or of a sparse peak: bandwidth, memory and FLOP/s of each generation in their range."""
    for name, gpu in machines.GPUS.items():
        assert name.startswith("NVIDIA ")
        low, high = {"A100": (312, 312), "B200": (2250, 2250)}.get(name.split()[1].split("-")[0], (750, 990))
        assert low <= gpu.bf16_flops / 1e12 <= high, name
        assert 1.5e12 <= gpu.hbm_bytes_per_second <= 8e12, name
        assert 39e9 <= gpu.memory_bytes <= 193e9, name
        assert 150 <= gpu.bf16_flops / gpu.hbm_bytes_per_second <= 400, name  # FLOPs a byte at the ridge


def test_importing_needs_no_torch():
    rooms = ", ".join(f"halny.model.estimate.{name}" for name in ("plan", "out_of_memory"))
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
