"""Every kernel beside its peers, as a share of what this machine can do.

    python bench/kernels.py [--only swiglu] [--out DIR]     on a GPU: the whole table, DIR/kernels.json
    python bench/kernels.py --smoke                         here: the same code at tiny sizes, no figures
    pytest bench --benchmark-only                           the everyday interface (test_benchmarks.py)

A row is an operation, a set of shapes, a mode and a provider (peers.py). Before a provider is timed, its outputs and
gradients at the very shape are held against the operation's reference in fp64: |out - truth| may be at most
2 |PyTorch in the same dtype - truth| plus one rounding. One that is not is reported wrong; one that is not installed,
absent; one that raises, failed: never left out. How time is taken: measure.py.

**Modes.** "forward" (with gradients wanted, so what the backward needs is saved), "backward" (a kept graph, run again,
which hides what the host spends: only its kernel time says something), "both" (a fresh graph each time). Losses may
make the gradient in the forward pass, where a kept graph would measure nothing: they have "both", and "loss only"
without gradients. AdamW has its "update".
"""
# ruff: noqa: E402  imports follow the change of sys.path

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not bench/, where this very file would be taken for Hugging Face's package ``kernels``
    if "--smoke" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: our kernels run, if slowly

import torch
import torch._functorch.config
from torch import Tensor

from bench import measure, peers
from bench.measure import Bench, Call, Clocks
from bench.operations import OPERATIONS, SETS, SMOKE_SETS, Operation, cases, random, tuple_of
from bench.peers import Peer

# ----------------------------------------------------------------------------------------------------------- one case


