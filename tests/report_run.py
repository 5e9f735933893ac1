"""A small run on disk, by the package's own writers, with names that try to break a page."""

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from moecollab.criteria.scoring import score
from moecollab.evaluation.evaluation import Evaluation
from moecollab.evaluation.usage import Usage
from moecollab.manifest import MANIFEST, manifest, write_json
from moecollab.pruning.planning import plan
from moecollab.pruning.resampling import uncertainty
from moecollab.record import schema
from moecollab.record.activations import Activations, load_activations
from moecollab.record.tallies import Tallies

LAYERS, N_EXPERTS, TOP_K = (1, 2, 5), 12, 2
DOMAINS = ('<b>law</b> & "order"', "maths", "stories")
WORDS = (" the", " court", " sum", "<script>alert(1)</script>", " king", "\n", " x&y", " of")
N_SAMPLES, LENGTH = 24, 40
SURE = ("caep-25", "gate_sum-25")
"""Plans whose scores were resampled."""
WROTE = ("full", "caep-25", "random-50")
"""Evaluations that wrote on and were timed."""
CRITERIA = ("frequency", "gate_sum", "random")


def routing(seed: int = 0):
    """Ids and weights (n_layers, n_tokens, top_k), token ids and samples; domains route apart."""
    rng = np.random.default_rng(seed)
    n_tokens = N_SAMPLES * LENGTH
    sample = np.repeat(np.arange(N_SAMPLES), LENGTH)
    domain = sample % len(DOMAINS)
    word = (rng.integers(0, 4, n_tokens) + 2 * domain) % len(WORDS)
    shape = (len(LAYERS), n_tokens, N_EXPERTS)
    wanted = np.zeros(shape)
    for row in range(len(LAYERS)):
        wanted[row, np.arange(n_tokens), (2 * domain + row) % N_EXPERTS] = 3
        wanted[row, np.arange(n_tokens), (word + row) % N_EXPERTS] += 1.5
    logits = wanted + rng.gumbel(size=shape)
    expert = np.argsort(-logits, axis=2)[:, :, :TOP_K]
    weight = np.exp(np.take_along_axis(wanted, expert, axis=2))
    return expert, weight / weight.sum(axis=2, keepdims=True), word, sample


def write_activations(folder: Path) -> Activations:
    """Activations as `extract` writes them."""
    folder.mkdir(parents=True)
    expert, weight, word, sample = routing()
    n_tokens = len(word)
    about = manifest(
        schema.KIND,
        schema.VERSION,
        settings={"tokens": None, "norms": False, "context": 64, "batch_size": 8},
        inputs={"model": "0011223344556677", "corpus": "calibration-text"},
        seed=0,
    )
    model = {"class": "Tiny", "model_type": "tiny_moe", "path": "models/<tiny>"}
    about["model"] = model | {"layers": list(LAYERS), "n_experts": N_EXPERTS, "top_k": TOP_K}
    about["corpus"] = {"n_tokens": n_tokens, "n_samples": N_SAMPLES, "domains": list(DOMAINS)}
    write_json(folder / MANIFEST, about)
    tallies(expert, weight, sample).save(folder / schema.TALLIES)
    token = {
        "token": np.arange(n_tokens),
        "sample": sample,
        "position": np.arange(n_tokens) % LENGTH,
    }
    tables = {
        schema.TOKENS: (token | {"token_id": word}, schema.TOKEN_COLUMNS),
        schema.VOCABULARY: (
            {"token_id": range(len(WORDS)), "text": list(WORDS)},
            schema.VOCABULARY_COLUMNS,
        ),
        schema.SAMPLES: (
            {
                "sample": range(N_SAMPLES),
                "domain": [DOMAINS[i % len(DOMAINS)] for i in range(N_SAMPLES)],
                "n_tokens": [LENGTH] * N_SAMPLES,
                "text_start": ["<i>text</i>"] * N_SAMPLES,
            },
            schema.SAMPLE_COLUMNS,
        ),
    }
    columns = schema.layer_columns(TOP_K, norms=False)
    for row, layer in enumerate(LAYERS):
        slots = {
            "expert": expert[row].astype(np.uint16),
            "weight": weight[row].astype(np.float32),
        }
        tables[schema.layer_file(layer)] = (token | slots, columns)
    for name, (columns_of, kinds) in tables.items():
        schema.write_table(pl.DataFrame(columns_of, schema=kinds), folder / name)
    return load_activations(folder)


