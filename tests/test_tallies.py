"""All sums of one pass against experts that are run by hand; merging; what may be asked for."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import models
from moecollab import criteria
from moecollab.criteria.base import Criterion, Needs
from moecollab.criteria.scoring import score
from moecollab.errors import MissingInputError, SettingsError, ShapeError, UnsupportedModelError
from moecollab.models.loading import load_model, load_tokenizer
from moecollab.models.routing import find_moe_layers
from moecollab.record.extraction import collected, extract
from moecollab.record.outputs import OutputReader
from moecollab.record.sketch import add_tokens, distinct, shared
from moecollab.record.sums import GROUPS, SUMS
from moecollab.record.tallies import Tallies, load_tallies

COLLECT = ("shift", "channels", "probability", "pairs", "vocabulary")


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def recorded(request, texts, tmp_path_factory):
    """A model's folder and a recording of everything."""
    folder = models.save(request.param, tmp_path_factory.mktemp("all") / request.param)
    out = tmp_path_factory.mktemp("recorded") / "acts"
    return folder, extract(folder, texts, out=out, collect=COLLECT, batch_size=3)


@pytest.fixture(scope="module")
def by_hand(recorded):
    """Slow sums: each document alone, every chosen expert on every token by its definition."""
    folder, acts = recorded
    model, tokenizer = load_model(folder, "float32")
    layers = find_moe_layers(model)
    tallies = acts.tallies()
    found = {name: np.zeros_like(value) for name, value in tallies.arrays.items()}
    found["tokens"] = {}
    table = acts.tokens().join(acts.samples(), on="sample")
    for sample in range(acts.n_samples):
        rows = table.filter(table["sample"] == sample)
        ids = rows["token_id"].to_numpy()
        domain = tallies.domains.index(rows["domain"][0])
        for start in range(0, len(ids), 64):  # the model reads 64 positions at most
            _add_window(model, layers, found, domain, ids[start : start + 64], start)
    assert tokenizer is not None
    return found


def _add_window(model, layers, found, domain, ids, start):
    calls, streams, logits = {}, {}, {}
    hooks = []
    for row, layer in enumerate(layers):
        decoder = model.get_submodule(layer.name.rpartition(".")[0])
        norm = decoder.post_attention_layernorm

        def keep_call(_module, args, row=row):
            calls[row] = [value.detach().clone() for value in args]

        def keep_stream(_module, args, row=row):
            streams[row] = args[0].detach().clone()

        def keep_logits(router, args, _output, row=row):
            logits[row] = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T

        hooks.append(layer.router.register_forward_hook(keep_logits))
        hooks.append(layer.experts.register_forward_pre_hook(keep_call))
        hooks.append(norm.register_forward_pre_hook(keep_stream))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    for row, layer in enumerate(layers):
        hidden, chosen, weights = calls[row]
        found["sum_probability"][domain, row] += logits[row].double().softmax(1).sum(0).numpy()
        stream = streams[row].reshape(-1, hidden.shape[-1])
        for token, experts in enumerate(chosen.tolist()):
            outputs = [_expert(layer.experts, expert, hidden[token]) for expert in experts]
            gates = weights[token].double().numpy()
            shift = _shift(stream[token].double().numpy(), gates @ np.stack(outputs))
            place = (int(ids[token]), start + token)
            for expert, g, f in zip(experts, gates, outputs, strict=True):
                _add_slot(found, (domain, row, expert), place, g, f, shift)
                for other in experts:
                    found["pair_count"][domain, row, expert, other] += 1


def _shift(before, routed):
    """One minus the cosine, at least 0."""
    after = before + routed
    return max(0.0, 1 - before @ after / np.linalg.norm(before) / np.linalg.norm(after))


def _add_slot(found, at, place, g, f, shift):
    norm, peak = np.linalg.norm(f), np.abs(f).max()
    for name, value in {
        "count": 1,
        "sum_weight": g,
        "sum_weight_sq": g * g,
        "sum_norm": norm,
        "sum_norm_sq": norm**2,
        "sum_weighted_norm": g * norm,
        "sum_weighted_norm_sq": (g * norm) ** 2,
        "sum_shift": g * norm * shift,
        "sum_output": f,
        "sum_output_sq": f * f,
    }.items():
        found[name][at] += value
    found["tokens"].setdefault(at, set()).add(place[0])
    if peak > found["max_abs"][at]:
        found["max_abs"][at] = peak
        found["peak_token"][at], found["peak_position"][at] = place
        found["peak_channel"][at] = np.abs(f).argmax()


@torch.no_grad()
def _expert(experts, number, hidden):
    gate, up = functional.linear(hidden, experts.gate_up_proj[number]).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, experts.down_proj[number]).double().numpy()


