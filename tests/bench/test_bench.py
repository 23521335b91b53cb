"""The benchmarks: what they count, what they refuse, and that a whole visit to a GPU works before there is one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import account, aot, gpu_pass, kernels, merge, report, step
from bench import attention as bench_attention
from bench.lib import machine_code, operations, peers
from bench.lib.clocks import Bench, Call, Clocks, quantiles
from bench.lib.process import ROOT
from bench.lib.results import BadResult, read_result, repeatable, write_json
from bench.lib.steps import MODE_LABELS
from halny.kernels import dispatch
from halny.kernels.adamw import new_moments, split
from halny.kernels.attention import attention_mask
from halny.kernels.rope import rope_qkv
from halny.kernels.swiglu import swiglu, swiglu_reference
from halny.model.record import breakdown

CPU = Bench(torch.device("cpu"), True, 2**16)
SHAPE = operations.SMOKE_SETS["7b"]

# ------------------------------------------------------------------------------------------------------ bytes and FLOPs


def n_bytes(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minimum_bytes_are_those_of_the_tensors(dtype):
    """Each mode moves its operands once: counted here from the tensors that the reference takes and makes."""
    for operation in operations.OPERATIONS.values():
        inputs = operation.inputs(SHAPE, dtype, torch.device("cpu"))
        with torch.no_grad():
            outputs = operations.tuple_of(operation.reference(*inputs))
        if isinstance(operation, operations.Update):
            (weight, gradient), kept = inputs, new_moments(inputs[0], operation.moments)
            halves = split(weight)
            moved = {"update": n_bytes(*halves, *kept.values(), *halves, *kept.values(), gradient)}
        elif operation.name == "rope":
            q, k, v = outputs
            moved = {"forward": n_bytes(inputs[0], q, k, v), "backward": n_bytes(q, k, v, inputs[0])}
            assert operation.unmoved("forward", SHAPE, dtype.itemsize) == n_bytes(v, v)
            assert operation.unmoved("backward", SHAPE, dtype.itemsize) == 0
        elif operation.name == "rms_norm":
            (x, weight), (y,) = inputs, outputs
            moved = {"forward": n_bytes(x, weight, y), "backward": n_bytes(x, weight, y, x, weight)}
        elif operation.name == "add_rms_norm":
            (x, residual, weight), (y, s) = inputs, outputs
            moved = {"forward": n_bytes(x, residual, weight, y, s), "backward": n_bytes(s, weight, y, s, x, weight)}
        elif operation.name == "swiglu":
            (gate_up,), (h,) = inputs, outputs
            moved = {"forward": n_bytes(gate_up, h), "backward": n_bytes(gate_up, h, gate_up)}
        elif operation.name == "cross_entropy":
            logits, labels = inputs
            moved = {"loss only": n_bytes(logits, labels), "both": n_bytes(logits, labels, logits)}
        else:
            hidden, weight, labels = inputs
            moved = {"loss only": n_bytes(*inputs), "both": n_bytes(*inputs, hidden, weight)}
        if "forward" in moved:
            moved["both"] = moved["forward"] + moved["backward"]
        assert set(moved) == set(operation.modes)
        for mode, expected in moved.items():
            assert operation.counts(mode, SHAPE, dtype.itemsize)[0] == expected, (operation.name, mode)


def test_minimum_flops_are_those_of_the_matrix_products():
    for operation in operations.OPERATIONS.values():
        if isinstance(operation, operations.Update):
            assert operation.counts("update", SHAPE, 4)[1] == 0
            continue
        inputs = operation.inputs(SHAPE, torch.float32, torch.device("cpu"))
        leaves = [x.requires_grad_() if i in operation.gradients else x for i, x in enumerate(inputs)]
        with FlopCounterMode(display=False) as counter:
            outputs = operations.tuple_of(operation.reference(*leaves))
            forward = counter.get_total_flops()
            sum(y.sum() for y in outputs).backward()
        assert operation.counts("both", SHAPE, 4)[1] == counter.get_total_flops()
        if "loss only" in operation.modes:
            assert operation.counts("loss only", SHAPE, 4)[1] == forward


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("mean_document", [None, 7])
def test_attention_flops_are_those_of_the_mask(window, mean_document):
    case = bench_attention.case(3, 48, window, mean_document, (4, 2, 16))
    cu_seqlens = case.cu_seqlens(torch.device("cpu"))
    assert (cu_seqlens is None) == (mean_document is None)
    if cu_seqlens is not None:
        assert {0, 48, 96, 144} <= set(cu_seqlens.tolist())
        assert case.cu_seqlens(torch.device("cpu"), sequences=1).tolist()[-1] == 48
    mask = attention_mask(48, window, cu_seqlens, 3, torch.device("cpu")).expand(3, 48, 48)
    forward = 2 * 2 * mask.sum().item() * 4 * 16  # two products, two FLOP each, of 4 heads of 16
    assert case.counts("forward", case.shape, 2)[1] == forward
    assert case.counts("backward", case.shape, 2)[1] == 2.5 * forward
    assert case.counts("both", case.shape, 2)[1] == 3.5 * forward
    q, k, v = case.inputs(case.shape, torch.bfloat16, torch.device("cpu"))
    assert case.counts("forward", case.shape, 2)[0] == n_bytes(q, k, v, q)
    assert case.counts("backward", case.shape, 2)[0] == n_bytes(q, k, v, q, q) + n_bytes(q, k, v)


# ------------------------------------------------------------------------------------------------------------ measuring


def test_quantiles_are_numpys():
    values = [3.0, 1.0, 2.0, 10.0, 4.0, 4.5]
    found = quantiles(values)
    assert [found[k] for k in ("p5", "median", "p95")] == pytest.approx(np.quantile(values, [0.05, 0.5, 0.95]))


def test_calls_are_interleaved_and_restored():
    """Providers take turns, in another order in some rounds; a restored one is restored before every run; one that
    raises stops no other."""
    order = []

    def broken(_):
        raise RuntimeError("no such luck")

    calls = {
        "a": Call(lambda i: order.append(f"a{i}"), 2, lambda i: order.append(f"restore{i}")),
        "b": Call(lambda i: order.append(f"b{i}"), 2),
        "c": Call(broken, 2),
    }
    clocks, turns = Clocks(CPU, rounds=6, least=2), []
    kernel_round = clocks._kernel_round
    clocks._kernel_round = lambda call, *more: (turns.append("ab"[call is calls["b"]]), kernel_round(call, *more))[1]
    results = clocks.time(calls)
    assert isinstance(results["c"], RuntimeError)
    assert {name: r["kernel_ms"]["n"] for name, r in results.items() if name != "c"} == {"a": 12, "b": 12}
    assert len(results["a"]["kernel_ms"]["rounds"]) == 6
    rounds = ["".join(turns[i : i + 2]) for i in range(2, len(turns), 2)]  # the first two are a look at each
    assert len(rounds) == 6 and set(rounds) == {"ab", "ba"}, turns
    for place, entry in enumerate(order):
        if entry[0] == "a":
            assert f"restore{entry[1]}" in order[:place][-4:]


def run_fakes(fakes: list[peers.Peer]) -> dict[str, dict]:
    """The "both" rows of SwiGLU with these providers, by name."""
    clocks = Clocks(CPU, rounds=1, least=1)
    ceilings = {"copy_gb_s": 1.0}
    rows = kernels.run_case(
        CPU, operations.OPERATIONS["swiglu"], "7b", SHAPE, fakes, ceilings, {}, torch.float32, clocks
    )
    return {row["provider"]: row for one in rows for row in one if row["mode"] == "both"}


def test_what_is_wrong_or_fails_or_is_absent_is_said_and_not_timed():
    def gone():
        raise ImportError("No module named 'gone'")

    def cannot():
        raise ValueError("needs a GPU")

    def breaks():
        raise TypeError("another version of something")

    def raises(gate_up):
        raise RuntimeError("misaligned\naddress")

    def wrong_gradient(gate_up):
        h = swiglu_reference(gate_up)
        return h + 1e-3 * (gate_up.chunk(2, -1)[0] - gate_up.chunk(2, -1)[0].detach())

    functions = ({
        "right": lambda: swiglu_reference,
        "gone": gone,
        "cannot": cannot,
        "breaks": breaks,
        "raises": lambda: raises,
        "wrong": lambda: wrong_gradient,
        "not finite": lambda: lambda x: swiglu_reference(x) * float("nan"),
        "short": lambda: lambda x: swiglu_reference(x)[:1],
    })  # fmt: skip
    rows = run_fakes([peers.Peer(name, load, False, "", name) for name, load in functions.items()])
    states = {name: row["status"] for name, row in rows.items()}
    assert states == {"right": "ok", "gone": "absent", "raises": "failed", "wrong": "wrong", "not finite": "wrong",
                      "short": "failed", "breaks": "failed", "cannot": "cannot run here"}  # fmt: skip
    case = kernels.KernelCase(CPU, operations.OPERATIONS["swiglu"], SHAPE, torch.float32)
    excluded = {"slow": "was still compiling after 60 s", "crashed": f"its process {kernels.BY_SIGNAL} 11"}
    fakes = [peers.Peer(name, lambda: swiglu_reference, False, "", name) for name in excluded]
    found = kernels.judge(case, fakes, excluded)[1]
    assert {name: state for name, (state, _) in found.items()} == {"slow": "not tried", "crashed": "failed"}
    assert rows["gone"]["reason"] == "ImportError: No module named 'gone'"
    assert rows["raises"]["reason"] == "RuntimeError: misaligned address"
    assert "gradient of input 0: error" in rows["wrong"]["reason"] and " h:" not in rows["wrong"]["reason"]
    assert all(("kernel_ms" in row) == (row["status"] == "ok") for row in rows.values())


def test_a_provider_that_overwrites_its_input_finds_it_whole_every_time():
    """And the others never see what it left: it works on tensors of its own."""
    seen = {"in place": [], "other": []}

    def in_place():
        def swiglu(gate_up):
            seen["in place"].append(gate_up.detach().abs().min().item())
            h = swiglu_reference(gate_up.clone())
            gate_up.data.zero_()  # past autograd, as a Triton kernel does
            return h

        return swiglu

    def other():
        def swiglu(gate_up):
            seen["other"].append(gate_up.detach().abs().min().item())
            return swiglu_reference(gate_up)

        return swiglu

    fakes = [peers.Peer("in place", in_place, True, "", "a"), peers.Peer("other", other, False, "", "b")]
    rows = run_fakes(fakes)
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    assert min(seen["other"]) > 0
    # restored before every timed run; a burst runs once through the sets, restored before it
    assert len(seen["in place"]) > 5 and min(seen["in place"]) > 0


def test_every_peer_says_how_it_is_called():
    for operation, listed in peers.PEERS.items():
        names = [peer.name for peer in listed]
        assert len(set(names)) == len(names) and names[0] == "halny", operation
        packages = {peer.package for peer in listed}
        assert packages >= {"halny", "PyTorch eager", "torch.compile"}
        if operation.startswith("adamw"):
            assert all("adamw_" in peer.call or "fused=True" in peer.call for peer in listed)
            continue
        assert packages >= {"torch native", "Liger-Kernel", "quack"}
        assert len({peer.call for peer in listed}) == len(listed)
        for peer in listed:
            modules = {"Liger-Kernel": "liger_kernel.", "quack": "quack", "cut-cross-entropy": "cut_cross_entropy."}
            assert modules.get(peer.package, "") in peer.call and "\n" not in peer.call, peer.call


def test_compiling_beforehand_names_only_who_hangs_or_crashes(tmp_path, monkeypatch):
    """One that raises is left in: it says what is wrong when it is measured."""
    script = tmp_path / "warm.py"
    script.write_text(
        "import os, sys, time\n"
        "assert sys.argv[1:3] == ['--warm', 'case']\n"
        "{'hangs': lambda: time.sleep(60), 'crashes': lambda: os.kill(os.getpid(), 11), 'works': int,\n"
        " 'raises': lambda: 1 / 0}[sys.argv[3]]()\n"
    )
    monkeypatch.setattr(kernels, "WARM_S", 2)
    jobs = [("case", name) for name in ("hangs", "crashes", "raises", "works")]
    assert kernels.warm_all(str(script), jobs, 2, lambda _: None) == {
        "case": {"hangs": "was still compiling after 2 s", "crashes": "its process was ended by signal 11"}
    }
    jobs = [("case", "hangs"), ("case", "works")]
    assert kernels.warm_all(str(script), jobs, 1, lambda _: None, budget_s=1) == {
        "case": {"hangs": "was still compiling after 1 s", "works": "no time was left to compile it"}
    }


def test_compiling_beforehand_runs_forward_and_backward():
    calls = []

    def loss(logits, labels):
        calls.append((logits.requires_grad, torch.is_grad_enabled(), logits.dtype))
        return operations.OPERATIONS["cross_entropy"].reference(logits, labels)

    kernels.run_once(CPU, operations.OPERATIONS["cross_entropy"], loss, SHAPE)
    assert calls == [(True, True, torch.bfloat16), (False, False, torch.bfloat16)]


# ------------------------------------------------------------------------------------------------- ahead of time, step


@pytest.mark.parametrize(
    "registers, shared, warps, expected",
    [
        # 80 x 32 = 2,560 registers a warp; 16,384 / 2,560 = 6 warps a partition, 24 in all: 3 programs of 8 warps
        (80, 8192, 8, 24 / 64),
        # 63 -> 2,048 a warp, 8 a partition, 32 in all: one program of 32 warps
        (63, 128, 32, 32 / 64),
        # registers would let 64 warps in; (100,000 + 1,024 -> 101,120) twice in 233,472 bytes: 2 programs of 4 warps
        (32, 100_000, 4, 8 / 64),
        # one warp a program: no more than 32 programs
        (16, 0, 1, 32 / 64),
        # a program of 1,024 threads with more than 64 registers each cannot start
        (65, 0, 32, 0.0),
    ],
)
def test_occupancy_by_hand(registers, shared, warps, expected):
    assert machine_code.resident_programs(registers, shared, warps) * warps / 64 == expected


LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;                 /* 0x0 */
        /*0010*/               @P0 BRA 0x{skip} ;                     /* 0x0 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0 */
        /*0030*/                   FMUL R4, R4, R5 ;                  /* 0x0 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;      /* 0x0 */
        /*0050*/                   LDG.E.64 R6, desc[UR4][R2.64] ;    /* 0x0 */
        /*0060*/                   LOP3.LUT R6, R6, R7, RZ, 0x3c, !PT ;  /* 0x0 */
        /*0070*/              @!P1 BRA 0x{again} ;                    /* 0x0 */
        /*0080*/              @!P2 BRA 0xa0 ;                         /* 0x0 */
        /*0090*/                   CALL.REL.NOINC 0xc0 ;              /* 0x0 */
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;   /* 0x0 */
        /*00b0*/                   EXIT ;                             /* 0x0 */
        /*00c0*/                   MUFU.RSQ R0, R0 ;                  /* 0x0 */
        /*00d0*/                   RET.REL.NODEC R8 0x0 ;             /* 0x0 */
        /*00e0*/                   BRA 0xe0;                          /* 0x0 */
"""