class Case:
    """An operation at a shape: input sets, incoming gradients, and the truth."""

    def __init__(self, bench: Bench, operation: Operation, shape: dict, dtype: torch.dtype):
        self.bench, self.operation, self.shape, self.dtype = bench, operation, shape, dtype
        allow_kept_graphs()
        torch.manual_seed(0)
        first = operation.inputs(shape, dtype, bench.device)
        size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
        n_sets = 2 if bench.smoke else min(32, max(4, -(-2 * bench.cache_bytes // size)))
        self.inputs = [first, *(operation.inputs(shape, dtype, bench.device) for _ in range(n_sets - 1))]
        self.upstream: list[list[Tensor]] = [[] for _ in range(n_sets)]
        if "backward" in operation.modes:
            shapes = operation.output_shapes(first)
            self.upstream = [[random(*s, dtype=dtype, device=bench.device) for s in shapes] for _ in range(n_sets)]
        self.same_dtype = operation.expected(first, self.upstream[0], dtype)
        self.truth = operation.expected(first, self.upstream[0], torch.float64)

    def errors(self, function: Callable) -> dict[str, dict[str, float]]:
        """The error of every output and gradient of a provider, beside its bound. On copies: some work in place."""
        copies = [x.clone() if isinstance(x, Tensor) else x for x in self.inputs[0]]
        got = self.operation.results(function, copies, [u.clone() for u in self.upstream[0]])
        names, found = self.operation.result_names, {}
        if len(got) != len(names):
            raise ValueError(f"{len(got)} outputs and gradients where {len(names)} were expected")
        for name, x, same, true in zip(names, self.operation.compared(got), self.same_dtype, self.truth, strict=True):
            found[name] = measure.excess(x, same, true)
        if "loss only" in self.operation.modes:
            copies = [x.clone() if isinstance(x, Tensor) else x for x in self.inputs[0]]
            with torch.no_grad():
                loss = function(*copies)
            found["loss without gradient"] = measure.excess(loss, self.same_dtype[0], self.truth[0])
        return found

    def call(self, peer: Peer, function: Callable, mode: str) -> Call:
        """A provider in a mode under the clock, on tensors of its own if it overwrites them."""
        n_sets, positions = len(self.inputs), self.operation.gradients
        own = [list(inputs) for inputs in self.inputs]
        upstream = self.upstream
        if peer.ruins:
            own = [[x.clone() if isinstance(x, Tensor) else x for x in inputs] for inputs in own]
            upstream = [[u.clone() for u in one] for one in self.upstream]
        with_gradient = mode != "loss only"
        leaves = [
            [x.detach().requires_grad_() if with_gradient and i in positions else x for i, x in enumerate(inputs)]
            for inputs in own
        ]
        wanted = [[one[i] for i in positions] for one in leaves]

        def prepare(i: int) -> None:
            # through .data: autograd must not learn of it, as it does not learn of what the provider overwrites
            for mine, original in zip((*leaves[i], *upstream[i]), (*self.inputs[i], *self.upstream[i]), strict=True):
                if isinstance(mine, Tensor):
                    mine.data.copy_(original)

        if mode == "loss only":

            def run(i: int):
                with torch.no_grad():
                    return function(*leaves[i])
        elif mode in ("forward", "update"):

            def run(i: int):
                return function(*leaves[i])
        elif mode == "both":

            def run(i: int):
                outputs = tuple_of(function(*leaves[i]))
                return torch.autograd.grad(outputs, wanted[i], upstream[i] or None)
        else:
            graphs = [tuple_of(function(*one)) for one in leaves]

            def run(i: int):
                return torch.autograd.grad(graphs[i], wanted[i], upstream[i] or None, retain_graph=True)

        return Call(run, n_sets, prepare if peer.ruins else None)


def line_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def load(peer: Peer) -> tuple[Callable | None, str, str]:
    """(the function to call, "ok", "") or (None, "absent" or "failed", why)."""
    try:
        return peer.load(), "ok", ""
    except (ImportError, AttributeError, ValueError) as error:  # a ValueError: it is here, but cannot do the case
        return None, "absent", line_of(error)
    except Exception as error:  # it is here, but does not get on with another package
        return None, "failed", line_of(error)


def judge(case: Case, providers: list[Peer], excluded: dict[str, str]) -> tuple[dict, dict, dict]:
    """(functions of those that are right, status and reason of each, errors of each that ran), by provider."""
    functions, status, errors = {}, {}, {}
    for peer in providers:
        if peer.name in excluded:
            status[peer.name] = "failed", excluded[peer.name]
            continue
        function, *state = load(peer)
        status[peer.name] = tuple(state)
        if function is None:
            continue
        try:
            errors[peer.name] = case.errors(function)
        except Exception as error:
            status[peer.name] = "failed", line_of(error)
            continue
        wrong = [
            f"{name}: error {found['error']:.3g} above the bound {found['bound']:.3g}"
            for name, found in errors[peer.name].items()
            if not found["error"] <= found["bound"]
        ]
        if wrong:
            status[peer.name] = "wrong", "; ".join(wrong)
        else:
            functions[peer.name] = function
    return functions, status, errors


def run_case(
    bench: Bench,
    operation: Operation,
    set_name: str,
    shape: dict,
    providers: list[Peer],
    ceilings: dict,
    excluded: dict[str, str],
    dtype: torch.dtype = torch.bfloat16,
    clocks: Clocks | None = None,
) -> Iterator[list[dict]]:
    """The rows of one case, a mode at a time. excluded: provider -> why it is not even tried."""
    clocks = clocks or Clocks(bench)
    torch._dynamo.reset()
    case = Case(bench, operation, shape, dtype)
    functions, status, errors = judge(case, providers, excluded)
    case.truth = case.same_dtype = None  # the largest tensors of all
    release(bench)

    for mode in operation.modes:
        calls, results = {}, {}
        for peer in providers:
            if peer.name in functions:
                try:
                    calls[peer.name] = case.call(peer, functions[peer.name], mode)
                except Exception as error:
                    results[peer.name] = error.with_traceback(None)  # whose frames hold tensors
        results |= clocks.time(calls)
        n_bytes, flops = operation.counts(mode, shape, dtype.itemsize)
        rows = []
        for peer in providers:
            (state, reason), result = status[peer.name], results.get(peer.name)
            if isinstance(result, Exception):
                state, reason = "failed", line_of(result)
            row = {
                "operation": operation.name, "set": set_name, "shape": shape, "mode": mode,
                "dtype": str(dtype).removeprefix("torch."), "provider": peer.name, "package": peer.package,
                "call": peer.call, "status": state, "reason": reason,
                "bytes": n_bytes, "flops": flops, "ceiling": operation.ceiling,
            }  # fmt: skip
            if state == "ok":
                seconds = result["kernel_ms"]["median"] / 1e3
                rates = {"gb_s": n_bytes / seconds / 1e9, "tflop_s": flops / seconds / 1e12}
                rate = rates["gb_s" if operation.ceiling == "copy_gb_s" else "tflop_s"]
                row |= result | rates | {
                    "of_ceiling": rate / ceilings[operation.ceiling], "errors": errors[peer.name],
                    "peak_bytes": measure.peak_bytes(bench, calls[peer.name]),
                }  # fmt: skip
            rows.append(row)
        del calls, results
        release(bench)
        yield rows


def allow_kept_graphs() -> None:
    """A compiled backward may otherwise overwrite what it was given, and refuses to run twice on one graph."""
    torch._functorch.config.donated_buffer = False


def release(bench: Bench) -> None:
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- warm-up

WARM_S = 60  # for one provider in all cases of an operation
WARM_SHARE = 0.5  # of the budget, for all of them
COMPILED_AT_FIRST = ("torch.compile", "Liger-Kernel", "quack", "cut-cross-entropy")


def run_once(bench: Bench, operation: Operation, function: Callable, shape: dict) -> None:
    """Forward and backward of one provider in one case, so that what it compiles lies in the caches on disk."""
    torch.manual_seed(0)
    allow_kept_graphs()
    inputs = operation.inputs(shape, torch.bfloat16, bench.device)
    leaves = [x.requires_grad_() if i in operation.gradients else x for i, x in enumerate(inputs)]
    outputs = tuple_of(function(*leaves))
    if operation.gradients:
        torch.autograd.grad(outputs, [leaves[i] for i in operation.gradients], [torch.ones_like(y) for y in outputs])
    if "loss only" in operation.modes:
        with torch.no_grad():
            function(*(x.detach() if isinstance(x, Tensor) else x for x in inputs))
    bench.synchronize()


def warm(bench: Bench, operation: Operation, provider: str) -> None:
    function = next(p for p in peers.PEERS[operation.name] if p.name == provider).load()
    for one, _, shape in cases(SETS, operation.name):
        if one is operation:
            run_once(bench, operation, function, shape)
            release(bench)


def warm_jobs(only: str) -> list[tuple[str, str]]:
    return [
        (name, peer.name)
        for name in reversed(OPERATIONS)  # the fused loss first: it compiles longest, and is least to be missed
        for peer in peers.PEERS[name]
        if only in name and peer.package in COMPILED_AT_FIRST and load(peer)[0] is not None
    ]


def warm_all(
    script: str, jobs: list[tuple[str, str]], workers: int, budget_s: float = float("inf")
) -> dict[str, dict[str, str]]:
    """``script --warm CASE PROVIDER`` of all jobs, in processes beside one another, within budget_s for all of them.

    Returns case -> provider -> why it must be left alone afterwards: because it did not come back in time, or brought
    its process down. One that merely raises will say so when it is measured.
    """

    end = time.monotonic() + budget_s

    def one(job: tuple[str, str]) -> str | None:
        seconds = min(WARM_S, end - time.monotonic())
        if seconds <= 0:
            return "no time was left to compile it"
        command = [sys.executable, str(ROOT / "bench" / script), "--warm", *job]
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # there are processes enough
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"was still compiling after {seconds:.0f} s"
        return f"its process was ended by signal {-done.returncode}" if done.returncode < 0 else None

    excluded: dict[str, dict[str, str]] = {case: {} for case, _ in jobs}
    with ThreadPoolExecutor(workers) as pool:
        for (case, provider), reason in zip(jobs, pool.map(one, jobs), strict=True):
            if reason:
                excluded[case][provider] = reason
    return excluded


# ---------------------------------------------------------------------------------------------------------------- main


def line(row: dict, smoke: bool) -> str:
    """A row for people."""
    name = f"{row['operation']:21}{row['set']:6} {row['mode']:10}{row['provider']:40}"
    if row["status"] != "ok":
        return f"{name}{row['status']}: {row['reason'][:100]}"
    if smoke:
        return f"{name}right, ran (smoke: no performance figure)"
    rate = f"{row['gb_s']:8,.0f} GB/s" if row["ceiling"] == "copy_gb_s" else f"{row['tflop_s']:8,.1f} TFLOP/s"
    times = f"{row['kernel_ms']['median']:9.4f} ms kernel {row['wall_ms']['median']:9.4f} wall"
    return f"{name}{times} {rate} {row['of_ceiling']:6.1%}"


def open_result(bench: Bench, kind: str, given_commit: str | None) -> dict:
    note = {"note": "smoke: no performance figure"} if bench.smoke else {}
    return {"format": 1, "kind": kind, "smoke": bench.smoke} | note | {"machine": measure.machine(bench, given_commit)}


def run_all(bench: Bench, path: Path, jobs: list, result: dict, deadline: float, dtype: torch.dtype) -> int:
    """Every job (operation, set, shape, providers, excluded) until the deadline; the file is whole after each mode."""
    result |= {"ceilings": measure.ceilings(bench), "rows": [], "not_reached": [], "broken": []}
    measure.write_json(path, result)
    clocks = Clocks(bench, rounds=1, least=1) if bench.smoke else Clocks(bench)
    for operation, set_name, shape, providers, excluded in jobs:
        if time.monotonic() > deadline:
            result["not_reached"].append(f"{operation.name} {set_name}")
            continue
        try:
            ceilings = result["ceilings"]
            for rows in run_case(bench, operation, set_name, shape, providers, ceilings, excluded, dtype, clocks):
                result["rows"] += rows
                measure.write_json(path, result)
                for row in rows:
                    print(line(row, bench.smoke), flush=True)
        except Exception as error:  # out of memory, say: the other cases are still worth having
            result["broken"].append(f"{operation.name} {set_name}: {line_of(error)}")
            print(result["broken"][-1], flush=True)
        release(bench)
    if not bench.smoke and time.monotonic() < deadline:
        result["ceilings_after"] = {"copy_gb_s": measure.copy_rate(bench)["gb_s"]}
    result["machine"]["nvidia_smi_after"] = measure.nvidia_smi() if bench.on_gpu else None
    measure.write_json(path, result)
    bad = [row for row in result["rows"] if row["package"] == "halny" and row["status"] != "ok"]
    timed = sum(row["status"] == "ok" for row in result["rows"])
    print(f"{timed} rows timed, {len(result['rows']) - timed} absent, failed or wrong, of which {len(bad)} of halny's")
    if result["not_reached"]:
        print(f"not reached: {'; '.join(result['not_reached'])}")
    return 1 if bad or not timed or result["broken"] else 0


def no_such(only: str, names: list[str]) -> int:
    print(f"--only {only!r} is part of no name; there are {'; '.join(names)}", file=sys.stderr)
    return 2


def parser_of(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="rehearse on the CPU at tiny sizes, without figures")
    parser.add_argument(
        "--out", type=Path, help="folder for the file [bench/results/DATE-DEVICE; runs/bench with --only or --smoke]"
    )
    parser.add_argument("--only", default="", help="operations whose name contains this [all]")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no case after so many seconds")
    parser.add_argument("--commit", help="commit to record where there is no git checkout")
    parser.add_argument("--warm", nargs=2, metavar=("CASE", "PROVIDER"), help="compile for one provider, and no more")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    return parser


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    given = parser_of(__doc__).parse_args(arguments)
    try:
        bench = measure.bench_on(given.smoke)
    except RuntimeError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 2
    if given.warm:
        warm(bench, OPERATIONS[given.warm[0]], given.warm[1])
        return 0
    if not any(given.only in name for name in OPERATIONS):
        return no_such(given.only, list(OPERATIONS))
    excluded, warm_s = {}, given.budget_s * WARM_SHARE
    if not given.smoke:
        excluded = warm_all("kernels.py", warm_jobs(given.only), given.workers, warm_s)
    jobs = [
        (operation, name, shape, peers.PEERS[operation.name], excluded.get(operation.name, {}))
        for operation, name, shape in cases(SMOKE_SETS if given.smoke else SETS, given.only)
    ]
    dtype = torch.float32 if given.smoke else torch.bfloat16  # the interpreter rounds bf16 wrongly
    result = open_result(bench, "kernels", given.commit)
    path = (given.out or measure.results_folder(bench, partial=bool(given.only))) / "kernels.json"
    return run_all(bench, path, jobs, result, start + given.budget_s, dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
