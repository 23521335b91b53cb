"""FSDP2's copy of gradients as a Triton kernel: PyTorch's bits, whoever calls it; and PyTorch's own where it must be.

Kernels run in Triton's interpreter, in a process that has TRITON_INTERPRET=1 (test_interpreted.py), or on a GPU.
"""

import warnings

import pytest
import torch
from runs import SMALL, checkpoint, column, equal, ranks_run

from halny.kernels import chunk_cat, dispatch
from halny.model.estimate import sizes
from halny.model.mistral import PRESETS

on_the_cpu = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1 (see test_interpreted.py)")
DTYPES = [torch.float32, torch.bfloat16]
LAYER = [(16,), (24, 16), (16, 16), (16,), (80, 16), (16, 40)]


def random(shape, dtype, device="cpu"):
    """Random bits, so all that a dtype has: infinities, NaNs, signed zeros, subnormal numbers."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.iinfo(integers)
    x = torch.randint(info.min, info.max + 1, shape, dtype=integers, device=device).view(dtype)
    if dispatch.INTERPRETED and dtype == torch.bfloat16:  # whose subnormal numbers Triton's interpreter mistakes
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, torch.full_like(x, -0.0), x)
    return x


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def both(tensors, chunks: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, PyTorch's), in buffers of NaN."""
    wide = sum(-(-x.shape[0] // chunks) * x[:1].numel() for x in tensors)
    outs = torch.full((2, chunks, wide), float("nan"), dtype=dtype, device=tensors[0].device)
    before = [x.clone() for x in tensors]
    chunk_cat.chunk_cat(tensors, 0, chunks, out=outs[0])
    torch._chunk_cat(before, 0, chunks, out=outs[1])
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(tensors, before, strict=True))
    return outs.unbind()


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chunks, shapes",
    [
        (1, [(1,)]),
        (1, LAYER),
        (2, LAYER),
        (4, LAYER),
        (8, LAYER),
        (16, [(16,), (16, 3), (32, 1, 5)]),  # rows of one element; of odd lengths, at odd offsets
        (3, [(3, 5000), (6, 4096), (3, 2048), (9, 1)]),  # several blocks a row, the last one whole or not
        (5, [(10, 7, 3)]),
    ],
)
def test_bits_are_pytorchs(chunks, shapes, dtype, launches):
    ours, theirs = both([random(shape, dtype) for shape in shapes], chunks)
    assert launches == {"chunk_cat_kernel": len(shapes)}
    assert torch.equal(bits(ours), bits(theirs))


@on_the_cpu
@pytest.mark.parametrize(
    "tensors, chunks, dtype",
    [
        ([torch.rand(8, 2), torch.rand(7, 3)], 4, torch.float32),  # padded
        ([torch.rand(3, 5)], 4, torch.float32),  # fewer rows than chunks
        ([torch.rand(6, 2), torch.rand(2, 2)], 4, torch.float32),  # padded, though elements divide
        ([torch.rand(8, 6).T.contiguous().T], 2, torch.float32),
        ([torch.rand(8, 6)[:, :3]], 2, torch.float32),
        ([torch.rand(8, 2).bfloat16()], 2, torch.bfloat16),  # nothing here is fp32
        ([torch.rand(8, 2).double()], 2, torch.float64),
    ],
)
def test_what_it_is_not_made_for_is_pytorchs(tensors, chunks, dtype, launches):
    ours, theirs = both(tensors, chunks, dtype)
    assert torch.equal(ours, theirs) and not launches


@on_the_cpu
def test_other_dimensions_wrong_sizes_and_the_switch_are_pytorchs(launches):
    x, out = torch.rand(4, 6), torch.empty(4, 2, 3)
    chunk_cat.chunk_cat([x], 1, 2, out=out)
    assert torch.equal(out, torch._chunk_cat([x], 1, 2))
    with dispatch.reference_only():
        both([x], 2)
    columns = torch.full((12, 2), float("nan")).T  # of an output
    chunk_cat.chunk_cat([x], 0, 2, out=columns)
    assert torch.equal(columns, x.view(2, 12))
    with warnings.catch_warnings(record=True):  # PyTorch resizes, and says so
        chunk_cat.chunk_cat([x], 0, 2, out=torch.empty(2, 13))
    with pytest.raises(RuntimeError):
        chunk_cat.chunk_cat([x], 0, 0, out=torch.empty(2, 12))
    with pytest.raises(RuntimeError, match="non-empty"):
        chunk_cat.chunk_cat([x, x[:0]], 0, 2, out=torch.empty(2, 12))
    assert not launches


# ---------------------------------------------------------------------------------------------------------- inside FSDP


