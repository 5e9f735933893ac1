"""The rules that foreign routing must keep: what is refused, left out or flagged.

The table of rules is in ``docs/importing.md``; each function here is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SettingsError, ShapeError
from moecollab.record.imports.dump import MAX_EXPERTS, Dump, Findings, Options, Piece


@dataclass(frozen=True, kw_only=True)
class Table:
    """The routing of all tokens of some pieces.

    Parameters
    ----------
    ids : int32 array of shape (n_tokens, n_layers, n_slots)
        Expert ids; -1 is an unused slot.
    weights : float32 array of the shape of ids, or None
        Weights; 0 in unused slots.
    piece, row : int64 arrays of shape (n_tokens,)
        Which piece a token is from, and its row there.
    layers : tuple of int
        The model's own indices of the layers.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    piece: NDArray[np.int64]
    row: NDArray[np.int64]
    layers: tuple[int, ...]

    def take(self, keep: NDArray[np.bool_]) -> Table:
        """The table of some of the tokens."""
        if keep.all():
            return self
        weights = None if self.weights is None else self.weights[keep]
        return replace(
            self, ids=self.ids[keep], weights=weights, piece=self.piece[keep], row=self.row[keep]
        )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Routing that keeps all rules, in as many slots as some token uses.

    Parameters
    ----------
    expert : uint16 array of shape (n_tokens, n_layers, top_k)
        Expert ids, the largest weight first; 0 where the weight is 0.
    weight : float32 array of shape (n_tokens, n_layers, top_k)
        Weights; equal shares where none were recorded.
    piece, row : int64 arrays of shape (n_tokens,)
        Which piece a token is from, and its row there.
    """

    expert: NDArray[np.uint16]
    weight: NDArray[np.float32]
    piece: NDArray[np.int64]
    row: NDArray[np.int64]
    layers: tuple[int, ...]
    pieces: tuple[Piece, ...]
    n_experts: int
    has_weights: bool
    findings: Findings


def check(dump: Dump, options: Options) -> Checked:
    """The routing of a dump after all rules.

    Raises
    ------
    DataError
        When a rule is broken that nothing can mend; it names file, row and rule.
    SettingsError
        When the files do not say something that the options do not say either.
    """
    findings = dump.findings
    pieces = _without_duplicates(dump.pieces, findings)
    if not pieces:
        raise DataError(f"the files hold no routing ({findings}); record it again")
    n_experts = _n_experts(dump, options)
    table = _stack(pieces, options.layers or dump.layers)
    _check_weights(table, pieces)
    table = _unused_by_weight(table)
    table = _moe_layers(table, dump, options, findings)
    for rule in (_zero_tokens, _missing_tokens, _warm_up_tokens):
        table = rule(table, findings)
    if options.prefill_only:
        table = _prefill_tokens(table, pieces, findings)
    if not len(table.ids):
        raise DataError(f"no token is left of {pieces[0].file} ({findings}); record it again")
    _check_range(table, pieces, n_experts)
    _check_repeats(table, pieces)
    expert, weight = _ordered(table, options, pieces, findings)
    return Checked(
        expert=expert,
        weight=weight,
        piece=table.piece,
        row=table.row,
        layers=table.layers,
        pieces=pieces,
        n_experts=n_experts,
        has_weights=pieces[0].weights is not None,
        findings=findings,
    )


def _n_experts(dump: Dump, options: Options) -> int:
    if dump.n_experts is None and options.experts is None:
        raise SettingsError("experts", None, "given, since the files do not say (--experts)")
    if dump.n_experts is not None and not 1 <= dump.n_experts <= MAX_EXPERTS:
        raise DataError(f"the files name {dump.n_experts} experts per layer; record them again")
    if None not in (dump.n_experts, options.experts) and dump.n_experts != options.experts:
        raise SettingsError("experts", options.experts, f"{dump.n_experts}, as the files say")
    return int(options.experts or dump.n_experts or 0)


def _without_duplicates(pieces: Sequence[Piece], findings: Findings) -> tuple[Piece, ...]:
    """Pieces of files whose routing is not that of an earlier file."""
    digests: dict[str, blake2b] = {}
    for piece in pieces:
        state = digests.setdefault(piece.file, blake2b(digest_size=16))
        for array in (piece.ids, piece.weights, piece.token_ids, piece.positions):
            state.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    first: dict[bytes, str] = {}
    for file, state in digests.items():
        first.setdefault(state.digest(), file)
    findings.duplicate_files += len(digests) - len(first)
    kept = set(first.values())
    return tuple(piece for piece in pieces if piece.file in kept)


def _stack(pieces: tuple[Piece, ...], named: tuple[int, ...] | None) -> Table:
    shape, first = pieces[0].ids.shape[1:], pieces[0]
    for piece in pieces:
        if piece.ids.shape[1:] != shape or (piece.weights is None) != (first.weights is None):
            raise ShapeError(
                f"{piece.where} has {piece.ids.shape[1:]} layers and slots, {first.where} has "
                f"{shape}, or only one has weights; import what belongs together"
            )
        _check_int32(piece)
    lengths = [len(piece.ids) for piece in pieces]
    weights = None
    if first.weights is not None:
        weights = np.concatenate([p.weights for p in pieces if p.weights is not None])
    return Table(
        ids=np.concatenate([piece.ids.astype(np.int32) for piece in pieces]),
        weights=weights,
        piece=np.repeat(np.arange(len(pieces)), lengths),
        row=np.concatenate([np.arange(length) for length in lengths]),
        layers=named if named and len(named) == shape[0] else tuple(range(shape[0])),
    )


def _check_int32(piece: Piece) -> None:
    """Raises when an id does not survive as int32."""
    ids = piece.ids
    if ids.size and max(int(ids.max()), -int(ids.min())) >= 2**31:
        raise DataError(f"{piece.where} holds ids beyond int32; its dtype was misread")


def _place(table: Table, pieces: tuple[Piece, ...], bad: NDArray[np.bool_]) -> str:
    """Where the first bad slot is: `bad` is a bool array of the shape of ids."""
    token, layer = (int(at) for at in np.argwhere(bad)[0][:2])
    where = pieces[int(table.piece[token])].where
    return f"{where}, row {int(table.row[token])}, layer {table.layers[layer]}"


def _check_weights(table: Table, pieces: tuple[Piece, ...]) -> None:
    if table.weights is None:
        return
    bad = ~(np.isfinite(table.weights) & (table.weights >= 0))
    if bad.any():
        value = table.weights[tuple(np.argwhere(bad)[0])]
        raise DataError(
            f"{_place(table, pieces, bad)}: the weight is {value}, but weights are finite and not "
            "negative; record the routing again"
        )


def _unused_by_weight(table: Table) -> Table:
    """A slot is unused when its id is -1 or its weight is 0; here both say so."""
    if table.weights is None:
        return table
    used = (table.weights != 0) & (table.ids != -1)
    if used.all():
        return table
    return replace(table, ids=np.where(used, table.ids, np.int32(-1)), weights=table.weights * used)


def _moe_layers(table: Table, dump: Dump, options: Options, findings: Findings) -> Table:
    """The table of the layers that route, under the model's own indices."""
    several = table.ids.shape[2] > 1  # with one slot, expert 0 throughout may be true
    missing = (table.ids == -1).all(axis=(0, 2))
    dense = missing | ((table.ids == 0).all(axis=(0, 2)) & several)
    n_layers, n_moe = len(dense), int((~dense).sum())
    if not n_moe:
        raise DataError("the files hold no routing: every layer is -1 or 0 throughout")
    named = options.layers or dump.layers or tuple(range(n_layers))
    if list(named) != sorted(set(named)) or named[0] < 0:
        raise DataError(f"the files name layers {list(named)}, which do not ascend from 0 on")
    if len(named) not in (n_layers, n_moe):
        raise SettingsError("layers", named, f"{n_layers} indices, one for each layer in the files")
    findings.dense_layers += n_layers - n_moe
    if len(named) == n_layers:
        named = tuple(layer for layer, skip in zip(named, dense, strict=True) if not skip)
    if n_moe == n_layers:
        return replace(table, layers=named)
    weights = None if table.weights is None else table.weights[:, ~dense]
    return replace(table, ids=table.ids[:, ~dense], weights=weights, layers=named)


