"""What patterns are about: domains, tokens and examples found again from planted use."""

import numpy as np
import polars as pl
import pytest

from moecollab.errors import DataError, SettingsError
from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Collaboration, Level
from moecollab.patterns.dictionary import HSDL
from moecollab.patterns.meaning import SCHEMA, TokenUse, describe, row_strength
from moecollab.record.activations import Activations
from planted import as_rows

WORDS = (" law", " court", " sum", " plus", " the", " rare")
LENGTH, N_SAMPLES = 20, 12


class Recorded(Activations):
    """Activations of two domains whose tokens are known, without files."""

    def __init__(self):
        super().__init__(None, {"corpus": {"domains": ["law", "maths"]}})

    @property
    def n_tokens(self):
        return LENGTH * N_SAMPLES

    @property
    def n_samples(self):
        return N_SAMPLES

    def samples(self):
        domain = [("law", "maths")[sample % 2] for sample in range(N_SAMPLES)]
        sizes = {"sample": range(N_SAMPLES), "domain": domain, "n_tokens": [LENGTH] * N_SAMPLES}
        return pl.DataFrame(sizes)

    def tokens(self):
        sample = np.repeat(np.arange(N_SAMPLES, dtype=np.uint32), LENGTH)
        return pl.DataFrame({"sample": sample, "token_id": self.word() + 10})

    def word(self):
        """Sample i of law: the, law, court, the, ...; of maths: the, sum, plus, the, ..."""
        place = np.arange(self.n_tokens) % LENGTH % 3
        odd = np.arange(self.n_tokens) // LENGTH % 2
        word = np.where(place == 0, 4, place - 1 + 2 * odd)
        word[7] = 5
        return word

    def vocabulary(self):
        return {number + 10: text for number, text in enumerate(WORDS)}


@pytest.fixture(scope="module")
def acts():
    return Recorded()


@pytest.fixture(scope="module")
def rows(acts):
    """Sites 0, 1 work on law and court; 2, 3 on sum and plus; 4 everywhere."""
    word = acts.word()
    x = np.zeros((acts.n_tokens, 6), np.float32)
    x[np.ix_(word < 2, [0, 1])] = 0.5
    x[np.ix_((word == 2) | (word == 3), [2, 3])] = 0.5
    x[:, 4] = 0.5
    return x


@pytest.fixture(scope="module")
def collab(rows):
    return HSDL(atoms=(4, 8), threads=1).fit(as_rows(rows))


def atom_of(collab, level, inside, outside):
    for atom in np.flatnonzero(collab.live(level)):
        experts = {expert for _, expert, _ in collab.members(level, int(atom))}
        if set(inside) <= experts and not experts & set(outside):
            return int(atom)
    raise AssertionError(f"no atom of level {level} has members {inside}")


def test_domains_tokens_and_examples_are_found(collab, acts):
    table = describe(collab, acts, 1)
    assert table.columns == list(SCHEMA)
    assert table["usage"].sum() == pytest.approx(1)
    assert table["usage"].is_sorted(descending=True)
    row = table.row(by_predicate=pl.col("atom") == atom_of(collab, 1, [0, 1], [2, 3]), named=True)
    assert [about["domain"] for about in row["domains"]] == ["law"]
    assert row["domains"][0]["share"] == pytest.approx(1)
    assert row["domains"][0]["lift"] == pytest.approx(2)
    assert {token["token"] for token in row["tokens"]} == {" law", " court"}
    assert all(token["lift"] > 1.5 for token in row["tokens"])
    assert len(row["examples"]) == 3
    assert all("»" in text and "«" in text for text in row["examples"])
    assert all(
        text[text.index("»") + 1 : text.index("«")] in (" law", " court")
        for text in row["examples"]
    )


def test_a_token_seen_once_is_never_listed(collab, acts):
    for level in (1, 2):
        for row in describe(collab, acts, level)["tokens"].to_list():
            assert " rare" not in {token["token"] for token in row}


def test_top_limits_tokens(collab, acts):
    assert describe(collab, acts, 1, top=1)["tokens"].list.len().max() == 1
    with pytest.raises(SettingsError, match="top is 0"):
        describe(collab, acts, 1, top=0)


def test_strength_at_level_2_goes_through_the_links(collab):
    codes = np.zeros((collab.n_rows, 4))
    row = np.repeat(np.arange(collab.n_rows), np.diff(collab.codes.indptr))
    codes[row, collab.codes.atom] = collab.codes.value
    through = codes @ collab.levels[1].links.astype(np.float64)
    for atom in range(8):
        np.testing.assert_allclose(row_strength(collab, 2, atom), through[:, atom], rtol=1e-12)
        total = row_strength(collab, 2, atom).sum()
        assert total == pytest.approx(collab.levels[1].usage[atom], rel=1e-5)


def test_rows_of_samples_take_a_token_s_weight_on_the_members(rows, acts, monkeypatch):
    sums = rows.reshape(N_SAMPLES, LENGTH, 6).mean(axis=1)
    collab = HSDL(atoms=(4,), threads=1).fit(as_rows(sums))
    monkeypatch.setattr(Recorded, "rows", lambda *_: as_rows(rows))
    use = TokenUse(collab, acts)
    atom = int(np.flatnonzero(collab.live(1))[0])
    member = collab.levels[0].atoms[atom].astype(np.float64)
    np.testing.assert_allclose(use.of(1, atom), rows @ member / member.sum(), rtol=1e-6)
    table = describe(collab, acts, 1)
    assert table["domains"].list.len().min() >= 1
    assert table["examples"].list.len().min() == 3


def test_other_activations_are_refused(acts):
    level = Level(np.ones((1, 6), np.float32), np.ones(1), np.ones(1))
    codes = Codes(np.zeros(8, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.float32))
    other = Collaboration(
        levels=(level,),
        codes=codes,
        history=({"total": 0.0},),
        stop_reason="tolerance",
        layers=(0,),
        n_experts=6,
    )
    with pytest.raises(DataError, match="7 rows, but the activations have 240 tokens"):
        describe(other, acts, 1)