@on_the_cpu
def test_the_operator_of_fsdp_is_it(launches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chunk_cat.use_in_fsdp() and chunk_cat.use_in_fsdp()
    x, out = random((8, 3), torch.bfloat16), torch.empty(4, 6)
    torch.ops.fsdp.chunk_cat([x], dim=0, num_chunks=4, out=out)
    assert launches == {"chunk_cat_kernel": 1} and torch.equal(bits(out), bits(x.float().view(4, 6)))
    torch.ops.fsdp.chunk_cat([x[:7]], dim=0, num_chunks=4, out=out)
    assert launches == {"chunk_cat_kernel": 1} and torch.equal(bits(out), bits(torch._chunk_cat([x[:7].float()], 0, 4)))


@pytest.mark.skipif(dispatch.INTERPRETED, reason="there the CPU's is replaced as well")
def test_the_cpu_keeps_its_own(launches, monkeypatch):
    assert chunk_cat.use_in_fsdp()
    monkeypatch.setattr(chunk_cat, "runs_kernel", None)  # is not asked
    x, out = torch.rand(8, 3), torch.empty(4, 6)
    torch.ops.fsdp.chunk_cat([x], dim=0, num_chunks=4, out=out)
    assert torch.equal(out, x.view(4, 6)) and not launches


def other_layout(tensors, dim, num_chunks, *, out):
    out.copy_(torch.cat([x.reshape(num_chunks, -1) for x in reversed(tensors)], dim=1))


def test_another_torch_is_left_alone(monkeypatch):
    """An operator that lays out otherwise, one of other arguments, none at all: said once, nothing replaced."""
    fresh, replaced = chunk_cat.use_in_fsdp.__wrapped__, []
    monkeypatch.setattr(torch.library.Library, "impl", lambda *args, **kwargs: replaced.append(args))
    for operator in (other_layout, lambda tensors, dim, num_chunks, scale, *, out: None, None):
        packet = type("packet", (), {"default": staticmethod(operator)} if operator else {})
        monkeypatch.setattr(torch.ops.fsdp, "chunk_cat", packet)
        with pytest.warns(UserWarning, match="FSDP copies gradients by its own kernel"):
            assert not fresh()
    assert not replaced


@on_the_cpu
@pytest.mark.parametrize(
    "dtype, ranks, flags, says",
    [
        ("fp32", 2, [], "2 shard(s) x 1 replica(s)"),
        ("bf16", 2, [], "2 shard(s) x 1 replica(s)"),
        ("bf16", 2, ["--shard", 1], "1 shard(s) x 2 replica(s)"),
        ("bf16", 4, ["--shard", 2], "2 shard(s) x 2 replica(s)"),
        ("bf16", 3, ["--batch-tokens", 192], "3 shard(s) x 1 replica(s)"),  # 64 channels on 3 ranks: padded
    ],
)
def test_a_run_is_the_same_to_the_bit(small, tmp_path, dtype, ranks, flags, says):
    """FSDP and HSDP on gloo: losses, norms, checkpoints beside those of PyTorch's copies. All else is the reference."""
    steps, command = 3, [*SMALL, "--kernels", "reference", "--dtype", dtype, "--data", small, *flags]
    command += ["--steps", steps, "--eval-every", 0, "--run-dir"]
    ours = ranks_run(*command, "ours", ranks=ranks, cwd=tmp_path, fault=("copied_by_kernel", "count"))
    ranks_run(*command, "theirs", ranks=ranks, cwd=tmp_path)
    assert says in ours.out
    for names in (("loss",), ("grad_norm",)):
        assert column(tmp_path / "ours", *names) == column(tmp_path / "theirs", *names)
    assert equal(*(checkpoint(tmp_path / run, steps) for run in ("ours", "theirs")))

    config, shards = PRESETS["test"], int(says.split()[0])
    groups = [sizes.layer_shapes(config)] * config.n_layers + [sizes.root_shapes(config)]
    wanted = sum(len(g) for g in groups if all(rows % shards == 0 for rows, _ in g))
    assert (wanted > 0) == (ranks != 3)
    counts = [tmp_path / f"count-{rank}" for rank in range(ranks)]
    assert [len(c.read_text().split()) if c.exists() else 0 for c in counts] == [steps * wanted] * ranks


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 8, 256])
def test_full_size_on_a_gpu(dtype, ranks, launches):
    """A layer of the 7B and its root, through FSDP's operator."""
    config = PRESETS["mistral-7b"]
    assert chunk_cat.use_in_fsdp()
    for shapes in (sizes.layer_shapes(config), sizes.root_shapes(config)):
        tensors = [random(shape, dtype, "cuda") for shape in shapes]
        theirs, ours = torch.full((2, ranks, sum(x.numel() for x in tensors) // ranks), float("nan"), device="cuda")
        torch._chunk_cat(tensors, 0, ranks, out=theirs)
        torch.ops.fsdp.chunk_cat(tensors, dim=0, num_chunks=ranks, out=ours)
        assert torch.equal(bits(ours), bits(theirs))
    assert launches == {"chunk_cat_kernel": 9}


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(launches):
    x = random((8, 2**28 + 16), torch.bfloat16, "cuda")
    out = torch.empty(8, 2**28 + 16, device="cuda")
    chunk_cat.chunk_cat([x], 0, 8, out=out)
    assert launches == {"chunk_cat_kernel": 1}
    assert torch.equal(bits(out[-1]), bits(x[-1].float())) and torch.equal(bits(out[3]), bits(x[3].float()))
