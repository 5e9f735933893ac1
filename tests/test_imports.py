"""Importing foreign routing: plain arrays, the rules, and what a recording is good for then."""

import pickle

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import dumps
import moecollab as mc
from moecollab.cli.main import app
from moecollab.errors import DataError, OutputExistsError, SchemaError, SettingsError, ShapeError


@pytest.fixture
def truth():
    return dumps.make_truth()


def same(acts, truth, *, weights=True, tokens=True):
    """Whether a recording holds what a dump was made from."""
    assert acts.layers == truth.layers
    assert (acts.n_experts, acts.top_k) == (truth.n_experts, truth.ids.shape[2])
    assert acts.samples()["n_tokens"].to_list() == list(truth.lengths)
    for row, layer in enumerate(truth.layers):
        table = acts.layer(layer)
        assert (table.expert == truth.ids[:, row]).all()
        expected = truth.weights[:, row] if weights else 1 / np.float32(acts.top_k)
        assert (table.weight == expected).all()
        count = np.bincount(truth.ids[:, row].ravel(), minlength=truth.n_experts)
        assert (acts.tallies().total().count[row] == count).all()
    if tokens:
        assert (acts.tokens()["token_id"].to_numpy() == truth.token_ids).all()
    assert acts.tokens()["position"].to_list() == [at for n in truth.lengths for at in range(n)]
    return True


def found(acts):
    return acts.manifest["imported"]["findings"]


def npz(tmp_path, truth, out="acts", options=None, **changes):
    path = dumps.write_npz(tmp_path / "law.npz", truth, **changes)
    return mc.import_routing("npz", path, out=tmp_path / out, **(options or {}))


def test_npz_round_trip(tmp_path, truth):
    acts = npz(tmp_path, truth)
    assert same(acts, truth)
    assert acts.domains == ("law",)
    assert found(acts) == {}
    assert same(mc.load_activations(tmp_path / "acts"), truth)
    assert str(tmp_path) not in (tmp_path / "acts" / "manifest.json").read_text()


def test_parquet_round_trip(tmp_path, truth):
    path = dumps.write_parquet(tmp_path / "routes.parquet", truth)
    acts = mc.import_routing("parquet", path, out=tmp_path / "acts", experts=8)
    assert same(acts, truth)
    assert acts.domains == ("code", "law")
    assert acts.samples()["domain"].to_list() == ["law", "code", "law"]


def test_the_same_files_give_the_same_bytes(tmp_path, truth):
    first, second = npz(tmp_path, truth), npz(tmp_path, truth, out="again")
    assert first.digest() == second.digest()
    names = sorted(path.name for path in first.path.iterdir())
    assert names == sorted(path.name for path in second.path.iterdir())
    for name in names:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_several_files_are_domains_and_slots_are_sorted_by_weight(tmp_path, truth):
    dumps.write_npz(tmp_path / "law.npz", truth)
    flipped = {"topk_ids": truth.ids[:, :, ::-1], "topk_weights": truth.weights[:, :, ::-1]}
    dumps.write_npz(tmp_path / "code.npz", dumps.make_truth(seed=1))
    dumps.write_npz(tmp_path / "maths.npz", truth, **flipped)
    acts = mc.import_routing("npz", tmp_path / "code.npz", out=tmp_path / "one")
    assert acts.domains == ("code",)
    acts = mc.import_routing("npz", tmp_path / "maths.npz", out=tmp_path / "two")
    assert same(acts, truth)
    paths = [tmp_path / f"{name}.npz" for name in ("law", "code")]
    both = mc.import_routing("npz", paths, out=tmp_path / "both")
    assert both.domains == ("code", "law")
    assert both.n_tokens == 2 * sum(truth.lengths)
    named = mc.import_routing("npz", paths, out=tmp_path / "named", domain="text")
    assert named.domains == ("text",)


