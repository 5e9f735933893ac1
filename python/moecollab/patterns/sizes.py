"""How many atoms a fit has."""

from __future__ import annotations

import math

from moecollab.errors import DataError, SettingsError

ATOMS_PER_SITE = (0.3, 1.2)
MOST_ATOMS = (512, 2048)


def level_sizes(atoms: tuple[int, ...] | None, n_rows: int, n_sites: int) -> tuple[int, ...]:
    """Atoms of each level, as asked for or by default.

    Raises
    ------
    DataError
        When there are no rows.
    SettingsError
        When level 1 would have more atoms than there are rows.
    """
    if n_rows < 1:
        raise DataError("there are no rows to fit; record some text first")
    if atoms is None:
        pairs = zip(ATOMS_PER_SITE, MOST_ATOMS, strict=True)
        wanted = [min(math.ceil(round(share * n_sites, 9)), most) for share, most in pairs]
        return (min(wanted[0], n_rows), wanted[1])
    if atoms[0] > n_rows:
        raise SettingsError("atoms", atoms, f"at most {n_rows} at level 1, one per row")
    return tuple(int(n_atoms) for n_atoms in atoms)
