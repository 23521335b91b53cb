"""bench/products.py before there is a GPU: its binding of cuBLASLt against the headers, and all of it on a stand-in."""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from bench import measure, products

REPO = measure.ROOT
CPU = measure.Bench(torch.device("cpu"), True, 2**16)
HEADERS = products.headers()
needs_headers = pytest.mark.skipif(len(HEADERS) < 3, reason="no headers of nvidia-cublas are installed")


def loaded() -> ctypes.CDLL | None:
    try:
        return products.library()
    except (RuntimeError, OSError):
        return None


needs_library = pytest.mark.skipif(loaded() is None, reason="torch has loaded no libcublasLt")


# -------------------------------------------------------------------------------------------------------- the headers


@needs_headers
def test_the_numbers_are_the_headers():
    known = {}
    for path in HEADERS:
        known |= products.enumerators(path.read_text(encoding="utf-8"))
    ours = {name: value for name, value in vars(products).items() if re.match(r"(CUBLAS|CUDA_)", name)}
    ours |= {name: number for name, (number, _) in products.CONFIG.items()}
    assert len(ours) > 20
    assert {name: known.get(name) for name in ours} == ours
    for i, matrix in enumerate("ABCD"):
        number = known[f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{matrix}_BYTES"]
        assert number == products.CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + i


@needs_headers
def test_the_attributes_types_are_the_headers():
    """Each attribute's comment says its type."""
    text = HEADERS[0].read_text(encoding="utf-8")
    for name, (_, kind) in products.CONFIG.items():
        said = re.findall(r"\b(u?)int(\d+)_t\b", text[: text.index(f"  {name} = ")])[-1]
        assert said == ("u" if kind(-1).value > 0 else "", str(8 * ctypes.sizeof(kind))), name


SIZES = {"uint64_t data[8]": 64, "cublasLtMatmulAlgo_t": 64, "size_t": 8, "cublasStatus_t": 4, "float": 4, "int[4]": 16}


@needs_headers
def test_the_structures_are_the_headers():
    text = re.sub(r"/\*.*?\*/", "", HEADERS[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.search(r"typedef struct \{\s*uint64_t data\[8\];\s*\} cublasLtMatmulAlgo_t;", text)
    assert ctypes.sizeof(products.Algorithm) == 64
    body = re.search(r"typedef struct \{([^}]*)\} cublasLtMatmulHeuristicResult_t;", text).group(1)
    offset = 0
    fields = re.findall(r"(\w+) (\w+)(\[\d+\])?;", body)
    assert [name for _, name, _ in fields] == [name for name, _ in products.HeuristicResult._fields_]
    for kind, name, array in fields:
        assert getattr(products.HeuristicResult, name).offset == offset, name
        offset += SIZES[kind + array]
    assert ctypes.sizeof(products.HeuristicResult) == offset == 96


def c_kind(parameter: str) -> str:
    """Which of ctypes' widths a parameter of a prototype has."""
    words = parameter.strip()
    opaque = re.match(r"(cublasLt\w+_t|cudaStream_t) ", words) and "Attribute" not in words
    if opaque or "*" in words or "[" in words:
        return "pointer"
    integers = {"size_t": "size", "uint64_t": "64", "int64_t": "64"}
    return integers.get(words.split()[0], "int")  # the rest are int and enumerations


def our_kind(kind: type) -> str:
    if kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer):
        return "pointer"
    return str(8 * ctypes.sizeof(kind))


@needs_headers
def test_the_signatures_are_the_headers():
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADERS[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    widths = {"pointer": "pointer", "int": "32", "64": "64", "size": "64"}
    for name, types in products.SIGNATURES.items():
        parameters = re.search(rf"\b{name}\(([^;]*)\);", text).group(1).split(",")
        assert [widths[c_kind(p)] for p in parameters] == [our_kind(kind) for kind in types], name


@needs_headers
def test_tiles_and_clusters_have_names():
    names = products.value_names()
    assert {"128x256", "192x192", "320x128"} <= set(names["tile_id"].values())
    assert names["cluster_shape_id"][3] == "2x1x1" and names["stages_id"][16] == "64x4"


@needs_library
def test_the_library_takes_the_descriptions_without_a_gpu(monkeypatch):
    """And refuses, rather than crashes, what needs one: the arguments are where it looks for them."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(cuda_stream=0))
    lib = loaded()
    a, w = torch.ones(64, 32, dtype=torch.bfloat16), torch.ones(48, 32, dtype=torch.bfloat16)
    out, workspace = torch.empty(64, 48, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.uint8)
    for formulation in products.REQUESTED:
        problem = products.Problem(lib, formulation, a, w.T, out)
        with pytest.raises(RuntimeError, match="cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_INITIALIZED"):
            problem.algorithms(None, 8)
        with pytest.raises(RuntimeError, match="cublasLtMatmul: CUBLAS_STATUS_NOT_INITIALIZED"):
            problem.caller(None, products.Algorithm(), workspace)()
    found = products.configuration(lib, products.HeuristicResult(), products.value_names())
    wanted = {name.removeprefix("CUBLASLT_ALGO_CONFIG_").lower() for name in products.CONFIG}
    assert wanted <= found.keys()  # each was read with the size that the library expects
    assert len(found["algo"]) == 128


# ----------------------------------------------------------------------------------------------------------- a stand-in


class StandIn:
    """cuBLASLt's functions on the CPU, by their documentation: matrices read from memory as their layouts say."""

    def __init__(self, offered: int = 3, wrong: int = 1, broken: int = 2):
        self.things, self.offered, self.wrong, self.broken, self.calls = {}, offered, wrong, broken, 0

    def made(self, pointer, thing):
        key = len(self.things) + 1
        self.things[key] = thing
        pointer._obj.value = key
        return 0

    def set(self, of, attribute, value, size):
        assert size == ctypes.sizeof(value._obj)
        self.things[of.value][attribute] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatrixLayoutSetAttribute = cublasLtMatmulPreferenceSetAttribute = set

    def cublasLtMatmulDescCreate(self, pointer, compute, scale):
        assert (compute, scale) == (68, 0)
        return self.made(pointer, {3: 0, 4: 0})

    def cublasLtMatrixLayoutCreate(self, pointer, kind, rows, columns, ld):
        assert kind == 14
        return self.made(pointer, {"rows": rows, "columns": columns, "ld": ld, 1: 0})

    def cublasLtMatmulPreferenceCreate(self, pointer):
        return self.made(pointer, {})

    def cublasLtMatmulAlgoGetHeuristic(self, handle, description, a, b, c, d, preference, most, results, n):
        assert self.things[preference.value] == {1: 2**26, 3: 2, 5: 16, 6: 16, 7: 16, 8: 16}
        assert c.value == d.value and len(results) == most
        n._obj.value = min(most, self.offered)
        for i in range(n._obj.value):
            results[i].algo.data[0], results[i].waves = i, 1.0
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(self, algo, attribute, value, size, written):
        assert size == ctypes.sizeof(value._obj)
        value._obj.value = algo._obj.data[0] if attribute == 0 else 1
        return 0

    def matrix(self, address, layout):
        rows, columns, ld, by_rows = layout["rows"], layout["columns"], layout["ld"], layout[1] == 1
        n = (rows - 1) * ld + columns if by_rows else (columns - 1) * ld + rows
        flat = torch.frombuffer((ctypes.c_uint16 * n).from_address(address), dtype=torch.bfloat16)
        return flat.as_strided((rows, columns), (ld, 1) if by_rows else (1, ld))

    def cublasLtMatmul(self, handle, description, alpha, A, a, B, b, beta, C, c, D, d, algo, workspace, size, stream):
        assert C == D and size == 64 and stream == 0
        self.calls += 1
        which = products.Algorithm.from_address(algo).data[0]
        if which == self.broken:
            return 15
        scalars = [ctypes.c_float.from_address(x).value for x in (alpha, beta)]
        assert scalars == [1.0, 0.0]
        first, second, out = (self.matrix(x, self.things[y.value]) for x, y in ((A, a), (B, b), (D, d)))
        transposed = self.things[description.value]
        first, second = first.T if transposed[3] else first, second.T if transposed[4] else second
        out.copy_(first.float() @ second.float() * (1.5 if which == self.wrong else 1.0))
        return 0

    def cublasLtGetStatusName(self, status):
        return b"CUBLAS_STATUS_NOT_SUPPORTED"


@pytest.fixture
def lt(monkeypatch) -> products.CublasLt:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(cuda_stream=0))
    made = object.__new__(products.CublasLt)
    made.lib, made.names, made.version, made.handle = StandIn(), {}, 130100, ctypes.c_void_p(7)
    made.workspace = torch.empty(64, dtype=torch.uint8)
    return made


@pytest.mark.parametrize("formulation", products.REQUESTED)
@pytest.mark.parametrize("kind", ["forward", "input gradient", "weight gradient"])
def test_what_is_described_is_the_product(lt, kind, formulation):
    a, b = measure.product_operands(CPU, {"p": (kind, 24, 40, 16, 1)})[0]
    out = torch.full((a.shape[0], b.shape[1]), float("nan"), dtype=torch.bfloat16)
    problem = products.Problem(lt.lib, formulation, a, b, out)
    problem.caller(lt.handle, problem.algorithms(lt.handle, 8)[0].algo, lt.workspace)()
    torch.testing.assert_close(out, (a.float() @ b.float()).bfloat16(), rtol=0, atol=0)


def given(**others) -> argparse.Namespace:
    return products.parser().parse_args(["--smoke", *(f"--{k.replace('_', '-')}={v}" for k, v in others.items())])


def new_result() -> dict:
    machine = {"date": "", "device": "CPU", "versions": {}, "commit": "", "command": ""}
    result = {"format": 1, "kind": "products", "smoke": True, "machine": machine, "preset": "mistral-7b"}
    return result | {"tokens": 16384, "cublaslt": "", "rows": [], "decision": None}


def test_all_of_it_on_the_stand_in(lt, monkeypatch, tmp_path, capsys):
    """Right candidates are timed, wrong and refused ones say why, and the file holds what was printed."""
    monkeypatch.setattr(products, "opened", lambda bench: (lt, "a stand-in"))
    path = tmp_path / "products.json"
    assert products.run(CPU, given(budget_s=60), path, new_result()) == 0
    found = measure.read_result(path)
    assert len(found["rows"]) == 15 and {row["status"] for row in found["rows"]} == {"ok"}
    for row in found["rows"]:
        by_name = {one["name"]: one for one in row["candidates"]}
        assert by_name.keys() == {"torch.mm", *(f"{f} {i}" for f in products.REQUESTED for i in range(3))}
        for formulation in products.REQUESTED:
            right, wrong, refused = (by_name[f"{formulation} {i}"] for i in range(3))
            assert right["reason"] == "" and right["ms"] > 0 and right["config"]["tile_id"] == 1
            assert "differs from torch.mm by" in wrong["reason"] and wrong["ms"] is None
            assert refused["reason"] == "cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED" and refused["ms"] is None
        assert row["best_ms"] == min(one["ms"] for one in row["candidates"] if one["ms"])
        assert row["best_ms"] <= row["default_ms"] == by_name["torch.mm"]["ms"]
    assert [one["set"] for one in found["decision"]["stretches"]] == ["default", "best", "best", "default"]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"the step's products: default [\d.,]+ ms, with the best of each [\d.,]+ ms$", last[0])
    assert last[1].startswith("the whole set back to back")

    found["rows"][0]["gain"] = None
    path.write_text(json.dumps(found))
    with pytest.raises(measure.BadResult, match=r"rows\[0\]\.gain must be"):
        measure.read_result(path)


class AsOnGpu(measure.Bench):
    on_gpu = True

    def synchronize(self):
        pass


class Event:
    """torch.cuda.Event by the host's clock."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later) -> float:
        return (later.at - self.at) * 1e3


def test_the_path_of_a_gpu_within_its_budget(lt, monkeypatch, tmp_path, capsys):
    """With profiler, watch, events and torch's other library."""
    shapes = {name: (kind, 32, 48, 16, 4) for name, (kind, *_) in measure.products_of(products.PRESETS["mistral-7b"],
                                                                                     16384).items()}  # fmt: skip
    monkeypatch.setattr(measure, "products_of", lambda *_: shapes)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(products, "opened", lambda bench: (lt, "a stand-in"))
    monkeypatch.setattr(products, "STRETCH_S", 0.005)
    monkeypatch.setattr(products, "DECISION_S", 0.45)
    before = torch.backends.cuda.preferred_blas_library()
    begun = time.monotonic()
    arguments = products.parser().parse_args(["--budget-s", "30", "--only", "gradient"])
    code = products.run(AsOnGpu(CPU.device, False, 2**16), arguments, tmp_path / "products.json", new_result())
    assert code == 0 and 1.8 < time.monotonic() - begun < 31
    assert torch.backends.cuda.preferred_blas_library() == before
    found = measure.read_result(tmp_path / "products.json")
    assert [row["status"] for row in found["rows"]] == ["ok"] * 10
    names = {one["name"] for one in found["rows"][0]["candidates"] if one["ms"]}
    assert names <= {"torch.mm", "transposes 0", "orders 0", "torch.mm, cublaslt preferred"} and len(names) >= 2
    assert found["decision"]["seconds"] == 0.45 and all(s["turns"] >= 2 for s in found["decision"]["stretches"])
    assert "clock unknown" in capsys.readouterr().out.splitlines()[-1]


def test_what_the_time_does_not_reach_is_said(lt, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(products, "opened", lambda bench: (lt, "a stand-in"))
    monkeypatch.setattr(
        products, "guessed_seconds", lambda bench, product, keep: 0.0 if "head" in product.name else 99.0
    )
    assert products.run(CPU, given(budget_s=30), tmp_path / "products.json", new_result()) == 0
    rows = measure.read_result(tmp_path / "products.json")["rows"]
    states = {row["name"]: row["status"] for row in rows}
    assert sorted(n for n, state in states.items() if state == "ok") == [n for n in sorted(states) if "head" in n]
    out = capsys.readouterr().out
    assert out.count("not reached: no time was left") == 12 and "(without 12 products that have no figures)" in out


def test_a_product_that_fails_loses_only_its_row(lt, monkeypatch, tmp_path):
    def candidates(bench, lt, product):
        def unlucky():
            raise ValueError("out of luck")

        return [products.Candidate("unlucky", unlucky)] if product.name == "qkv, forward" else [], {}

    monkeypatch.setattr(products, "candidates_of", candidates)
    assert products.run(CPU, given(), tmp_path / "products.json", new_result()) == 1
    found = measure.read_result(tmp_path / "products.json")
    states = {row["name"]: (row["status"], row["reason"]) for row in found["rows"]}
    assert states.pop("qkv, forward") == ("failed", "ValueError: out of luck")
    assert set(states.values()) == {("ok", "")} and found["decision"]


def test_a_gpu_in_error_ends_the_run_with_its_file(lt, monkeypatch, tmp_path, capsys):
    class Broken(measure.Bench):
        broken = False

        def synchronize(self):
            if Broken.broken:
                raise RuntimeError("an illegal memory access was encountered")

    def run():
        Broken.broken = True

    monkeypatch.setattr(products, "candidates_of", lambda *_: ([products.Candidate("bad", run)], {}))
    bench = Broken(CPU.device, True, 2**16)
    assert products.run(bench, given(), tmp_path / "products.json", new_result()) == 1
    found = measure.read_result(tmp_path / "products.json")
    assert [row["status"] for row in found["rows"]] == ["failed"] + ["not reached"] * 14
    assert "bad: an illegal memory access" in found["rows"][0]["reason"] and found["decision"] is None
    assert "not measured, DeviceLost" in capsys.readouterr().out


def test_stretches_are_taken_in_turn_and_in_reverse():
    """Each of the time that is asked for, whatever a run of it takes."""
    order = []

    def candidate(name: str, ms: float) -> products.Candidate:
        def run():
            order.append(name)
            time.sleep(ms / 1e3)

        return products.Candidate(name, run)

    both = [candidate("slow", 4.0), candidate("fast", 2.0)]
    found = products.sustained(CPU, both, {"slow": 4.0, "fast": 2.0}, 0.016)
    assert order == ["slow"] * 4 + ["fast"] * 16 + ["slow"] * 4
    assert found["slow"] > found["fast"] > 1.9


def test_slow_candidates_are_screened_once():
    counts = dict.fromkeys(("torch.mm", "slow"), 0)

    def candidate(name: str, ms: float) -> products.Candidate:
        def run():
            counts[name] += 1
            time.sleep(ms / 1e3)

        return products.Candidate(name, run)

    found = products.screened(CPU, [candidate("torch.mm", 2.0), candidate("slow", 20.0)], time.monotonic() + 60)
    assert counts == {"torch.mm": 2 * products.SCREENING_RUNS, "slow": 1}  # each round is led by one that is not timed
    assert [len(times) for times in found.values()] == [products.SCREENING_RUNS, 1]


def test_the_profiler_takes_every_candidate_and_those_that_raise():
    """Without a GPU no kernel is launched, but the profiler, its events and their times are these."""
    made, ran = products.products_on(CPU)[:2], []

    def refused():
        ran.append("refused")
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    candidates = {p.name: [products.default_of(p), products.Candidate("refused", refused)] for p in made}
    products.name_kernels(CPU, made, candidates)
    assert ran == ["refused"] * 2 and [one.kernels for p in made for one in candidates[p.name]] == [[]] * 4


def test_one_kernel_takes_one_place():
    def one(name: str, algo: str, *kernels: str) -> products.Candidate:
        return products.Candidate(name, int, {"algo": algo} if algo else {}, list(kernels))

    default, again = one("torch.mm", "", "k1"), one("transposes 0", "a", "k1")
    other, twice, swizzled = one("transposes 1", "b", "k2"), one("orders 0", "b", "k2"), one("orders 1", "c", "k2")
    preferred, slower = one("torch.mm, cublaslt preferred", "", "k2"), one("orders 2", "d", "k1")
    ms = {"torch.mm": 1.0, "transposes 0": 1.001, "transposes 1": 1.002, "orders 0": 1.003, "orders 1": 1.004}
    ms |= {"torch.mm, cublaslt preferred": 1.0045, "orders 2": 1.1}
    every = [default, again, twice, other, slower, swizzled, preferred]
    assert products.distinct(every, ms, 9) == [default, other, swizzled, slower]
    assert products.distinct(every, ms, 1) == [default, other]
    for x in every:
        x.kernels = []  # nothing is known of torch's: they stay
    assert products.distinct(every, ms, 9) == [default, again, other, swizzled, preferred, slower]


def test_the_rehearsal(tmp_path):
    command = [sys.executable, "bench/products.py", "--smoke", "--out", str(tmp_path), "--commit", "a test's"]
    done = subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = measure.read_result(tmp_path / "products.json")
    assert found["smoke"] and found["machine"]["commit"] == "a test's" and found["cublaslt"] == "no GPU"
    assert {row["status"] for row in found["rows"]} == {"ok"}
    assert products.main(["--smoke", "--only", "no such", "--out", str(tmp_path)]) == 2
