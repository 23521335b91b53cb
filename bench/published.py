"""What model/estimate/step_time.py's model predicts of published runs, beside what they published.

    python bench/published.py        needs no GPU; predictions of a model, not measurements

Two constants are fitted to the runs: the share of the peak in matrix products, which here is whatever the other
constants do not explain, and the straggling a doubling of the nodes. Each run is predicted by constants fitted to the
runs of the *other* programs only: left out alone, its own program's other runs would give it away. That error is
printed too, in the column "point out". What is known of a run, beside its sizes, is of few kinds, whose numbers come
from sources or from arithmetic, not from the fit; but which kinds there are was decided with all runs in sight, and
that no error below tests:

watts       the board's limit (``limited``): 500 W on Meta's H100. A GH200's is the module's, which its CPU shares:
            660 W a module of four-module nodes and 100 W for the CPU are assumed.
recent      matrix products by cuBLAS 12.8 or later (January 2025), with which its kernels for Hopper called nvjet are
            assumed to begin. They are as fast as we measured them, RATES["good"]; the fitted share is of those before.
attention   FlashAttention 2's and cuDNN's rates are alike (step_time.py). Older: MPT's Triton kernel, from the slope
            of its own table, 7B on sequences of 8,192 to 65,536 tokens: 164 TFLOP/s.
eager       no torch.compile, no fused kernels: RMSNorm, RoPE, SwiGLU and the additions, counted op by op as PyTorch
            runs them, with fp32 inside norms and RoPE, move 3.7 times the bytes of fused ones.
recompute   a whole layer again is all its products but the last, whose result no gradient needs (torch 2.1 stops
            there, torch.compile drops it); every second product, in torchtitan's selective way, saves the others.
zero        weights are gathered once a step (ZeRO-1; ZeRO-2 reduces each micro step), not for each pass as by FSDP.

Not here: runs whose tensor parallelism waits for what it exchanges (CSCS's 8,000 tokens/s of pull 33, and 430 and 413
TFLOP/s of pull 29 if they are that too), which the model lacks; 7,600 tokens/s on 64 GH200 that are quoted of CSCS, on
no page that was found, and below its own figure on 256; NeMo AutoModel's 8B, whose published rate is LoRA's.

A published MFU is no measure of speed before its counting is known: attention whole, as if no mask halved it, the
embedding as if it were multiplied, grouped keys as if each query had its own. The second table has them beside ours,
which counts what is computed once: 6 x multiplied weights and the pairs that the mask admits.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import numpy as np

from halny.model.estimate import machines, roofline, sizes, step_time
from halny.model.estimate.step_time import Cluster, Rates
from halny.model.estimate.work import ALONE, Layout, Work
from halny.model.mistral import MistralConfig

H100, H200 = machines.GPUS["NVIDIA H100 80GB HBM3"], machines.GPUS["NVIDIA H200"]
H100_HBM2E = replace(H100, hbm_bytes_per_second=2.4e12, memory_bytes=96 * 10**9)  # Meta's
GH200, GH200_WATTS = machines.GPUS["NVIDIA GH200 480GB"], 660 - 100
MPT_ATTENTION = 0.166  # of the peak
FULL_W, IDLE_W = 700.0, 80.0  # Hopper's limit, at which step_time.py's rates hold, and what it draws when idle
EAGER = 3.7  # times the bytes of fused kernels; tests/estimate/test_plan.py has the count

# Architectures in the words of MistralConfig, which has three MLP matrices and no tied weights: where others have two
# MLP matrices, here are as many weights in three; MPT's tied embedding is gathered twice
MPT_7B = MistralConfig(vocab_size=50368, hidden_dim=10923, n_kv_heads=32, window=None)
LLAMA2_7B = MistralConfig(hidden_dim=11008, n_kv_heads=32, window=None)
LLAMA3_8B = MistralConfig(vocab_size=128256, window=None)
LLAMA3_13B = replace(LLAMA3_8B, dim=5120, n_layers=40, n_heads=40, hidden_dim=17920)
OLMO_7B = MistralConfig(vocab_size=100352, hidden_dim=11008, n_kv_heads=32, window=None)
OLMO_13B = replace(OLMO_7B, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824)
NEMOTRON_15B = MistralConfig(vocab_size=256000, dim=6144, n_heads=48, hidden_dim=16384, window=None)
MISTRAL_7B = MistralConfig()


def limited(rates: Rates, watts: float) -> Rates:
    """The rates of a Hopper board whose power is limited to so many watts.

    Products and attention go with the clock f. Power above idle is f V^2: while the voltage V follows the clock, f goes
    with the cube root of power; once V is at its floor, with power itself. An H200 at 700 W runs a step at 1,490 of its
    1,980 MHz, between the two, so the square root is taken: at 500 W, 0.82 of the clock.
    """
    clock = math.sqrt((watts - IDLE_W) / (FULL_W - IDLE_W))
    return replace(rates, matmul=rates.matmul * clock, attention=rates.attention * clock)


def again(config: MistralConfig, kind: str) -> dict:
    """Work's fields for a recompute that is "selective", every second product (k, out, w3 of q, k, v, out, w1, w3,
    w2), "full", all but the last, or "all"."""
    if not kind:
        return {}
    k, width, whole = config.n_kv_heads * config.head_dim, config.hidden_dim, sizes.layer_matmul_parameters(config)
    share = {"selective": config.dim * (k + config.dim + width) / whole, "full": 1 - config.dim * width / whole}
    return dict(recomputed_matmuls=share.get(kind, 1.0), recomputes_attention=kind != "selective")


@dataclass(frozen=True)
class Program:
    name: str
    source: str
    counting: str  # of FLOPs, in its MFU
    assumed: str
    gpu: machines.GPU = H100
    gpus_per_node: int = 8
    nic_gbs: float = 50  # a GPU
    watts: float = FULL_W
    recent: bool = False
    attention: float | None = None  # of the peak, where it is not the rates'
    reduce_bytes: int = 4
    shared_by: int = 1  # GPUs that compute a micro batch together
    layout: Layout = Layout()  # but for its ranks: when weights are gathered, and gradients reduced


@dataclass(frozen=True)
class Run:
    program: Program
    what: str
    published: float  # tokens/s a GPU
    work: Work
    gpus: int
    claimed: float | None = None  # MFU, %
    shards: int | None = None  # all GPUs

    def predict(self, rates: Rates) -> float:
        program, shards = self.program, self.shards or self.gpus
        cluster = Cluster(program.gpu, self.gpus, program.gpus_per_node, 450e9, program.nic_gbs * 1e9)
        layout = replace(program.layout, shard=shards, replicate=self.gpus // shards) if self.gpus > 1 else ALONE
        if program.recent:
            rates = replace(rates, matmul=step_time.RATES["good"].matmul)
        rates = limited(replace(rates, attention=program.attention or rates.attention), program.watts)
        step = step_time.step(self.work, cluster, layout, rates, communicators=1)
        return step_time.tokens_per_second(self.work, step)

    @property
    def mfu(self) -> float:
        """%, by this repository's counting."""
        flops = roofline.flops_per_token(self.work.config, self.work.seq_len)
        return 100 * machines.mfu(self.published, flops, self.program.gpu.bf16_flops)