def test_the_path_taken_by_hand():
    straight = machine_code.instructions(LISTING.format(skip="a0", again="80"))
    path = machine_code.path_taken(straight)  # the branch that skips is shorter, the subroutine is for denormals
    assert path.instructions == 11 and path.alu == 1 and path.special == 0
    assert (path.early_bytes, path.load_bytes) == (16, 24)

    loop = machine_code.instructions(LISTING.format(skip="a0", again="20"))
    path = machine_code.path_taken(loop, 10)
    assert path.instructions == 2 + 10 * 6 + 3 and path.alu == 10
    assert (path.early_bytes, path.load_bytes) == (16, 24)
    with pytest.raises(ValueError, match="instructions 2 to 7 are a loop"):
        machine_code.path_taken(loop)

    idle = machine_code.instructions(LISTING.format(skip="a0", again="50"))  # nothing is multiplied in 5 .. 7
    assert machine_code.path_taken(idle, 10).instructions == 8


def test_every_kernel_is_compiled_ahead_of_time():
    """Those that account.py knows, which stops at others; and each limit is some case's."""
    cases = aot.cases()
    assert {launches[-1].kernel.__name__ for launches in cases.values()} == account.TRAFFIC.keys()
    assert aot.LIMITS.keys() == cases.keys()


def swiglu_specialised(start: int, width: int) -> tuple[dict, dict, dict]:
    """Of the forward kernel's launch on columns start .. of a wider bf16 tensor: types, constants, divisible by 16."""
    x = aot.meta(8, width, dtype=torch.bfloat16)
    (launch,) = aot.launches_of(lambda: swiglu(x[:, start : start + 64]))
    signature, constants, attributes, options, _ = aot.specialised(launch, "sm_90")
    assert options.num_warps == launch.constants["num_warps"]
    names = list(signature)
    return signature, constants, {names[i] for (i,), found in attributes.items() if ["tt.divisibility", 16] in found}


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels are not specialised")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_launches_are_specialised_as_on_a_gpu():
    signature, constants, divisible = swiglu_specialised(0, 128)
    pointers = [name for name, kind in signature.items() if kind == "*bf16"]
    (stride,) = [name for name, kind in signature.items() if kind == "i32"]
    assert len(pointers) == 2 and sorted(constants.values()) == [32, 256]  # F, BLOCK_F
    assert divisible == {*pointers, stride}
    assert swiglu_specialised(8, 128)[2] == divisible  # 16 bytes on
    assert swiglu_specialised(4, 128)[2] == divisible - {pointers[0]}  # 8 bytes on
    assert swiglu_specialised(0, 120)[2] == divisible - {stride}

    x, cos = aot.meta(1, 2, 3, 16, dtype=torch.float32), aot.meta(2, 8, dtype=torch.float32)
    positions = aot.meta(1, 2, dtype=torch.int64)
    (launch,) = aot.launches_of(lambda: rope_qkv(x, cos, cos, 1, 1, positions))
    signature, constants, *_ = aot.specialised(launch, "sm_90")
    place = list(signature).index("positions_position_stride")
    assert signature["positions_position_stride"] == "constexpr" and constants[(place,)] == 1


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels are not specialised")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_launch_of_no_case_is_reported():
    def launches(n: int, dtype: torch.dtype = torch.bfloat16):
        return aot.launches_of(lambda: swiglu(aot.meta(4, n, dtype=dtype)))

    case = launches(4096)
    assert aot.of_no_case(launches(4096), case) == []
    for other in (launches(8192), launches(4096, torch.float32)):
        (found,) = aot.of_no_case([*case, *other], case)
        assert found.startswith("swiglu_forward_kernel")


