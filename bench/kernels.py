"""Every kernel beside its peers, as a share of what this machine can do.

    python bench/kernels.py [--set 7b] [--only swiglu] [--out DIR]     on a GPU: DIR/kernels.json
    python bench/kernels.py --warm-only --out DIR           before: compile everything, in several processes
    python bench/kernels.py --smoke                         here: the same code at tiny sizes, no figures
    python bench/kernels.py --loss-error [--smoke]          the loss and its gradients beside PyTorch's, against fp64
    pytest bench --benchmark-only                           the everyday interface (test_benchmarks.py)

A row is an operation, a set of shapes, a mode and a provider (lib/peers.py). Before one is timed, its outputs and
gradients at the very shape are held against the operation's reference in fp64: |out - truth| may be at most
2 |PyTorch in the same dtype - truth| plus one rounding. One that is not is reported wrong; one that is not installed,
absent; one that is but cannot do the case, as without a GPU, cannot run here; one that was not compiled in time, not
tried; one that raises, failed: never left out. How time is taken, short kernels in bursts: lib/clocks.py.

**Ceilings.** of_ceiling is the share of a large copy's rate (2 GiB) or of cuBLAS's: the figure of the goals.

**Warm-up.** What is compiled lies in caches on disk, so --warm-only compiles for all providers in processes beside one
another and times nothing; who hangs or crashes there is named in DIR/warm-kernels.json, and a run with the same DIR
leaves it alone. It may share the GPU with tests: torch.compile does time tiles then, but takes the least of up to a
hundred samples. Without it a run compiles as it comes to each case.

A provider that leaves the GPU in error (an illegal address) makes all fail that come after it: a warm-up leaves it out
of the run, and a run that meets one ends, says whose it was, and has the cases before it in its file.

**Modes.** "forward" (with gradients wanted, so what the backward needs is saved), "backward" (a kept graph, run again,
which hides what the host spends: only its kernel time says something), "both" (a fresh graph each time). Losses may
make the gradient in the forward pass, where a kept graph would measure nothing: they have "both", and "loss only"
without gradients. AdamW has its "update".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    # not bench/, where this very file would be taken for Hugging Face's package ``kernels``
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    if "--smoke" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: our kernels run, if slowly

import torch
import torch._functorch.config
from torch import Tensor

from bench.lib import operations, peers
from bench.lib.ceilings import ceilings, copy_rate
from bench.lib.clocks import Bench, Call, Clocks, bench_on, peak_bytes, sets_for
from bench.lib.command import command, no_such, parser_of
from bench.lib.operations import LOSSES, OPERATIONS, SETS, SMOKE_SETS, Operation
from bench.lib.peers import Peer
from bench.lib.process import CACHES, ROOT, die_with_parent, line_of
from bench.lib.results import new_result, results_folder, write_json, write_result
from halny.kernels import dispatch
from halny.model.exits import Refused

# A compiled backward may otherwise overwrite what it was given, and refuses to run twice on one graph
torch._functorch.config.donated_buffer = False

# ----------------------------------------------------------------------------------------------------------- one case


class KernelCase:
    """An operation at a shape: input sets, incoming gradients, and the truth."""

    def __init__(self, bench: Bench, operation: Operation, shape: dict, dtype: torch.dtype):
        self.bench, self.operation, self.shape, self.dtype = bench, operation, shape, dtype
        torch.manual_seed(0)
        first = operation.inputs(shape, dtype, bench.device)
        size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
        n_sets = sets_for(bench, size)
        self.inputs = [first, *(operation.inputs(shape, dtype, bench.device) for _ in range(n_sets - 1))]
        self.upstream: list[list[Tensor]] = [[] for _ in range(n_sets)]
        if "backward" in operation.modes:
            shapes, like = operation.output_shapes(first), dict(dtype=dtype, device=bench.device)
            self.upstream = [[operations.random(*s, **like) for s in shapes] for _ in range(n_sets)]
        same_dtype = operation.expected(first, self.upstream[0], dtype)
        self.truth = operation.expected(first, self.upstream[0], torch.float64)
        self.limits = [operations.limits(same, true) for same, true in zip(same_dtype, self.truth, strict=True)]

    def errors(self, function: Callable) -> dict[str, dict[str, float]]:
        """The error of every output and gradient of a provider, beside its bound. On copies: some work in place."""
        got = self.operation.results(function, copied(self.inputs[0]), copied(self.upstream[0]))
        names, found = self.operation.result_names, {}
        if len(got) != len(names):
            raise ValueError(f"{len(got)} outputs and gradients where {len(names)} were expected")
        for name, x, true, bounds in zip(names, self.operation.compared(got), self.truth, self.limits, strict=True):
            found[name] = operations.excess(x, true, *bounds)
        if "loss only" in self.operation.modes:
            with torch.no_grad():
                loss = function(*copied(self.inputs[0]))
            found["loss without gradient"] = operations.excess(loss, self.truth[0], *self.limits[0])
        return found

    def call(self, peer: Peer, function: Callable, mode: str) -> Call:
        """A provider in a mode under the clock, on tensors of its own if it overwrites them."""
        positions = self.operation.gradients
        own, upstream = self.inputs, self.upstream
        if peer.ruins:
            own, upstream = ([copied(one) for one in sets] for sets in (own, upstream))
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

        graphs = [operations.tuple_of(function(*one)) for one in leaves] if mode == "backward" else []

        def both(i: int):
            return torch.autograd.grad(operations.tuple_of(function(*leaves[i])), wanted[i], upstream[i] or None)

        run = {
            "loss only": torch.no_grad()(lambda i: function(*leaves[i])),
            "forward": lambda i: function(*leaves[i]),
            "update": lambda i: function(*leaves[i]),
            "both": both,
            "backward": lambda i: torch.autograd.grad(graphs[i], wanted[i], upstream[i] or None, retain_graph=True),
        }[mode]
        return Call(run, len(self.inputs), prepare if peer.ruins else None)


def copied(values: list) -> list:
    return [x.clone() if isinstance(x, Tensor) else x for x in values]


def works(bench: Bench) -> bool:
    """Whether this process can still use the GPU."""
    try:
        bench.synchronize()
    except Exception:
        return False
    return True


def check_device(bench: Bench, provider: str, error: BaseException) -> None:
    """RuntimeError if the device does not work any more after a provider's error: no later call of ours will either."""
    if not works(bench):
        raise RuntimeError(f"{provider} left the GPU in error: {line_of(error)}") from None


