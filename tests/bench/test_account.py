"""bench/account.py: the step counted on the meta device, against brute force; and that nothing in a step waits."""

import json
import linecache
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import SMALL, _server, _start_server
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import train
from bench import account, aot
from bench.account import Call, Count, Product, count_step, size
from bench.lib import meta_step
from bench.lib.meta_step import META, MetaCase, MetaStep, on_hopper, world_of
from halny.kernels import dispatch, rms_norm, rope, swiglu
from halny.kernels.adamw import MOMENTS
from halny.kernels.attention import attention_mask
from halny.kernels.cross_entropy import cross_entropy
from halny.kernels.linear_cross_entropy import linear_cross_entropy
from halny.model import mistral
from halny.model.data.batches import Batch, Loader
from halny.model.estimate import machines, roofline, sizes
from halny.model.mistral import PRESETS, Mistral
from halny.model.record import breakdown, journal
from halny.model.record.journal import InFlight
from halny.model.run.optimizer import Guard
from halny.model.run.ranks import World, start_distributed

MISTRAL_7B, SMALL_MODEL = PRESETS["mistral-7b"], replace(PRESETS["test"], n_layers=2)
H200 = machines.GPUS["NVIDIA H200"]


def counted(function, *tensors: torch.Tensor, backward: bool = False) -> list[Call]:
    """What ``function(*tensors)`` calls on a Hopper GPU, or what its backward does."""
    count = Count()
    with on_hopper(count.launched, window_hides=False):
        with count:
            out = function(*tensors)
        if backward:
            count.calls.clear()
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            upstream = [torch.empty_like(x) for x in outs]
            with count:
                torch.autograd.grad(outs, tensors, upstream)
    return count.calls


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True)


# ------------------------------------------------------------------------------------------------- known operations


def test_a_linear_layer_is_three_products():
    x, weight = bf16(3, 5, 48), bf16(112, 48)
    forward, backward = counted(F.linear, x, weight), counted(F.linear, x, weight, backward=True)
    assert [c.product for c in forward] == [Product("forward", 15, 112, 48)]
    assert {c.product for c in backward} == {Product("dgrad", 15, 48, 112), Product("wgrad", 112, 48, 15)}
    for call in (*forward, *backward):
        assert call.part == "matmul" and call.flops == 2 * 15 * 112 * 48 and call.product.weight == (112, 48)
        assert call.bytes == 2 * (15 * 48 + 112 * 48 + 15 * 112)


@pytest.mark.parametrize(
    "function, shapes, forward, backward",
    [  # bytes by the docstring of each kernel: M rows of N elements, 2 bytes each
        (lambda x, w: rms_norm.rms_norm(x, w, 1e-5), [(4, 6, 32), (32,)], 2 * 24 * 32, 3 * 24 * 32),
        (lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5), [(24, 32), (24, 32), (32,)], 4 * 24 * 32, 4 * 24 * 32),
        (swiglu.swiglu, [(24, 64)], 3 * 24 * 32, 5 * 24 * 32),
    ],
)
def test_row_kernels_move_what_they_say(function, shapes, forward, backward):
    tensors = [bf16(*shape) for shape in shapes]
    weight = 32 if shapes[-1] == (32,) else 0  # a norm reads its weight too, and writes or reads rstd
    (call,) = counted(function, *tensors)
    assert call.part == account.ROWS and call.bytes == 2 * (forward + weight) + (4 * 24 if weight else 0)
    call = next(c for c in counted(function, *tensors, backward=True) if c.name.endswith("backward_kernel"))
    partials = 4 * 32 * math.ceil(24 / 16) if weight else 0  # two programs of 16 rows
    assert call.bytes == 2 * (backward + weight) + (4 * 24 if weight else 0) + partials
    summed = [c for c in counted(function, *tensors, backward=True) if c.name == "rms_norm_dweight_kernel"]
    assert [(c.part, c.bytes) for c in summed] == ([(account.ROWS, partials + 2 * 32)] if weight else [])