def test_what_is_imported_can_be_fitted_mined_scored_and_reported(tmp_path):
    truth = dumps.make_truth((60, 40), seed=3)
    acts = npz(tmp_path, truth, out="run/activations")
    groups = mc.HSDL(atoms=(3, 6), max_iterations=3, threads=1).fit(acts)
    groups.save(tmp_path / "run" / "collaboration")
    assert mc.mine(acts, threads=1, out=tmp_path / "run" / "pairs").table.height > 0
    frequency = mc.score("frequency", acts)
    assert frequency.values.sum() == truth.ids.size
    gate = mc.score("gate_sum", acts, out=tmp_path / "run" / "scores.parquet")
    np.testing.assert_allclose(gate.values.sum(axis=1), truth.weights.sum(axis=(0, 2)), rtol=1e-6)
    page = mc.report(tmp_path / "report.html", run=tmp_path / "run").read_text()
    assert "moecollab import npz FILES --out run/activations" in page


def test_minus_one_rows_and_slots(tmp_path, truth):
    ids = truth.ids.astype(np.int16)
    ids[2, 1] = -1  # a whole layer of one token
    ids[6, 0, 2] = -1  # one slot
    acts = npz(tmp_path, truth, topk_ids=ids)
    assert found(acts) == {"missing_tokens": 1, "unused_slots": 1}
    assert acts.n_tokens == sum(truth.lengths) - 1
    assert acts.tokens()["position"].to_list()[:4] == [0, 1, 3, 4]
    assert acts.layer(1).weight[5].tolist() == [*truth.weights[6, 0, :2], 0]
    assert acts.tallies().total().count.sum() == truth.ids.size - 10


def test_a_sample_without_routing_vanishes(tmp_path, truth):
    ids = truth.ids.astype(np.int16)
    ids[5] = -1
    acts = npz(tmp_path, truth, topk_ids=ids)
    assert acts.samples()["n_tokens"].to_list() == [5, 7]


def test_dense_layers(tmp_path, truth):
    ids = np.concatenate([np.zeros_like(truth.ids[:, :1]), truth.ids], axis=1)
    arrays = {"topk_ids": ids, "topk_weights": None}
    acts = npz(tmp_path, truth, moe_layer_ids=np.array([0, 1, 2, 4]), **arrays)
    assert same(acts, truth, weights=False)
    assert found(acts) == {"dense_layers": 1}
    assert same(npz(tmp_path, truth, out="named", **arrays), truth, weights=False)
    bare = npz(tmp_path, truth, out="bare", **(arrays | {"moe_layer_ids": None}))
    assert bare.layers == (1, 2, 3)


def test_zero_tokens(tmp_path, truth):
    ids = truth.ids.copy()
    ids[3] = 0
    assert found(npz(tmp_path, truth, topk_ids=ids)) == {"zero_tokens": 1}


def test_with_one_slot_expert_zero_is_an_expert(tmp_path):
    truth = dumps.make_truth(top_k=1)
    ids = truth.ids.copy()
    ids[3], ids[:, 1] = 0, 0
    acts = npz(tmp_path, truth, topk_ids=ids)
    assert found(acts) == {}
    assert acts.n_tokens == sum(truth.lengths)


def test_warm_up_tokens(tmp_path, truth):
    weights = truth.weights.copy()
    weights[:4] = 1 / 3
    acts = npz(tmp_path, truth, topk_weights=weights)
    assert found(acts) == {"warm_up_tokens": 4}
    weights[:] = 1 / 3
    acts = npz(tmp_path, truth, out="even", topk_weights=weights)
    assert found(acts) == {"uniform_weights": len(weights)}
    assert acts.n_tokens == len(weights)


def test_files_of_ranks_that_see_all_tokens_count_once(tmp_path, truth):
    paths = [dumps.write_npz(tmp_path / f"{rank}.npz", truth) for rank in range(3)]
    acts = mc.import_routing("npz", paths, out=tmp_path / "acts")
    assert found(acts) == {"duplicate_files": 2}
    assert same(acts, truth)


def broken(truth, at, value):
    ids = truth.ids.astype(np.int64)
    ids[at] = value
    return {"topk_ids": ids}