def load(peer: Peer) -> tuple[Callable | None, str, str]:
    """(the function to call, "ok", "") or (None, "absent", "cannot run here" or "failed", why)."""
    try:
        return peer.load(), "ok", ""
    except (ImportError, AttributeError) as error:
        return None, "absent", line_of(error)
    except ValueError as error:  # it is here, but cannot do the case
        return None, "cannot run here", line_of(error)
    except Exception as error:  # it is here, but does not get on with another package
        return None, "failed", line_of(error)


BY_SIGNAL, NO_TIME = "was ended by signal", "no time was left to compile it"


def judge(case: KernelCase, providers: list[Peer], excluded: dict[str, str]) -> tuple[dict, dict, dict]:
    """(functions of those that are right, status and reason of each, errors of each that ran), by provider."""
    functions, status, errors = {}, {}, {}
    for peer in providers:
        if peer.name in excluded:
            crashed = BY_SIGNAL in excluded[peer.name]
            status[peer.name] = "failed" if crashed else "not tried", excluded[peer.name]
            continue
        function, *state = load(peer)
        status[peer.name] = tuple(state)
        if function is None:
            continue
        try:
            errors[peer.name] = case.errors(function)
        except Exception as error:
            check_device(case.bench, peer.name, error)
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


def row_of(operation: Operation, set_name: str, shape: dict, mode: str, dtype: torch.dtype, peer: Peer) -> dict:
    """A row before anything has run: what would be, and the bytes and FLOPs of it."""
    n_bytes, flops = operation.counts(mode, shape, dtype.itemsize)
    least = n_bytes - operation.unmoved(mode, shape, dtype.itemsize)
    return {
        "operation": operation.name, "set": set_name, "shape": shape, "mode": mode,
        "dtype": str(dtype).removeprefix("torch."), "provider": peer.name, "package": peer.package,
        "call": peer.call, "status": "failed", "reason": "",
        "bytes": least if peer.leaves_v else n_bytes, "least_bytes": least, "flops": flops,
        "ceiling": operation.ceiling,
    }  # fmt: skip


