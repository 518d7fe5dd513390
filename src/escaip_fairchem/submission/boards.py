"""What the leaderboards of the Open Catalyst Project take: one ``.npz`` with all test splits.

OC20: the leaderboard page of fairchem's documentation. OC22: the format of its EvalAI challenge,
which has had no successor since that closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

OC20_SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
OC22_SPLITS = ("id", "ood")


@dataclass(frozen=True)
class Board:
    """A leaderboard.

    Attributes:
        name: Name on the command line.
        title: Name in a sentence.
        splits: Test splits, each of which a file must hold.
        forces: Whether forces are wanted besides energies.
        energies: What an energy means: ``adsorption`` or ``total``.
    """

    name: str
    title: str
    splits: tuple[str, ...]
    forces: bool
    energies: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Arrays of each split, named ``{split}_{field}``."""
        return ("ids", "energy", *(("forces", "chunk_idx") if self.forces else ()))

    def keys(self) -> list[str]:
        """Names of all arrays."""
        return [f"{split}_{field}" for split in self.splits for field in self.fields]


BOARDS = {
    board.name: board
    for board in (
        Board("oc20_s2ef", "OC20 S2EF", OC20_SPLITS, forces=True, energies="adsorption"),
        Board("oc20_is2re", "OC20 IS2RE", OC20_SPLITS, forces=False, energies="adsorption"),
        Board("oc22_s2ef_total", "OC22 S2EF-Total", OC22_SPLITS, forces=True, energies="total"),
    )
}


def find_board(name: str) -> Board:
    """The leaderboard of a name.

    Raises:
        UserError: There is none.
    """
    if name not in BOARDS:
        raise UserError(f"no leaderboard {name}; known are {', '.join(BOARDS)}")
    return BOARDS[name]


def board_of(keys: Iterable[str]) -> Board:
    """The leaderboard that a file with these arrays is probably meant for."""
    keys = set(keys)
    return max(BOARDS.values(), key=lambda board: _likeness(board, keys))


def _likeness(board: Board, keys: set[str]) -> tuple[int, int]:
    """Arrays that a file shares with a board; of equals, that with the fewer missing."""
    return len(keys & set(board.keys())), -len(board.keys())
