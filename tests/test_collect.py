"""What is summed is asked for by its own names, or by those of the criteria that read it."""

import subprocess
import sys

import numpy as np
import pytest

import moecollab as mc
from moecollab.criteria import Criterion, Needs
from moecollab.errors import SettingsError
from moecollab.record.sums import groups_meant


def test_a_criterion_stands_for_what_it_reads(model_folder, texts, tmp_path):
    named = mc.extract(model_folder, texts, out=tmp_path / "a", collect="coverage, mone")
    assert named.manifest["settings"]["collect"] == ["shift", "channels"]
    spelt = mc.extract(model_folder, texts, out=tmp_path / "b", collect=["channels", "shift"])
    assert named.digest() == spelt.digest()
    with pytest.raises(SettingsError, match=r"collect is 'covrage'; .* did you mean coverage"):
        mc.extract(model_folder, texts, out=tmp_path / "c", collect="covrage")
    with pytest.raises(SettingsError, match="collect is 5; it must be a sequence of names"):
        mc.extract(model_folder, texts, out=tmp_path / "c", collect=5)


def test_criteria_are_known_as_soon_as_there_is_extract():
    """In an interpreter that has imported nothing else."""
    code = "from moecollab import extract; from moecollab.record.sums import groups_meant as meant"
    code += "; print(*meant(['easy_ep']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(found.stdout.split()) == ["routing", "shift"]


def test_a_registered_criterion_can_be_named_until_it_is_forgotten():
    mc.criteria.register(Criterion("mine_own", Needs.PAIRS, np.zeros_like))
    assert groups_meant(["mine_own"]) == {"pairs"}
    mc.criteria.unregister("mine_own")
    with pytest.raises(SettingsError, match="collect is 'mine_own'"):
        groups_meant(["mine_own"])
    with pytest.raises(SettingsError, match="it must be a name that is not yet taken"):
        mc.criteria.register(Criterion("pairs", Needs.PAIRS, np.zeros_like))
