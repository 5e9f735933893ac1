"""Opening recordings: rows against a slow twin, tallies, and damaged files."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from moecollab.errors import (
    DataError,
    MissingInputError,
    SchemaError,
    SettingsError,
    ShapeError,
)
from moecollab.record.activations import load_activations
from moecollab.record.extraction import extract
from moecollab.record.rows import Rows
from moecollab.record.schema import layer_columns
from moecollab.record.sums import SCALARS
from moecollab.record.tallies import Tallies, load_tallies


@pytest.fixture
def folder(acts, tmp_path):
    """A copy of the recording that may be damaged."""
    return shutil.copytree(acts.path, tmp_path / "acts")


@pytest.fixture(scope="module")
def bare(model_folder, texts, tmp_path_factory):
    """A recording without norms."""
    return extract(model_folder, texts, out=tmp_path_factory.mktemp("bare") / "acts", norms=False)


def slow_dense(acts, weights):
    """The activation matrix, one slot at a time: (n_tokens, n_sites)."""
    matrix = np.zeros((acts.n_tokens, acts.n_sites))
    for row, layer in enumerate(acts.layers):
        table = acts.layer(layer)
        for token in range(acts.n_tokens):
            total = sum(float(weight) for weight in table.weight[token])
            for slot in range(acts.top_k):
                weight = float(table.weight[token, slot])
                value = {
                    "raw": weight,
                    "renormalised": weight / total,
                    "binary": 1.0,
                    "output": weight * float(table.norm[token, slot]),
                }[weights]
                matrix[token, row * acts.n_experts + table.expert[token, slot]] = value
    return matrix


def test_facts(acts):
    assert (acts.layers, acts.n_experts, acts.top_k, acts.n_sites) == ((0, 1, 2), 8, 2, 24)
    assert acts.domains == ("animals", "law")
    assert acts.n_samples == 4
    assert acts.has_norms
    assert repr(acts).startswith("Activations(Qwen2MoeForCausalLM: 3 MoE layers × 8 experts, top 2")


def test_tables(acts, texts):
    samples, tokens = acts.samples(), acts.tokens()
    assert samples["n_tokens"].to_list() == [len(text["text"].encode()) for text in texts]
    assert samples["text_start"].to_list() == [text["text"].strip()[:80] for text in texts]
    assert tokens["token"].to_list() == list(range(acts.n_tokens))
    words = acts.vocabulary()
    for sample, text in enumerate(texts):
        mine = tokens.filter(pl.col("sample") == sample)
        assert "".join(words[number] for number in mine["token_id"]) == text["text"]
        assert mine["position"].to_list() == list(range(mine.height))


def test_layer_files_hold_the_places_of_tokens(acts):
    for layer in acts.layers:
        table = pl.read_parquet(acts.path / f"layer-{layer:03d}.parquet")
        assert dict(table.schema) == layer_columns(2, norms=True)
        assert table.select("token", "sample", "position").equals(
            acts.tokens().select("token", "sample", "position")
        )


def test_layer_arrays_are_read_only_and_sorted(acts):
    table = acts.layer(1)
    assert (table.expert.dtype, table.weight.dtype) == (np.uint16, np.float32)
    assert table.expert.shape == table.weight.shape == table.norm.shape == (acts.n_tokens, 2)
    assert (np.diff(table.weight, axis=1) <= 0).all()
    with pytest.raises(ValueError, match="read-only"):
        table.weight[0, 0] = 1
    with pytest.raises(SettingsError, match=r"layer is 7; it must be one of \[0, 1, 2\]"):
        acts.layer(7)


@pytest.mark.parametrize("weights", ["renormalised", "raw", "binary", "output"])
def test_token_rows_equal_the_slow_twin(acts, weights):
    rows = acts.rows("token", weights)
    np.testing.assert_allclose(rows.dense(), slow_dense(acts, weights), rtol=1e-6)
    assert rows.sample.tolist() == acts.tokens()["sample"].to_list()
    for start, end in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        assert (np.diff(rows.sites[start:end].astype(int)) > 0).all()
    assert (rows.values > 0).all()


@pytest.mark.parametrize("weights", ["renormalised", "raw", "binary", "output"])
def test_sample_rows_are_means_over_tokens(acts, weights):
    rows = acts.rows("sample", weights)
    dense, sample = slow_dense(acts, weights), acts.tokens()["sample"].to_numpy()
    means = np.stack([dense[sample == number].mean(axis=0) for number in range(acts.n_samples)])
    np.testing.assert_allclose(rows.dense(), means, rtol=1e-5)
    assert rows.sample.tolist() == list(range(acts.n_samples))


def test_wrong_names(acts):
    with pytest.raises(SettingsError, match="grain is 'word'; it must be 'token', 'sample'"):
        acts.rows("word")
    with pytest.raises(SettingsError, match="weights is 'square'"):
        acts.rows("token", "square")


def test_one_lazy_table_of_all_tokens(acts, bare):
    table = acts.to_polars().collect()
    assert table.columns[:5] == ["token", "sample", "domain", "position", "token_id"]
    assert len(table) == acts.n_tokens
    assert table["token_id"].equals(acts.tokens()["token_id"])
    named = dict(acts.samples().select("sample", "domain").iter_rows())
    assert [named[sample] for sample in table["sample"]] == table["domain"].to_list()
    for layer in acts.layers:
        assert np.array_equal(table[f"expert_{layer}"].to_numpy(), acts.layer(layer).expert)
        assert np.array_equal(table[f"norm_{layer}"].to_numpy(), acts.layer(layer).norm)
    assert table.schema["weight_0"] == pl.Array(pl.Float32, 2)
    assert bare.to_polars([2]).collect_schema().names()[5:] == ["expert_2", "weight_2"]
    law = acts.to_polars().filter(pl.col("domain") == "law").select(pl.len()).collect().item()
    assert 0 < law < acts.n_tokens
    with pytest.raises(SettingsError, match="layer is 7"):
        acts.to_polars([7])


def test_recording_without_norms(acts, bare):
    assert not bare.has_norms
    assert bare.layer(0).norm is None
    assert np.array_equal(bare.layer(2).weight, acts.layer(2).weight)
    assert not bare.tallies().has_norms
    with pytest.raises(MissingInputError, match="sum_norm was not recorded; extract again with n"):
        bare.tallies()["sum_norm"]
    with pytest.raises(MissingInputError, match="extract again with norms=True"):
        bare.rows("token", "output")


def test_tallies_are_sums_over_the_tables(acts):
    tallies = acts.tallies()
    domain = acts.tokens().join(acts.samples(), on="sample")["domain"].to_numpy()
    for row, layer in enumerate(acts.layers):
        table = acts.layer(layer)
        for number, name in enumerate(tallies.domains):
            for expert in range(acts.n_experts):
                mine = (table.expert == expert) & (domain == name)[:, None] & (table.weight != 0)
                weight = table.weight[mine].astype(float)
                norm = table.norm[mine].astype(float)
                place = (number, row, expert)
                assert tallies.count[place] == mine.sum()
                both = weight * norm
                sums = [mine[mine], weight, weight**2, norm, norm**2, both, both**2]
                for key, values in zip(SCALARS, sums, strict=True):
                    assert tallies[key][place] == pytest.approx(values.sum(), rel=1e-12)
    mean = tallies["sum_norm"] / tallies.count.clip(1)
    assert (tallies["max_abs"] * np.sqrt(32) + 1e-6 >= mean).all()


def test_tallies_total_and_merge(acts, tmp_path):
    tallies = acts.tallies()
    total = tallies.total()
    assert total.count.sum() == acts.n_tokens * acts.n_layers * acts.top_k
    assert np.array_equal(total["max_abs"], tallies["max_abs"].max(axis=0))
    assert total.total() is total
    other = Tallies.zeros(("cooking", "law"), 3, 8)
    other.count[1] += 5
    both = tallies.merge(other)
    assert both.domains == ("animals", "law", "cooking")
    assert np.array_equal(both.count[1], tallies.count[1] + 5)
    assert not both.count[2].any()
    with pytest.raises(ShapeError, match="do not belong to the same model"):
        tallies.merge(Tallies.zeros(("law",), 3, 4))
    with pytest.raises(ShapeError, match="cannot be merged; merge before total"):
        tallies.merge(total)
    both.save(tmp_path / "t.safetensors")
    assert np.array_equal(load_tallies(tmp_path / "t.safetensors")["sum_norm"], both["sum_norm"])


def test_load_gives_the_same_recording(acts):
    again = load_activations(str(acts.path))
    assert again.digest() == acts.digest()
    assert again.manifest == acts.manifest


def test_digest_sees_every_layer(acts, folder):
    table = pl.read_parquet(folder / "layer-001.parquet")
    table.with_columns(pl.col("weight") * 2).write_parquet(folder / "layer-001.parquet")
    assert load_activations(folder).digest() != acts.digest()


def test_no_activations(tmp_path):
    with pytest.raises(DataError, match=r"holds no activations \(no manifest.json\); make them"):
        load_activations(tmp_path)


@pytest.mark.parametrize("name", ["layer-001.parquet", "tokens.parquet", "tallies.safetensors"])
def test_truncated_file(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{name} is truncated or damaged; record"):
        load_activations(folder)


@pytest.mark.parametrize("name", ["layer-001.parquet", "tallies.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist; record"):
        load_activations(folder)


def test_wrong_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(SchemaError, match="holds activations version 9; expected activations"):
        load_activations(folder)


def test_manifest_without_a_field(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["model"]["top_k"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SchemaError, match="lacks 'top_k'; record again"):
        load_activations(folder)


def test_wrong_columns(folder):
    table = pl.read_parquet(folder / "layer-002.parquet").drop("norm")
    table.write_parquet(folder / "layer-002.parquet")
    with pytest.raises(SchemaError, match=r"layer-002.parquet has columns token UInt32.*record"):
        load_activations(folder)


def test_missing_rows(folder):
    pl.read_parquet(folder / "layer-002.parquet")[:-1].write_parquet(folder / "layer-002.parquet")
    with pytest.raises(DataError, match=r"layer-002.parquet has \d+ rows, expected \d+"):
        load_activations(folder)


def rows_of(**changes):
    fields = {
        "indptr": np.array([0, 1, 2], np.int64),
        "sites": np.array([0, 3], np.uint32),
        "values": np.array([1, 2], np.float32),
        "sample": np.array([0, 0], np.uint32),
        "n_sites": 4,
    }
    return Rows(**(fields | changes))


def test_rows():
    rows = rows_of()
    assert rows.dense().tolist() == [[1, 0, 0, 0], [0, 0, 0, 2]]
    assert (rows.n_rows, rows.nnz) == (2, 2)
    assert repr(rows) == "Rows(2 rows × 4 sites, 1.0 entries a row)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.array([1.0, 2.0])}, "values is float64.* expected contiguous 1-D float32"),
        ({"indptr": np.array([0, 2], np.int64)}, "indptr has 2 entries for 2 rows"),
        ({"indptr": np.array([0, 1, 3], np.int64)}, r"indptr spans \(0, 3\) but there are 2"),
        ({"indptr": np.array([0, 3, 2], np.int64)}, "indptr decreases"),
        ({"n_sites": 3}, r"site 3 is outside \[0, 3\)"),
        ({"values": np.array([1, np.nan], np.float32)}, "values of the rows are not finite"),
    ],
)
def test_rows_are_checked(changes, message):
    with pytest.raises(DataError, match=message):
        rows_of(**changes)


def test_sample_sums_are_the_means_times_the_lengths(acts):
    mean, total = acts.rows("sample").dense(), acts.rows("sample_sum").dense()
    length = acts.samples()["n_tokens"].to_numpy()
    assert total == pytest.approx(mean * length[:, None], rel=1e-5)
    assert total.sum(axis=1) == pytest.approx(length * acts.n_layers, rel=1e-5)
