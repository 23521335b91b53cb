"""How bench/kernels.py and bench/attention.py take time, warm up, order their cases, and go on after a failure."""

import argparse
import json
import platform
import sys
import time

import pytest
import torch

from bench import attention as bench_attention
from bench import kernels
from bench.lib import clocks as clocks_module
from bench.lib import operations, peers
from bench.lib.clocks import Bench, Call, Clocks, burst_of, sets_for
from bench.lib.results import new_result, read_result
from halny.kernels.swiglu import swiglu_reference

CPU = Bench(torch.device("cpu"), True, 2**16)
H200 = Bench(torch.device("cuda"), False, 60 * 2**20)  # asked for sizes only
SHAPE = operations.SMOKE_SETS["7b"]

# ----------------------------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize(
    "n_bytes, expected",
    [
        (2**22, 64),  # 256 MiB, more than four times the cache
        (2**27, 12),  # a tensor of the 7B micro batch
        (2**30, 4),
    ],
)
def test_input_sets_exceed_the_cache_and_fill_a_burst(n_bytes, expected):
    assert sets_for(H200, n_bytes) == expected
    assert expected * n_bytes > 4 * H200.cache_bytes


@pytest.mark.parametrize(
    "kernel_ms, n_sets, expected",
    [(0.062, 12, 10), (0.25, 4, 3), (0.3, 12, 1), (0.005, 64, 16), (0.062, 4, 4), (0.05, 1, 1)],
)
def test_a_burst_lasts_long_beside_its_events_and_repeats_no_set(kernel_ms, n_sets, expected):
    assert burst_of(kernel_ms, n_sets) == expected


def test_a_burst_is_one_interval_divided(monkeypatch):
    """With a clock that counts calls: two marks a burst, whose difference is divided by its calls."""
    calls, waits = [], []
    clocks = Clocks(CPU, rounds=1, least=1)
    monkeypatch.setattr(clocks, "_flush", lambda: calls.append("flush"))
    monkeypatch.setattr(clocks, "_wait", waits.append)
    monkeypatch.setattr(clocks_module, "mark", lambda bench: float(sum(c != "flush" for c in calls)))
    call = Call(calls.append, 6)
    found = clocks._kernel_round(call, n=2, first=4, host_ms=0.5, burst=3)
    assert found == [1000.0, 1000.0]  # three calls, three "seconds", a second each
    assert calls == ["flush", 4, 5, 0, "flush", 1, 2, 3]
    assert waits == [pytest.approx(0.1 + 2 * 3 * 0.5)] * 2  # longer than the host needs for the three


def test_outputs_of_a_burst_live_until_it_is_over():
    """Else the allocator hands every call the same memory to write, and it stays in the cache."""
    alive = []

    class Output:
        def __del__(self):
            alive.remove(id(self))

    counts = []

    def run(i):
        out = Output()
        alive.append(id(out))
        counts.append(len(alive))
        return out

    Clocks(CPU, rounds=1)._kernel_round(Call(run, 4), n=2, first=0, host_ms=0.0, burst=4)
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4] and not alive


def test_slow_calls_do_not_take_all_their_sets_for_wall_time():
    seen = []

    def slow(i):
        seen.append(i)
        time.sleep(0.015)

    found = Clocks(CPU, rounds=2, least=1).time({"slow": Call(slow, 30)})["slow"]
    assert len(seen) < 30 and found["burst"] == 1 and found["wall_ms"]["median"] == pytest.approx(15, rel=0.5)


# ------------------------------------------------------------------------------------------------------ cases and rows


def test_the_7b_set_comes_first_in_order_of_value():
    listed = [(operation.name, name) for operation, name, _ in operations.cases(operations.SETS, "")]
    assert listed[:6] == [
        ("rms_norm", "7b"), ("add_rms_norm", "7b"), ("swiglu", "7b"), ("rope", "7b"), ("cross_entropy", "7b"),
        ("linear_cross_entropy", "2k"),
    ]  # fmt: skip
    assert listed[6] == ("linear_cross_entropy", "7b") and listed[7][0].startswith("adamw")
    assert len(set(listed)) == len(listed) and {name for _, name in listed} == set(operations.SETS)
    chosen = operations.chosen_sets(operations.SETS, ["7b"])
    assert list(chosen) == ["7b", "2k"]
    assert [name for name in listed if name[1] in chosen] == [(o.name, n) for o, n, _ in operations.cases(chosen, "")]
    assert [n for _, n, _ in operations.cases(operations.chosen_sets(operations.SETS, ["2k"]), "")] == ["2k"]