@pytest.mark.parametrize(
    "kernel, expected",
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_nt_align8>(...)", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, float, true>(...)", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_64x128x128_4x1x1", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(...)", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("rms_norm_backward_kernel", "norm, RoPE, SwiGLU"),
        ("rms_norm_dweight_kernel", "norm, RoPE, SwiGLU"),
        ("rope_kernel", "norm, RoPE, SwiGLU"),
        ("swiglu_backward_kernel", "norm, RoPE, SwiGLU"),
        ("cross_entropy_kernel", "loss"),
        ("scale_kernel", "loss"),
        ("adamw_kernel", "optimizer"),
        ("add_rounded_kernel", "optimizer"),
        ("block_norms_kernel", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
         "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, "
         "(at::native::ADAM_MODE)1, false>, float>", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, "
         "LpNormFunctor<float, (NormType)1, float, 1, 1, 0>>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
         "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::OpaqueType<2u>>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "other"),
        ("void at::native::(anonymous namespace)::embedding_backward_feature_kernel<c10::BFloat16>", "other"),
    ],
)  # fmt: skip
def test_kernels_are_assigned_by_name(kernel, expected):
    assert breakdown.category(kernel) == expected


def test_our_kernels_have_a_category():
    """Each kernel of kernels/ has one, so a new one is not lost in "other", where the embedding's floor is."""
    for name, launches in aot.cases().items():
        is_other = breakdown.category(launches[-1].kernel.__name__) == "other"
        assert is_other == name.startswith("embedding"), name


def test_breakdown_counts_idle_once_and_names_the_rest():
    kernels_run = [("nvjet_a", 0.0, 4.0), ("ncclDevKernel_AllGather", 3.0, 6.0), ("mystery", 8.0, 9.0)]
    found = breakdown.breakdown(kernels_run, wall_ms=10.0)
    assert found["categories_ms"]["matmul"] == 4 and found["categories_ms"]["communication"] == 3
    assert found["idle_ms"] == 10 - (6 + 1)
    assert [k["kernel"] for k in found["other"]] == ["mystery"]


# --------------------------------------------------------------------------------------------------------------- report


def machine() -> dict:
    return {"date": "2026-01-02T03:04:05Z", "device": "Fixture GPU", "versions": {"torch": "2.0", "quack-kernels": "9"},
            "commit": "abc", "command": "python bench/kernels.py"}  # fmt: skip


def times(median: float) -> dict:
    return {"median": median, "p5": 0.99 * median, "p95": 1.2 * median, "n": 10, "rounds": [median]}


