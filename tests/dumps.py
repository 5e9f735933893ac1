"""Makes files of foreign routing from each format's description; nothing here is copied."""

import base64
import io
import json
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch


@dataclass(frozen=True)
class Truth:
    """What a file is made from: ids (n_tokens, n_layers, top_k), the largest weight first."""

    ids: np.ndarray
    weights: np.ndarray
    token_ids: np.ndarray
    lengths: tuple[int, ...]
    n_experts: int = 8
    layers: tuple[int, ...] = (1, 2, 4)

    def parts(self):
        """Slices of the samples."""
        ends = np.cumsum(self.lengths)
        return [slice(int(b - n), int(b)) for n, b in zip(self.lengths, ends, strict=True)]


def make_truth(lengths=(5, 1, 7), *, n_experts=8, layers=(1, 2, 4), top_k=3, seed=0):
    """Random routing of some samples."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(sum(lengths), len(layers), n_experts))
    ids = np.argsort(-logits, axis=2)[:, :, :top_k]
    share = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    weights = np.take_along_axis(share, ids, axis=2).astype(np.float32)
    tokens = rng.integers(0, 50, sum(lengths)).astype(np.uint32)
    return Truth(ids.astype(np.int32), weights, tokens, tuple(lengths), n_experts, tuple(layers))


def write_npz(path, truth, **changes):
    """Plain arrays; a change of None leaves one out."""
    arrays = {
        "topk_ids": truth.ids.astype(np.uint8),
        "topk_weights": truth.weights,
        "seq_lens": np.array(truth.lengths),
        "moe_layer_ids": np.array(truth.layers),
        "token_ids": truth.token_ids,
        "n_experts": np.array(truth.n_experts),
    }
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **arrays)
    return path


def write_parquet(path, truth, *, domains=("law", "code")):
    """A row per token and layer, in no particular order."""
    rows = [
        {
            "sample": sample,
            "position": at - part.start,
            "layer": layer,
            "expert": truth.ids[at, row].tolist(),
            "weight": truth.weights[at, row].tolist(),
            "token_id": int(truth.token_ids[at]),
            "domain": domains[sample % len(domains)],
        }
        for sample, part in enumerate(truth.parts())
        for row, layer in enumerate(truth.layers)
        for at in range(part.start, part.stop)
    ]
    pl.DataFrame(rows).write_parquet(path)
    return path


def write_esft(folder, truth):
    """A file per layer and a line per sample: ids, two tabs, weights with four digits."""
    folder.mkdir(parents=True)
    for row, layer in enumerate(truth.layers):
        lines = []
        for part in truth.parts():
            ids = "\t".join(map(str, truth.ids[part, row].ravel().tolist()))
            weights = truth.weights[part, row].ravel().tolist()
            lines.append(ids + "\t\t" + "\t".join(str(round(weight, 4)) for weight in weights))
        (folder / f"expert_weights_{layer}.txt").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text("{}")
    return folder


def _base64_npy(rows):
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def vllm_responses(truth, *, form="lists", n_prompt=3, last=True):
    """A response per sample: "lists" with the prompt apart, "npy" or "bare" for all tokens.

    `last` says whether the last token's row is there.
    """
    responses = []
    for part in truth.parts():
        rows, tokens = truth.ids[part], truth.token_ids[part].tolist()
        cut = min(n_prompt, len(rows))
        kept = rows if last else rows[:-1]
        choice = {"index": 0, "token_ids": tokens[cut:], "routed_experts": None}
        response = {"object": "text_completion", "prompt_token_ids": tokens[:cut]}
        if form == "lists":
            response["prompt_routed_experts"] = kept[:cut].astype(np.int16).tolist()
            choice["routed_experts"] = kept[cut:].astype(np.int16).tolist() or None
        elif form == "npy":
            choice["routed_experts"] = _base64_npy(kept.astype(np.uint8))
        elif form == "bare":
            data = kept.astype(np.uint16).tobytes()
            choice["routed_experts"] = base64.b64encode(data).decode()
        else:
            data = base64.b64encode(kept.astype("<i2").tobytes()).decode()
            about = {"data": data, "shape": list(kept.shape), "dtype": "int16", "start": 0}
            choice["routed_experts"] = about
        responses.append(response | {"choices": [choice]})
    return responses


def sglang_responses(truth, *, native=True, n_prompt=3):
    """A response per sample: base64 of int32 for all tokens but the last."""
    responses = []
    for part in truth.parts():
        rows, tokens = truth.ids[part], truth.token_ids[part].tolist()
        cut = min(n_prompt, len(rows))
        data = base64.b64encode(rows[:-1].astype(np.int32).tobytes()).decode()
        counts = {"prompt_tokens": cut, "completion_tokens": len(tokens) - cut}
        if native:
            about = counts | {"id": "r", "routed_experts": data}
            responses.append({"text": "", "output_ids": tokens[cut:], "meta_info": about})
        else:
            choice = {"index": 0, "text": "", "sgl_ext": {"routed_experts": data}}
            responses.append({"choices": [choice], "usage": counts})
    return responses


def write_jsonl(path, objects):
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))
    return path


def physical_map(truth, seed=0, extra=4):
    """Logical ids of the physical experts of each layer: every expert once, some again."""
    rng = np.random.default_rng(seed)
    width = truth.n_experts
    rows = [
        rng.permutation([*range(width), *rng.integers(0, width, extra)])
        for _ in range(max(truth.layers) + 1)
    ]
    return np.array(rows)


def _sglang_record(truth, tokens, positions, mapping, **about):
    """One pass: 8 slots whatever top-k is, -1 where nothing is, and rows for dense layers."""
    ids = np.full((len(mapping), len(tokens), 8), -1, np.int32)
    for row, layer in enumerate(truth.layers):
        first = np.array([np.flatnonzero(mapping[layer] == e)[-1] for e in range(truth.n_experts)])
        ids[layer, :, : truth.ids.shape[2]] = first[truth.ids[tokens, row]]
    return about | {
        "rank": 0,
        "input_ids": truth.token_ids[tokens].tolist(),
        "positions": list(positions),
        "topk_ids_of_layer": torch.from_numpy(ids),
        "misc_objects": [],
    }


def sglang_recording(truth, *, n_prompt=3):
    """A file of mode per_token: one prefill of all samples, then a token of each in turn."""
    mapping = physical_map(truth)
    parts = truth.parts()
    prompts = [np.arange(part.start, min(part.start + n_prompt, part.stop)) for part in parts]
    start = np.concatenate([np.arange(len(prompt)) for prompt in prompts])
    lengths = [len(prompt) for prompt in prompts]
    passes = [(np.concatenate(prompts), start, {"extend_seq_lens": lengths, "forward_mode": 1})]
    for step in range(n_prompt, max(truth.lengths)):
        running = [part.start + step for part in parts if part.start + step < part.stop]
        about = {"extend_seq_lens": None, "forward_mode": 2}
        passes.append((np.array(running), [step] * len(running), about))
    records = [
        _sglang_record(truth, tokens, np.asarray(places).tolist(), mapping, **about)
        for tokens, places, about in passes
    ]
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(mapping)}


def counts_of(truth, tokens=slice(None)):
    """Choices of each expert: int64 (n_layers, n_experts)."""
    return np.array(
        [
            np.bincount(truth.ids[tokens, row].ravel(), minlength=truth.n_experts)
            for row in range(len(truth.layers))
        ]
    )


def sglang_statistics(truth):
    """A file of mode stat: counts of two steps over all layers."""
    counts = np.zeros((2, max(truth.layers) + 1, truth.n_experts), np.int32)
    for step, tokens in enumerate((slice(0, 4), slice(4, None))):
        counts[step, list(truth.layers)] = counts_of(truth, tokens)
    return {"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate": 0.5}


def write_pt(path, value):
    torch.save(value, path)
    return path


def megatron_trace(truth, *, rank=0):
    """A line per step and layer; each sample is a step of its own."""
    return [
        {
            "step": step,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": layer,
            "rank": rank,
            "num_tokens": part.stop - part.start,
            "topk": truth.ids.shape[2],
            "top_indices": truth.ids[part, row].tolist(),
        }
        for step, part in enumerate(truth.parts())
        for row, layer in enumerate(truth.layers)
    ]


def sums_of(truth, values):
    """Sums of values (n_tokens, n_layers, top_k) by expert: float64 (n_layers, n_experts)."""
    return np.array(
        [
            np.bincount(truth.ids[:, row].ravel(), values[:, row].ravel(), truth.n_experts)
            for row in range(len(truth.layers))
        ]
    )


def llamacpp_json(truth, norms):
    """Sums of one run; `norms` (n_tokens, n_layers, top_k) are of expert outputs."""
    held = {
        "cnt": counts_of(truth),
        "gate": sums_of(truth, truth.weights),
        "sal": sums_of(truth, truth.weights * norms),
    }
    return {
        "arch": "test",
        "n_expert": truth.n_experts,
        "tokens": len(truth.ids),
        "layers": {
            str(layer): {name: array[row].tolist() for name, array in held.items()}
            for row, layer in enumerate(truth.layers)
        },
    }


def reap_observations(truth, norms):
    """A dictionary by layer of tensors."""
    held = {
        "expert_frequency": counts_of(truth),
        "weighted_expert_frequency_sum": sums_of(truth, truth.weights),
        "ean_sum": sums_of(truth, norms),
        "weighted_ean_sum": sums_of(truth, truth.weights * norms),
    }
    return {
        layer: {
            "total_tokens": torch.tensor(len(truth.ids)),
            **{name: torch.from_numpy(array[row]) for name, array in held.items()},
            "max_activations": torch.ones(truth.n_experts),
            "pairwise_expert_frequency": torch.ones(truth.n_experts, truth.n_experts),
        }
        for row, layer in enumerate(truth.layers)
    }
