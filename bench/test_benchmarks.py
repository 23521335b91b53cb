"""The everyday interface: ``pytest bench --benchmark-only [-k "swiglu and halny"]``.

Wall time of the synchronised call, by pytest-benchmark, at Mistral-7B's micro batch on a GPU and at tiny sizes on a
CPU (where it shows that the calls work, no more). Cold-cache kernel time, ceilings and the comparison with all of them
interleaved are bench/kernels.py's. A provider that is absent is skipped with the reason; one that is wrong fails.
"""

import pytest
import torch

from bench import kernels
from bench.lib import peers
from bench.lib.clocks import bench_on
from bench.lib.operations import OPERATIONS, SETS, SMOKE_SETS

SMOKE = not torch.cuda.is_available()
SHAPE = (SMOKE_SETS if SMOKE else SETS)["7b"]
CASES = [
    pytest.param(operation, peer, mode, id=f"{operation.name}-{mode}-{peer.name}".replace(" ", "_"))
    for operation in OPERATIONS.values()
    for mode in operation.modes
    for peer in peers.PEERS[operation.name]
]


@pytest.fixture(scope="module")
def case_of():
    """One case at a time: all its tests follow one another, and the next takes its memory."""
    kept = {}

    def case(operation):
        if operation.name not in kept:
            kept.clear()
            bench = bench_on(SMOKE)
            dtype = torch.float32 if SMOKE else torch.bfloat16
            kept[operation.name] = kernels.KernelCase(bench, operation, SHAPE, dtype)
        return kept[operation.name]

    return case


@pytest.mark.parametrize("operation, peer, mode", CASES)
def test_operation(benchmark, case_of, operation, peer, mode):
    function, state, reason = kernels.load(peer)
    if function is None:
        pytest.skip(f"{state}: {reason}")
    if SMOKE and peer.package in ("Liger-Kernel", "cut-cross-entropy", "quack"):
        pytest.skip("needs a GPU")
    case = case_of(operation)
    if mode == operation.modes[0]:
        for name, found in case.errors(function).items():
            assert found["error"] <= found["bound"], f"{name}: {found}"
    call = case.call(peer, function, mode)

    def synchronised():
        call.run(0)
        case.bench.synchronize()

    small = " (no GPU: tiny sizes on a CPU, to see that the calls work; no time here is a result)" if SMOKE else ""
    benchmark.group = f"{operation.name} {mode}{small}"
    benchmark.pedantic(synchronised, setup=call.prepare and (lambda: call.prepare(0)), rounds=3 if SMOKE else 30,
                       warmup_rounds=0 if SMOKE else 3)  # fmt: skip
