"""halny's Mistral against transformers' MistralForCausalLM, and what the model promises beside that.

The oracle is transformers in fp32 with eager attention, given the same random weights: norm weights too, because at 1
they would hide themselves. Tensors are compared through convert's TABLE, so a wrong packing order fails here.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers

from halny.kernels.rope import rope_tables
from halny.model import mistral
from halny.model.convert import pieces
from halny.model.mistral import PRESETS, Mistral, MistralConfig, _fill_normal

EPS = torch.finfo(torch.float32).eps
BASE = {
    "vocab_size": 97, "dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12, "hidden_dim": 80,
    "window": None, "max_seq_len": 64, "norm_eps": 1e-5,
}  # fmt: skip


def oracle(config: MistralConfig, seed: int = 0) -> transformers.MistralForCausalLM:
    hf = transformers.MistralForCausalLM._from_config(
        transformers.MistralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            sliding_window=config.window,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        ),
        attn_implementation="eager",
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3, generator=generator)
            else:  # twice the usual size, so that attention is not close to uniform
                parameter.normal_(0.0, 2 * parameter.shape[1] ** -0.5, generator=generator)
    return hf


def ours_from(hf: transformers.MistralForCausalLM, config: MistralConfig) -> Mistral:
    theirs, model = hf.state_dict(), Mistral(config)
    ours = {name: torch.cat([theirs[piece.hf_name] for piece in placed]) for name, placed in pieces(config)}
    model.load_state_dict(ours, strict=True)
    return model


def batch(config: MistralConfig, B: int, T: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (B, T), generator=generator)
    labels = torch.randint(0, config.vocab_size, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.2] = -100
    return tokens, labels


def run_ours(model: Mistral, tokens, labels) -> dict[str, torch.Tensor]:
    loss, n_tokens, n_correct = model(tokens, labels)
    loss.backward()
    logits = model(tokens).detach()
    assert n_tokens == (labels != -100).sum()
    assert n_correct == (logits.argmax(-1) == labels).sum()
    out = {"logits": logits, "loss": loss.detach()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, placed in pieces(model.config):
        for hf_name, shape, first in placed:
            out[hf_name] = grads[name][first : first + shape[0]]
    return out


def run_oracle(hf, tokens, labels) -> dict[str, torch.Tensor]:
    logits = hf(tokens, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    grads = {name: parameter.grad for name, parameter in hf.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def assert_equals_oracle(config: MistralConfig, B: int, T: int) -> None:
    hf = oracle(config)
    tokens, labels = batch(config, B, T)
    theirs = run_oracle(hf, tokens, labels)
    ours = run_ours(ours_from(hf, config), tokens, labels)
    truth = run_ours(ours_from(hf, config).double(), tokens, labels)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, want in truth.items():
        # By norm and not by the largest element, which helpers.py bounds for one operation: after some dozens of them
        # it is a matter of luck which element is hit, up to a factor of 3 on these sizes.
        our_error, their_error = ((x[name].double() - want).norm() / want.norm() for x in (ours, theirs))
        # transformers is within rounding of the fp64 run, which is therefore the truth for both ...
        assert their_error < 1e-5, f"{name}: transformers is {their_error:.1e} away from our fp64 run"
        # ... and ours is as near to it as PyTorch's arithmetic gets
        assert our_error <= 2 * their_error + 4 * EPS, f"{name}: {our_error:.1e}, transformers {their_error:.1e}"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="gqa-4-2"),
        pytest.param({"n_kv_heads": 4}, id="mha"),
        pytest.param({"n_heads": 8, "n_kv_heads": 1, "head_dim": 6}, id="8-1"),
        pytest.param({"window": 7}, id="window-below-T"),
        pytest.param({"window": 2}, id="window-2"),
        pytest.param({"window": 33}, id="window-equals-T"),
        pytest.param({"window": 32}, id="window-T-minus-1"),
        pytest.param({"head_dim": 20}, id="head_dim-not-dim-over-heads"),
        pytest.param({"rope_theta": 1e6}, id="theta-1e6"),
        pytest.param({"rope_theta": 50.0, "norm_eps": 0.1}, id="theta-50-eps-0.1"),
    ],
)
def test_logits_loss_and_every_gradient_equal_transformers(changes):
    assert_equals_oracle(MistralConfig(**{**BASE, **changes}), B=2, T=33)


def test_positions_to_4096():
    config = MistralConfig(
        vocab_size=31, dim=24, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=32, window=3000,
        max_seq_len=4096,
    )  # fmt: skip
    assert_equals_oracle(config, B=1, T=4096)


def test_packed_documents_equal_the_documents_alone(monkeypatch):
    # RoPE being relative, logits cannot tell whether positions restart with each document; the calls can
    positions = []
    rope = mistral.rope_split_qkv_
    monkeypatch.setattr(mistral, "rope_split_qkv_", lambda *args: (positions.append(args[-1]), rope(*args))[1])
    config = MistralConfig(**{**BASE, "window": 9})
    model = ours_from(oracle(config), config)
    tokens, labels = batch(config, B=2, T=24)
    cu_seqlens = torch.tensor([0, 10, 11, 24, 48], dtype=torch.int32)
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=cu_seqlens, max_seqlen=24).flatten(0, 1)
        assert positions[0].tolist() == [[*range(10), 0, *range(13)], [*range(24)]]
        across = model(tokens).flatten(0, 1)
        packed_loss = model(tokens, labels, cu_seqlens=cu_seqlens).loss
        alone_loss = 0.0
        for start, end in pairwise(cu_seqlens.tolist()):
            document = tokens.flatten()[start:end][None]
            alone = model(document)[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-5)
            alone_loss += model(document, labels.flatten()[start:end][None]).loss
    torch.testing.assert_close(packed_loss, alone_loss, rtol=1e-6, atol=0)
    assert (packed[10] - across[10]).abs().max() > 0.1  # the first position of the second document saw nothing else


def test_a_token_reaches_exactly_as_far_as_the_window():
    window, layers, T, poisoned_at = 5, 2, 30, 8
    config = MistralConfig(**{**BASE, "window": window, "n_layers": layers})
    model = ours_from(oracle(config), config)
    tokens, _ = batch(config, B=1, T=T)
    poison = (tokens == tokens[0, poisoned_at]).nonzero()[:, 1]
    tokens[0, poison] = 0
    poisoned = tokens.clone()
    poisoned[0, poisoned_at] = 1
    with torch.no_grad():
        model.embed.weight[1] *= 1000
        changed = (model(tokens) != model(poisoned)).any(-1)[0].nonzero().flatten().tolist()
    # each layer hands it on to the window - 1 positions after it; the next is untouched to the last bit
    assert changed == list(range(poisoned_at, poisoned_at + layers * (window - 1) + 1))


def test_greedy_generation_equals_transformers_token_by_token():
    config = MistralConfig(**{**BASE, "window": 8})
    hf = oracle(config)
    model = ours_from(hf, config)
    hf.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    for seed in range(3):
        prompt, _ = batch(config, B=1, T=5, seed=seed)
        theirs = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=25, do_sample=False)
        assert model.generate(prompt, 25).tolist() == theirs.tolist()
    sampled = [model.generate(prompt, 25, temperature=1.0, seed=seed).tolist() for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_mistral_7b_on_the_meta_device():
    with torch.device("meta"):
        model = Mistral(PRESETS["mistral-7b"])
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_241_732_096


@pytest.mark.parametrize("cuts", [[0, 1100], [0, 300, 1030, 1100], [0, 512, 512, 1024, 1100], [0, 1, 1099, 1100]])
def test_initial_values_do_not_depend_on_the_sharding(cuts):
    whole, std = torch.full((1100, 6), torch.nan), 0.02
    _fill_normal(whole, 0, std, 7, "some.weight")
    shards = []
    for start, end in pairwise(cuts):
        shards.append(torch.full((end - start, 6), torch.nan))
        _fill_normal(shards[-1], start, std, 7, "some.weight")
    assert torch.equal(torch.cat(shards), whole)
    assert whole.unique().numel() > 0.99 * whole.numel()  # no block repeats another
    assert abs(whole.std() / std - 1) < 0.05 and abs(whole.mean()) < 0.05 * std


def test_init_weights():
    config = MistralConfig(**{**BASE, "dim": 64, "n_layers": 3})
    with torch.device("meta"):
        model = Mistral(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    model.init_weights(seed=3)
    first = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, parameter in first.items():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / (2 * config.n_layers) ** 0.5 if residual else 0.02
            assert abs(parameter.std() / std - 1) < 0.06, name
    for table, want in zip((model.rope_cos, model.rope_sin), rope_tables(64, 12, 10000.0), strict=True):
        assert torch.equal(table, want)
    shapes_alike = [first[f"layers.{i}.mlp.gate_up.weight"] for i in range(3)]
    assert not torch.equal(shapes_alike[0], shapes_alike[1]) and not torch.equal(shapes_alike[1], shapes_alike[2])
    model.init_weights(seed=3)
    assert all(torch.equal(parameter, first[name]) for name, parameter in model.named_parameters())
    model.init_weights(seed=4)
    assert not torch.equal(model.embed.weight, first["embed.weight"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_seq_len")
          for value in (0, -3, 2.5, "8", None, True)),
        ("n_kv_heads", 3),
        ("head_dim", 7),
        ("window", 0),
        ("window", 1.5),
        ("rope_theta", float("nan")),
        ("rope_theta", 0.0),
        ("norm_eps", -1e-5),
        ("norm_eps", float("inf")),
    ],
)  # fmt: skip
def test_config_errors_name_field_and_value(field, value):
    with pytest.raises(ValueError) as error:
        MistralConfig(**{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


def test_forward_refuses_what_does_not_fit():
    config = MistralConfig(**BASE)
    model = Mistral(config)
    tokens, labels = batch(config, B=2, T=8)

    def changed(x, value):
        x = x.clone()
        x[1, 3] = value
        return x

    for wrong in (-1, config.vocab_size):
        with pytest.raises(ValueError, match=rf"tokens must lie in 0 \.\. 96.*got {wrong}"):
            model(changed(tokens, wrong))
    for wrong in (-1, config.vocab_size):
        with pytest.raises(ValueError, match=rf"labels must lie in 0 \.\. 96.*got {wrong}"):
            model(tokens, changed(labels, wrong))
    with pytest.raises(ValueError, match="labels must have shape"):
        model(tokens, labels[:, :-1])
    with pytest.raises(ValueError, match="T = 65, beyond the model's max_seq_len of 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    assert model(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 97)
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\]"):
        model(tokens[0])
    with pytest.raises(TypeError, match="tokens must be an integer tensor"):
        model(tokens.float())
    with pytest.raises(ValueError, match="cu_seqlens lacks the row boundary 8"):
        model(tokens, cu_seqlens=torch.tensor([0, 4, 12, 16], dtype=torch.int32))
    for prompt in (tokens[0], tokens[:1, :0], tokens[:2]):
        with pytest.raises(ValueError, match=r"tokens must be \[1, T\] with at least one token"):
            model.generate(prompt, 1)
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        model.generate(tokens[:1], 1, temperature=-1)


def test_a_growing_prompt_has_few_lengths():
    """Each length is a plan of cuDNN's; what is behind the last token changes nothing before it."""
    model, lengths = Mistral(MistralConfig(**BASE | {"max_seq_len": 150, "window": 40})), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    grown = model.generate(torch.arange(120).view(1, 120) % BASE["vocab_size"], 40)
    assert lengths == [128] * 9 + [150] * 31
    with torch.no_grad():
        for n in (120, 127, 128, 129, 149, 150, 151, 159):
            logits_v = model(grown[:, max(0, n - 150) : n])[0, -1]
            assert logits_v[grown[0, n]] >= logits_v.max() - 1e-4 * logits_v.abs().max()
