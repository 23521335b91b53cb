"""train.py --profile: the traces that runs leave, and that they leave nothing else."""

import contextlib
import gzip
import json
import re

import pytest
import torch
from runs import SMALL, checkpoint, column, equal, ranks_run

from halny.model.estimate import machines, step_time
from halny.model.estimate.choices import choose_layout
from halny.model.estimate.work import ALONE, Work
from halny.model.exits import Refused
from halny.model.mistral import PRESETS, Mistral
from halny.model.record import breakdown
from halny.model.record.breakdown import REGIONS
from halny.model.record.profiler import StepProfiler
from halny.model.run.ranks import World
from halny.model.run.recipe import COMMAND, ranks_to_profile, steps_to_profile
from halny.model.run.resolve import resolve

CPU = torch.device("cpu")


def hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_profiled_steps_leave_a_trace_with_every_region_and_the_run_as_it_was(small, tmp_path):
    command = [*SMALL, "--data", small, "--steps", 5, "--save-every", 5, "--eval-every", 0]
    ranks_run(*command, "--run-dir", "plain", ranks=2, cwd=tmp_path)
    profiled = ranks_run(
        *command, "--run-dir", "profiled", "--profile", "2-3", "--profile-ranks", 1, 0, ranks=2, cwd=tmp_path
    )
    values = ("step", "loss", "accuracy", "grad_norm")
    assert column(tmp_path / "profiled", *values) == column(tmp_path / "plain", *values)
    assert equal(checkpoint(tmp_path / "profiled", 5), checkpoint(tmp_path / "plain", 5))

    traces = tmp_path / "profiled/traces"
    names = [f"steps-2-3-rank-{rank}.{ending}" for rank in (0, 1) for ending in ("json.gz", "txt")]
    assert sorted(path.name for path in traces.iterdir()) == names
    for rank in (0, 1):
        with gzip.open(traces / f"steps-2-3-rank-{rank}.json.gz", "rt") as file:
            trace = json.load(file)
        assert trace["distributedInfo"]["rank"] == rank
        spans = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and e["ph"] == "X"]
        count = {region: sum(bool(re.match(p, e["name"])) for e in spans) for region, p in REGIONS}
        layers = 2 * PRESETS["test"].n_layers * 2  # of two steps, two micro batches
        assert count["attention"] == count["MLP"] == layers / 2 and count["loss"] == count["embedding"] == 2
        assert count["data"] == count["optimizer"] == 2 and count["gather"] >= 6 and count["reduce"] == 6
        assert [e["name"] for e in spans if e["name"].startswith("step ")] == ["step 2", "step 3"]
        operators = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "cpu_op"}
        assert {"aten::mm", "aten::_fused_adamw_"} <= operators

    out = profiled.out
    assert "profile of steps 2 to 3 on rank 0" in out and out.count("profile of steps") == 1
    assert re.search(r"^  matmul +[\d.]+ ms +[\d.]+%$", out, re.M), out
    assert re.search(r"^  MLP +[\d.]+ ms +[\d.]+%$", out, re.M), out
    assert re.search(r"^ +[\d.]+ ms +[\d.]+% +[\d.]+ x  aten::mm$", out, re.M), out


def test_outside_the_chosen_steps_there_is_no_hook_and_no_span(tmp_path):
    model = Mistral(PRESETS["test"])
    optimizer = torch.optim.AdamW(model.parameters())
    profiler = StepProfiler(2, 2, True, tmp_path / "traces", 0, CPU)
    tokens = torch.arange(32).view(1, 32)

    def step(number: int) -> bool:
        profiler.begin(number, model, optimizer)
        marked = not isinstance(profiler.region("data"), contextlib.nullcontext)
        model(tokens, tokens).loss.backward()
        optimizer.step()
        assert (hooks(model) > 0) == marked == bool(optimizer._optimizer_step_pre_hooks)
        return marked

    assert not step(1) and step(2)
    (tmp_path / "traces").write_text("in the way")  # as a full disk: said, and nothing else
    assert "could not be written" in profiler.end()
    assert not step(3) and profiler.end() is None

    begun = StepProfiler(4, 5, True, tmp_path / "other", 0, CPU)
    begun.begin(4, model, optimizer)
    begun.close()  # a run that stops before the last of its steps
    assert hooks(model) == 0 and not (tmp_path / "other").exists()