EACH = Layout(holds_gradients=False)  # each micro step reduces
ZERO1 = Layout(gathered_again=1, gathers_once=True)
ZERO2 = replace(ZERO1, holds_gradients=False)

FOUNDRY = Program(
    "llm-foundry", "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md",
    "6 x all weights + attention whole", "50 GB/s a GPU between nodes; fp32 reductions; low-precision LayerNorm and "
    "GELU move what fused kernels do; recompute of the whole layer, as torch before 2.1",
    attention=MPT_ATTENTION, layout=EACH)  # fmt: skip
FMS = Program(
    "fms-fsdp", "https://pytorch.org/blog/maximizing-training-throughput, https://github.com/foundation-model-stack/"
    "fms-fsdp", "", "HSDP 8 x 12; 800 Gb/s a node; bf16 reductions, its mixed-precision policy",
    nic_gbs=12.5, reduce_bytes=2)  # fmt: skip
TITAN = Program(
    "torchtitan", "https://github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3",
    "6 x weights but the embedding + attention whole; of an H100 at 700 W", "nothing but the law of power: its 2.4 "
    "TB/s and 500 W are published", gpu=H100_HBM2E, watts=500)  # fmt: skip
OLMO = Program(
    "OLMo-core", "https://github.com/allenai/OLMo-core, README of v2 (that of v1.2 had 9.7 to 10 and 4.4 to 4.6 "
    "thousand), src/scripts/train: OLMo-7B.py, Llama3-8B.py and OLMo2-13B.py (HSDP, 4.2 and 8.4 million tokens a step)",
    "6 x weights but the embedding + attention whole", "64 GPUs, shards in a node", layout=EACH)  # fmt: skip
