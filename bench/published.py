"""What model/estimate/step_time.py's model predicts of published runs, beside what they published.

    python bench/published.py        needs no GPU; predictions of a model, not measurements

Two constants are fitted to the runs, by least squares on the relative error of the step's time: the share of the peak
in matrix products, which here is whatever the other constants do not explain, and the straggling a doubling of the
nodes. Each run is predicted by constants fitted to the runs of the *other* programs only: left out alone, its own
program's other runs would give it away. That error is printed too, in the column "point out". Everything else is
model/estimate/step_time.py's, and what is assumed of a run is said with its source.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import numpy as np

from halny.model.estimate import machines, sizes, step_time
from halny.model.estimate.step_time import Cluster, Rates
from halny.model.estimate.work import Layout, Work
from halny.model.mistral import MistralConfig

H100 = machines.GPUS["NVIDIA H100 80GB HBM3"]
H100_HBM2E = replace(H100, hbm_bytes_per_second=2.4e12, memory_bytes=96 * 10**9)  # torchtitan's: also limited to 500 W
GH200 = machines.GPUS["NVIDIA GH200 480GB"]

# Architectures in the words of MistralConfig, which has three MLP matrices and no tied weights:
# MPT's two MLP matrices of 4 x 4096 are as many weights in three; its tied embedding is gathered twice here
MPT_7B = MistralConfig(vocab_size=50368, hidden_dim=10923, n_kv_heads=32, window=None, max_seq_len=2048)
LLAMA2_7B = MistralConfig(hidden_dim=11008, n_kv_heads=32, window=None)
LLAMA3_8B = MistralConfig(vocab_size=128256, window=None)
OLMO2_7B = MistralConfig(vocab_size=100352, hidden_dim=11008, n_kv_heads=32, window=None)
MISTRAL_7B = MistralConfig()

LLM_FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
FMS_FSDP = "https://pytorch.org/blog/maximizing-training-throughput, https://github.com/foundation-model-stack/fms-fsdp"
TORCHTITAN = "https://github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
BIELIK = "https://huggingface.co/speakleash/Bielik-7B-v0.1"


@dataclass(frozen=True)
class Run:
    program: str
    what: str
    published: float  # tokens/s a GPU
    work: Work
    gpus: int
    source: str
    assumed: str
    gpu: machines.GPU = H100
    gpus_per_node: int = 8
    nic_gbs: float = 50  # a GPU
    shards: int | None = None  # all GPUs

    def predict(self, rates: Rates) -> float:
        cluster = Cluster(self.gpu, self.gpus, self.gpus_per_node, 450e9, self.nic_gbs * 1e9)
        layout = Layout(self.shards or self.gpus, self.gpus // (self.shards or self.gpus))
        step = step_time.step(self.work, cluster, layout, rates, communicators=1)
        return step_time.tokens_per_second(self.work, step)


def mpt(gpus: int, published: float) -> Run:
    return Run(
        "llm-foundry", f"MPT-7B, 6 x 2048, {gpus} H100", published,
        Work(MPT_7B, 6, 2048, recompute=False), gpus, LLM_FOUNDRY,
        "50 GB/s a GPU between nodes; fp32 reductions",
    )  # fmt: skip


def llama3(gpus: int, published: float) -> Run:
    # every second matrix product of a layer is recomputed: k, out and w3 of q, k, v, out, w1, w3, w2
    config = LLAMA3_8B
    again = config.dim * (config.n_kv_heads * config.head_dim + config.dim + config.hidden_dim)
    share = again / sizes.layer_matmul_parameters(config)
    return Run(
        "torchtitan", f"Llama 3.1 8B, 2 x 8192, {gpus} H100", published,
        Work(config, 2, 8192, recompute=False, recomputed_matmuls=share), gpus, TORCHTITAN,
        f"selective recompute is every second product, {share:.0%} of a forward; its 2.4 TB/s are in the model, its "
        "limit of 500 W is not",
        gpu=H100_HBM2E,
    )  # fmt: skip


RUNS = [
    mpt(8, 10643),
    mpt(128, 10475),
    mpt(256, 10119),
    mpt(512, 9670),
    Run("llm-foundry", "MPT-7B, 16 x 4096, 8 H100", 8611, Work(replace(MPT_7B, max_seq_len=4096), 16, 4096, 2,
        recompute=False, recomputed_matmuls=1.0, recomputes_attention=True), 8, LLM_FOUNDRY,
        "activation checkpointing is full"),
    Run("fms-fsdp", "Llama 2 7B, 2 x 4096, 96 H100", 9600,
        Work(LLAMA2_7B, 2, 4096, recompute=False, reduce_bytes=2), 96, FMS_FSDP,
        "HSDP 8 x 12; 800 Gb/s a node, 12.5 GB/s a GPU; bf16 reductions, its mixed-precision policy",
        nic_gbs=12.5, shards=8),
    llama3(8, 6667),
    llama3(128, 6514),
    Run("OLMo-core", "OLMo 2 7B, 2 x 4096, 64 H100", 9850, Work(OLMO2_7B, 2, 4096, recompute=False), 64,
        "its team's figure of about 9,700 to 10,000, 47 to 48% MFU; the middle is taken",
        "number of GPUs, micro batch and sharding, which are not published with it; no recompute"),
    Run("ALLaMo", "Bielik-7B-v0.1, 4 x 4096, 256 GH200", 9200, Work(MISTRAL_7B, 4, 4096, recompute=False), 256,
        BIELIK + " (\"exceeding 9200\")",
        "25 GB/s a GPU; no recompute of matrix products, with which this rate would be above all published ones",
        gpu=GH200, gpus_per_node=4, nic_gbs=25),
]  # fmt: skip


def fit(runs: list[Run], start: Rates = step_time.RATES["good"], steps: int = 8) -> Rates:
    """``start`` with the matmul share and the straggling that fit the runs best.

    Gauss-Newton on log(predicted / published) with differences for derivatives: the exposed communication is a maximum,
    so the model is not linear in its constants. Runs of a program count together as one, or the program with the most
    points would decide.
    """
    weight = np.array([1 / sum(other.program == run.program for other in runs) for run in runs]) ** 0.5
    names, widths = ("matmul", "straggling"), np.array([1e-3, 1e-4])
    base = replace(start, attention=step_time.RATES["published"].attention)

    def errors(x) -> np.ndarray:
        rates = replace(base, **dict(zip(names, map(float, x), strict=True)))
        return weight * np.log([run.predict(rates) / run.published for run in runs])

    x = np.array([start.matmul, start.straggling])
    for _ in range(steps):
        here = errors(x)
        slopes = np.stack([(errors(x + shift) - here) / shift.sum() for shift in np.diag(widths)])
        x = np.clip(x - np.linalg.lstsq(slopes.T, here, rcond=None)[0], [0.2, 0.0], [1.0, 0.1])
    return replace(base, **dict(zip(names, map(float, x), strict=True)))


@dataclass(frozen=True)
class Prediction:
    run: Run
    rates: Rates  # fitted without this run's program
    predicted: float
    error: float  # relative, of the prediction
    error_point_out: float  # with constants fitted without this point only


def predictions(runs: list[Run] = RUNS) -> list[Prediction]:
    out = []
    for run in runs:
        rates = fit([other for other in runs if other.program != run.program])
        near = fit([other for other in runs if other is not run])
        predicted = run.predict(rates)
        error, error_near = (p / run.published - 1 for p in (predicted, run.predict(near)))
        out.append(Prediction(run, rates, predicted, error, error_near))
    return out


def main() -> None:
    rows = predictions()
    print("predicted by step_time.py's model, fitted to other programs' runs; published: tokens/s a GPU\n")
    print(f"{'program':<13}{'run':<38}{'published':>10}{'predicted':>11}{'error':>8}{'point out':>11}   constants")
    for p in rows:
        print(
            f"{p.run.program:<13}{p.run.what:<38}{p.run.published:>10,.0f}{p.predicted:>11,.0f}{p.error:>+8.1%}"
            f"{p.error_point_out:>+11.1%}   matmul {p.rates.matmul:.3f}, straggling {p.rates.straggling:.4f}"
        )
    for name, field in (("program", "error"), ("point", "error_point_out")):
        errors = [abs(getattr(p, field)) for p in rows]
        print(f"\n{name} left out: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}", end="")
    rates = fit(RUNS)
    print(f'\n\nfitted to all, model/estimate/step_time.py\'s "published": {rates}\n\nsources and assumptions')
    for run in RUNS:
        print(f"  {run.what}: {run.source}; assumed: {run.assumed}")


if __name__ == "__main__":
    main()