def test_rope_moves_what_it_turns_and_the_rows_of_its_tables():
    """Forward q and k, read and written where they lie; backward three gradients, read, and the packed one, written."""
    cos, sin = (x.to(META) for x in rope.rope_tables(64, 16, 1e4))
    rotate = lambda x: rope.rope_split_qkv_(x.clone(), cos, sin, 4, 2)  # noqa: E731
    copied, forward = counted(rotate, bf16(2, 10, 8, 16))
    (backward,) = counted(rotate, bf16(2, 10, 8, 16), backward=True)
    tables = 2 * 4 * 10 * 8
    assert forward.name == backward.name == "rope_kernel" != copied.name
    assert forward.bytes == 2 * (2 * 2 * 10 * 6 * 16) + tables
    assert backward.bytes == 2 * (2 * 2 * 10 * 8 * 16) + tables


def test_a_loss_alone_and_with_its_projection():
    """The operator is opened: chunks are products and launches of their own, d_weight is summed in fp32."""
    labels = torch.empty(24, dtype=torch.int64, device=META)
    calls = counted(lambda logits: cross_entropy(logits, labels), bf16(24, 256))
    assert [(c.name, c.bytes) for c in calls if c.part == "loss"] == [("cross_entropy_kernel", 24 * (4 * 256 + 16) + 4)]
    rows, dim, vocabulary = 4096, 64, 32_000
    labels = torch.empty(rows, dtype=torch.int64, device=META)
    calls = counted(lambda x, w: linear_cross_entropy(x, w, labels).loss, bf16(rows, dim), bf16(vocabulary, dim))
    assert [c.name for c in calls if c.part in ("matmul", "loss")] == [
        *("aten::mm", "cross_entropy_kernel", "aten::mm", "aten::mm"),
        *("aten::mm", "cross_entropy_kernel", "aten::mm", "aten::addmm"),
    ]
    sums = [c for c in calls if c.product and c.product.kind == "wgrad"]
    total, operands = 4 * vocabulary * dim, 2 * 2048 * (vocabulary + dim)
    assert [(c.read, c.written) for c in sums] == [(operands, total), (operands + total, total)]
    summed = lambda x, w: linear_cross_entropy(x, w, labels, reduction="sum").loss  # noqa: E731
    calls = counted(summed, bf16(rows, dim), bf16(vocabulary, dim), backward=True)
    scaled = [c for c in calls if c.part == "loss"]
    assert sum(c.bytes for c in scaled) == 4 * rows * dim + (4 + 2) * vocabulary * dim + 2 * 4


def test_an_expanded_tensor_is_there_once_and_a_view_costs_nothing():
    x = bf16(4, 8)
    assert size(x[:1].expand(100, 8)) == 16 and size(x[:, :0].expand(4, 0)) == 0
    calls = counted(lambda x: (x.view(32), x.t(), x.detach(), x.split(2), torch.empty_like(x), x + x)[-1], x)
    assert [(c.name, c.read, c.written) for c in calls] == [("aten::add", 128, 64)]


def test_a_copy_between_host_and_device_is_refused():
    with pytest.raises(RuntimeError, match="between host and device"):
        counted(lambda x: x.copy_(torch.zeros(4, 8)), torch.empty(4, 8, device=META))


def test_a_kernel_whose_traffic_is_not_stated_stops_the_count(monkeypatch):
    monkeypatch.delitem(account.TRAFFIC, "swiglu_forward_kernel")
    with pytest.raises(KeyError, match="swiglu_forward_kernel"):
        counted(swiglu.swiglu, bf16(24, 64))


def test_categories_are_the_profilers():
    """Ours are its own, some in parts; and a kernel of ours is in the same one there, or not yet in any."""
    assert {part.partition(":")[0] for part in account.PARTS} == {name for name, _ in breakdown.CATEGORIES} | {"other"}
    for kernel in account.TRAFFIC:
        part = account.PART_OF.get(kernel, account.ROWS).partition(":")[0]
        assert breakdown.category(kernel) in (part, "other"), kernel


@pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels are not specialised")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_machine_code_of_a_step_is_looked_at(monkeypatch):
    """Whatever a step launches is, to the specialisation, a case of bench/aot.py: at the 7B width, in bf16."""
    launches = []

    class Launches(Count):
        def launched(self, *launch):
            launches.append(aot.Launch(*launch))
            super().launched(*launch)

    monkeypatch.setattr(account, "Count", Launches)
    case = MetaCase(replace(MISTRAL_7B, n_layers=2), 4, 4096, 1)
    count_step(replace(case, ranks=256))
    for recompute in ("always", "never"):
        for moments in MOMENTS:
            for accumulation in (1, 3):
                count_step(replace(case, moments=moments, accumulation=accumulation, recompute=recompute))
    assert {launch.kernel.__name__ for launch in launches} == account.TRAFFIC.keys()
    assert aot.of_no_case(launches, [found[-1] for found in aot.cases().values()]) == []


def test_the_switch_restores_itself(launches):
    x, gpu = bf16(4, 8), dispatch.StandIn((9, 0), 132, (), lambda *_: None)
    assert not dispatch.runs_kernel(x) and dispatch.stands_for(META) is None
    with pytest.raises(ZeroDivisionError), dispatch.stand_in(gpu):
        assert dispatch.runs_kernel(x) and dispatch.multiprocessors(META) == 132
        with dispatch.stand_in(gpu._replace(multiprocessors=78)):
            assert dispatch.multiprocessors(META) == 78
        assert dispatch.stands_for(META) is gpu and dispatch.stands_for(torch.device("cpu")) is None
        with dispatch.reference_only():
            assert not dispatch.runs_kernel(x)
        swiglu.swiglu(x)
        assert launches == {"swiglu_forward_kernel": 1}
        raise ZeroDivisionError
    assert not dispatch.runs_kernel(x) and dispatch.generation_of(x) == 0
    swiglu.swiglu(x)  # the reference again
    assert launches == {"swiglu_forward_kernel": 1}


# ---------------------------------------------------------------------------------------------------- whole steps


def check_step(case: MetaCase, calls: list[Call]) -> None:
    """Products, attention and launches against a count by hand; all kinds against roofline.py."""
    config, T = case.config, case.n_tokens
    with META:
        linears = [m for m in Mistral(config).modules() if isinstance(m, torch.nn.Linear)]
    wanted = Counter()
    for m in linears:
        n, k = m.weight.shape
        wanted.update([Product("forward", T, n, k), Product("dgrad", T, k, n), Product("wgrad", n, k, T)])
    head, chunks = config.vocab_size, Counter()
    for call in calls:
        if call.product and head in call.product.weight:
            chunks[call.product.kind] += call.flops
    assert Counter(c.product for c in calls if c.product and head not in c.product.weight) == Counter(
        {p: n for p, n in wanted.items() if head not in p.weight}
    )
    assert chunks == dict.fromkeys(("forward", "dgrad", "wgrad"), 2 * T * head * config.dim)

    seen = int(attention_mask(case.seq_len, config.window, None, 1, "cpu").sum()) * case.micro_batch
    a_product = 2 * config.n_layers * config.n_heads * config.head_dim * seen
    assert sum(c.flops for c in calls if c.part == "attention") == 7 * a_product

    names, n = Counter(c.name for c in calls), config.n_layers
    assert names["rms_norm_forward_kernel"] == names["rms_norm_backward_kernel"] == 2 * n + 1
    assert names["rms_norm_dweight_kernel"] == 2 * n + 1
    assert names["swiglu_forward_kernel"] == names["swiglu_backward_kernel"] == n and names["rope_kernel"] == 2 * n
    assert names["aten::clone"] == 0
    assert names["chunk_cat_kernel"] == (6 * n + 3 if case.ranks > 1 else 0)  # a gradient each
    apart = [part for part in account.parts_of(calls, case, H200) if part.differs]
    assert not apart