def run_case(
    bench: Bench, operation: Operation, set_name: str, shape: dict, providers: list[Peer], ceilings: dict,
    excluded: dict[str, str], dtype: torch.dtype = torch.bfloat16, clocks: Clocks | None = None,
) -> Iterator[list[dict]]:  # fmt: skip
    """The rows of one case, a mode at a time. excluded: provider -> why it is not even tried."""
    clocks = clocks or Clocks(bench)
    torch._dynamo.reset()
    case = KernelCase(bench, operation, shape, dtype)
    functions, status, errors = judge(case, providers, excluded)
    case.truth = None  # the largest tensors of all
    bench.release()

    for mode in operation.modes:
        calls, results = {}, {}
        for peer in providers:
            if peer.name in functions:
                try:
                    calls[peer.name] = case.call(peer, functions[peer.name], mode)
                except Exception as error:
                    check_device(bench, peer.name, error)
                    results[peer.name] = error.with_traceback(None)  # whose frames hold tensors
        results |= clocks.time(calls)
        for name, result in results.items():
            if isinstance(result, Exception):
                check_device(bench, name, result)
        rows = []
        for peer in providers:
            (state, reason), result = status[peer.name], results.get(peer.name)
            if isinstance(result, Exception):
                state, reason = "failed", line_of(result)
            row = row_of(operation, set_name, shape, mode, dtype, peer) | {"status": state, "reason": reason}
            if state == "ok":
                seconds = result["kernel_ms"]["median"] / 1e3
                rates = {"gb_s": row["bytes"] / seconds / 1e9, "tflop_s": row["flops"] / seconds / 1e12}
                rate = rates["gb_s" if operation.ceiling == "copy_gb_s" else "tflop_s"]
                row |= result | rates | {
                    "of_ceiling": rate / ceilings[operation.ceiling], "errors": errors[peer.name],
                    "peak_bytes": peak_bytes(bench, calls[peer.name]),
                }  # fmt: skip
            rows.append(row)
        del calls, results
        bench.release()
        yield rows


# -------------------------------------------------------------------------------------------------- errors of the loss