def kernel_result() -> dict:
    """A made-up file of every operation and set: halny 0.5 ms, peers slower or without a figure."""
    rows = []
    for operation, name, shape in operations.cases(operations.SETS, ""):
        for mode in operation.modes:
            n, flops = operation.counts(mode, shape, 2)
            for place, peer in enumerate(peers.PEERS[operation.name]):
                row = {"operation": operation.name, "set": name, "shape": shape, "dtype": "bfloat16", "mode": mode,
                       "provider": peer.name, "package": peer.package, "call": peer.call, "bytes": n, "flops": flops,
                       "ceiling": operation.ceiling, "status": "ok", "reason": ""}  # fmt: skip
                if peer.package == "quack":
                    row |= {"status": "absent", "reason": "No module named 'quack'"}
                else:
                    ms = 0.5 if (operation.name, name, mode) == ("swiglu", "7b", "forward") else n / 2.7e9
                    ms = (flops / 6e11 or ms) * (1 + 0.2 * place)
                    rate = {"gb_s": n / ms / 1e6, "tflop_s": flops / ms / 1e9}
                    row |= rate | {"kernel_ms": times(ms), "wall_ms": times(2 * ms), "host_ms": times(0.01),
                                   "peak_bytes": 2**30, "errors": {}, "of_ceiling": rate["gb_s"] / 3000}  # fmt: skip
                rows.append(row)
    ceilings = {"copy_gb_s": 3000.0, "step_tflop_s": 700.0, "head_tflop_s": 650.0, "square_tflop_s": 750.0}
    return {"format": 1, "kind": "kernels", "smoke": False, "machine": machine(), "ceilings": ceilings, "rows": rows}


def attention_result() -> dict:
    result, rows = kernel_result(), []
    for case in bench_attention.cases(smoke=False):
        for mode in case.modes:
            n, flops = case.counts(mode, case.shape, 2)
            for place, name in enumerate(("halny", "flash3", "cudnn", "flex")):
                ms = flops / 1e9 / (600 - 90 * place)
                row = {"operation": "attention", "set": bench_attention.title(case.shape), "shape": case.shape,
                       "dtype": "bfloat16", "mode": mode, "provider": name, "package": name, "call": "attention()",
                       "bytes": n, "flops": flops, "ceiling": "square_tflop_s", "status": "ok", "reason": "",
                       "kernel_ms": times(ms), "wall_ms": times(ms), "host_ms": times(0.1), "gb_s": 1.0,
                       "tflop_s": flops / ms / 1e9, "of_ceiling": 0.7, "peak_bytes": None, "errors": {}}  # fmt: skip
                rows.append(row)
    return result | {"rows": rows}


def step_result() -> dict:
    found = {
        "case": "one-gpu-bf16",
        "mode": "one-gpu",
        "moments": "bf16",
        "status": "ok",
        "reason": "",
        "label": "training on one GPU: 13 of Mistral-7B's 32 layers",
        "tokens_per_second": 23456.0,
        "step_ms": times(700.0),
        "mfu": 0.52,
        "mfu_palm": 0.57,
        "of_ceiling": 0.7,
        "ceiling_before": {"tflop_s": 700.0},
        "ceiling_after": {"tflop_s": 700.0},
        "n_layers": 13,
        "micro_batch": 4,
        "seq_len": 4096,
        "flops_per_token": 2e10,
        "peak_memory_bytes": 70 * 2**30,
    }
    return {"format": 1, "kind": "step", "smoke": False, "machine": machine(), "rows": [found]}  # fmt: skip


def profile_result() -> dict:
    found = breakdown.breakdown([("nvjet_a", 0.0, 6.0), ("mystery", 6.0, 7.0)], 10.0)
    least = breakdown.Floors(dict.fromkeys(breakdown.PRECEDENCE, 0.0) | {"matmul": 5.0, "idle": 0.0}, "made up")
    row = {k: step_result()["rows"][0][k] for k in ("case", "mode", "moments", "status", "reason", "label")}
    found |= {"gaps": breakdown.gaps(found, least), "floors": {"ms": least.ms, "basis": least.basis}}
    about = {"format": 1, "kind": "profile", "smoke": False, "machine": machine()}
    return about | {"profiles": [row | found]}


def write_results(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    aot_row = {"kernel": "rope 32/8x128 bf16", "arch": "sm_90", "warps": 4, "registers": 42, "spills": 0,
               "shared_bytes": 0, "loads": {"16": 10, "4": 1}, "stores": {"16": 2}, "occupancy": 0.625}  # fmt: skip
    about = {"format": 1, "smoke": False, "machine": machine()}
    for name, value in {
        "kernels": kernel_result(),
        "attention": attention_result(),
        "step": step_result(),
        "profile": profile_result(),
        "aot": about | {"kind": "aot", "rows": [aot_row]},
    }.items():
        write_json(folder / f"{name}.json", value)
    return folder


def test_report_renders_tables_and_plots_from_files_alone(tmp_path, capsys):
    from PIL import Image

    folder = write_results(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(folder), "--write", str(readme)]) == 0
    short, text = readme.read_text(), (tmp_path / report.FULL).read_text()
    assert short.startswith(f"before\n{report.BEGIN}\n") and short.endswith(f"{report.END}\nafter\n")
    assert "\nold\n" not in short and f"[{report.FULL}]({report.FULL})" in short
    assert (
        "| swiglu, forward | 0.500 (0.495 to 0.600) |" in short and "| PyTorch eager, " in short and "1.20 |" in short
    )
    assert "device copy 3,000 GB/s" in short and "Fixture GPU, 2026-01-02, commit abc" in short
    cases = [
        line for line in short.splitlines() if re.match(r"\| (swiglu|rms_norm|rope|adamw|.*cross_entropy), ", line)
    ]
    modes = {(o.name, m) for o, name, _ in operations.cases(operations.SETS, "") if name == "7b" for m in o.modes}
    assert len({line.split("|")[1] for line in cases}) == len(cases) <= len(modes)  # a line each
    assert "| 4 x 4096, forward | " in short and "4 x 4096, both" not in short
    assert "sm_90" not in short and "quack" not in short.replace("quack-kernels 9", "")
    n_bytes = operations.minimum("swiglu", "forward", operations.SETS["7b"], 2)[0]
    row = next(line for line in text.splitlines() if line.startswith("| swiglu, 7b, forward"))
    assert "**halny**" in row and f"{n_bytes / 0.5 / 1e6:,.0f} GB/s" in row and "0.500 (0.495 to 0.600)" in row
    assert "device copy 3,000 GB/s" in text and "Fixture GPU, 2026-01-02, commit abc" in text
    assert "- rms_norm, quack: absent. No module named 'quack'" in text
    assert "13 of Mistral-7B's 32 layers | 23,456 |" in text and "| matmul | 6.00 | 6.00 | 5.00 | +1.00 |" in text
    assert "| idle | 3.00 | 0.00 | 0.00 | +3.00 |" in text and "`mystery` 1.00 ms" in text
    assert "| rope 32/8x128 bf16 | sm_90 | 4 | 42 | 0 | 0 | 62% | 10x16 1x4 / 2x16 |" in text
    made = sorted(folder.glob("*.png"))
    assert [p.name for p in made] == ["attention.png", "bandwidth.png", "linear-cross-entropy.png"]
    for path in made:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 900
        assert (pixels == (0xC2, 0x41, 0x0C)).all(-1).sum() > 1000, f"{path.name} has no bar of halny's colour"