@pytest.mark.parametrize("ranks, moments", [(1, "fp32"), (1, "bf16"), (1, "8bit"), (8, "fp32")])
@pytest.mark.parametrize("window", [24, None])
def test_small_steps(ranks, moments, window):
    """Both attention backends, one chunk of logits; wide enough that a weight outweighs the step's scalars."""
    config = replace(SMALL_MODEL, window=window, dim=480, hidden_dim=1120)
    case = MetaCase(config, 3, 64, ranks, moments)
    calls = count_step(case)
    backend = "flash4" if window else "cudnn"
    assert sum(backend in c.name for c in calls) == 2 * config.n_layers
    check_step(case, calls)


@pytest.mark.parametrize("reshard, again", [("always", 0), ("never", 1), ("node", 4)])
def test_gathered_weights_cost_copies(reshard, again):
    """16 ranks, on which most weights need padding: copies and collectives are roofline.py's."""
    case = MetaCase(replace(SMALL_MODEL, dim=500, hidden_dim=1003, vocab_size=250), 1, 64, 16, reshard=reshard)
    calls = count_step(case)
    assert not any(part.differs for part in account.parts_of(calls, case, H200))
    copies = Counter(c.name for c in calls if "chunk_cat" in c.name)  # padded by PyTorch, not by the kernel
    assert copies == {"aten::_chunk_cat in chunk_cat": case.config.n_layers + 1}
    wanted = roofline.collectives(case.config, 16, gathered_again=again)
    assert sum(c.name.endswith("_base_") for c in calls) == sum(c.count for c in wanted)
    assert sum(c.part == "communication" and not c.name.endswith("_base_") for c in calls) <= 4  # of a few numbers


def test_micro_batches_are_summed():
    case = MetaCase(replace(SMALL_MODEL, dim=480), 1, 64, 1, "8bit", accumulation=3)
    calls = count_step(case)
    parts = account.parts_of(calls, case, H200)
    assert not any(part.differs for part in parts)
    sums = [c for c in calls if c.name == "add_rounded_kernel"]
    assert sum(c.bytes for c in sums) == 2 * 6 * sizes.parameters(case.config)
    once = count_step(replace(case, accumulation=1))
    assert sum(c.flops for c in calls) == 3 * sum(c.flops for c in once)
    assert sum(c.name == "adamw_kernel" for c in calls) == sum(c.name == "adamw_kernel" for c in once)


@pytest.mark.parametrize("ranks, moments", [(1, "8bit"), (256, "fp32")])
def test_the_7b_step(ranks, moments):
    case = MetaCase(MISTRAL_7B, 4, 4096, ranks, moments)
    calls = count_step(case)
    check_step(case, calls)
    parts = {part.name: part for part in account.parts_of(calls, case, H200)}
    assert parts["matmul"].flops == 6 * 7_110_393_856 * 16_384
    assert parts["attention"].flops * 12 / 14 == pytest.approx(52.79e12, rel=1e-3)
    matmul, attention = parts["matmul"].floor_ms, parts["attention"].floor_ms
    assert (matmul, attention) == (
        pytest.approx(885, abs=1),
        pytest.approx(109, abs=1),
    )  # 790 TFLOP/s; FlashAttention 3
    rate = 16_384 / account.floor_ms(list(parts.values())) * 1e3
    assert 15_000 < rate < 15_350  # the floor that the trainer's notes derive by hand is 15,250


@pytest.mark.parametrize("given", ["--ranks 256", "--ranks 8 --reshard node", "--moments 8bit --accumulation 4"])
def test_the_documented_commands(given, capsys):
    assert account.main(["--model", "tiny", "--layers", "2", "--seq-len", "512", *given.split()]) == 0
    captured = capsys.readouterr()
    assert "<- apart" not in captured.out and not captured.err
    title = captured.out.splitlines()[0]
    assert (f"one of {given.split()[1]} ranks under FSDP2, --reshard" in title) == ("--ranks" in given)