ALLAMO = Program(
    "ALLaMo", "https://huggingface.co/speakleash/Bielik-7B-v0.1 (\"exceeding 9200\")", "", "micro batch; 25 GB/s a "
    "GPU; no recompute of products, with which this rate would be above all published ones; power as on Alps",
    gpu=GH200, gpus_per_node=4, nic_gbs=25, watts=GH200_WATTS)  # fmt: skip
DGXC = Program(
    "NVIDIA dgxc", "https://github.com/NVIDIA/dgxc-benchmarking, v25.04, llama3.1/README.md, nemotron/README.md",
    "6 x multiplied weights + attention whole; Nemotron's grouped keys as whole ones", "two GPUs share a micro batch, "
    "by CP or TP, and what they exchange is hidden; vboost, which it switches on, is not in the model",
    recent=True, shared_by=2, layout=ZERO1)  # fmt: skip
FAST = Program(
    "Fast-LLM", "https://github.com/ServiceNow/Fast-LLM, docs/cost-efficiency.md, docs/index.md, "
    "examples/mistral-4-node-benchmark.yaml (ZeRO-2)", "", "batch of 64 in two micro batches, as the 32 are in one; "
    "cuBLAS of its container of 2024", layout=ZERO2)  # fmt: skip
KEMPNER = Program(
    "KempnerForge", "https://github.com/KempnerInstitute/KempnerForge, benchmarks/mfu_scaling, config_validation",
    "6 x all weights + attention whole", "micro batch of one GPU as in its script, 2 x 4 (its table has 4 x 2); "
    "50 GB/s a GPU between nodes, one NDR 400 each; recent, since its profile names nvjet kernels",
    gpu=H200, gpus_per_node=4, recent=True, layout=EACH)  # fmt: skip
CSCS = Program(
    "CSCS Megatron", "https://github.com/swiss-ai/Megatron-LM/pull/33 and submit-llama3-8b.sh", "", "2.1 million "
    "tokens a step, as in pull 29; 25 GB/s a GPU; bf16 reductions, as its sums; recent, as cuBLAS 12.8 of its "
    "container, 25.01", gpu=GH200, gpus_per_node=4, nic_gbs=25, watts=GH200_WATTS, recent=True, reduce_bytes=2,
    layout=ZERO1)  # fmt: skip


