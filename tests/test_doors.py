"""The doors of the Rust core: what is wrong with rows or settings is told in a sentence."""

import numpy as np
import pytest

from moecollab import _core
from moecollab.errors import DataError, SettingsError, ShapeError
from planted import SHORT_FIT

COMMON = SHORT_FIT | {"atoms": [2]}
FIT = COMMON | {"passes": 1.0, "batch": 0}
CODE = {"sparsity": 0.2, "reconstruction": 1.0, "tolerance": 1e-4, "caps": None, "gap": False}
LEARN = {"batches": 1, "batch": 2, "window": 4, "exponent": 3.0, "share": 0.5, "seed": 0}
ENCODE = CODE | {"threads": 1}
LEARNING = LEARN | {"sparsity": 0.2, "reconstruction": 1.0, "tolerance": 1e-3, "threads": 1}
ATOMS = np.array([[1, 0, 0], [0, 0.6, 0.8]], np.float32)
ROWS = (np.array([0, 2, 3]), np.array([0, 2, 1], np.uint32), np.array([1, 0.5, 2], np.float32))
MINE = {"n_experts": 1, "size": 3, "least": 1, "top": 1, "by_lift": False, "chance": True}


def watch(*_):
    pass


def encode(rows, n_sites, atoms, settings):
    return _core.encode(rows, atoms, np.full(len(atoms), np.inf, np.float32), 0.1, 1)


DOORS = {
    "fit_dictionary": lambda rows, n: _core.fit_dictionary(rows, n, COMMON, watch),
    "fit_square": lambda rows, n: _core.fit_square(rows, n, FIT, watch),
    "learn_square": lambda rows, n: _core.learn_square(rows, n, {"atoms": ATOMS}, LEARNING),
    "encode": lambda rows, n: encode(rows, n, ATOMS, None),
    "encode_square": lambda rows, n: _core.encode_square(rows, n, ATOMS, ENCODE),
}
CODERS = {
    "learn_square": lambda atoms: _core.learn_square(ROWS, 3, {"atoms": atoms}, LEARNING),
    "encode": lambda atoms: encode(ROWS, 3, atoms, None),
    "encode_square": lambda atoms: _core.encode_square(ROWS, 3, atoms, ENCODE),
}
SETTINGS = {
    "fit_dictionary": (COMMON, lambda s: _core.fit_dictionary(ROWS, 3, s, watch)),
    "fit_square": (FIT, lambda s: _core.fit_square(ROWS, 3, s, watch)),
    "learn_square": (LEARNING, lambda s: _core.learn_square(ROWS, 3, {"atoms": ATOMS}, s)),
    "encode_square": (ENCODE, lambda s: _core.encode_square(ROWS, 3, ATOMS, s)),
}


def door(doors):
    return pytest.mark.parametrize("enter", doors.values(), ids=doors.keys())


def changed(at, array):
    return (*ROWS[:at], array, *ROWS[at + 1 :])


def ids(*sites):
    return np.array(sites, np.uint32)


@door(DOORS)
def test_sound_rows_enter(enter):
    enter(ROWS, 3)


