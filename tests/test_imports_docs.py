"""The page on importing: its commands run, and it names every kind and every rule."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import dumps
from moecollab.cli.main import app
from moecollab.record.imports.dump import Findings
from moecollab.record.imports.kinds import READERS

PAGE = (Path(__file__).parent.parent / "docs" / "importing.md").read_text()
COMMANDS = re.findall(r"^moecollab (import .*)$", PAGE, re.MULTILINE)
TRUTH = dumps.make_truth((6, 5), n_experts=64, layers=(1, 2, 3), top_k=6)


def files(at):
    """Every file that the page speaks of."""
    norms = np.ones(TRUTH.ids.shape)
    other = dumps.make_truth((6, 5), n_experts=64, layers=(1, 2, 3), top_k=6, seed=1)
    for name, truth in (("law", TRUTH), ("code", other)):
        dumps.write_npz(at / f"{name}.npz", truth)
        dumps.write_esft(at / name, truth)
    for folder in ("recorder", "trace"):
        (at / folder).mkdir()
    dumps.write_pt(at / "recorder" / "0.pt", dumps.sglang_recording(TRUTH))
    dumps.write_jsonl(at / "trace" / "router_trace_rank0.jsonl", dumps.megatron_trace(TRUTH))
    dumps.write_jsonl(at / "expert_stats.json", [dumps.llamacpp_json(TRUTH, norms)])
    dumps.write_pt(at / "observations.pt", dumps.reap_observations(TRUTH, norms))


def responses(kind):
    if kind == "vllm":
        return dumps.vllm_responses(TRUTH)
    wide = np.concatenate([np.zeros_like(TRUTH.ids[:, :1]), TRUTH.ids], axis=1)
    return dumps.sglang_responses(dumps.Truth(wide, TRUTH.weights, TRUTH.token_ids, TRUTH.lengths))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    kind = command.split()[1]
    dumps.write_jsonl(tmp_path / "responses.jsonl", responses(kind))
    shown = CliRunner().invoke(app, shlex.split(command))
    assert shown.exit_code == 0, shown.output
    assert "3 MoE layers × " in shown.output


def test_every_kind_and_rule_is_on_the_page():
    assert len(COMMANDS) == 8
    for kind in READERS:
        assert f"| `{kind}` |" in PAGE
    for rule in fields(Findings):
        assert f"| `{rule.name}` |" in PAGE