def tallies(expert, weight, sample) -> Tallies:
    found = Tallies.zeros(DOMAINS, len(LAYERS), N_EXPERTS, groups=("routing",))
    for row in range(len(LAYERS)):
        for slot in range(TOP_K):
            at = (sample % len(DOMAINS), row, expert[row, :, slot])
            np.add.at(found.count, at, 1)
            np.add.at(found.sum_weight, at, weight[row, :, slot].astype(np.float32))
    return found


def write_evaluations(folder: Path, plans) -> None:
    """Losses of 30 documents: the random control costs most."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(50, 200, 30)
    base = tokens * rng.normal(3, 0.3, 30)
    added = {"full": 0.0} | {
        name: one.drop * (1.0 if one.criterion == "random" else 0.3) for name, one in plans.items()
    }
    for name, cost in added.items():
        table = {
            "document": [f"d{i}" for i in range(30)],
            "domain": [DOMAINS[i % len(DOMAINS)] for i in range(30)],
            "tokens": tokens,
            "nll": base + tokens * cost * rng.normal(1, 0.4, 30),
        }
        about = manifest(
            "evaluation",
            1,
            settings={"context": 64, "tasks": []},
            inputs={"corpus": "held-out-text"},
            seed=0,
        )
        masked = plans[name].as_json() if name in plans else None
        about["settings"]["generate"] = 12
        Evaluation(
            name=name,
            model="tiny",
            documents=pl.DataFrame(table),
            generations=written(cost) if name in WROTE else None,
            usage=usage(name) if name in WROTE else None,
            plan=masked,
            about=about,
        ).save(folder / f"{name}.json")


def written(cost) -> pl.DataFrame:
    """What a model says after four beginnings: the dearer, the more often the same."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 2 if cost > 0.2 else 40, 12).tolist() for _ in range(4)]
    columns = {
        "prompt": [f"d{i}" for i in range(4)],
        "domain": [DOMAINS[i % len(DOMAINS)] for i in range(4)],
        "text": [f"Beginning {i} <b>of</b>" for i in range(4)],
        "written": ["".join(f" <i>w{token}</i>" for token in row) for row in ids],
        "ids": ids,
    }
    return pl.DataFrame(columns)


def usage(name) -> Usage:
    """Speed and size, other ones for every name."""
    fast = float(len(name))
    return Usage(
        batch=1,
        prompt_tokens=48,
        new_tokens=12,
        threads=1,
        device="cpu",
        prefill=(100 * fast, 120 * fast, 90 * fast),
        decode=(10 * fast, 12 * fast, 9 * fast),
        parameters=1234 * len(name),
        weight_bytes=2_000_000,
        resident_bytes=None if name == "full" else 3_000_000,
        disk_bytes=1_500_000,
    )


def write_run(folder: Path) -> Path:
    """A whole run: activations, collaboration, scores, plans, evaluations."""
    from moecollab.patterns.dictionary import HSDL

    acts = write_activations(folder / "activations")
    collab = HSDL(atoms=(8, 12), seed=0, threads=1, max_iterations=30).fit(acts)
    collab.save(folder / "collaboration")
    plans = {}
    for criterion in ("caep", *CRITERIA):
        for drop in (0.25, 0.5):
            name = f"{criterion}-{round(100 * drop)}"
            settings = {"collaboration": collab if criterion == "caep" else None, "drop": drop}
            made = partial(uncertainty, resamples=25) if name in SURE else score
            scores = made(criterion, acts, **settings, out=folder / "scores" / f"{name}.parquet")
            plans[name] = plan(scores, drop=drop, out=folder / "plans" / f"{name}.json")
    plans["caep-25"].save(folder / "plan.json")
    write_evaluations(folder / "evaluations", plans)
    return folder
