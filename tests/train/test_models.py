"""The models: shapes, what a position sees, parameters, and sizes that do not fit together."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import overdrive.pytorch as te
from overdrive.models import SIZES, ArgumentError, ModelConfig, build, generate, generate_batch
from overdrive.models.config import KINDS
from overdrive.models.generation import Decoder, draw, next_logits
from overdrive.train.loop import deterministic
from tests.numerics import assert_same_bits, relative_error
from tests.train.runs import RECIPES, config


def tokens(device, length=16):
    return torch.randint(0, 256, (3, length), device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_of_every_position_and_gradients_of_every_parameter(device, kind, recipe):
    model, x = build(config(kind=kind, groups=1), device), tokens(device, 17)[:2]
    with te.autocast(enabled=RECIPES[recipe] is not None, recipe=RECIPES[recipe]):
        logits = model(x[:, :-1])
    assert logits.shape == (2, 16, 256)
    assert logits.dtype == torch.bfloat16
    loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.01), "a fresh model knows nothing"
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_sees_itself_and_what_was_before(device, kind):
    model, x = build(config(kind=kind), device, torch.float32).eval(), tokens(device)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).gt(1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_what_was_before_matters(device, kind):
    model, x = build(config(kind=kind), device, torch.float32).eval(), tokens(device)
    swapped = x[:, [1, 0, *range(2, 16)]]
    with torch.no_grad():
        assert (model(x)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_last_token_alone(device, kind):
    model, x = build(config(kind=kind), device, torch.float32).eval(), tokens(device)
    with torch.no_grad():
        torch.testing.assert_close(model(x, last_only=True), model(x)[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_bit(device, kind):
    def gradients(recompute):
        torch.manual_seed(3)
        model, x = build(config(kind=kind, dropout=0.2), device), tokens(device)
        for _ in range(2):  # the second step has scales of the first
            model.zero_grad()
            with te.autocast(recipe=RECIPES["delayed"]):
                logits = model(x, recompute=recompute)
            logits.float().logsumexp(-1).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with deterministic(True, torch.device(device)):
        plain, again = gradients(False), gradients(True)
    for name in plain:
        assert_same_bits(again[name], plain[name], name)


def test_heads_are_tied_or_not(device):
    tied, untied = build(config(), device), build(config(tied=False), device)
    assert tied.head is tied.embedding
    assert untied.head is not untied.embedding
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 256 * 32


def test_the_seed_decides_the_parameters(device):
    def drawn(seed):
        torch.manual_seed(seed)
        return build(config(), device).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    for name in first:
        assert_same_bits(first[name], again[name], name)
    assert not torch.equal(first["embedding"], other["embedding"])
    assert first["layers.0.layernorm_mlp.fc1_weight"].float().std().item() == pytest.approx(0.02, rel=0.1)
    assert first["layers.0.layernorm_mlp.fc2_weight"].float().std().item() == pytest.approx(0.01, rel=0.1), "0.02 / sqrt(4)"


def test_too_many_tokens_are_refused(device):
    with pytest.raises(ValueError, match="tokens: 17 of them came, the model's context is 16"):
        build(config(), device)(tokens(device, 17))


@pytest.mark.parametrize(
    ("changes", "argument", "words"),
    [
        ({"heads": 7}, "heads", "7 heads do not divide the hidden size 32"),
        ({"groups": 3}, "groups", "3 groups of keys and values do not divide 2 heads"),
        ({"layers": 0}, "layers", "0 came; it takes a whole number of at least 1"),
        ({"context": -1}, "context", "-1 came"),
        ({"hidden": 3.5}, "hidden", "3.5 came"),
        ({"ffn": True}, "ffn", "True came"),
        ({"kind": "rnn"}, "kind", "'rnn' is not a kind of model; there are gpt, llama"),
        ({"kind": "llama", "hidden": 33, "heads": 11}, "heads", "11 heads have 3 channels each; rotary positions need an even"),
        ({"dropout": 1.5}, "dropout", "1.5 is not a probability"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, argument, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        config(**changes)
    assert caught.value.argument == argument


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_every_size_suits_fp8(size, kind):
    made = ModelConfig(kind=kind, **SIZES[size][kind])
    for features in (made.hidden, made.ffn, made.hidden // made.heads * made.groups):
        assert features % 16 == 0


def test_generation_is_greedy_at_temperature_zero_and_repeatable(device):
    model = build(config(), device)
    greedy = list(generate(model, b"one", 20, temperature=0))
    said = list(b"one")
    for _ in range(20):
        said.append(int(next_logits(model, said).argmax()))
    assert greedy == said[3:]
    drawn = [bytes(generate(model, b"", 30, temperature=1.0, top_p=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not model.training


def test_generation_sees_as_much_as_the_context_holds(device):
    model = build(config(), device).eval()
    window = list(range(40, 56))
    assert_same_bits(next_logits(model, [1, 2, 3, *window]), next_logits(model, window))


PROMPTS = [b"a", b"12 bottles", b"", b"as long as the context is, and then some"]


def outspoken(kind, device, dtype):
    """A model whose likeliest byte changes from one to the next and stands out."""
    model = build(config(kind=kind, groups=1, tied=False), device, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 8
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_no_byte(device, kind):
    """Prompts of any lengths, one longer than the context; all of them grow beyond it."""
    model = outspoken(kind, device, torch.float32)
    cached, anew = (list(generate_batch(model, PROMPTS, 24, temperature=0, use_cache=use)) for use in (True, False))
    assert cached == anew
    for row, prompt in zip(zip(*cached), PROMPTS):
        assert len(set(row)) > 8, "a model that repeats itself shows nothing"
        assert list(row) == list(generate(model, prompt, 24, temperature=0))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_a_cache_changes_only_bytes_that_are_as_likely(device, kind):
    """Each byte is the likeliest after those before it, as far as bf16 can tell."""
    model = outspoken(kind, device, torch.bfloat16)
    for row, prompt in zip(zip(*generate_batch(model, PROMPTS, 16, temperature=0)), PROMPTS):
        said = list(prompt or b"\n")
        for byte in row:
            logits = next_logits(model, said)
            likely = logits >= logits.max() - 0.2 * logits.std()
            assert likely[byte]
            assert likely.sum() < 20, "most bytes are less likely by far"
            said.append(byte)


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_of_a_batch_draws_as_it_does_alone(device, kind):
    model = build(config(kind=kind, groups=1), device, torch.float32)
    batch = zip(*generate_batch(model, PROMPTS, 20, seed=3))
    assert [list(row) for row in batch] == [list(generate(model, prompt, 20, seed=3, use_cache=False)) for prompt in PROMPTS]
    assert list(generate_batch(model, [], 2)) == [[], []]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [{}, {"is_paged": True, "page_size": 4, "total_num_pages": 9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_from_a_cache_are_those_of_all_tokens(device, dtype, memory, kind):
    model = outspoken(kind, device, dtype)
    said = {name: torch.randint(0, 256, (16,)).tolist() for name in range(3)}
    decoder, ends = Decoder(model, 3, **memory), {0: 3, 1: 7, 2: 1}
    known = decoder.cache.sequences
    for new in (3, 1, 1, 1, 4):  # new tokens of the next step; one sequence ends before the others
        logits = decoder({name: said[name][known.get(name, 0) : end] for name, end in ends.items()})
        known = decoder.cache.sequences
        expected = torch.stack([next_logits(model, said[name][:end]) for name, end in ends.items()])
        assert relative_error(logits, expected) < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
        ends = {name: end + new for name, end in ends.items() if name != 1 or end + new <= 12}
    assert (decoder.graph is not None) == (device == "cuda")
    with pytest.raises(ValueError, match="the cache overflows"):
        decoder({0: said[0][:9]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*FP8 GEMMs need token counts divisible by 16:UserWarning")
@pytest.mark.parametrize("recipe", [name for name in RECIPES if RECIPES[name] is not None])
def test_a_cache_goes_with_fp8(device, kind, recipe):
    """Scales of a token alone are not those of all tokens, so that only rounding to FP8 may differ."""
    model, said = build(config(kind=kind, groups=1), device).eval(), list(range(12))
    with te.autocast(recipe=RECIPES[recipe]):
        model(torch.tensor([said], device=device))  # records amaxes
    with te.autocast(recipe=RECIPES[recipe]):
        decoder = Decoder(model, 1, graphed=True)
        for end in range(4, 13):
            logits = decoder({0: said[decoder.cache.sequences.get(0, 0) : end]})
            assert relative_error(logits[0], next_logits(model, said[:end])) < 0.1
    assert decoder.graph is None


def test_top_p_draws_among_the_likeliest():
    probabilities = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])
    generator = torch.Generator().manual_seed(0)

    def seen(top_p, temperature=1.0):
        return {draw(probabilities.log(), temperature, top_p, generator) for _ in range(400)}

    assert seen(0.69) == {1, 2}
    assert seen(0.71) == {1, 2, 3}
    assert seen(1.0) == {0, 1, 2, 3, 4}
    assert seen(0.0) == {1}, "the likeliest always remains"
    assert seen(1.0, temperature=0.01) == {1}
