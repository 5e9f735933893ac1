"""Fixtures for all tests: tiny models, a tokenizer, a small corpus and its activations."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Before torch, as the command does, so that this process and the ones it starts round alike.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

import models
from moecollab.record.extraction import extract

logging.disable_progress_bar()
settings.register_profile("any machine", settings(), deadline=None)  # a busy one is no failure
settings.load_profile("any machine")

TEXTS = [
    {"text": "The quick brown fox jumps over the lazy dog. " * 4, "domain": "animals"},
    {"text": "Habeas corpus is a writ that brings a person before a court.", "domain": "law"},
    {"text": "A contract needs offer, acceptance and consideration. " * 2, "domain": "law"},
    {"text": "Owls hunt at night.", "domain": "animals"},
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return models.build_tokenizer()


@pytest.fixture(scope="session")
def texts():
    """Four short documents of two domains."""
    return [dict(text) for text in TEXTS]


@pytest.fixture(params=models.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved Qwen2-MoE with its tokenizer; not to be changed."""
    return models.save("qwen2_moe", tmp_path_factory.mktemp("models") / "qwen2_moe")


@pytest.fixture(scope="session")
def acts(model_folder, tmp_path_factory):
    """Activations of that model on the texts, with norms; not to be changed."""
    out = tmp_path_factory.mktemp("acts") / "acts"
    return extract(model_folder, TEXTS, out=out)


@pytest.fixture
def token_ids():
    """Token ids for a forward pass, (2, 12)."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, models.VOCABULARY, (2, 12), generator=draw)


@pytest.fixture(scope="session")
def logits():
    """A function: logits of a model on token ids."""

    def run(model, ids):
        with torch.inference_mode():
            return model(input_ids=ids).logits.clone()

    return run


def pytest_addoption(parser):
    parser.addoption(
        "--all-families",
        action="store_true",
        help="try every Mixture-of-Experts family of transformers, not a spread of them",
    )
