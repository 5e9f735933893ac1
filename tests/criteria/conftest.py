"""Activations for every criterion's tests."""

import pytest
from synthetic import make_recorded


@pytest.fixture(scope="session")
def recorded():
    return make_recorded()


@pytest.fixture(scope="session")
def acts(recorded, tmp_path_factory):
    return recorded.save(tmp_path_factory.mktemp("acts") / "a")


@pytest.fixture(scope="session")
def bare_acts(tmp_path_factory):
    """Activations without output norms."""
    return make_recorded(norms=False).save(tmp_path_factory.mktemp("acts") / "bare")


@pytest.fixture(scope="session")
def fitted():
    """Fits patterns to activations."""
    from moecollab.patterns.dictionary import HSDL

    return lambda acts: HSDL(atoms=(6, 4), seed=0, threads=1).fit(acts)


@pytest.fixture(scope="session")
def collaboration(acts, fitted):
    return fitted(acts)