@door(DOORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
def test_values_that_cannot_be_are_refused(enter, bad):
    with pytest.raises(DataError, match=r"values holds .* at position 1; it must be finite and no"):
        enter(changed(2, np.array([1, bad, 2], np.float32)), 3)


@door(DOORS)
@pytest.mark.parametrize("sites", [ids(0, 3, 1), ids(2, 2, 1), ids(2, 0, 1), ids(0, 2**32 - 1, 1)])
def test_sites_out_of_range_twice_or_out_of_order_are_refused(enter, sites):
    with pytest.raises(DataError, match=r"sites holds \d+ at position 1; it must be below n_sites"):
        enter(changed(1, sites), 3)


@door(DOORS)
def test_pointers_that_do_not_fit_are_refused(enter):
    for pointers in ([0, 2, 1, 3], [0, -1, 3], [-1, 2, 3]):
        with pytest.raises(DataError, match=r"indptr holds -?1 at position .* ascending from 0"):
            enter(changed(0, np.array(pointers)), 3)
    for pointers in ([0, 2], [1, 2, 3], [0, 2, 4], [0, 2, 2**62]):
        with pytest.raises(ShapeError, match="sites has length 3, expected"):
            enter(changed(0, np.array(pointers)), 3)
    for pointers in ([], [0]):
        with pytest.raises(DataError, match="rows is empty"):
            enter(changed(0, np.array(pointers, np.int64)), 3)
    with pytest.raises(ShapeError, match="values has length 2, expected 3"):
        enter(changed(2, ROWS[2][:2]), 3)


@door(DOORS)
def test_arrays_of_another_kind_are_refused(enter):
    for at, name in enumerate(("indptr", "sites", "values")):
        right = ROWS[at]
        for wrong in (right.astype(np.float64), right.tolist(), None, right.astype(">i2")):
            with pytest.raises(ShapeError, match=f"{name} is .*; pass a numpy array of"):
                enter(changed(at, wrong), 3)
        with pytest.raises(ShapeError, match=f"{name} has shape .*; pass an array with 1 axes"):
            enter(changed(at, right[None]), 3)
        apart = np.stack([right, right], axis=1)[:, 0]
        with pytest.raises(ShapeError, match=f"{name} is not C-contiguous"):
            enter(changed(at, apart), 3)
    for few in (ROWS[:2], ROWS[:1]):
        with pytest.raises((ValueError, IndexError), match="tuple"):
            enter(few, 3)


@pytest.mark.parametrize("enter", [DOORS["fit_dictionary"], DOORS["fit_square"]])
def test_no_sites_and_too_many_are_refused(enter):
    empty = (np.array([0, 0]), np.zeros(0, np.uint32), np.zeros(0, np.float32))
    with pytest.raises(DataError, match="sites is empty"):
        enter(empty, 0)
    for many in (10**9, 2**63):
        with pytest.raises(SettingsError, match=f"n_sites is '{many}'; it must be at most"):
            enter(empty, many)
    with pytest.raises(OverflowError):
        enter(empty, -1)


@door(CODERS)
def test_atoms_of_another_kind_are_refused(enter):
    enter(ATOMS)
    wrong = {
        "atoms is float64": ATOMS.astype(np.float64),
        "atoms is a list": ATOMS.tolist(),
        "atoms has shape": ATOMS[0],
        "atoms is not C-contiguous": np.asfortranarray(ATOMS),
        "expected 3|sites holds 2": ATOMS[:, :2].copy(),
    }
    for said, atoms in wrong.items():
        with pytest.raises((ShapeError, DataError), match=said):
            enter(atoms)
    for bad in (np.nan, np.inf, -1.0, 1e30):
        atoms = ATOMS.copy()
        atoms[1, 0] = bad
        with pytest.raises(DataError, match=r"atoms holds .* at position 3"):
            enter(atoms)


@pytest.mark.parametrize("enter", [CODERS["learn_square"], CODERS["encode_square"]])
def test_no_atoms_are_refused(enter):
    with pytest.raises(DataError, match="atoms is empty"):
        enter(ATOMS[:0])


@door(SETTINGS)
def test_every_setting_is_needed_and_checked(enter):
    good, call = enter
    call(good)
    for name, value in good.items():
        with pytest.raises(KeyError, match=name):
            call({key: other for key, other in good.items() if key != name})
        with pytest.raises(TypeError):
            call(good | {name: "much"})
        if isinstance(value, float):
            for bad in (np.nan, np.inf, -1.0):
                with pytest.raises(SettingsError, match=f"{name} is"):
                    call(good | {name: bad})
        elif isinstance(value, int) and name != "gap":
            with pytest.raises(TypeError, match=name):
                call(good | {name: -1})
    if "reconstruction" in good:
        with pytest.raises(SettingsError, match="reconstruction is"):
            call(good | {"reconstruction": 0.0})


@pytest.mark.parametrize("name", ["fit_dictionary", "fit_square"])
@pytest.mark.parametrize("atoms", [[10**9], [2, 10**9], [10**5], [2**63], [], [2, 0]])
def test_atoms_that_no_memory_holds_are_refused(name, atoms):
    good, call = SETTINGS[name]
    with pytest.raises(SettingsError, match="atoms is"):
        call(good | {"atoms": atoms})


def test_passes_and_sizes_are_checked():
    call = SETTINGS["fit_square"][1]
    for name in ("passes", "dictionary_size"):
        with pytest.raises(SettingsError, match=f"{name} is"):
            call(FIT | {name: -1.0})
    with pytest.raises(SettingsError, match=r"sparsity is .* at most 1e30 times reconstruction"):
        call(FIT | {"sparsity": 1e300, "reconstruction": 1e-300})
    for share in (0.0, 1.5):
        with pytest.raises(SettingsError, match="share is"):
            SETTINGS["learn_square"][1](LEARNING | {"share": share})
    for name in ("batch", "window"):
        with pytest.raises(SettingsError, match=f"{name} is"):
            SETTINGS["learn_square"][1](LEARNING | {name: 0})


def test_a_batch_larger_than_the_rows_is_all_rows():
    both = [
        _core.learn_square(ROWS, 3, {"atoms": ATOMS}, LEARNING | {"batch": batch})
        for batch in (2, 2**62)
    ]
    assert both[0]["atoms"].tobytes() == both[1]["atoms"].tobytes()
    huge = _core.fit_square(ROWS, 3, FIT | {"batch": 2**62, "passes": 2.0}, watch)
    assert huge["stop_reason"] in ("tolerance", "max iterations")


def test_a_learner_state_that_cannot_be_is_refused():
    state = _core.learn_square(ROWS, 3, {"atoms": ATOMS}, LEARNING)
    for name in ("second", "pull", "first", "scales"):
        bad = state[name].copy()
        bad.flat[0] = np.nan
        with pytest.raises(DataError, match=f"{name} holds .* at position 0"):
            _core.learn_square(ROWS, 3, state | {name: bad}, LEARNING)
    for name, place in (("born", 1), ("counts", 1), ("counts", 2)):
        bad = state[name].copy()
        bad[place] = 2**60
        with pytest.raises(DataError, match=f"{name} holds .* at position"):
            _core.learn_square(ROWS, 3, state | {name: bad}, LEARNING)
    lacking = {key: array for key, array in state.items() if key != "second"}
    with pytest.raises(KeyError, match="second"):
        _core.learn_square(ROWS, 3, lacking, LEARNING)
    for wrong in (state["pull"].astype(np.float64), state["pull"][:1].copy()):
        with pytest.raises(ShapeError, match="pull"):
            _core.learn_square(ROWS, 3, state | {"pull": wrong}, LEARNING)


@pytest.mark.parametrize("caps", [[1.0], [1.0, -1.0], [1.0, np.nan]])
def test_caps_that_do_not_fit_are_refused(caps):
    with pytest.raises((ShapeError, DataError), match="caps"):
        _core.encode_square(ROWS, 3, ATOMS, ENCODE | {"caps": caps})


def test_peaks_that_do_not_fit_are_refused():
    for peak in (np.ones(1), np.array([1, np.nan]), np.array([1, -1])):
        with pytest.raises((ShapeError, DataError), match=r"atoms|peak"):
            _core.encode(ROWS, ATOMS, peak.astype(np.float32), 0.1, 1)
    for ratio in (-1.0, np.nan, np.inf):
        with pytest.raises(SettingsError, match="ratio"):
            _core.encode(ROWS, ATOMS, np.ones(2, np.float32), ratio, 1)