def test_which_steps_and_ranks():
    assert steps_to_profile("auto", 1, 200) == (6, 8) and steps_to_profile("auto", 101, 104) == (102, 104)
    assert steps_to_profile("auto", 1, 2) == (1, 2) and steps_to_profile("7", 1, 9) == (7, 7)
    assert steps_to_profile("10-12", 1, 12) == (10, 12)
    for text in ("0", "13", "12-10", "10-", "x", "-1", "1-2-3", "tiny"):
        with pytest.raises(ValueError, match=re.escape(text)):
            steps_to_profile(text, 1, 12)
    assert ranks_to_profile(["0", "2"], 4) == {0, 2} and ranks_to_profile(["all"], 3) == {0, 1, 2}
    for ranks in (["3"], ["0", "x"], ["all", "0"]):
        with pytest.raises(ValueError, match="ranks from 0 to 2"):
            ranks_to_profile(ranks, 3)


def test_the_flag_alone_leaves_a_preset_its_place():
    assert COMMAND.command_line(["--profile"]).profile == "auto"
    recipe = COMMAND.command_line(["--profile", "bielik-7b"])
    assert recipe.profile == "auto" and recipe.steps == 17_350
    assert COMMAND.command_line(["tiny", "--profile", "3-4"]).profile == "3-4"
    with pytest.raises(Refused, match=r"--profile 201 .*200"):
        resolve(COMMAND.command_line(["--profile", "201"]), World(0, 1, CPU, mesh=None))


# ----------------------------------------------------------------------------------------------------- floors and gaps

MICROSECONDS = [  # (category of event, name, stream, start, duration): a step of 100 us, computation on stream 7
    ("kernel", "nvjet_hsh_128x256", 7, 0, 30),
    ("kernel", "flash_fwd_kernel", 7, 30, 10),
    ("kernel", "rms_norm_forward_kernel", 7, 40, 5),
    ("kernel", "ncclDevKernel_AllGather_RING_LL", 20, 20, 15),  # all of it beside the two above
    ("kernel", "ncclDevKernel_ReduceScatter_Sum_f32", 24, 42, 18),  # 3 us beside the norm, 2 beside the copy
    ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 24, 58, 4),  # 2 us beside the reduction
    ("kernel", "what_is_this", 7, 70, 6),
    ("kernel", "nvjet_hsh_128x256", 7, 72, 18),  # 4 us beside the unknown one, which has 2 to itself
    ("gpu_user_annotation", "optimizer", 7, 0, 100),
    ("cpu_op", "aten::mm", 1, 0, 100),
]


def events(rows) -> list[dict]:
    return [{"ph": "X", "cat": c, "name": n, "pid": 0, "tid": t, "ts": at, "dur": dur} for c, n, t, at, dur in rows]


def test_every_microsecond_belongs_to_one_category():
    found = breakdown.breakdown(breakdown.kernels_of(events(MICROSECONDS)), wall_ms=0.1)
    us = {name: 1e3 * ms for name, ms in {**found["own_ms"], "idle": found["idle_ms"]}.items()}
    assert us == pytest.approx({
        "matmul": 48, "attention": 10, "norm, RoPE, SwiGLU": 5, "loss": 0, "optimizer": 0, "other": 2,
        "copies": 4, "communication": 13, "idle": 18,
    })  # fmt: skip
    assert sum(us.values()) == pytest.approx(100)
    assert 1e3 * found["categories_ms"]["communication"] == pytest.approx(33)  # as the kernels' durations add up
    assert 1e3 * found["categories_ms"]["other"] == pytest.approx(6)
    assert 1e3 * found["hidden_communication_ms"] == pytest.approx(33 - 13)
    assert [k["kernel"] for k in found["other"]] == ["what_is_this"]


def test_a_copy_in_place_of_a_collective_is_communication():
    span = ("gpu_user_annotation", f"{breakdown.STAND_IN} for all-gather", 20, 0, 10)
    rows = [span, ("gpu_memcpy", "Memcpy DtoD", 20, 1, 8), ("gpu_memcpy", "Memcpy DtoD", 7, 1, 8)]
    names = [name for name, _, _ in breakdown.kernels_of(events(rows))]
    assert [breakdown.category(name) for name in names] == ["communication", "copies"]

    # a span ends with its last kernel; but not as sums of what a trace says, whose clock began months ago
    span = ("gpu_user_annotation", f"{breakdown.STAND_IN} for a reduce-scatter", 20, 4863231436304.922, 84.6)
    copy = ("gpu_memcpy", "Memcpy DtoD", 20, 4863231436315.906, 73.616)
    assert copy[3] + copy[4] > span[3] + span[4]
    assert breakdown.category(breakdown.kernels_of(events([span, copy]))[0][0]) == "communication"