def test_what_the_step_need_not_move_is_found(monkeypatch, capsys):
    """A planted copy in each layer: the table names its kind, the exit code is 1."""
    arguments = ["--model", "tiny", "--layers", "2", "--seq-len", "512"]
    assert account.main(arguments) == 0
    out = capsys.readouterr().out
    assert "<- apart" not in out
    assert len(out[out.index("matrix products") : out.index("  all ")].splitlines()) == 2 + 15
    assert "calculated" in out and "gate_up wgrad" in out and "no GPU involved" in out

    forward = mistral.Block.forward
    monkeypatch.setattr(mistral.Block, "forward", lambda self, x, *rest: forward(self, x.clone(), *rest))
    assert account.main(arguments) == 1
    captured = capsys.readouterr()
    assert "more than 1% apart" in captured.err
    (line,) = (line for line in captured.out.splitlines() if "<- apart" in line)
    assert line.split()[0] == "copies"


def test_host_time_of_operations():
    lines = list(account.operation_lines(calls=1))
    assert len(lines) == 5 and lines[0].startswith("bare Function") and all(line.endswith(" us") for line in lines)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--seq-len", "40000"], "--seq-len 40000 is beyond mistral-7b's limit of 32768"),
        (["--gpu", "NVIDIA A100-SXM4-80GB"], "--gpu NVIDIA A100-SXM4-80GB is not known; use one of NVIDIA H100"),
        (
            ["--moments", "8bit", "--ranks", "2"],
            "--moments 8bit is for one rank in bf16, and this is bf16 on 2",
        ),
        (["--reshard", "node"], "--reshard node is for several ranks, and --ranks is 1; leave it out"),
        (["--reshard", "node", "--ranks", "6"], "--reshard node (4 ranks) does not divide the 6 shards"),
        (["--accumulation", "2", "--ranks", "2"], "--accumulation 2 is counted on one rank only; leave out --ranks"),
    ],
)
def test_refusals(arguments, said, capsys):
    assert account.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"account.py: {said}") and captured.err.count("\n") == 1 and not captured.out


def fsdp_calls(device: torch.device, config, ranks: int) -> list[tuple]:
    """FSDP2's copies and collectives of a step, [operator, shapes and dtypes], on that device."""

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace in ("fsdp", "c10d"):
                tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                self.calls.append((str(operator), [(tuple(x.shape), x.dtype) for x in tensors]))
            return operator(*args, **(kwargs or {}))

    case = MetaCase(config, 1, 8, ranks)
    if device == META:
        with world_of(ranks) as world, on_hopper(lambda *_: None, window_hides=False):
            step = MetaStep(case, world)
            with Record() as record:
                step.run()
        return record.calls
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        step = MetaStep(case, World(0, ranks, device, init_device_mesh("cpu", (ranks,)), 4))
        step.batches = [Batch(*torch.zeros(2, 1, 8, dtype=torch.int64), lengths=[8])]
        with torch.no_grad():
            for p in step.model.parameters():
                p.to_local().fill_(1.0)
        with Record() as record:
            step.run()
    finally:
        dist.destroy_process_group()
    return record.calls


def test_fsdp_on_meta_tensors_is_fsdp(monkeypatch):
    """The three patches that let it run there change none of its copies or collectives."""
    monkeypatch.setattr(meta_step, "META", torch.device("cpu"))  # where MetaStep puts guard and batch
    real = fsdp_calls(torch.device("cpu"), SMALL_MODEL, 16)
    monkeypatch.undo()
    ours = fsdp_calls(META, SMALL_MODEL, 16)
    assert len(ours) > 20 and Counter(map(str, ours)) == Counter(map(str, real))