def test_every_sum_equals_experts_run_by_hand(recorded, by_hand):
    tallies = recorded[1].tallies()
    assert set(tallies.groups) == set(GROUPS) - {"preferences"}, "which is a column"
    for name, value in tallies.arrays.items():
        if name == "token_sketch":
            continue
        exact = SUMS[name].dtype == "int64"
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 2e-5, "atol": 2e-6}
        np.testing.assert_allclose(value, by_hand[name], err_msg=name, **close)


def test_sketches_count_the_ids_that_each_expert_saw(recorded, by_hand):
    sketch = recorded[1].tallies()["token_sketch"]
    seen = by_hand["tokens"]
    for at, ids in seen.items():
        assert distinct(sketch[at]) == pytest.approx(len(ids), abs=3, rel=0.05)
    assert (distinct(sketch) > 0).sum() == len(seen)


def test_sketches_of_known_sets():
    rng = np.random.default_rng(0)
    ids = rng.choice(200_000, 60_000, replace=False)
    sketch = np.zeros((3, 1024), np.uint8)
    site = np.repeat([0, 1], [40_000, 40_000])
    add_tokens(sketch, site, np.concatenate([ids[:40_000], ids[20_000:]]))
    assert distinct(sketch[:2]) == pytest.approx([40_000, 40_000], rel=0.1)
    assert distinct(sketch[2]) == 0
    assert shared(sketch[0], sketch[1]) == pytest.approx(20_000, rel=0.3)
    again = sketch.copy()
    add_tokens(again, site[:100], ids[:100])
    assert np.array_equal(again, sketch), "ids that were seen change nothing"


def test_the_diagonal_of_pairs_is_the_count(recorded):
    tallies = recorded[1].tallies()
    diagonal = np.diagonal(tallies["pair_count"], axis1=-2, axis2=-1)
    assert np.array_equal(diagonal, tallies.count)
    assert np.array_equal(tallies["pair_count"], tallies["pair_count"].swapaxes(-1, -2))


def test_sums_do_not_depend_on_how_the_text_is_divided(recorded, texts, tmp_path):
    folder, acts = recorded
    parts = [
        extract(folder, part, out=tmp_path / str(n), collect=COLLECT).tallies()
        for n, part in enumerate((texts[:2], texts[2:]))
    ]
    both, whole = parts[0].merge(parts[1]), acts.tallies()
    for name, value in whole.arrays.items():
        order = [both.domains.index(domain) for domain in whole.domains]
        close = (
            {"rtol": 0, "atol": 0}
            if SUMS[name].dtype != "float64"
            else {"rtol": 1e-6, "atol": 1e-6}
        )
        np.testing.assert_allclose(both[name][order], value, err_msg=name, **close)
    for name, value in whole.total().arrays.items():
        joined = both.total()[name]
        np.testing.assert_allclose(joined, value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_tallies_survive_a_file(recorded, tmp_path):
    tallies = recorded[1].tallies()
    tallies.save(tmp_path / "t.safetensors")
    again = load_tallies(tmp_path / "t.safetensors")
    assert (again.domains, set(again.arrays)) == (tallies.domains, set(tallies.arrays))
    assert all(np.array_equal(again[name], value) for name, value in tallies.arrays.items())


def test_preferences_of_routers_that_choose_by_more_than_probability(texts, tokenizer, tmp_path):
    model = models.build("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="with a correction bias or by groups"):
        extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer, collect="preferences")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_preferences_are_the_best_of_the_rest(family, tmp_path):
    folder = models.save(family, tmp_path / "model")
    texts = ["Owls hunt at night.", "Nine short words in a row."]
    acts = extract(folder, texts, out=tmp_path / "acts", norms=False, collect="preferences")
    model, _ = load_model(folder, "float32")
    layers = find_moe_layers(model)
    logits = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _router, _args, output: logits.append(output[0]))
    start = 0
    for ids in acts.tokens().group_by("sample", maintain_order=True).agg("token_id")["token_id"]:
        logits.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor(ids.to_list())[None])
        for layer, found in zip(layers, logits, strict=True):
            table = acts.layer(layer.layer)
            for token, values in enumerate(found.numpy()):
                chosen = table.expert[start + token].tolist()
                rest = [one for one in np.argsort(-values).tolist() if one not in chosen]
                assert table.next[start + token].tolist() == rest[:4]
        start += len(ids)
    assert acts.to_polars().collect()[f"next_{acts.layers[0]}"].to_numpy().shape == (start, 4)


def test_layers_with_fewer_experts_run_out_of_preferences():
    from moecollab.record.mass import Mass
    from moecollab.record.schema import NO_EXPERT, n_preferences

    assert [n_preferences(64, 8), n_preferences(8, 3), n_preferences(4, 4)] == [16, 5, 0]
    mass = Mass(find_moe_layers(models.build("mixtral"))[0], (1, 4), 4)
    found = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])
    ids, weights = torch.tensor([[0, 2], [3, 0]]), torch.tensor([[0.6, 0.4], [1.0, 0.0]])
    after = mass._after(found, ids, weights)
    assert after.tolist() == [[3, 1, NO_EXPERT, NO_EXPERT], [2, 1, 0, NO_EXPERT]]


