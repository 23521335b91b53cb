"""The GPUs that halny knows: peaks, memory, links, power. The one table of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    bf16_flops: float  # dense tensor-core peak, FLOP/s
    hbm_bytes_per_second: float
    memory_bytes: int


def _gpu(bf16_tflops: float, hbm_gb_per_second: float, memory_mib: int) -> GPU:
    return GPU(bf16_tflops * 1e12, hbm_gb_per_second * 1e9, memory_mib * 2**20)


# torch.cuda.get_device_name() -> peaks. Names are the driver's own (the list of supported chips in its README). FLOP/s
# and bytes/s are from NVIDIA's data sheets; those since Hopper print the rate with 2:4 sparsity, so half of it stands
# here. Memory is the total that nvidia-smi reports. The GH200's "120GB" and "480GB" are its LPDDR; both have 96 GB of
# HBM3.
GPUS: dict[str, GPU] = {
    # A100 data sheet, June 2021: 312 TFLOP/s; 1,555, 2,039 and (80 GB PCIe) 1,935 GB/s
    "NVIDIA A100-SXM4-40GB": _gpu(312, 1555, 40960),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 2039, 81920),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 1555, 40960),
    "NVIDIA A100 80GB PCIe": _gpu(312, 1935, 81920),
    # H100 data sheets: SXM 1,979 sparse, 3.35 TB/s; PCIe 1,513 sparse, 2 TB/s; NVL 1,671 sparse a GPU, 3.9 TB/s
    "NVIDIA H100 80GB HBM3": _gpu(989.5, 3350, 81559),
    "NVIDIA H100 PCIe": _gpu(756.5, 2000, 81559),
    "NVIDIA H100 NVL": _gpu(835.5, 3900, 95830),
    # H200 data sheet: SXM 1,979 sparse, NVL 1,671 sparse; 4.8 TB/s both
    "NVIDIA H200": _gpu(989.5, 4800, 143771),
    "NVIDIA H200 NVL": _gpu(835.5, 4800, 143771),
    # GH200 data sheet: 1,979 sparse; 4 TB/s with 96 GB of HBM3, 4.9 TB/s with 144 GB of HBM3e
    "NVIDIA GH200 120GB": _gpu(989.5, 4000, 97871),
    "NVIDIA GH200 480GB": _gpu(989.5, 4000, 97871),
    "NVIDIA GH200 144G HBM3e": _gpu(989.5, 4900, 146831),
    # Blackwell architecture brief, HGX B200 at 1,000 W: 4,500 sparse, 8 TB/s
    "NVIDIA B200": _gpu(2250, 8000, 183359),
}


@dataclass(frozen=True)
class Machine:
    name: str  # in GPUS
    nvlink: float  # bytes/s a GPU and direction inside the node
    watts: float  # the board's limit
    host_copy: float  # bytes/s into pinned host memory, a rank

    @property
    def gpu(self) -> GPU:
        return GPUS[self.name]


# NVLink and watts are the data sheets' (half of the bidirectional total; of GH200, the whole module with its CPU).
# Copies: PCIe 4 and 5 x16 with two GPUs sharing one are assumed, and two thirds of a GH200's 450 GB/s of NVLink-C2C.
MACHINES = {
    "a100-40": Machine("NVIDIA A100-SXM4-40GB", 300e9, 400, 12e9),
    "a100-80": Machine("NVIDIA A100-SXM4-80GB", 300e9, 400, 12e9),
    "h100-80": Machine("NVIDIA H100 80GB HBM3", 450e9, 700, 25e9),
    "h200-141": Machine("NVIDIA H200", 450e9, 700, 25e9),
    "gh200-96": Machine("NVIDIA GH200 480GB", 450e9, 1000, 300e9),
    "gh200-144": Machine("NVIDIA GH200 144G HBM3e", 450e9, 1000, 300e9),
    "b200-180": Machine("NVIDIA B200", 900e9, 1000, 25e9),
}


def peak_flops(device_name: str, override_tflops: float | None = None) -> float | None:
    """bf16 FLOP/s of the device that torch.cuda.get_device_name calls so; override_tflops if given; None if unknown.

    Never a guess by part of a name: frameworks that take the "A100"-like branch for a GH200 print an MFU 3.2 times too
    high. Raises ValueError for an override that is not a positive finite number.
    """
    if override_tflops is not None:
        if not 0 < override_tflops < float("inf"):
            raise ValueError(f"override_tflops must be a positive number, got {override_tflops}")
        return override_tflops * 1e12
    gpu = GPUS.get(device_name)
    return None if gpu is None else gpu.bf16_flops


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation of one GPU, 1.0 at its peak; None where the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_per_token / peak