def loss_errors(bench: Bench, rows: int, dim: int, vocabulary: int) -> Iterator[str]:
    """A line for each dtype, kind of target and form of the head and its loss, in chunks of a quarter of the rows.

    Errors are the largest over a tensor, divided by the largest of the truth, which is made in fp64 of the same rounded
    inputs. Triton's interpreter puts ours in bf16 at a disadvantage of up to one unit in the last place: it truncates
    where a GPU rounds.
    """
    operation, chunk = OPERATIONS["linear_cross_entropy"], max(1, rows // 4)
    native = peers.native_linear_cross_entropy(batch_chunk_size=chunk, chunking_method=None)
    listed = [*peers.PEERS[operation.name][:2], Peer("torch native", native)]
    yield f"torch {torch.__version__}, {bench.name}: {rows} rows x {dim} x {vocabulary}, mean; errors are relative"
    yield f"{'dtype':10}{'targets':11}{'form':20}{'loss':>10}{'d_hidden':>10}{'d_weight':>10}"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind, confidence in (("random", 0.0), ("confident", 12.0)):
            torch.manual_seed(0)
            weight, labels = torch.randn(vocabulary, dim), torch.randint(vocabulary, (rows,))
            hidden = torch.randn(rows, dim) / dim**0.5
            hidden += confidence * weight[labels] / weight[labels].square().sum(-1, keepdim=True)
            labels[::5] = -100
            inputs = [hidden.to(bench.device, dtype), weight.to(bench.device, dtype), labels.to(bench.device)]
            truth = operation.expected(inputs, [], torch.float64)
            for peer in listed:
                function, state, _ = load(peer)
                text = f"{str(dtype).removeprefix('torch.'):10}{kind:11}{peer.name:20}"
                if function is None:
                    yield f"{text}{state:>30}"
                    continue
                dispatch.launches.clear()
                with patch.object(peers.lce, "chunk_rows", lambda *_: chunk):
                    got = operation.results(function, inputs, [])
                if bool(dispatch.launches) != (peer.package == "halny"):
                    raise RuntimeError(f"{peer.name}: kernels ran where they should not, or did not where they should")
                errors = (operations.largest(x, y) / operations.largest(y) for x, y in zip(got, truth, strict=True))
                yield text + "".join(f"{error:10.1e}" for error in errors)


# ------------------------------------------------------------------------------------------------------------- warm-up

WARM_S = 60  # for one provider in all cases of an operation; more if the budget is more
WARM_BYTES = 48e9  # of GPU memory, for all the processes together; a third of a smaller GPU's
# In this order: those that take seconds first, since torch.compile, which tries dozens of tiles, took all the time once
COMPILED_AT_FIRST = ("Liger-Kernel", "halny", "cut-cross-entropy", "quack", "torch.compile")


def run_once(bench: Bench, operation: Operation, function: Callable, shape: dict) -> None:
    """Forward and backward of one provider in one case, so that what it compiles lies in the caches on disk."""
    torch.manual_seed(0)
    try:
        inputs = operation.inputs(shape, torch.bfloat16, bench.device)
        leaves = [x.requires_grad_() if i in operation.gradients else x for i, x in enumerate(inputs)]
        outputs = operations.tuple_of(function(*leaves))
        if operation.gradients:
            wanted = [leaves[i] for i in operation.gradients]
            torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        if "loss only" in operation.modes:
            with torch.no_grad():
                function(*(x.detach() if isinstance(x, Tensor) else x for x in inputs))
        bench.synchronize()
    except Exception:
        if not works(bench):
            os.abort()  # so that who leaves the GPU in error is left alone, as who crashes is
        raise


def warm(bench: Bench, operation: Operation, provider: str, sets: dict[str, dict]) -> None:
    function = next(p for p in peers.PEERS[operation.name] if p.name == provider).load()
    for one, _, shape in operations.cases(sets, operation.name):
        if one is operation:
            run_once(bench, operation, function, shape)
            bench.release()


def warm_jobs(only: str, sets: dict[str, dict]) -> list[tuple[str, str]]:
    """(operation, provider) of all that compiles and keeps it, the quickest first.

    Liger-Kernel's CuTe DSL keeps nothing: its kernels, some seconds each, compile in the process that times them.
    """
    jobs = [
        (name, peer.name)
        for name in dict.fromkeys(operation.name for operation, _, _ in operations.cases(sets, only))
        for peer in peers.PEERS[name]
        if peer.package in COMPILED_AT_FIRST and peer.name != "Liger-Kernel, CuTe DSL" and load(peer)[0] is not None
    ]
    return sorted(jobs, key=lambda job: COMPILED_AT_FIRST.index(job[1].partition(",")[0]))


def warm_bytes(operation: Operation, sets: dict[str, dict]) -> float:
    """What a process that warms an operation may hold at most, roughly: never less than eager PyTorch needs.

    At full size, because the row count decides what is compiled: of torch.compile the whole code, of the others tiles.
    """
    most = 0
    for one, _, shape in operations.cases(sets, operation.name):
        if one is operation:
            tensors = operation.counts("both" if "both" in operation.modes else "update", shape, 2)[0]
            logits = shape["tokens"] * shape["vocabulary"] if operation.name in LOSSES else 0
            most = max(most, 2 * tensors + 12 * logits)
    return 1e9 + most


def warm_all(
    script: str, jobs: list[tuple[str, str]], workers: int, save: Callable[[dict], None],
    budget_s: float = float("inf"), sizes: dict[str, float] | None = None, more: tuple[str, ...] = (),
) -> dict[str, dict[str, str]]:  # fmt: skip
    """``script --warm CASE PROVIDER`` of all jobs, in processes beside one another, within budget_s for all of them.

    sizes: case -> bytes of GPU memory that its process takes; no more run at once than WARM_BYTES hold. more: further
    arguments. save is called with what is excluded so far after every job, one not done yet being so, too.

    Returns case -> provider -> why it must be left alone afterwards: because it did not come back in time, or brought
    its process down. One that merely raises will say so when it is measured. Ours is only left alone if it crashes.
    """
    most = WARM_BYTES
    if torch.cuda.is_available():
        most = min(most, bench_on(smoke=False).memory_bytes / 3)
    start, free, room = time.monotonic(), most, threading.Condition()
    end, limit = start + budget_s, max(WARM_S, 0.6 * budget_s) if budget_s < 3600 else WARM_S
    excluded: dict[str, dict[str, str]] = {case: {} for case, _ in jobs}
    for case, provider in jobs:
        if provider != "halny":
            excluded[case][provider] = NO_TIME

    def run(job: tuple[str, str]) -> str | None:
        seconds = min(limit, end - time.monotonic())
        if seconds <= 0:
            return NO_TIME
        command = [sys.executable, str(ROOT / "bench" / script), "--warm", *job, *more]
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # there are processes enough
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"was still compiling after {seconds:.0f} s"
        return f"its process {BY_SIGNAL} {-done.returncode}" if done.returncode < 0 else None

    def one(job: tuple[str, str]) -> None:
        nonlocal free
        case, provider = job
        size = min((sizes or {}).get(case, 0), most)
        with room:
            room.wait_for(lambda: free >= size, max(0, min(86400, end - time.monotonic())))
            free -= size
        reason = run(job)
        with room:
            free += size
            room.notify_all()
            excluded[case].pop(provider, None)
            if reason and (provider != "halny" or BY_SIGNAL in reason):
                excluded[case][provider] = reason
            save(excluded)

    save(excluded)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, jobs))
    return excluded