def run(program, model, config, batch, gpus, published, claimed=None, recompute="", eager=False, shards=None) -> Run:
    """``batch``: micro batch, sequence length and micro steps of a step."""
    work = Work(
        config, *batch, recompute=False, moments="fp32" if gpus > 1 else "bf16", row_bytes=EAGER if eager else 1.0,
        reduce_bytes=program.reduce_bytes, shared_by=program.shared_by, **again(config, recompute),
    )  # fmt: skip
    name = {H200: "H200", GH200: "GH200"}.get(program.gpu, "H100")
    how = ", ".join(word for word in (recompute and f"recompute {recompute}", eager and "eager") if word)
    what = f"{model}, {' x '.join(map(str, batch))}, {gpus} {name}" + (f", {how}" if how else "")
    return Run(program, what, published, work, gpus, claimed, shards)


RUNS = [
    run(FOUNDRY, "MPT-7B", MPT_7B, (6, 2048, 1), 8, 10643, 46.44),
    run(FOUNDRY, "MPT-7B", MPT_7B, (6, 2048, 1), 128, 10475, 45.71),
    run(FOUNDRY, "MPT-7B", MPT_7B, (6, 2048, 1), 256, 10119, 44.15),
    run(FOUNDRY, "MPT-7B", MPT_7B, (6, 2048, 1), 512, 9670, 42.20),
    run(FOUNDRY, "MPT-7B", MPT_7B, (16, 4096, 2), 8, 8611, 40.42, "all"),
    run(FMS, "Llama 2 7B", LLAMA2_7B, (2, 4096, 1), 96, 9600, shards=8),
    run(TITAN, "Llama 3.1 8B", LLAMA3_8B, (2, 8192, 1), 8, 6667, 39, "selective"),
    run(TITAN, "Llama 3.1 8B", LLAMA3_8B, (2, 8192, 1), 128, 6514, None, "selective"),
    run(TITAN, "Llama 3.1 8B", LLAMA3_8B, (2, 8192, 1), 8, 5762, None, "selective", eager=True),
    run(TITAN, "Llama 3.1 8B", LLAMA3_8B, (2, 8192, 1), 128, 5605, 33, "selective", eager=True),
    run(OLMO, "OLMo 7B", OLMO_7B, (2, 4096, 8), 64, 10000, 48, shards=8),
    run(OLMO, "Llama 3 8B", LLAMA3_8B, (2, 4096, 8), 64, 9500, shards=8),
    run(OLMO, "OLMo 13B", OLMO_13B, (1, 4096, 32), 64, 4600, 42, shards=8),
    run(ALLAMO, "Bielik-7B-v0.1", MISTRAL_7B, (4, 4096, 1), 256, 9200),
    run(DGXC, "Llama 3.1 8B", LLAMA3_8B, (1, 8192, 32), 8, 10682, 62.47),
    run(DGXC, "Llama 3.1 8B", LLAMA3_8B, (1, 8192, 32), 128, 10630, 62.16),
    run(DGXC, "Nemotron-4 15B", NEMOTRON_15B, (2, 4096, 4), 16, 6159, 66.07),
    run(DGXC, "Nemotron-4 15B", NEMOTRON_15B, (2, 4096, 4), 256, 6113, 65.57),
    run(FAST, "Mistral-7B", MISTRAL_7B, (1, 8192, 1), 32, 9800),
    run(FAST, "Mistral-7B", MISTRAL_7B, (1, 8192, 2), 32, 10350),
    run(KEMPNER, "Llama 3 8B", LLAMA3_8B, (2, 4096, 4), 1, 10471, 57.8, "full"),
    run(KEMPNER, "Llama 3 8B", LLAMA3_8B, (4, 4096, 2), 4, 9746, 53.8, "full"),
    run(KEMPNER, "Llama 3 8B", LLAMA3_8B, (8, 4096, 4), 4, 9714, 53.7, "full"),
    run(KEMPNER, "Llama 3 8B", LLAMA3_8B, (4, 4096, 4), 32, 9293, 51.3, "full"),
    run(KEMPNER, "Llama 3 13B", LLAMA3_13B, (4, 4096, 4), 8, 4426, 44.4, "full", eager=True),
    run(CSCS, "Llama 3 8B", LLAMA3_8B, (1, 8192, 1), 256, 8290),
    run(CSCS, "Llama 3 8B", LLAMA3_8B, (2, 4096, 1), 256, 8840),
]  # fmt: skip


