"""A Mistral whose parts are replaced, hooked, wrapped, sharded apart, cast or moved: it computes what they say.

Fused operations stand for plain modules alone. Adapters are tried once more where kernels run, in the interpreter.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_passes_in_the_interpreter
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from halny.kernels.dispatch import INTERPRETED
from halny.kernels.rope import rope_tables
from halny.model.convert import load_hf_weights, save_hf
from halny.model.mistral import PRESETS, Mistral, named_weights

CONFIG = PRESETS["test"]
TOKENS, LABELS = torch.arange(2 * 9).view(2, 9) * 7 % 256, torch.arange(2 * 9).view(2, 9) * 11 % 256
LABELS[0, 3] = -100


def model_of(seed: int = 1, recompute: bool = True) -> Mistral:
    model = Mistral(CONFIG, recompute)
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.ndim == 2 else p.add_(torch.linspace(-0.3, 0.3, len(p)))
    return model


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, n_tokens, n_correct = model(TOKENS, LABELS)
    loss.backward()
    gradients = {name: p.grad for name, p in named_weights(model)}  # before FSDP shows gathered weights
    with torch.no_grad():
        logits = model(TOKENS).float()
    want = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum")
    torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=1e-4)  # a sum of 17 losses of some 10, in fp32
    assert n_tokens == 17 and n_correct == (logits.argmax(-1) == LABELS).sum()
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return loss.item(), whole


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients(model_of())


def assert_same(model, plain) -> None:
    loss, gradients = loss_and_gradients(model)
    assert abs(loss / plain[0] - 1) < 1e-6
    assert gradients.keys() == plain[1].keys()
    for name, want in plain[1].items():
        # the same in fp32 but for the order of sums, where another path makes them
        torch.testing.assert_close(gradients[name], want, rtol=1e-4, atol=1e-5, msg=name)


def linears(model) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of each nn.Linear."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


class LowRank(nn.Module):
    """y = W x + B A x, W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, (rows, columns) = base.requires_grad_(False), base.weight.shape
        self.a, self.b = nn.Parameter(torch.randn(3, columns) * 0.1), nn.Parameter(torch.randn(rows, 3) * 0.1)

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("recompute", [True, False])
def test_adapters_on_every_linear_are_trained(recompute):
    """Against the chain rule from the gradient of the merged weight W + B A."""
    adapted, merged = model_of(recompute=recompute), model_of()
    adapters = {}
    for (parent, name, layer), (*_, whole) in zip(linears(adapted), linears(merged), strict=True):
        adapters[whole] = LowRank(layer)
        setattr(parent, name, adapters[whole])
        with torch.no_grad():
            whole.weight += adapters[whole].b @ adapters[whole].a
    assert len(adapters) == 4 * CONFIG.n_layers + 1
    ours, theirs = (loss_and_gradients(model)[0] for model in (adapted, merged))
    assert abs(ours / theirs - 1) < 1e-5
    for whole, adapter in adapters.items():
        gradient = whole.weight.grad
        # W x + B (A x) and (W + B A) x round differently in fp32, and gradients go through two layers of it
        torch.testing.assert_close(adapter.b.grad, gradient @ adapter.a.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(adapter.a.grad, adapter.b.T @ gradient, rtol=1e-3, atol=1e-4)
        assert adapter.base.weight.grad is None


def test_adapters_are_refused_where_weights_are_named(tmp_path):
    model = model_of()
    model.layers[1].mlp.down = LowRank(model.layers[1].mlp.down)
    message = r"unexpected \['layers.1.mlp.down.a', .*missing \['layers.1.mlp.down.weight'\].*merge adapters"
    with pytest.raises(ValueError, match=message):
        save_hf(model, tmp_path / "export")
    with pytest.raises(ValueError, match=message):
        model.init_weights(1)
    save_hf(model_of(), tmp_path / "export")
    with pytest.raises(ValueError, match=message):
        load_hf_weights(model, tmp_path / "export")


@pytest.mark.parametrize("everywhere", [False, True], ids=["on each module", "on all modules"])
def test_hooks_of_every_module_are_called(everywhere, plain):
    model, forward, backward = model_of(), [], []
    on_forward = lambda module, *_: forward.append(module)  # noqa: E731
    on_backward = lambda module, *_: backward.append(module)  # noqa: E731
    called = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    if everywhere:
        handles = [nn.modules.module.register_module_forward_hook(on_forward)]
        handles.append(nn.modules.module.register_module_full_backward_hook(on_backward))
    else:
        handles = [m.register_forward_hook(on_forward) for m in called]
        handles += [m.register_full_backward_pre_hook(on_backward) for m in called if type(m) is nn.Linear]
    try:
        assert_same(model, plain)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(map(id, forward)) == sorted(map(id, called * 2))  # with labels, and without
    assert {id(m) for m in called if type(m) is nn.Linear} <= {id(m) for m in backward}


def with_bias(layer: nn.Linear) -> nn.Module:
    layer.bias = nn.Parameter(torch.linspace(-1, 1, len(layer.weight)))
    return layer


def with_forward(layer: nn.Linear) -> nn.Module:
    before = layer.forward
    layer.forward = lambda x: before(x) + torch.linspace(-1, 1, len(layer.weight))
    return layer


def with_hook(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, x, y: y + torch.linspace(-1, 1, len(module.weight)))
    return layer


@pytest.mark.parametrize("change", [with_bias, with_forward, with_hook])
@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "head"])
def test_what_a_linear_was_made_to_add_is_added(name, change):
    """Loss and logits agree, and are those of a module that is nothing but a sum."""

    class Sum(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + torch.linspace(-1, 1, len(self.layer.weight))

    losses = []
    for changed in (change, Sum):
        model = model_of()
        parent = model if name == "head" else model.layers[0].get_submodule(name.split(".")[0])
        setattr(parent, name.split(".")[-1], changed(parent.get_submodule(name.split(".")[-1])))
        losses.append(loss_and_gradients(model)[0])
    assert losses[0] == losses[1] != loss_and_gradients(model_of())[0]


# ------------------------------------------------------------------------------------------------------------ wrappers


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(*paths: str):
    def shard(model):
        for layer in model.layers:
            for path in paths:
                fully_shard(layer.get_submodule(path))
        return fully_shard(model)

    return shard


def layers_in(wrap):
    def wrapped(model):
        for i in range(len(model.layers)):
            model.layers[i] = wrap(model.layers[i])
        return model

    return wrapped


def norms_and_mlps_checkpointed(model):
    for layer in model.layers:
        layer.mlp, layer.mlp_norm = checkpoint_wrapper(layer.mlp), checkpoint_wrapper(layer.mlp_norm)
    return model


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPED = {
    "compiled": compiled,
    "layers compiled": layers_in(compiled),
    "layers checkpointed": layers_in(checkpoint_wrapper),
    "layers checkpointed and compiled": layers_in(lambda layer: compiled(checkpoint_wrapper(layer))),
    "norms and MLPs checkpointed": norms_and_mlps_checkpointed,
    "data parallel": lambda model: nn.parallel.DistributedDataParallel(model),
    "sharded": fully_sharded(),
    "MLPs and attention sharded": fully_sharded("mlp", "attention"),
    "norms sharded": fully_sharded("mlp_norm", "attention_norm"),
    "linears sharded": fully_sharded("mlp.down", "mlp.gate_up", "attention.qkv", "attention.out"),
    "head sharded": lambda model: (fully_shard(model.head), fully_shard(model))[1],
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_computes_as_before(wrap, plain, alone):
    torch._dynamo.reset()
    assert_same(WRAPPED[wrap](model_of()), plain)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_has_its_names(wrap, alone, tmp_path):
    """Exports and seeds do not know of wrappers."""
    model = model_of()
    save_hf(model, tmp_path / "plain")
    wrapped = WRAPPED[wrap](copy.deepcopy(model))
    save_hf(wrapped, tmp_path / "wrapped")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert [path.name for path in sorted((tmp_path / "wrapped").iterdir())] == files
    for file in files:
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    inner = getattr(wrapped, "module", wrapped)
    inner.init_weights(7)
    drawn = Mistral(CONFIG)
    drawn.init_weights(7)
    assert_weights(inner, drawn)
    load_hf_weights(wrapped, tmp_path / "plain")
    assert_weights(inner, model)


def assert_weights(wrapped, model) -> None:
    found = dict(named_weights(wrapped))
    for name, p in model.named_parameters():
        held = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        assert torch.equal(held, p), name


def test_what_is_no_mistral_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a Mistral.*Linear"):
        save_hf(nn.Linear(3, 3), tmp_path / "export")


# ---------------------------------------------------------------------------------------------------------- RoPE tables


def assert_tables(model) -> None:
    for held, want in zip((model.rope_cos, model.rope_sin), rope_tables(CONFIG.max_seq_len, 16, 1e4), strict=True):
        assert held.dtype == torch.float32 and torch.equal(held, want)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(),
                                  lambda m: nn.Sequential(m).bfloat16()[0], compiled])  # fmt: skip
def test_tables_do_not_follow_the_dtype(cast):
    model = model_of()
    assert_tables(cast(model))
    assert_tables(model.float())


def test_tables_are_made_where_the_weights_are():
    with torch.device("meta"):
        model = Mistral(CONFIG)
    assert model.rope_cos.is_meta
    for fill in (lambda m: m.to_empty(device="cpu"), lambda m: m):
        filled = fill(copy.deepcopy(model))
        filled.load_state_dict(model_of().state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(filled(TOKENS), model_of()(TOKENS))
        assert_tables(filled)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process runs the kernels itself")
def test_adapters_in_the_interpreter():
    assert_passes_in_the_interpreter(f"{__file__}::test_adapters_on_every_linear_are_trained")
