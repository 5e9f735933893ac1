"""The public names, and that the command line offers what the API offers."""

import inspect
import pickle

import pytest
import typer.testing

import moecollab as mc
from moecollab import errors
from moecollab.cli import verbs
from moecollab.cli.main import app

VERBS = (
    "extract",
    "mine",
    "score",
    "uncertainty",
    "agreement",
    "blend",
    "plan",
    "mask",
    "prune",
    "merge",
    "repair",
    "evaluate",
    "compare",
    "super_experts",
    "report",
)
NOT_ON_THE_COMMAND_LINE = {
    "extract": {"tokenizer"},
    "compare": {"tokenizer"},
    "evaluate": {"tokenizer", "name"},
    "iterate": {"hsdl", "tokenizer"},
    "mask": {"mode"},
    "mine": {"n_experts"},
    "super_experts": {"tokenizer"},
    "report": {"activations", "collaboration", "scores", "plan", "evaluations"},
}


def test_all_is_sorted_and_complete():
    assert len(mc.__all__) == len(set(mc.__all__))
    assert set(mc.__all__) == set(mc._HOME)
    for name in mc.__all__:
        assert getattr(mc, name).__doc__, name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        mc.prun  # noqa: B018


@pytest.mark.parametrize("name", VERBS)
def test_commands_have_the_options_of_the_verbs(name):
    api = set(inspect.signature(getattr(mc, name)).parameters)
    command = set(inspect.signature(getattr(verbs, name)).parameters)
    assert api - command == NOT_ON_THE_COMMAND_LINE.get(name, set())
    assert not command - api


def test_import_has_the_options_of_import_routing():
    api = inspect.signature(mc.import_routing).parameters
    command = inspect.signature(verbs.import_).parameters
    assert set(api) == set(command)
    for option, parameter in command.items():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == api[option].default, option


def test_fit_has_the_settings_of_hsdl():
    settings = set(inspect.signature(mc.HSDL).parameters)
    command = set(inspect.signature(verbs.fit).parameters)
    assert command - settings == {"activations", "out", "overwrite"}
    assert not settings - command


def test_defaults_agree():
    for name in VERBS:
        api = inspect.signature(getattr(mc, name)).parameters
        for option, parameter in inspect.signature(getattr(verbs, name)).parameters.items():
            if parameter.default is not inspect.Parameter.empty and option != "tasks":
                wanted = api[option].default
                if isinstance(wanted, tuple):  # written between commas
                    wanted = ",".join(map(str, wanted))
                assert parameter.default == wanted, f"{name} {option}"
    defaults = mc.HSDL()
    for option, parameter in inspect.signature(verbs.fit).parameters.items():
        if hasattr(defaults, option):
            assert parameter.default == getattr(defaults, option), option


@pytest.mark.parametrize("command", [verbs.command_name(v) for v in verbs.VERBS])
def test_help_has_an_example(command):
    found = typer.testing.CliRunner().invoke(app, [command, "--help"])
    assert found.exit_code == 0
    assert "Example:" in found.output or command == "criteria"


@pytest.mark.parametrize(
    "error",
    [
        errors.SettingsError("drop", 2, "in [0, 1)"),
        errors.OutputExistsError("there"),
        errors.DataError("empty"),
    ],
)
def test_errors_survive_pickle(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_unknown_names_suggest_near_ones():
    assert "did you mean caep" in str(errors.unknown_name("criterion", "caap", ["caep", "reap"]))