def fit(runs: list[Run], steps: int = 6, far: float = 0.05) -> Rates:
    """The rates called published, with the matmul share and the straggling that fit the runs best.

    Gauss-Newton on log(predicted / published) with differences for derivatives: the exposed communication is a maximum,
    so the model is not linear in its constants. Runs of a program count together as one, or the program with the most
    points would decide. Errors beyond ``far`` count by their size, no longer by its square (Huber), so that a run
    that the model does not explain does not move the others.
    """
    start = step_time.RATES["published"]
    weight = np.array([1 / sum(other.program == run.program for other in runs) for run in runs])
    names, widths = ("matmul", "straggling"), np.array([1e-3, 1e-4])

    def errors(x) -> np.ndarray:
        rates = replace(start, **dict(zip(names, map(float, x), strict=True)))
        return np.log([run.predict(rates) / run.published for run in runs])

    x = np.array([start.matmul, start.straggling])
    for _ in range(steps):
        here = errors(x)
        slopes = np.stack([(errors(x + shift) - here) / shift.sum() for shift in np.diag(widths)])
        root = np.sqrt(weight / np.maximum(1, np.abs(here) / far))
        x = np.clip(x - np.linalg.lstsq((root * slopes).T, root * here, rcond=None)[0], [0.2, 0.0], [1.0, 0.1])
    return replace(start, **dict(zip(names, map(float, x), strict=True)))


@dataclass(frozen=True)
class Prediction:
    run: Run
    rates: Rates  # fitted without this run's program
    predicted: float
    error: float  # relative, of the prediction
    error_point_out: float  # with constants fitted without this point only


def predictions(runs: list[Run] = RUNS) -> list[Prediction]:
    without = {p.name: fit([run for run in runs if run.program != p]) for p in {run.program for run in runs}}
    out = []
    for run in runs:
        rates, near = without[run.program.name], fit([other for other in runs if other is not run])
        predicted = run.predict(rates)
        error, error_near = (p / run.published - 1 for p in (predicted, run.predict(near)))
        out.append(Prediction(run, rates, predicted, error, error_near))
    return out


def main() -> None:
    rows = predictions()
    print("predicted by step_time.py's model, fitted to other programs' runs; published: tokens/s a GPU\n")
    print(f"{'program':<15}{'run':<66}{'published':>10}{'predicted':>11}{'error':>8}{'point out':>11}   constants")
    for p in rows:
        print(
            f"{p.run.program.name:<15}{p.run.what:<66}{p.run.published:>10,.0f}{p.predicted:>11,.0f}{p.error:>+8.1%}"
            f"{p.error_point_out:>+11.1%}   matmul {p.rates.matmul:.3f}, straggling {p.rates.straggling:.4f}"
        )
    for name, field in (("program", "error"), ("point", "error_point_out")):
        errors = [abs(getattr(p, field)) for p in rows]
        beyond = sum(error > 0.10 for error in errors)
        print(f"\n{name} left out: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}", end="")
        print(f"; {beyond} of {len(errors)} beyond 10%", end="")
    print(f'\n\nfitted to all, model/estimate/step_time.py\'s "published": {fit(RUNS)}\n')
    print(f"{'MFU':<81}{'published':>10}{'ours':>8}   FLOPs as published")
    for run in RUNS:
        claimed = f"{run.claimed:.1f}%" if run.claimed else ""
        counting = run.program.counting if run.claimed else ""
        print(f"{run.program.name:<15}{run.what:<66}{claimed:>10}{run.mfu:>7.1f}%   {counting}".rstrip())
    print("\nsources and assumptions")
    for program in dict.fromkeys(run.program for run in RUNS):
        print(f"  {program.name}: {program.source}; assumed: {program.assumed}")


if __name__ == "__main__":
    main()