def test_rope_says_what_is_moved_and_what_must_be():
    """403 MB where v is copied, 336 MB where it stays; the backward packs three gradients."""
    rope, shape = operations.OPERATIONS["rope"], operations.SETS["7b"]
    by_name = {
        peer.name: kernels.row_of(rope, "7b", shape, "forward", torch.bfloat16, peer) for peer in peers.PEERS["rope"]
    }
    assert by_name["PyTorch eager"]["bytes"] == by_name["torch.compile"]["bytes"] == 402_653_184
    assert by_name["halny"]["bytes"] == by_name["quack"]["bytes"] == by_name["Liger-Kernel"]["bytes"] == 335_544_320
    assert {row["least_bytes"] for row in by_name.values()} == {335_544_320}
    for mode in ("backward", "both"):
        ours, eager = (kernels.row_of(rope, "7b", shape, mode, torch.bfloat16, p) for p in peers.PEERS["rope"][:2])
        assert ours["bytes"] == ours["least_bytes"] == eager["least_bytes"]
        assert eager["bytes"] - eager["least_bytes"] == (67_108_864 if mode == "both" else 0)


@pytest.mark.parametrize("place", range(7))
def test_who_leaves_v_returns_a_view_of_it(place):
    """leaves_v of every RoPE peer that runs here, from where its v lies."""
    peer = peers.PEERS["rope"][place]
    function, state, reason = kernels.load(peer)
    if function is None or peer.package not in ("halny", "PyTorch eager"):
        pytest.skip(f"{peer.name} {state} {reason}")
    inputs = operations.OPERATIONS["rope"].inputs(SHAPE, torch.float32, CPU.device)
    q, k, v = function(*inputs)
    qkv = inputs[0]
    shared = v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert shared == peer.leaves_v


def run(fakes: list[peers.Peer], tmp_path, excluded=None, names=("swiglu",), result=None, shape=SHAPE) -> dict:
    """run_all on the CPU with these providers; the file's content afterwards."""
    path = tmp_path / "kernels.json"
    result = result or new_result("kernels", CPU, "abc")
    jobs = [(operations.OPERATIONS[name], "7b", shape, fakes, excluded or {}) for name in names]
    kernels.run_all(CPU, path, jobs, result, time.monotonic() + 60, torch.float32)
    return read_result(path)


@pytest.fixture
def ceilings(monkeypatch):
    found = {"copy_gb_s": 1.0, "step_tflop_s": 1.0, "head_tflop_s": 1.0, "square_tflop_s": 1.0}
    monkeypatch.setattr(kernels, "ceilings", lambda bench: dict(found))


RIGHT = peers.Peer("halny", lambda: swiglu_reference, False, "", "right")