@pytest.mark.parametrize("chunks", [1, 3])
def test_host_time_is_that_of_forward_backward_and_optimizer(chunks, monkeypatch):
    """With several chunks of logits, whose products are added up in fp32, as well."""
    monkeypatch.setattr("halny.kernels.linear_cross_entropy.chunk_rows", lambda n_rows, *_: -(-n_rows // chunks))
    host = account.host_ms(MetaCase(SMALL_MODEL, 1, 64, 1), n_steps=3)
    assert min(host.values()) > 0
    assert host["forward"] + host["backward"] + host["optimizer"] == pytest.approx(host["step"], rel=0.3)


# ----------------------------------------------------------------------------------------- nothing waits for the device


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_step_reads_no_value(ranks, monkeypatch):
    """A meta tensor has none to read, so what does not raise there waits for no GPU; a planted read raises."""
    case = MetaCase(SMALL_MODEL, 2, 64, ranks)
    with world_of(ranks) as world, on_hopper(lambda *_: None, case.window_hides):
        step = MetaStep(case, world)
        assert step.run().shape == (7,)
        judge = Guard.judge
        for read in (torch.Tensor.item, torch.Tensor.tolist, bool, torch.nonzero):

            def planted(guard, n, loss, norm, read=read):
                read(norm)
                return judge(guard, n, loss, norm)

            monkeypatch.setattr(Guard, "judge", planted)
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                step.run()


PLANTED = {  # what the step did once, and its kind
    "a number to an element": lambda guard, host: guard.losses.__setitem__(3, 5),
    "a number by an index": lambda guard, host: guard.losses.__setitem__(guard.losses.argsort(), 5.0),
    "a number of the host's to an element": lambda guard, host: guard.losses.__setitem__(3, host[0]),
    "by a list": lambda guard, host: guard.losses[[1, 2]],
    "a new tensor": lambda guard, host: torch.tensor([1.0], device=META),
    "a new one of its kind": lambda guard, host: guard.losses.new_tensor(1.0),
    "a number moved": lambda guard, host: host[0].to(META),
    "moved": lambda guard, host: host.to(META, non_blocking=True),
    "copied": lambda guard, host: guard.losses.copy_(host),
}


def test_the_old_line_is_found(monkeypatch):
    """totals[3] = pairs, as train_step had it."""
    fill = torch.Tensor.fill_

    def planted(x, value):
        if x.dtype == torch.float64 and x.shape == (1,):  # totals[3:]
            x[0] = value
            return x
        return fill(x, value)

    monkeypatch.setattr(torch.Tensor, "fill_", planted)
    with pytest.raises(RuntimeError, match=r"__setitem__ with .* copies from the host"):
        count_step(MetaCase(SMALL_MODEL, 2, 64, 1))


@pytest.mark.parametrize("copy", PLANTED.values(), ids=PLANTED)
def test_a_copy_from_the_host_is_found(copy, monkeypatch):
    """For each of these a host waits that has CUDA tensors before it."""
    judge, host = Guard.judge, torch.zeros(Guard.LENGTH, dtype=torch.float64)

    def planted(guard, n, loss, norm):
        copy(guard, host)
        return judge(guard, n, loss, norm)

    monkeypatch.setattr(Guard, "judge", planted)
    with pytest.raises(RuntimeError, match="host"):
        count_step(MetaCase(SMALL_MODEL, 2, 64, 1))


def test_what_waits_for_no_copy_is_let_pass(monkeypatch):
    """A number filled in, one that is a kernel's argument, and pinned memory."""
    judge, host = Guard.judge, torch.zeros(Guard.LENGTH, dtype=torch.float64)

    def planted(guard, n, loss, norm):
        guard.losses[3:].fill_(5)
        guard.losses[3:] = 5
        guard.losses.mul_(host[0])
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: True)
        guard.losses.copy_(host, non_blocking=True)
        host.to(META, non_blocking=True)
        monkeypatch.undo()
        return judge(guard, n, loss, norm)

    monkeypatch.setattr(Guard, "judge", planted)
    count_step(MetaCase(SMALL_MODEL, 2, 64, 1))


STEP_MS = 250.0
READERS = ("item", "tolist", "numpy", "cpu", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
READERS += ("__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "_local_scalar_dense")


def record_reads(cwd: Path, arguments: list[str], planted: bool) -> None:
    """In a process of its own: a run whose loop believes its metrics to be on a GPU; writes down who reads values.

    That GPU takes STEP_MS for each step, whenever the host comes to look.

    Between the batches of a step and its end, evaluation and checkpoint left out.
    """
    os.chdir(cwd)
    reads, order, watching = [], [], [False]

    def note(name: str) -> None:
        if name not in READERS or not watching[0]:
            return
        frame = sys._getframe(2)
        while "torch" in frame.f_code.co_filename.split(os.sep) or frame.f_code.co_name.startswith("__torch_"):
            frame = frame.f_back
        at = frame.f_code.co_filename, frame.f_lineno
        reads.append([Path(at[0]).name, frame.f_code.co_name, linecache.getline(*at).strip()])

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            note(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            note(operator.overloadpacket.__name__)
            return operator(*args, **(kwargs or {}))

    def around(owner, name: str, before, after=lambda: None) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before(*args)
            out = original(*args, **kwargs)
            after()
            return out

        setattr(owner, name, wrapped)

    def watch(on: bool):
        return lambda *_: watching.__setitem__(0, on)

    class Ended:  # a GPU's event
        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later) -> float:
            return STEP_MS

    journal.mark = lambda device: Ended()
    for module in ("mistral", "cross_entropy", "rope", "attention"):  # on a GPU no values are checked
        package = "model" if module == "mistral" else "kernels"
        sys.modules[f"halny.{package}.{module}"].can_check_values = lambda x: False
    around(Loader, "__next__", watch(False), watch(True))
    around(train.Run, "save", watch(False))
    around(train, "log_evaluation", watch(False))
    around(train, "train_step", lambda *args: order.append(["step", args[3]]))
    around(InFlight, "line", lambda self, *_: order.append(["settle", self.step]))
    if planted:
        around(Guard, "judge", lambda guard, step, loss, grad_norm: loss.item())
    original = train.train

    def recorded(run):
        with Functions(), Operators():
            return original(run)

    train.train = recorded
    code = train.run_to_exit_code(train.begin(arguments))
    Path("reads.json").write_text(json.dumps({"code": code, "reads": reads, "order": order}))
    os._exit(code)


def reads_of(cwd: Path, *arguments, planted: bool = False) -> dict:
    cwd.mkdir()
    _start_server()
    process = _server.Process(target=record_reads, args=(cwd, list(map(str, arguments)), planted))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0
    return json.loads((cwd / "reads.json").read_text())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_loop_reads_only_the_step_before(dtype, small, tmp_path):
    """bf16: one rank without FSDP; fp32: with it. The loop itself asks one thing more, of the host's own tensor."""
    command = [*SMALL, "--data", small, "--steps", 5, "--save-every", 3, "--eval-every", 4, "--dtype", dtype]
    found = reads_of(tmp_path / "clean", *command)
    assert {tuple(read[:2]) for read in found["reads"]} == {("journal.py", "line"), ("train.py", "train")}
    assert {line for _, function, line in found["reads"] if function == "train"} == {
        "stopping, save_failed, data_lost, save = map(bool, answers.tolist())"
    }
    steps = [["step", 1], ["step", 2], ["settle", 1], ["step", 3], ["settle", 2], ["settle", 3]]  # 3 is saved
    assert found["order"] == [*steps, ["step", 4], ["settle", 4], ["step", 5], ["settle", 5]]  # 4 is followed by a look
    (metrics,) = (tmp_path / "clean").glob("**/metrics.jsonl")
    lines = [line for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert [line["tokens_per_second_per_gpu"] for line in lines] == 5 * [256 / (STEP_MS / 1e3)]

    if dtype == "bf16":
        planted = reads_of(tmp_path / "planted", *command, planted=True)
        assert ["test_account.py", "<lambda>"] in [read[:2] for read in planted["reads"]]


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_synchronise():
    world = start_distributed(600)
    try:
        case = MetaCase(replace(SMALL_MODEL, window=None), 2, 64, 1)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(meta_step, "META", world.device)
            step = MetaStep(case, world)
        step.batches = [Batch(*torch.randint(256, (2, 2, 64), device=world.device), lengths=[64] * 2)]
        step.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    finally:
        dist.destroy_process_group()