def warm_up(script: str, jobs: list[tuple[str, str]], given: argparse.Namespace, folder: Path, **options) -> int:
    """--warm-only: ``warm_all``, and the file that tells the run after it what to leave alone."""
    start = time.monotonic()

    def save(excluded: dict) -> None:
        seconds = time.monotonic() - start
        about = {"format": 1, "kind": "warm", "host": platform.node(), "seconds": seconds, "excluded": excluded}
        write_json(folder / f"warm-{script}.json", about)

    jobs = [] if given.smoke else jobs
    excluded = warm_all(f"{script}.py", jobs, given.workers, save, given.budget_s, **options)
    kept = sum(1 for _ in CACHES.rglob("*.o"))  # none, where a package is installed, says that its cache is off
    print(f"{len(jobs)} jobs in {time.monotonic() - start:.0f} s; {kept} kernels of CuTe DSL on disk")
    for case, reasons in excluded.items():
        for provider, reason in reasons.items():
            print(f"{case:30}{provider:40}{reason}")
    return 0


def read_warm(path: Path) -> dict[str, dict[str, str]]:
    """case -> provider -> why it is not tried, as a warm-up on this machine left it; nothing if there was none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found["excluded"] if found.get("kind") == "warm" and found.get("host") == platform.node() else {}


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


def run_all(bench: Bench, path: Path, jobs: list, result: dict, deadline: float, dtype: torch.dtype) -> int:
    """Every job (operation, set, shape, providers, excluded) until the deadline; the file is whole after each mode."""
    names = [f"{operation.name} {set_name}" for operation, set_name, *_ in jobs]
    result |= {"not_reached": list(names), "broken": [], "seconds": {}, "rows": [], "ceilings": ceilings(bench)}
    write_json(path, result)
    clocks = Clocks(bench, rounds=1, least=1) if bench.smoke else Clocks(bench)
    for name, (operation, set_name, shape, providers, excluded) in zip(names, jobs, strict=True):
        if time.monotonic() > deadline:
            break
        began, reached = time.monotonic(), []
        try:
            for rows in run_case(
                bench, operation, set_name, shape, providers, result["ceilings"], excluded, dtype, clocks
            ):
                result["rows"] += rows
                reached += [rows[0]["mode"]]
                write_json(path, result)
                for row in rows:
                    print(line(row, bench.smoke), flush=True)
        except Exception as error:  # out of memory, say: the other cases are still worth having
            reason = line_of(error)
            result["broken"].append(f"{name}: {reason}")
            for mode in operation.modes:
                if mode not in reached:
                    for peer in providers:
                        row = row_of(operation, set_name, shape, mode, dtype, peer)
                        result["rows"].append(row | {"reason": f"the whole case: {reason}"})
            print(result["broken"][-1], flush=True)
        result["not_reached"].remove(name)
        result["seconds"][name] = time.monotonic() - began
        write_json(path, result)
        if not works(bench):
            print("no later call on this GPU can work: run again, its culprit left out by --without", flush=True)
            break
        bench.release()
    if not bench.smoke and time.monotonic() < deadline and works(bench):
        result["ceilings_after"] = {"copy_gb_s": copy_rate(bench)["gb_s"]}
    write_result(path, result)
    bad = [row for row in result["rows"] if row["package"] == "halny" and row["status"] != "ok"]
    timed = sum(row["status"] == "ok" for row in result["rows"])
    print(f"{timed} rows timed, {len(result['rows']) - timed} without a figure, of which {len(bad)} of halny's")
    if result["not_reached"]:
        print(f"not reached: {'; '.join(result['not_reached'])}")
    return 1 if bad or not timed or result["broken"] else 0


def left_out(providers: list[Peer], without: list[str]) -> dict[str, str]:
    """provider -> why it is not tried, of those that --without names."""
    named = [(peer.name, text) for peer in providers for text in without if text in peer.name]
    return {name: f"left out of this run: --without {text!r}" for name, text in named}


def run_jobs(
    bench: Bench, given: argparse.Namespace, script: str, folder: Path, jobs: list[tuple],
    excluded: dict[str, dict[str, str]], start: float, dtype: torch.dtype,
) -> int:  # fmt: skip
    """``run_all`` of jobs (operation, set, shape, providers, key into excluded)."""
    result = new_result("kernels", bench, given.commit) | {"excluded": excluded}
    jobs = [
        (operation, name, shape, providers, excluded.get(key, {}) | left_out(providers, given.without))
        for operation, name, shape, providers, key in jobs
    ]
    return run_all(bench, folder / f"{script}.json", jobs, result, start + given.budget_s, dtype)


def options_of(doc: str) -> argparse.ArgumentParser:
    parser = parser_of(doc, "bench/results/DATE-DEVICE; runs/bench with --only or --smoke", 1e9)
    parser.add_argument("--only", default="", help="operations whose name contains this [all]")
    parser.add_argument("--warm", nargs=2, metavar=("CASE", "PROVIDER"), help="compile for one provider, and no more")
    parser.add_argument("--warm-only", action="store_true", help="compile for all, time nothing; DIR/warm-NAME.json")
    parser.add_argument("--without", action="append", default=[], help="do not try providers named so, or in part")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    return parser


@command
def main(arguments: list[str]) -> int:
    start = time.monotonic()
    parser = options_of(__doc__)
    parser.add_argument("--loss-error", nargs="*", type=int, metavar="N",
        help="errors of the head and its loss and no times; with sizes: ROWS DIM VOCABULARY [64 64 1000]")  # fmt: skip
    parser.add_argument("--set", action="append", choices=list(SETS), help="sets of shapes; may be repeated [all]")
    given = parser.parse_args(arguments)
    bench = bench_on(given.smoke)
    if given.loss_error is not None:
        if len(sizes := given.loss_error or [64, 64, 1000]) != 3:
            raise Refused(f"--loss-error takes ROWS DIM VOCABULARY or nothing, got {sizes}")
        print(*loss_errors(bench, *sizes), sep="\n")
        return 0
    sets = operations.chosen_sets(SMOKE_SETS if given.smoke else SETS, given.set)
    if given.warm:
        die_with_parent()
        warm(bench, OPERATIONS[given.warm[0]], given.warm[1], sets)
        return 0
    if not any(given.only in name for name in OPERATIONS):
        raise no_such(given.only, OPERATIONS)
    folder = given.out or results_folder(bench, partial=bool(given.only or given.set))
    sizes = {operation.name: warm_bytes(operation, sets) for operation, _, _ in operations.cases(sets, given.only)}
    more = tuple(argument for name in given.set or () for argument in ("--set", name))
    if given.warm_only:
        return warm_up("kernels", warm_jobs(given.only, sets), given, folder, sizes=sizes, more=more)
    excluded = read_warm(folder / "warm-kernels.json")
    jobs = [
        (operation, name, shape, peers.PEERS[operation.name], operation.name)
        for operation, name, shape in operations.cases(sets, given.only)
    ]
    dtype = torch.float32 if given.smoke else torch.bfloat16  # the interpreter rounds bf16 wrongly
    return run_jobs(bench, given, "kernels", folder, jobs, excluded, start, dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