def test_what_was_not_asked_for_is_named(acts):
    with pytest.raises(
        MissingInputError, match="sum_output was not recorded; extract again with c"
    ):
        acts.tallies()["sum_output"]
    assert acts.groups == ("routing", "norms")
    with pytest.raises(SettingsError, match="sum is 'sum_wieght'; it must be one of count, sum_w"):
        acts.tallies()["sum_wieght"]
    assert acts.tallies().keys()[:2] == ("count", "sum_weight")
    assert repr(acts.tallies()).startswith("Tallies(2 domains, 3 layers × 8 experts: count, sum_")
    with pytest.raises(ShapeError, match="only one of the tallies holds pair_count"):
        acts.tallies().merge(Tallies.zeros(("law",), 3, 8, groups=("routing", "norms", "pairs")))


def test_a_criterion_asks_for_what_it_needs(model_folder, texts, acts, tmp_path, monkeypatch):
    def turning(evidence, /):
        return evidence.tallies["sum_shift"]

    monkeypatch.setattr(criteria, "_registry", dict(criteria._registry))
    needs = Needs.ROUTING | Needs.OUTPUT_NORMS | Needs.SHIFT
    criteria.register(Criterion("turning", needs, turning))
    with pytest.raises(MissingInputError, match=r"again with collect=.shift. .--collect shift"):
        score("turning", acts)
    recorded = extract(
        model_folder, texts, out=tmp_path / "acts", collect=criteria.collects("turning")
    )
    assert recorded.groups == ("routing", "norms", "shift")
    assert (
        collected("pairs,,shift") == collected(("pairs", "routing", "shift")) == ("shift", "pairs")
    )
    found = score("turning", recorded).values
    assert (found[recorded.tallies().total().count > 0] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collect": "nonsense"}, "collect is 'nonsense'"),
        ({"collect": "channels", "norms": False}, "norms is False"),
        ({"collect": ["shift"], "norms": False}, "norms is False"),
        ({"collect": "pairs, norms", "norms": False}, "norms is False"),
    ],
)
def test_collecting_what_cannot_be(model_folder, texts, tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        extract(model_folder, texts, out=tmp_path / "acts", **options)
    assert not list(tmp_path.iterdir())


def test_recording_everything_leaves_logits_as_they_are(token_ids):
    from moecollab.record.recorder import Recorder

    model = models.build("qwen3_moe")
    with torch.inference_mode():
        before = model(input_ids=token_ids).logits
        layers = find_moe_layers(model)
        everything = {"norms": True, "channels": True, "shift": model, "probability": True}
        with Recorder(layers, **everything) as recorder:
            assert torch.equal(model(input_ids=token_ids).logits, before)
            recorder.take(torch.ones(token_ids.numel(), dtype=torch.bool))
        assert torch.equal(model(input_ids=token_ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_of_reading_outputs_agree(dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(150, 37, generator=generator).to(dtype)
    which = torch.randperm(150, generator=generator)[:120]
    sites = torch.randint(0, 10, (120,), generator=generator)
    host, device = (OutputReader(10, channels=True) for _ in range(2))
    device._on_host = device._on_device
    found, twin = (reader.read(rows, which, sites) for reader in (host, device))
    torch.testing.assert_close(found.norm, twin.norm)
    assert torch.equal(found.peak, twin.peak)
    assert torch.equal(found.channel, twin.channel)
    np.testing.assert_allclose(host.sums, device.sums, rtol=1e-12)


def test_probabilities_of_a_router_that_tells_nothing(token_ids):
    from moecollab.record.recorder import Recorder

    model = models.build("mixtral")
    for layer in model.model.layers:
        forward = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda hidden, forward=forward: (
            torch.rand(hidden.reshape(-1, 32).shape[0], 8),
            *forward(hidden)[1:],
        )
    real = torch.ones(token_ids.numel(), dtype=torch.bool)
    layers = find_moe_layers(model)
    with torch.inference_mode(), Recorder(layers, norms=False, probability=True) as recorder:
        model(input_ids=token_ids)
        with pytest.raises(
            UnsupportedModelError, match="does not return what its weights are made"
        ):
            recorder.take(real)


def test_experts_beside_the_residual_stream_are_refused():
    from moecollab.record.residual import Residual

    model = models.build("mixtral")
    watch = Residual(model, find_moe_layers(model)[0])
    watch.given = torch.zeros(4, 32)
    with pytest.raises(
        UnsupportedModelError, match="no residual stream was found to which layer 0"
    ):
        watch.turned(torch.zeros(4, 16))
    assert load_tokenizer("/nowhere") is None