def test_broken_rules_name_file_row_and_rule(tmp_path, truth):
    with pytest.raises(DataError, match=r"law.npz sample 2, row 1, layer 2: expert id 8, but ids"):
        npz(tmp_path, truth, **broken(truth, (7, 1, 2), 8))
    with pytest.raises(DataError, match=r"row 1, layer 2: expert id -2, .* physical or fused"):
        npz(tmp_path, truth, **broken(truth, (7, 1, 2), -2))
    with pytest.raises(DataError, match=r"sample 0, row 4, layer 4: experts \[6, 6, 6\] repeat, "):
        npz(tmp_path, truth, **broken(truth, (4, 2), 6))
    with pytest.raises(DataError, match="holds ids beyond int32"):
        npz(tmp_path, truth, **broken(truth, (4, 2, 0), 2**40))
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.25])
def test_weights_that_are_no_weights(tmp_path, truth, value):
    weights = truth.weights.copy()
    weights[6, 2, 1] = value
    with pytest.raises(DataError, match=rf"sample 2, row 0, layer 4: the weight is {value}"):
        npz(tmp_path, truth, topk_weights=weights)


def test_wrong_shapes(tmp_path, truth):
    with pytest.raises(ShapeError, match=r"float64 ids of shape .* expected whole numbers"):
        npz(tmp_path, truth, topk_ids=truth.ids.astype(float))
    with pytest.raises(ShapeError, match=r"topk_ids of shape \(13, 3\), expected"):
        npz(tmp_path, truth, topk_ids=truth.ids[:, :, 0])
    with pytest.raises(ShapeError, match=r"weights of shape \(13, 3, 2\) for ids"):
        npz(tmp_path, truth, topk_weights=truth.weights[:, :, :2])
    with pytest.raises(ShapeError, match="seq_lens that add up to 12, but 13 rows"):
        npz(tmp_path, truth, seq_lens=np.array([5, 7]))
    with pytest.raises(ShapeError, match=r"token_ids of shape \(12,\) for 13 rows"):
        npz(tmp_path, truth, token_ids=truth.token_ids[:12])
    with pytest.raises(ShapeError, match=r"domains of shape \(2,\), not \(3,\)"):
        npz(tmp_path, truth, domains=np.array(["a", "b"]))
    with pytest.raises(ShapeError, match=r"<U1 weights of shape"):
        npz(tmp_path, truth, topk_weights=np.full(truth.ids.shape, "a"))
    with pytest.raises(ShapeError, match=r"several n_experts"):
        npz(tmp_path, truth, n_experts=np.array([8, 8]))
    with pytest.raises(DataError, match="the files name 70000 experts per layer"):
        npz(tmp_path, truth, n_experts=np.array(70_000))
    with pytest.raises(DataError, match=r"the files name layers \[4, 2, 1\], which do not ascend"):
        npz(tmp_path, truth, moe_layer_ids=np.array([4, 2, 1]))
    with pytest.raises(SettingsError, match=r"layers is .* must be 3 indices, one for each layer"):
        npz(tmp_path, truth, options={"layers": (1, 2)})
    dumps.write_npz(tmp_path / "wide.npz", dumps.make_truth(top_k=4))
    dumps.write_npz(tmp_path / "law.npz", truth)
    with pytest.raises(ShapeError, match=r"\(3, 3\) layers and slots, .*wide.npz.* has \(3, 4\)"):
        mc.import_routing("npz", [tmp_path / "wide.npz", tmp_path / "law.npz"], out=tmp_path / "a")


def test_files_that_are_no_files(tmp_path, truth):
    out = tmp_path / "acts"
    (tmp_path / "empty.npz").touch()
    with pytest.raises(DataError, match=r"empty.npz is empty; record"):
        mc.import_routing("npz", tmp_path / "empty.npz", out=out)
    data = dumps.write_npz(tmp_path / "a.npz", truth).read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut.npz is truncated, damaged or holds Python objects"):
        mc.import_routing("npz", tmp_path / "cut.npz", out=out)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"text.parquet is truncated or damaged"):
        mc.import_routing("parquet", tmp_path / "text.parquet", out=out)
    with pytest.raises(DataError, match=r"gone.npz does not exist"):
        mc.import_routing("npz", tmp_path / "gone.npz", out=out)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder holds no files that end in .npy or .npz"):
        mc.import_routing("npz", tmp_path / "folder", out=out)
    with pytest.raises(SchemaError, match="lacks the array topk_ids"):
        npz(tmp_path, truth, topk_ids=None)
    empty = {"topk_ids": np.zeros((0, 3, 3), int), "seq_lens": np.array([0])}
    with pytest.raises(DataError, match="the files hold no routing"):
        npz(tmp_path, truth, topk_weights=None, token_ids=None, **empty)
    with pytest.raises(DataError, match="every layer is -1 or 0"):
        npz(tmp_path, truth, topk_ids=np.full((13, 3, 3), -1))


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.savez(tmp_path / "trap.npz", topk_ids=np.array([Trap()], dtype=object))
    with pytest.raises(DataError, match="holds Python objects, which are not read"):
        mc.import_routing("npz", tmp_path / "trap.npz", out=tmp_path / "acts", experts=8)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "sprung").unlink(missing_ok=True)
    with pytest.raises(DataError, match="holds Python objects, which are not read"):
        mc.import_routing("npz", tmp_path / "bare.npz", out=tmp_path / "acts", experts=8)
    assert not (tmp_path / "sprung").exists()


