"""Activations and a model for every criterion's tests."""

import numpy as np
import pytest
from probed import SUBJECTS
from synthetic import make_recorded

import models
from moecollab.criteria import get
from moecollab.criteria.base import Needs
from moecollab.criteria.scoring import score
from moecollab.models.layout import Layout
from moecollab.models.registry import register_layout, unregister_layout

collect_ignore = ["register_busy_peak.py"]
"""Registers a criterion when it is imported, as its reader would."""

WINDOWS = np.random.default_rng(0).integers(3, models.VOCABULARY, (4, 16))
"""Token ids of text to run the model on."""


@pytest.fixture(scope="session")
def recorded():
    return make_recorded()


@pytest.fixture(scope="session")
def acts(recorded, tmp_path_factory):
    return recorded.save(tmp_path_factory.mktemp("acts") / "a")


@pytest.fixture(scope="session")
def bare_acts(tmp_path_factory):
    """Activations without output norms, and without all that is recorded on request."""
    return make_recorded(norms=False).save(tmp_path_factory.mktemp("acts") / "bare")


@pytest.fixture(scope="session")
def fitted():
    """Fits patterns to activations."""
    from moecollab.patterns.dictionary import HSDL

    return lambda acts: HSDL(atoms=(6, 4), seed=0, threads=1).fit(acts)


@pytest.fixture(scope="session")
def collaboration(acts, fitted):
    return fitted(acts)


@pytest.fixture(scope="session")
def model():
    """A model with the layers, experts and top-k of the recorded one."""
    return models.build("qwen2_moe", num_experts=6, num_hidden_layers=4, mlp_only_layers=[0, 2])


@pytest.fixture
def scored(acts, fitted, model):
    """A function: scores by a criterion, with all that it needs."""

    def run(name, of=acts, parameters=model, **settings):
        needs = get(name).needs
        patterns = fitted(of) if Needs.COLLABORATION in needs else None
        if needs & (Needs.WEIGHTS | Needs.MODEL):
            settings |= {"model": parameters}
        if Needs.MODEL in needs:
            settings |= {"corpus": list(WINDOWS)}
        return score(name, of, collaboration=patterns, **settings)

    return run


@pytest.fixture
def small_moe():
    """A family of remote code, whose experts are a list of modules."""
    register_layout(Layout(family="small_moe", count="n_routed_experts", capture="modules"))
    yield
    unregister_layout("small_moe")


@pytest.fixture(params=SUBJECTS)
def subject(request, small_moe):
    return SUBJECTS[request.param]()