def test_a_row_has_its_share_of_the_ceiling(tmp_path, ceilings):
    rows = run([RIGHT], tmp_path)["rows"]
    assert [row["mode"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert row["of_ceiling"] == pytest.approx(row["gb_s"])  # of the large copy's 1 GB/s
        assert row["burst"] >= 1 and row["least_bytes"] == row["bytes"]


def test_a_case_that_breaks_leaves_a_row_a_provider_with_the_reason(tmp_path, ceilings, monkeypatch):
    def none_left(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 4 GiB")

    monkeypatch.setattr(kernels, "KernelCase", none_left)
    found = run([RIGHT, RIGHT._replace(package="other")], tmp_path)
    assert [(row["mode"], row["provider"]) for row in found["rows"]] == [
        (mode, name) for mode in ("forward", "backward", "both") for name in ("halny", "other")
    ]
    reasons = {row["reason"] for row in found["rows"]}
    assert reasons == {"the whole case: OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB"}
    assert found["not_reached"] == [] and list(found["seconds"]) == ["swiglu 7b"]


def test_what_is_not_reached_is_in_the_file_from_the_beginning(tmp_path, ceilings):
    path = tmp_path / "kernels.json"
    seen = []

    def spying():
        seen.append(json.loads(path.read_text())["not_reached"])
        return swiglu_reference

    run([peers.Peer("halny", spying, False, "", "spying")], tmp_path)
    assert seen == [["swiglu 7b"]] and json.loads(path.read_text())["not_reached"] == []


def test_who_leaves_the_gpu_in_error_is_named_and_the_run_ends(tmp_path, ceilings, capsys):
    """The cases before it are whole; what is after it is not reached, as nothing would work."""
    lost = []

    class Lost(Bench):
        def synchronize(self):
            if lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def poisons(gate_up):
        if gate_up.shape[0] == 9:  # only the second case
            lost.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return swiglu_reference(gate_up)

    fakes = [RIGHT, peers.Peer("bad", lambda: poisons, False, "", "bad")]
    operation, path = operations.OPERATIONS["swiglu"], tmp_path / "kernels.json"
    sizes = {"7b": 8, "128k": 9, "short": 8}
    jobs = [(operation, name, SHAPE | {"tokens": n}, fakes, {}) for name, n in sizes.items()]
    result = new_result("kernels", CPU, "abc") | {"excluded": {}}
    bench = Lost(CPU.device, True, CPU.cache_bytes)
    assert kernels.run_all(bench, path, jobs, result, time.monotonic() + 60, torch.float32) == 1
    found = read_result(path)
    states = {(row["set"], row["provider"]): row["status"] for row in found["rows"]}
    assert states == {
        ("7b", "halny"): "ok",
        ("7b", "bad"): "ok",
        ("128k", "halny"): "failed",
        ("128k", "bad"): "failed",
    }
    reason = next(row["reason"] for row in found["rows"] if row["status"] == "failed")
    assert reason.startswith("the whole case: RuntimeError: bad left the GPU in error: RuntimeError: CUDA error")
    assert found["not_reached"] == ["swiglu short"]
    assert "run again, its culprit left out by --without" in capsys.readouterr().out


def test_who_leaves_the_gpu_in_error_while_compiling_ends_its_process(monkeypatch):
    class Dead(Bench):
        def synchronize(self):
            raise RuntimeError("CUDA error: unspecified launch failure")

    class Aborted(BaseException):
        pass

    def abort():
        raise Aborted

    monkeypatch.setattr(kernels.os, "abort", abort)
    with pytest.raises(Aborted):
        kernels.run_once(Dead(CPU.device, True, 1), operations.OPERATIONS["swiglu"], swiglu_reference, SHAPE)


def test_who_is_left_out_says_so():
    fakes = [RIGHT, RIGHT._replace(package="Liger-Kernel", note="CuTe DSL")]
    assert kernels.left_out(fakes, ["CuTe", "quack"]) == {
        "Liger-Kernel, CuTe DSL": "left out of this run: --without 'CuTe'"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- warm-up


def test_a_warm_up_leaves_its_exclusions_for_the_run(tmp_path, monkeypatch):
    given = argparse.Namespace(smoke=False, budget_s=10.0, workers=2)
    listed, excluded = (
        [("swiglu", "quack"), ("swiglu", "halny")],
        {"swiglu": {"quack": "was still compiling after 9 s"}},
    )

    def warm_all(script, jobs, workers, save, budget_s, **more):
        assert (script, jobs, workers, budget_s) == ("kernels.py", listed, 2, 10.0)
        save(excluded)
        return excluded

    monkeypatch.setattr(kernels, "warm_all", warm_all)
    path = tmp_path / "warm-kernels.json"
    assert kernels.read_warm(path) == {}
    assert kernels.warm_up("kernels", listed, given, tmp_path) == 0
    assert kernels.read_warm(path) == excluded
    path.write_text(path.read_text().replace(json.dumps(platform.node()), '"another machine"'))
    assert kernels.read_warm(path) == {}, "what another machine compiled is not on this one"


def test_a_warm_up_that_is_ended_has_excluded_what_it_did_not_do(tmp_path):
    """The file is written before the first job and after each, so it is right whenever it is cut off."""
    script = tmp_path / "warm.py"
    script.write_text("import sys\n")
    saved = []
    jobs = [("a", "quack"), ("a", "halny"), ("b", "quack")]
    save = lambda excluded: saved.append(json.loads(json.dumps(excluded)))  # noqa: E731
    assert kernels.warm_all(str(script), jobs, 1, save) == {"a": {}, "b": {}}
    no_time = {"quack": "no time was left to compile it"}
    assert saved == [{"a": no_time, "b": no_time}, {"a": {}, "b": no_time}, {"a": {}, "b": no_time}, {"a": {}, "b": {}}]


def test_large_jobs_do_not_run_beside_one_another(tmp_path, monkeypatch):
    script, log = tmp_path / "warm.py", tmp_path / "log"
    script.write_text(
        "import sys, time\n"
        f"for what in ('begins', 'ends'):\n    open({str(log)!r}, 'a').write(f'{{sys.argv[2]}} {{what}}\\n')\n"
        "    time.sleep(0.3)\n"
    )
    monkeypatch.setattr(kernels, "WARM_BYTES", 10)
    jobs = [(name, "quack") for name in "abc"]
    kernels.warm_all(str(script), jobs, 3, lambda _: None, sizes={"a": 8, "b": 8, "c": 99})
    lines = log.read_text().split("\n")[:-1]
    assert len(lines) == 6
    assert all(lines[i].split()[0] == lines[i + 1].split()[0] for i in range(0, 6, 2)), lines


def test_every_warm_job_is_given_enough_memory_and_fits():
    sizes = {o.name: kernels.warm_bytes(o, operations.SETS) for o in operations.OPERATIONS.values()}
    logits = 16384 * 32000
    assert sizes["linear_cross_entropy"] > (2 + 4 + 4) * logits  # in bf16, in fp32, and the fp32 gradient
    assert all(2e9 < size < kernels.WARM_BYTES / 3 for size in sizes.values()), sizes


def test_warm_jobs_begin_with_the_quickest():
    jobs = kernels.warm_jobs("", operations.SETS)
    assert jobs[0] == ("rms_norm", "halny") and ("adamw, 8bit", "halny") in jobs
    packages = [provider.partition(",")[0] for _, provider in jobs]
    assert packages[-1] == "torch.compile" and packages == sorted(packages, key=kernels.COMPILED_AT_FIRST.index)


def test_the_disk_cache_of_flash_attn_4_is_on_before_it_is_imported():
    assert kernels.os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert kernels.os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.fixture
def on_h200(monkeypatch):
    """Plans as on a Hopper GPU with the packages that a test names, without one."""
    monkeypatch.setattr(bench_attention.kernels, "load", lambda peer: (object(), "ok", ""))

    def with_packages(*packages: str) -> None:
        from halny.kernels.attention import choose
        from halny.kernels.attention_backends import AttentionCase

        def plan(B, T, head_dim, dtype, device, *, window, cu_seqlens, backend, max_seqlen=None):
            hides = window is not None and window < (max_seqlen or T)
            case = AttentionCase((9, 0), dtype, head_dim, hides, cu_seqlens is not None, T == 1, False, packages)
            return argparse.Namespace(backend=choose(backend, case))

        monkeypatch.setattr(bench_attention, "plan_attention", plan)

    return with_packages


def by_title() -> dict:
    return {bench_attention.title(case.shape): case for case in bench_attention.cases(False)}


def test_attention_cases_come_in_order_of_value():
    assert list(by_title())[:4] == ["4 x 4096", "4 x 4096, documents", "1 x 32768, window 4096", "1 x 32768"]


def test_flex_attention_compiles_only_where_asked_or_where_nothing_else_can(on_h200):
    arguments = torch.bfloat16, torch.device("cpu")
    on_h200("flash-attn-4")

    def compiled(flex: bool) -> set[tuple[str, str]]:
        providers = {name: case.peers(*arguments, flex=flex) for name, case in by_title().items()}
        return set(bench_attention.warm_jobs(providers))

    assert compiled(flex=False) == {(name, "halny, flash4") for name in by_title()}
    assert {provider for _, provider in compiled(flex=True)} == {"halny, flash4", "flex", "flex_flash"}
    for case in by_title().values():
        names = {peer.name for peer in case.peers(*arguments, flex=False)}
        assert names == {"halny, flash4", "flash3", "flash2", "cudnn", "sdpa"}
    on_h200()
    masked = {
        name for name, case in by_title().items()
        if case.shape["documents"] or (case.shape["window"] or 2**62) < max(case.lengths)
    }  # fmt: skip
    assert {name for name, provider in compiled(flex=False) if provider == "halny, flex"} == masked


def test_rehearsals_take_the_new_options(tmp_path, capsys):
    assert kernels.main(["--smoke", "--warm-only", "--set", "7b", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "warm-kernels.json").read_text()) if (tmp_path / "warm-kernels.json").exists() else 1
    arguments = ["--smoke", "--set", "128k", "--only", "linear", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    assert {row["set"] for row in read_result(tmp_path / "kernels.json")["rows"]} == {"128k"}
    with pytest.raises(SystemExit):
        kernels.main(["--smoke", "--set", "13b"])
    assert "invalid choice" in capsys.readouterr().err
    assert sys.argv  # untouched