def _zero_tokens(table: Table, findings: Findings) -> Table:
    if table.ids.shape[2] == 1:
        return table  # with one slot, expert 0 may be true
    zero = (table.ids == 0).all(axis=(1, 2))
    findings.zero_tokens += int(zero.sum())
    return table.take(~zero)


def _missing_tokens(table: Table, findings: Findings) -> Table:
    missing = (table.ids == -1).all(axis=2).any(axis=1)
    findings.missing_tokens += int(missing.sum())
    return table.take(~missing)


def _warm_up_tokens(table: Table, findings: Findings) -> Table:
    """Engines warm up on tokens whose weights are all 1/k; real routers do not give that."""
    if table.weights is None or table.ids.shape[2] == 1 or not len(table.ids):
        return table
    uniform = (table.weights == table.weights[:, :1, :1]).all(axis=(1, 2))
    if uniform.all():
        findings.uniform_weights += len(uniform)
        return table
    findings.warm_up_tokens += int(uniform.sum())
    return table.take(~uniform)


def _prefill_tokens(table: Table, pieces: tuple[Piece, ...], findings: Findings) -> Table:
    generated = np.zeros(len(table.ids), np.bool_)
    for number, piece in enumerate(pieces):
        if piece.generated is None:
            raise SettingsError(
                "prefill_only", True, f"false: {piece.where} does not say which tokens it wrote"
            )
        mine = table.piece == number
        generated[mine] = piece.generated[table.row[mine]]
    findings.generated_tokens += int(generated.sum())
    return table.take(~generated)