def spoil(folder: Path, name: str, change) -> None:
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("kernels.json", lambda v: v["rows"][3].pop("gb_s"), "kernels.json.rows[3].gb_s is missing"),
        ("kernels.json", lambda v: v["rows"][0].update(status=3), "kernels.json.rows[0].status must be str, got 3"),
        ("kernels.json", lambda v: v["rows"][0]["kernel_ms"].update(median="fast"), "kernel_ms.median must be"),
        ("kernels.json", lambda v: v.pop("ceilings"), "kernels.json.ceilings is missing"),
        ("attention.json", lambda v: v["machine"].pop("commit"), "attention.json.machine.commit is missing"),
        ("step.json", lambda v: v["rows"][0].update(tokens_per_second=True), "rows[0].tokens_per_second must be"),
        ("step.json", lambda v: v["rows"][0].update(mode="fast"), "label must say 'one that is known'"),
        ("profile.json", lambda v: v["profiles"][0]["gaps"][1].pop("floor_ms"), "gaps[1].floor_ms is missing"),
        ("aot.json", lambda v: v["rows"][0].pop("occupancy"), "aot.json.rows[0].occupancy is missing"),
        ("aot.json", lambda v: v["rows"][0].update(speed=1), "aot.json.rows[0].speed is no field of a MachineCode"),
        ("step.json", lambda v: v["rows"][0].update(mfu=float("nan")), "rows[0].mfu must be finite, got nan"),
        (
            "kernels.json",
            lambda v: v["rows"][2]["errors"].update(h={"error": float("inf")}),
            "[2].errors.h.error must be",
        ),
        ("profile.json", lambda v: v.update(kind="step"), "profile.json.rows is missing"),
        ("step.json", lambda v: v.update(format=2), "step.json has format 2"),
        ("kernels.json", lambda v: v.update(smoke=True), "results/kernels.json is a rehearsal (smoke)"),
    ],
)
def test_a_file_that_lacks_something_is_refused_by_name(tmp_path, capsys, name, change, message):
    folder = write_results(tmp_path / "results")
    spoil(folder, name, change)
    assert report.main([str(folder)]) == 2
    heard = capsys.readouterr()
    assert message in heard.err and heard.err.count("\n") == 1 and not heard.out
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize(
    "path", sorted(report.RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_file_that_is_committed_is_read(path):
    assert not read_result(path)["smoke"]


def test_report_without_results_says_so(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 0
    heard = capsys.readouterr().out
    assert "nothing has been measured" in heard and "|" not in heard


def test_markers_are_needed(tmp_path, capsys):
    folder, readme = write_results(tmp_path / "results"), tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert report.main([str(folder), "--write", str(readme)]) == 2
    assert "must hold the lines" in capsys.readouterr().err and readme.read_text() == "no markers\n"


# ------------------------------------------------------------------------------------------------------------ the visit


def part(name: str, code: str, share: float = 1) -> gpu_pass.Part:
    return gpu_pass.Part(name, share, lambda visit, seconds: [sys.executable, "-c", code])


@pytest.mark.slow
def test_a_whole_visit_rehearsed(tmp_path, capsys):
    """Parts at tiny sizes, and one more that breaks: the others still run, files are whole, the code says 1.

    train.py's part is rehearsed in test_bench_trainer.py, and the last tests are as the first.
    """
    broken = part("broken", "import sys; print('about to fail'); sys.exit('no luck')")
    chosen = [p for p in gpu_pass.PARTS if p.name not in ("trainer", "last tests")]
    parts = (chosen[0], broken, *chosen[1:])
    assert gpu_pass.main(["--smoke", "--out", str(tmp_path), "--visit-s", "700"], parts) == 1
    printed = capsys.readouterr().out
    ran = read_result(tmp_path / "pass.json")
    states = {name: entry["status"] for name, entry in ran["parts"].items()}
    log = (tmp_path / "log.txt").read_text()
    assert states == {p.name: "failed" if p is broken else "ok" for p in parts}, log[-3000:]
    assert ran["parts"]["broken"]["said"] == "no luck" and ran["parts"]["tests"]["skipped"] > 0
    modes = [row["mode"] for row in read_result(tmp_path / "step.json")["rows"] if row["status"] == "ok"]
    assert list(dict.fromkeys(modes)) == list(MODE_LABELS)
    others = {row["name"]: row for row in read_result(tmp_path / "step.json")["opponents"]}
    assert [a["micro_batch"] for a in others["hf-bf16"]["attempts"]] == [2, 1]
    assert others["hf-bf16"]["status"] == "ok" and others["liger-bf16"]["status"] == "absent"
    gaps = read_result(tmp_path / "profile.json")["profiles"][0]["gaps"]
    assert {row["part"] for row in gaps} == {*breakdown.PRECEDENCE, "idle"}
    names = ("kernels", "attention", "step", "profile")
    results = {name: read_result(tmp_path / f"{name}.json") for name in names}
    assert all(results[name]["smoke"] and "no performance figure" in results[name]["note"] for name in names)
    ours = [row for row in results["kernels"]["rows"] if row["package"] == "halny"]
    assert {row["operation"] for row in ours} == set(operations.OPERATIONS)
    assert all(row["status"] == "ok" for row in ours)
    assert {row["status"] for row in results["kernels"]["rows"]} >= {"ok", "absent"}
    assert len(list(tmp_path.iterdir())) <= 8
    last = printed[printed.rindex("smoke: no performance figure") :]
    assert len(last.splitlines()) <= 60 and "broken" in last and not re.search(r"\d ms|GB/s|FLOP|tokens/s", last)
    assert report.main([str(tmp_path)]) == 2  # a rehearsal is not rendered


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_wrote(tmp_path):
    code = f"""
import pathlib, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", child])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
pathlib.Path({str(tmp_path / "kernels.json")!r}).write_text("partial")
time.sleep(600)
"""
    result = {"parts": {}}
    visit = gpu_pass.Visit(True, tmp_path, tmp_path, "abc")
    began = time.monotonic()
    with (tmp_path / "log.txt").open("w+") as log:
        parts = [part("hangs", code), part("after", "print('still here')", share=2)]
        gpu_pass.run_parts(visit, parts, 24, result, log)
    assert time.monotonic() - began < 24
    states = {name: entry["status"] for name, entry in result["parts"].items()}
    assert states == {"hangs": "ended at its limit", "after": "ok"}
    assert result["parts"]["after"]["said"] == "still here"
    assert (tmp_path / "kernels.json").read_text() == "partial"
    child = int((tmp_path / "child").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
    assert not state or state.startswith("Z"), "the part's child outlived it"


def test_what_is_not_timed_runs_side_by_side(tmp_path):
    """Each of two parts waits for the other; the third begins when both have ended. Log and states are whole."""
    code = f"""
import pathlib, sys, time
here = pathlib.Path({str(tmp_path)!r})
(here / sys.argv[1]).touch()
while not (here / sys.argv[2]).exists():
    time.sleep(0.01)
print("met", sys.argv[2])
"""

    def waits(name: str, other: str) -> gpu_pass.Part:
        return gpu_pass.Part(name, 1, lambda visit, seconds: [sys.executable, "-c", code, name, other], timed=False)

    last = part("last", f"import os; print(sorted(os.listdir({str(tmp_path)!r})))")
    result = {"parts": {}}
    with (tmp_path / "log.txt").open("w+") as log:
        visit = gpu_pass.Visit(True, tmp_path, tmp_path, "abc")
        gpu_pass.run_parts(visit, [waits("one", "two"), waits("two", "one"), last], 60, result, log)
    said = {name: (entry["status"], entry["said"]) for name, entry in result["parts"].items()}
    assert said["one"] == ("ok", "met two") and said["two"] == ("ok", "met one")
    assert "'one'" in said["last"][1] and "'two'" in said["last"][1]
    assert [p.name for p in gpu_pass.groups_of(list(gpu_pass.PARTS))[0]] == ["step"]


def test_a_part_that_fails_says_why():
    traceback = ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: no such thing", "bye"]
    assert gpu_pass.last_words(traceback) == "ValueError: no such thing"
    assert gpu_pass.last_words(["3 failed, 2 passed", "KeyboardInterrupt"]) == "3 failed, 2 passed"
    interrupted = ["step 5 of 9", "Traceback (most recent call last):", "  os.unlink(entry)", "KeyboardInterrupt"]
    assert gpu_pass.last_words(interrupted) == "step 5 of 9"
    assert gpu_pass.last_words([]) == ""


def test_tests_are_counted_from_their_lines():
    lines = [
        "$ python -m pytest tests -m gpu", "tests/test_a.py::test_b[x y-None] PASSED   [  1%]",
        "tests/test_a.py::test_c FAILED [  2%]", "tests/test_a.py::test_d SKIPPED (marked gpu: ...)  [  3%]",
        "[gw1] [  4%] ERROR tests/test_a.py::test_e", "tests/test_a.py::test_f",
    ]  # fmt: skip
    counts = gpu_pass.test_counts(lines)
    assert [counts[k] for k in ("passed", "failed", "errors", "skipped")] == [1, 1, 1, 1]
    assert counts["failing"] == ["tests/test_a.py::test_c", "tests/test_a.py::test_e"]


def test_the_summary_has_the_reports_tables_and_how_each_part_ended(tmp_path):
    write_results(tmp_path)
    visit = gpu_pass.Visit(False, tmp_path, tmp_path, "abc")
    entry = {"status": "failed", "seconds": 1.0, "said": "x" * 300}
    tests = entry | {
        "passed": 1,
        "failed": 30,
        "errors": 0,
        "skipped": 0,
        "failing": [f"tests/t.py::t{i}" for i in range(30)],
    }
    profile = entry | {"said": "profile"}
    parts = {"tests": tests, "kernels": entry, "attention": entry, "step": entry, "profile": profile}
    lines = gpu_pass.summary(visit, {"machine": machine(), "parts": parts})
    assert sum("failed: tests/t.py" in line for line in lines) == 10
    swiglu = next(line for line in lines if "| swiglu, forward" in line)
    assert "| 0.500 (0.495 to 0.600) |" in swiglu and "PyTorch eager, " in swiglu and swiglu.endswith("| 1.20 |")
    assert any(line.startswith("| 1 x 32768, window 4096, documents, forward |") for line in lines)
    assert "one profiled step of 10.0 ms: matmul 6.0 (5.0), idle 3.0 (0.0)" in "\n".join(lines)
    assert any("| training on one GPU: 13 of Mistral-7B's 32 layers | 23,456 |" in line for line in lines)
    assert "  1 passed, 30 failed, 0 errors, 0 skipped" in lines


def test_a_name_that_does_not_exist_is_refused(capsys, tmp_path):
    for main in (kernels.main, bench_attention.main):
        assert main(["--smoke", "--only", "swigloo", "--out", str(tmp_path / "out")]) == 2
        assert "--only 'swigloo' is part of no name; there are" in capsys.readouterr().err
    assert step.main(["--smoke", "--layers", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--layers must be at least 1, got 0" in capsys.readouterr().err
    assert gpu_pass.main(["--smoke", "--only", "tests,kernel", "--out", str(tmp_path / "out")]) == 2
    assert gpu_pass.main(["--smoke", "--visit-s", "-1", "--out", str(tmp_path / "out")]) == 2
    heard = capsys.readouterr().err
    assert "--only kernel: there are step, tests" in heard and "--visit-s must be positive, got -1" in heard
    assert not (tmp_path / "out").exists()


def test_the_everyday_interface():
    """``pytest bench --benchmark-only``: what the compiler makes keeps its graph, absent peers are skipped by name."""
    command = ["-m", "pytest", "bench", "--benchmark-only", "-p", "no:cacheprovider", "-k", "rms_norm-backward", "-rs"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stdout[-3000:]
        return
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-3000:]
    assert "no GPU: tiny sizes on a CPU" in done.stdout
    assert "needs a GPU" in done.stdout or "absent: ModuleNotFoundError" in done.stdout


def test_a_command_can_be_repeated_elsewhere():
    paths = [str(ROOT / "bench" / "kernels.py"), "/somewhere/else/out", "--only", "swiglu"]
    assert [repeatable(p) for p in paths] == ["bench/kernels.py", "out", "--only", "swiglu"]


@pytest.mark.parametrize("script", ["kernels", "attention", "step", "opponents", "gpu_pass"])
def test_without_a_gpu_nothing_starts_and_nobody_elses_package_is_shadowed(script, tmp_path):
    """One line and code 2 without a GPU or --smoke. And bench/kernels.py is not what ``import kernels`` finds.

    transformers imports Hugging Face's package of that name where it is installed; here a stand-in further down the
    path, imported once more at the very end of the script.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'the stand-in'\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\n\n\ndef last(*code):\n    import kernels\n\n    print(kernels.WHOSE, flush=True)\n"
        "    if code:\n        leave(*code)\n\n\nleave, os._exit = os._exit, last\natexit.register(last)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, f"bench/{script}.py", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
    assert done.stdout == "the stand-in\n"


def test_the_report_shows_convergence(tmp_path):
    """The file that is in the repository; and none that lacks a number."""
    source = report.RESULTS / "2026-11-25-cpu" / "convergence.json"
    result = json.loads(source.read_text())
    text = report.markdown(merge.merge(merge.read_folders([source.parent])))
    row = next(row for row in result["summary"] if row["optimizer"] == "8bit")
    assert f"| 8bit | {row['held_out_loss']:.3f} | {row['spread']:.3f} | {row['difference']:+.3f} |" in text
    del row["difference"]
    (tmp_path / "convergence.json").write_text(json.dumps(result))
    with pytest.raises(BadResult, match=r"convergence.json.summary\[3\].difference is missing"):
        merge.read_folders([tmp_path])


def test_the_report_shows_averaging(tmp_path):
    """The file that is in the repository, beside the losses of convergence.py; and none that lacks a number."""
    source = report.RESULTS / "2026-11-28-cpu" / "averaging.json"
    result = json.loads(source.read_text())
    text = report.markdown(merge.merge(merge.read_folders([source.parent, report.RESULTS / "2026-11-25-cpu"])))
    assert text.index("### Convergence: CPU") < text.index("### Averaging: CPU")
    setting, row = result["setting"], result["summary"][-1]
    assert f"weights in {setting['dtype']}, {setting['steps']} steps" in text and "weights in bf16, 400 steps" in text
    figures = f"{row['held_out_loss']:.3f} | {row['spread']:.3f} | {row['difference']:+.3f} |"
    assert row["what"] == "decayed" and f"| {row['step']} | decayed | {figures}" in text
    for change, message in (
        (lambda v: v["summary"][3].pop("difference"), r"averaging.json.summary\[3\].difference is missing"),
        (lambda v: v["summary"][0].update(step="last"), r"averaging.json.summary\[0\].step must be int, got 'last'"),
        (lambda v: v["setting"].pop("dtype"), r"averaging.json.setting.dtype is missing"),
    ):
        damaged = json.loads(source.read_text())
        change(damaged)
        (tmp_path / "averaging.json").write_text(json.dumps(damaged))
        with pytest.raises(BadResult, match=message):
            merge.read_folders([tmp_path])


# ------------------------------------------------------------------------------------------------------ several visits

H100 = "NVIDIA H100 80GB HBM3"


def at(value: dict, date: str, commit: str, device: str = H100) -> dict:
    """A result file as it would be of another visit."""
    found = dict(date=date, commit=commit, device=device)
    return json.loads(json.dumps(value | {"machine": value["machine"] | found}))


def visits(results: Path) -> list[Path]:
    """Two visits to a GPU, the second partial, whose folder sorts first; one to another GPU; what a CPU left."""
    first, second = results / "2026-01-02-GPU", results / "2026-01-02-AAA-partial"
    other, cpu = results / "2026-01-01-other", results / "2026-01-03-cpu"
    early, late = ("2026-01-02T03:04:05Z", "abc"), ("2026-01-02T05:00:00Z", "def")
    for name, value in {"kernels": kernel_result(), "attention": attention_result(), "step": step_result()}.items():
        write_json(first / f"{name}.json", at(value, *early))
    profile = profile_result()
    profile["profiles"][0] |= {"n_layers": 32, "micro_batch": 4, "seq_len": 4096, "ceiling_before": {"tflop_s": 777.0}}
    write_json(first / "profile.json", at(profile, *early))
    entry = {"status": "failed", "seconds": 80.0, "said": "1 failed | really", "passed": 41, "failed": 1, "errors": 0,
             "skipped": 2, "failing": ["tests/test_a.py::test_b[x]"]}  # fmt: skip
    ended = {"status": "ok", "seconds": 9.0, "said": "done"}
    about = {"format": 1, "smoke": False, "machine": machine()}
    visit = about | {"kind": "pass", "parts": {"tests": entry, "kernels": ended}}
    write_json(first / "pass.json", at(visit, *early))

    again = at(kernel_result(), *late)
    again["rows"] = [row for row in again["rows"] if row["operation"] in ("swiglu", "rms_norm") and row["set"] == "7b"]
    for row in again["rows"]:
        if (row["operation"], row["package"]) == ("rms_norm", "halny"):
            row.update(status="failed", reason="RuntimeError: no luck")
        elif (row["operation"], row["provider"]) == ("rms_norm", "PyTorch eager"):
            row.update(status="wrong", reason="out: error 2 above the bound 1")
        elif row["operation"] == "swiglu" and row["package"] == "halny":
            row["kernel_ms"] = times(0.25)
    again["ceilings"] |= {"copy_gb_s": 2950.0, "step_tflop_s": 701.0}
    again |= {"not_reached": ["adamw, fp32 7b", "nobody 7b"], "broken": ["rope 7b: OutOfMemoryError: all of it"]}
    write_json(second / "kernels.json", again)
    step_file = at(step_result(), *late)
    step_file["rows"].append(step_file["rows"][0] | {"label": "training on one GPU: accumulating"})
    step_file["rows"][0].update(status="failed", reason="OutOfMemoryError: this time")
    write_json(second / "step.json", step_file)
    resumed = {"name": "resumes", "status": "ok", "seconds": 31.5, "reason": "bit for bit", "from_s": 0.0, "to_s": 31.5,
               "command": "torchrun train.py", "said": ["much"],
               "figures": {"losses": [9.0] * 9, "tokens_per_second": [4321, 4330], "summary": {}}}  # fmt: skip
    tried = [resumed, resumed | {"name": "fits", "status": "cannot run here", "reason": "", "figures": {}}]
    write_json(second / "trainer.json", at(about | {"kind": "trainer", "rows": tried}, *late))

    write_json(other / "attention.json", at(attention_result(), "2026-01-01T00:00:00Z", "abb", "Other GPU"))
    cpu.mkdir()
    convergence = report.RESULTS / "2026-11-25-cpu" / "convergence.json"
    (cpu / "convergence.json").write_text(convergence.read_text())
    return [first, second, other, cpu]


def test_nothing_is_lost_of_several_visits(tmp_path, monkeypatch):
    """Each row is there with its machine; the newest by date has it; a figure survives an attempt that failed later."""
    results, readme = tmp_path / "results", tmp_path / "README.md"
    folders = visits(results)
    devices = merge.merge(merge.read_folders(folders))
    assert [device.name for device in devices] == [H100, "Other GPU", "CPU"]
    gpu = devices[0]
    first = {tuple(r[k] for k in ("operation", "set", "mode", "provider")): r for r in kernel_result()["rows"]}
    merged = {tuple(r[k] for k in ("operation", "set", "mode", "provider")): r for r in gpu.sections["kernels"]}
    assert merged.keys() == first.keys() and len(gpu.sections["kernels"]) == len(merged)
    for key, row in merged.items():
        repeated = key[0] in ("swiglu", "rms_norm") and key[1] == "7b"
        kept = key[0] == "rms_norm" and row["package"] == "halny"
        commit = "def" if repeated and not kept else "abc"
        assert row["source"].machine["commit"] == commit, key
        assert bool(row["since"]) == (repeated and kept)
    assert merged["rms_norm", "7b", "forward", "halny"]["status"] == "ok"
    assert merged["rms_norm", "7b", "forward", "PyTorch eager"]["status"] == "wrong"
    assert merged["swiglu", "7b", "forward", "halny"]["kernel_ms"]["median"] == 0.25
    assert [(row["label"][-12:], row["source"].machine["commit"]) for row in gpu.sections["step"]] == [
        ("'s 32 layers", "abc"), ("accumulating", "def")
    ]  # fmt: skip
    assert {(one["case"], one["said"]) for one in gpu.unmeasured} == {
        ("nobody 7b", "not reached"), ("rope 7b", "OutOfMemoryError: all of it")
    }  # fmt: skip

    monkeypatch.setattr(report, "RESULTS", results)
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main(["--write", str(readme)]) == 0
    short, full = readme.read_text(), (results / report.FULL).read_text()
    assert "(results/RESULTS.md)" in short
    for text in (short, full):
        titles = [line for line in text.splitlines() if line.startswith("### ")]
        assert titles.index(f"### Kernels: {H100}") < titles.index("### Attention: Other GPU") < len(titles) - 1
        assert titles[-1] == "### Convergence: CPU" and f"### The trainer itself: {H100}" in titles
        assert f"- run 1: {H100}, 2026-01-02 03:04, commit abc" in text and "device copy 3,000 GB/s" in text
        assert f"- run 2: {H100}, 2026-01-02 05:00, commit def" in text and "device copy 2,950 GB/s" in text
        assert "rms_norm, 7b, both, halny: failed on 2026-01-02 05:00, commit def" in text
        assert "commit def; the figure is of 2026-01-02 03:04, commit abc. RuntimeError: no luck" in text
        assert re.search(r"^\| training on one GPU: 13 of .* † \| 23,456 .* \| 1 \|$", text, re.M)
        assert re.search(r"^\| training on one GPU: accumulating \| 23,456 .* \| 2 \|$", text, re.M)
        assert "OutOfMemoryError: this time" in text
        assert "GPU tests: 41 passed, 1 failed, 0 errors, 2 skipped; 2026-01-02 03:04, commit abc" in text
        assert "- `tests/test_a.py::test_b[x]`" in text
        figures = "" if text is short else "; tokens per second 4,321 and 4,330"
        assert f"| resumes | ok | 32 | bit for bit{figures} |" in text
        assert "| fits | cannot run here | 32 |  |" in text
        assert "rope 7b: OutOfMemoryError: all of it (run of 2026-01-02 05:00)" in text or text is short
    assert re.search(r"^\| rms_norm, 7b, forward \| \*\*halny\*\* † \|.*\| 1 \|$", full, re.M)
    assert re.search(r"^\| swiglu, 7b, forward \| \*\*halny\*\* \| 0.250 .*\| 2 \|$", full, re.M)
    assert re.search(r"^\| swiglu, forward \| 0.250 .*\| 2 \|$", short, re.M)
    assert "| 2026-01-02-GPU/step.json | NVIDIA H100 80GB HBM3 | 2026-01-02 03:04 | abc | 1 of 1 |" in full
    assert "1 failed \\| really" in full
    assert "](2026-01-02-AAA-partial/bandwidth.png)" in full and (folders[1] / "bandwidth.png").exists()
    assert (folders[2] / "attention.png").exists() and not list(folders[0].glob("*.png"))

    assert report.main(["--write", str(readme)]) == 0  # once more: the same
    assert (readme.read_text(), (results / report.FULL).read_text()) == (short, full)
    (results / "2026-01-04-bad").mkdir()
    (results / "2026-01-04-bad" / "step.json").write_text("{")
    assert report.main(["--write", str(readme)]) == 2 and readme.read_text() == short


def test_attention_is_a_column_a_backend(tmp_path):
    """ "auto" is the backend that it took, in bold; a backend that cannot do a case has an empty cell there."""

    def row(name: str, mode: str, provider: str, tflop_s: float, status: str = "ok") -> dict:
        ms = {"median": 1.2345, "p5": 1.2, "p95": 1.3}
        package = provider if provider == "halny" else ""
        call = 'attention(q, k, v, backend="auto") -> flash4' if provider == "halny" else ""
        named = {"operation": "attention", "set": name, "mode": mode, "provider": provider, "package": package}
        timed = {"status": status, "call": call, "tflop_s": tflop_s, "kernel_ms": ms}
        return named | timed | {"source": source, "since": None}

    source = merge.Source(tmp_path, "attention.json", machine(), None, 5)
    rows = [
        *(row("a", "forward", *one) for one in (("halny", 700.0), ("flash4", 600.0), ("cudnn", 500.0))),
        row("a", "both", "flash4", 1.0),
        *(
            row("b", "forward", *one)
            for one in (("halny", 300.0), ("flash4", 301.0), ("cudnn", 0.0, "cannot run here"))
        ),
    ]
    rows = merge.once(rows)
    assert [row["provider"] for row in rows if row["set"] == "b"] == ["halny, flash4", "cudnn"]
    assert merge.once(rows) == rows
    assert report.backends_table(rows).splitlines() == [
        "| case | flash4 | cudnn |",
        "| --- | --: | --: |",
        "| a, forward | **600 in 1.23 ms** | 500 in 1.23 ms |",
        "| b, forward | **301 in 1.23 ms** |  |",
    ]


def test_the_plans_rates_stand_beside_the_measured(tmp_path):
    devices = merge.merge(merge.read_folders(visits(tmp_path)))
    text = "\n".join(report.rates_parts(devices[0]))
    peak = 989.5  # TFLOP/s in bf16, dense

    def line(what: str) -> list[str]:
        found = next(one for one in text.splitlines() if one.startswith(f"| {what}"))
        return [cell.strip() for cell in found.strip("|").split("|")]

    assert line("matrix products alone, the step")[1:4] == ["690", "740", f"701 TFLOP/s ({701 / peak:.1%})"]
    assert line("device copy")[1:4] == ["2,372", "2,583", f"2,950 GB/s ({2950 / 3350:.1%})"]
    assert f"- run {line('device copy')[4]}: {H100}, 2026-01-02 05:00, commit def" in text
    # the fixture's 600 TFLOP/s count the backward as 2.5 forwards, the plan as 2: 3 forwards in the time of 3.5
    assert line("attention, 4 x 4096, forward and")[1:4] == ["391", "433", f"514 TFLOP/s ({600 * 3 / 3.5 / peak:.1%})"]
    assert line("attention, 4 x 4096, backward")[1:4] == ["", "", "600 TFLOP/s"]
    in_step = 6 * 7_110_393_856 * 4 * 4096 / 6e-3 / 1e12  # the profile's matrix products take 6 ms
    assert f"{in_step:,.0f} TFLOP/s" in line("matrix products in the step")[3]
    assert MODE_LABELS["one-gpu"] == "training on one GPU" and "777 TFLOP/s" in text
    assert "is not in model/estimate/machines.py" in "\n".join(report.rates_parts(devices[1]))
    assert report.rates_parts(devices[2]) == []


def test_a_visit_that_timed_nothing_says_so(tmp_path, capsys):
    """A newer "wrong" takes a figure away; and what broke before it had a row is said."""
    broken = at(kernel_result(), "2026-01-02T03:04:05Z", "abc") | {"broken": ["rope 7b: RuntimeError: a word"]}
    write_json(tmp_path / "a" / "kernels.json", broken | {"rows": []})
    assert report.main([str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert f"### Kernels: {H100}" in text and "- rope 7b: RuntimeError: a word (run of 2026-01-02 03:04)" in text

    wrong = at(kernel_result(), "2026-01-03T03:04:05Z", "def")
    for row in wrong["rows"]:
        row.update(status="wrong", reason="out: error 2 above the bound 1")
    write_json(tmp_path / "b" / "kernels.json", wrong)
    write_json(tmp_path / "c" / "kernels.json", at(kernel_result(), "2026-01-01T00:00:00Z", "old"))
    for folders in (("b", "c"), ("c", "b")):
        assert report.main([str(tmp_path / name) for name in folders]) == 0
        text = capsys.readouterr().out
        assert "| **halny** | wrong |" in text
        assert "- swiglu, halny: wrong. out: error 2" in text and "2026-01-01" not in text


def test_rehearsals_left_among_results_are_passed_over(tmp_path):
    for name in ("2026-01-01-cpu", "2026-01-02-smoke", "2026-01-03-empty"):
        (tmp_path / name).mkdir()
    for name in ("2026-01-01-cpu", "2026-01-02-smoke"):
        (tmp_path / name / "step.json").write_text("{}")
    assert [folder.name for folder in merge.result_folders(tmp_path)] == ["2026-01-01-cpu"]