def test_tables_that_lack_something(tmp_path, truth):
    path = dumps.write_parquet(tmp_path / "a.parquet", truth)
    table = pl.read_parquet(path)

    def read(changed):
        changed.write_parquet(tmp_path / "b.parquet")
        return mc.import_routing("parquet", tmp_path / "b.parquet", out=tmp_path / "x", experts=8)

    with pytest.raises(SchemaError, match=r"lacks the columns \['layer'\]"):
        read(table.drop("layer"))
    with pytest.raises(DataError, match="sample 0 lacks layers of some tokens"):
        read(table[1:])
    with pytest.raises(DataError, match="has some twice"):
        read(pl.concat([table[:1], table]))
    short = pl.when(pl.int_range(pl.len()) == 0).then(pl.col("expert").list.head(2))
    with pytest.raises(ShapeError, match=r"lists in expert have lengths \[2, 3\]"):
        read(table.with_columns(short.otherwise(pl.col("expert")).alias("expert")))
    with pytest.raises(DataError, match="holds missing values"):
        read(table.with_columns(pl.lit(None, pl.Int64).alias("token_id")))
    with pytest.raises(DataError, match="position holds numbers that are not a list of uint32"):
        read(table.with_columns(pl.col("position") - 1))
    with pytest.raises(SchemaError, match="positions that are not whole numbers"):
        read(table.with_columns(pl.col("position") + 0.5))
    with pytest.raises(DataError, match="holds no rows"):
        read(table[:0])


def test_what_must_be_said(tmp_path, truth):
    with pytest.raises(SettingsError, match=r"experts is None; it must be given, .*\(--experts\)"):
        npz(tmp_path, truth, n_experts=None)
    with pytest.raises(SettingsError, match="experts is 9; it must be 8, as the files say"):
        npz(tmp_path, truth, options={"experts": 9})
    with pytest.raises(DataError, match="use up to 3 experts per token and layer, but top_k is 2"):
        npz(tmp_path, truth, options={"top_k": 2})
    with pytest.raises(SettingsError, match="does not say which tokens it wrote"):
        npz(tmp_path, truth, options={"prefill_only": True})
    with pytest.raises(SettingsError, match=r"kind is 'nzp'.* did you mean npz"):
        mc.import_routing("nzp", tmp_path, out=tmp_path / "acts")
    npz(tmp_path, truth)
    with pytest.raises(OutputExistsError):
        npz(tmp_path, truth)
    assert same(npz(tmp_path, truth, options={"overwrite": True}), truth)


@pytest.mark.parametrize(
    ("name", "value"),
    [("experts", 0), ("experts", 65_537), ("top_k", 0), ("layers", ()), ("layers", (2, 1)),
     ("layers", (-1, 2)), ("domain", " ")],
)  # fmt: skip
def test_settings_out_of_range(tmp_path, truth, name, value):
    with pytest.raises(SettingsError, match=f"{name} is"):
        npz(tmp_path, truth, options={name: value})


def test_the_command(tmp_path, truth):
    path = dumps.write_npz(tmp_path / "law.npz", truth, moe_layer_ids=None)
    out = tmp_path / "acts"
    call = ["import", "npz", str(path), "--layers", "1-2,4", "--out", str(out)]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    assert shown.output.endswith("without norms); nothing unusual\n")
    assert same(mc.load_activations(out), truth)
    shown = CliRunner().invoke(app, [*call, "--layers", "one"])
    assert shown.exit_code == 1
    assert "layers is 'one'; it must be indices or ranges" in shown.output