NATIVE = "void at::native::"
KERNELS = {  # as CUPTI names them on a Hopper GPU: cuDNN 9, cuBLAS 13, FlashAttention 2 to 4, PyTorch 2.11
    "communication": (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclSymkDevKernel_AllGather_LL(ncclSymkDevWorkArgs4K)",
        f"{breakdown.STAND_IN} for an all-gather: Memcpy DtoD (Device -> Device)",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, unsigned int, void*, void*)",
        "void cudnn::fusion::compute_dot_do_o<true>(void const*, unsigned int, void*, void*)",
        "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int, unsigned int)",
        "void cudnn::fusion::convert_dq_to_16bits_ragged<true>(void const*, void*, unsigned int, unsigned int)",
        "void cudnn::fusion::matmul_dq<true>(void const*, void*)",
        "void cudnn::fusion::fmha_reduce_head<true>(void const*, void*, unsigned int)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<128, 64, 128, 8>>",
        "void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8>>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<cute::TiledCopy>>>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnBwdSm90<cutlass::gemm::Mainloop>>>",
        "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<64>>, cutlass::bfloat16_t>>",
        "void cutlass::device_kernel<flash::FlashAttnBwdPostprocessConvertdQ<cute::tuple<cute::C<64>>, float>>",
        "kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionForwardSm90_object_at__tensorptrbf16gmem_0",
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPreprocess_object_at__0",
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_postprocessFlashAttentionBackwardPostprocess_object_at__0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
        "triton_tem_fused_flex_attention_0",
        "triton_tem_fused_flex_attention_backward_zeros_1",
        "triton_red_fused_mul_sum_zeros_0",
    ),
    "norm, RoPE, SwiGLU": ("rms_norm_forward_kernel", "rms_norm_backward_kernel", "rms_norm_dweight_kernel",
        "rope_kernel", "swiglu_forward_kernel", "swiglu_backward_kernel"),
    "loss": ("cross_entropy_kernel", "scale_kernel"),
    "matmul": (
        "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopB_NNN",
        "nvjet_sm90_tss_192x192_64x3_2x1_v_bz_splitK_coopB_NTN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nt_align8>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::Copy_Atom<cute::SM90_TMA_LOAD>>>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "void gemvNSP_kernel<float, float, float, float, 1, 32, 4, 1024>",
    ),
    "copies": (
        "Memcpy DtoD (Device -> Device)", "Memcpy HtoD (Pinned -> Device)", "Memset (Device)",
        NATIVE + "vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>",
        NATIVE + "unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        NATIVE + "(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<OpaqueType<4u>, unsigned int, 1, 64>",
        NATIVE + "detail::chunk_cat_cuda_kernel<float, c10::BFloat16>", "chunk_cat_kernel",
        NATIVE + "detail::split_with_sizes_copy_out_contiguous_no_cast_kernel(char**, char**)",
    ),
    "optimizer": (
        "adamw_kernel", "add_rounded_kernel", "add_wide_kernel", "block_norms_kernel",
        NATIVE + "(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4, (ADAM_MODE)1, false>>",
        NATIVE + "(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, at::native::LpNormFunctor>",
        NATIVE + "lpnorm_cleanup<float, (at::native::NormType)1, float, float>",
        NATIVE + "reduce_kernel<512, 1, at::native::ReduceOp<double, at::native::NormTwoOps<double, double, double>>>",
    ),
    "other": (
        NATIVE + "vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        NATIVE + "vectorized_elementwise_kernel<4, at::native::FillFunctor<c10::BFloat16>>",
        NATIVE + "(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>",
        NATIVE + "vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long, long, long, bool)",
        NATIVE + "(anonymous namespace)::embedding_backward_feature_kernel<c10::BFloat16, float, long>",
        NATIVE + "(anonymous namespace)::compute_grad_weight<c10::BFloat16, long>",
        NATIVE + "(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("expected, name", [(c, name) for c, names in KERNELS.items() for name in names])
def test_kernels_by_their_names(expected, name):
    assert breakdown.category(name) == expected


@pytest.mark.parametrize("reshard", ["always", "node", "never"])
def test_copies_in_place_of_collectives_have_a_floor(reshard):
    """A gather and a gather again in bf16, a reduction in fp32, of all weights; each read and written."""
    config, n, gpu = PRESETS["mistral-7b"], 7_241_732_096, machines.GPUS["NVIDIA H200"]
    work, speeds = Work(config, 4, 4096), breakdown.ideal_speeds(gpu)
    layout = choose_layout(work, ranks=256, node=4, reshard=reshard)
    without = breakdown.floors(work, speeds, layout).ms
    least = breakdown.floors(work, speeds, layout, stand_in=True).ms
    layers = n - 2 * 32_000 * 4096 - 4096
    n_bytes = 2 * n + (0 if reshard == "never" else 2 * layers) + 4 * n
    assert least["communication"] == pytest.approx(2 * n_bytes / speeds.memory * 1e3)
    assert least | {"communication": 0.0} == without


@pytest.mark.parametrize("reshard", ["always", "node", "never"])
def test_the_floors_are_the_plans_step(reshard):
    """Category by category at the rates called ideal, and so the sum; and nothing where nothing is gathered."""
    gpu, ideal = machines.GPUS["NVIDIA H200"], step_time.RATES["ideal"]
    work = Work(PRESETS["mistral-7b"], 4, 4096, 2)
    layout = choose_layout(work, ranks=256, node=4, reshard=reshard)
    expected = step_time.step(work, step_time.Cluster(gpu, 256, 4, 450e9, 25e9), layout, ideal)
    speeds = breakdown.ideal_speeds(gpu)
    least = breakdown.floors(work, speeds, layout, expected.exposed).ms
    rows = ("norm, RoPE, SwiGLU", "loss", "other", "copies")
    assert least["matmul"] == pytest.approx(1e3 * expected.matmul)
    assert least["attention"] == pytest.approx(1e3 * expected.attention)
    assert least["optimizer"] == pytest.approx(1e3 * expected.optimizer)
    assert sum(least[name] for name in rows) == pytest.approx(1e3 * expected.memory_bound)
    assert sum(least.values()) == pytest.approx(1e3 * expected.total)
    alone = breakdown.floors(work, speeds, ALONE).ms
    assert alone["copies"] == alone["communication"] == 0 and alone["matmul"] == least["matmul"]


def test_gaps_are_ranked_and_add_up():
    found = breakdown.breakdown(breakdown.kernels_of(events(MICROSECONDS)), wall_ms=0.1)
    least = dict.fromkeys(breakdown.PRECEDENCE, 0.0) | {"matmul": 0.040, "attention": 0.011, "idle": 0.0}
    rows = breakdown.gaps(found, breakdown.Floors(least, "made up"), n_steps=2)
    gaps = [row["gap_ms"] for row in rows]
    assert gaps == sorted(gaps, reverse=True) and sum(row["ms"] for row in rows) == pytest.approx(0.05)
    by_part = {row["part"]: row for row in rows}
    assert by_part["matmul"]["gap_ms"] == pytest.approx(0.024 - 0.040)  # two steps took what one must: beaten
    assert rows[0]["part"] == "idle" and by_part["communication"]["kernels_ms"] == pytest.approx(0.0165)
    text = "\n".join(breakdown.gap_lines(found, breakdown.Floors(least, "made up")))
    assert re.search(r"^  the step +0\.10 +0\.11 +0\.05 +\+0\.05$", text, re.M), text
    assert "hidden behind computation: 0.02 ms of communication" in text and text.endswith("floors made up")
    for line in breakdown.gap_lines(found, breakdown.Floors(least, "made up"), label="emulated"):
        assert line.endswith("   emulated") == bool(re.search(r"\d\.\d", line)), line


def test_a_known_gpu_has_floors(monkeypatch, tmp_path):
    """train.py hands them to the profiler, which puts the gaps above its tables."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GH200 120GB")
    config, world = PRESETS["mistral-7b"], World(0, 256, torch.device("cuda"), mesh=None, node_size=4)
    layout = choose_layout(Work(config, 4, 4096), ranks=256, node=4, memory_bytes=97871 * 2**20)
    least = breakdown.floors_of_run(Work(config, 4, 4096), layout, world)
    cluster = step_time.Cluster(machines.MACHINES["gh200-96"].gpu, 256, 4, 450e9, 25e9)
    whole = step_time.step(Work(config, 4, 4096), cluster, layout, step_time.RATES["ideal"])
    assert sum(least.ms.values()) == pytest.approx(1e3 * whole.total)
    assert breakdown.floors_of_run(Work(config, 4, 4096, compute_bytes=4), layout, world) is None

    one = World(0, 1, torch.device("cuda"), mesh=None)  # without FSDP, and so without its copies
    for moments, accumulation, n_bytes in (
        ("fp32", 1, 28),
        ("bf16", 1, 20),
        ("fp32", 3, 32 + 18),
        ("8bit", 3, 16 + 12),
    ):
        work = Work(config, 2, 4096, accumulation, moments=moments)
        found = breakdown.floors_of_run(work, ALONE, one).ms
        assert found["copies"] == found["communication"] == 0
        ideal = step_time.RATES["ideal"].memory * 4000e9
        assert found["optimizer"] == pytest.approx(1e3 * n_bytes * 7_241_732_096 / ideal, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unknown")
    assert breakdown.floors_of_run(Work(config, 4, 4096), layout, world) is None

    made = StepProfiler(1, 1, True, tmp_path, 0, torch.device("cuda"), least)
    text = made._tables(events(MICROSECONDS), None, wall_ms=0.1)
    assert "the gap to what it takes at least\n" in text and "time by category" in text
    assert text.index("  the step ") < text.index("time by category")