def _check_range(table: Table, pieces: tuple[Piece, ...], n_experts: int) -> None:
    bad = (table.ids < -1) | (table.ids >= n_experts)
    if bad.any():
        found = int(table.ids[tuple(np.argwhere(bad)[0])])
        raise DataError(
            f"{_place(table, pieces, bad)}: expert id {found}, but ids are in [0, {n_experts}); "
            "these may be physical or fused shared experts: record logical ids of routed experts, "
            "or correct --experts"
        )


def _check_repeats(table: Table, pieces: tuple[Piece, ...]) -> None:
    for row in range(len(table.layers)):
        order = np.sort(table.ids[:, row], axis=1)
        bad = ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] != -1)).any(axis=1)
        if bad.any():
            token = int(np.argmax(bad))
            where = np.zeros(table.ids.shape[:2], np.bool_)
            where[token, row] = True
            raise DataError(
                f"{_place(table, pieces, where)}: experts {table.ids[token, row].tolist()} repeat, "
                "which no router gives; check the order of axes, --layers and --top-k"
            )


def _ordered(
    table: Table, options: Options, pieces: tuple[Piece, ...], findings: Findings
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Used slots first, by falling weight; slots that nobody uses are cut off."""
    n_tokens, n_layers, _ = table.ids.shape
    top_k = int((table.ids != -1).sum(axis=2).max())
    if options.top_k not in (None, top_k):
        raise DataError(
            f"{pieces[0].file} and its like use up to {top_k} experts per token and layer, but "
            f"top_k is {options.top_k}; correct --top-k"
        )
    expert = np.empty((n_tokens, n_layers, top_k), np.uint16)
    weight = np.empty(expert.shape, np.float32)
    for row in range(n_layers):  # one layer at a time, since sorting takes several copies
        ids = table.ids[:, row]
        weights = _shares(ids) if table.weights is None else table.weights[:, row]
        order = np.argsort(-weights, axis=1, kind="stable")[:, :top_k]
        ids = np.take_along_axis(ids, order, axis=1)
        findings.unused_slots += int((ids == -1).sum())
        expert[:, row] = np.maximum(ids, 0)
        weight[:, row] = np.take_along_axis(weights, order, axis=1)
    return expert, weight


def _shares(ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Equal shares of the used slots of one layer: (n_tokens, n_slots)."""
    used = ids != -1
    shares: NDArray[np.float32] = (used / used.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares
