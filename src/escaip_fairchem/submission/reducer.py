"""The last step of the leaderboard recipes: predictions to one checked file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fairchem.core.common import distutils
from fairchem.core.components.reducer import Reducer

from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.runner import PredictRunner
from escaip_fairchem.submission.boards import find_board
from escaip_fairchem.submission.check import Expectations, check
from escaip_fairchem.submission.write import write_submission

if TYPE_CHECKING:
    from fairchem.core.components.runner import Runner


class SubmissionReducer(Reducer):
    """Writes the predictions of a run as ``job.run_dir/job.timestamp_id/BOARD.npz``.

    The file is checked as `escaip submission check` does without the data.

    Args:
        board: A name in `escaip_fairchem.submission.boards`.
        ids: As of `escaip_fairchem.submission.write.write_submission`, like the other two.
        atoms: Which atoms' forces.
        fixed_forces: Forces of atoms held in place.
    """

    def __init__(
        self, board: str, *, ids: str = "auto", atoms: str = "all", fixed_forces: str = "zero"
    ) -> None:
        self.board = find_board(board)
        self.settings = {"ids": ids, "atoms": atoms, "fixed_forces": fixed_forces}

    @property
    def runner_type(self) -> type[Runner]:
        """The runner whose predictions it takes."""
        return PredictRunner

    def reduce(self) -> None:
        """Write the file and print what the checker says.

        Raises:
            UserError: Predictions are missing, or the file has problems, which are printed.
        """
        if distutils.is_master():
            self.reduce_folder(Path(self.job_config.metadata.results_dir))

    def reduce_folder(self, folder: Path) -> None:
        """Write the file beside a folder of predictions, on whatever rank; as `reduce`."""
        path = folder.parent / f"{self.board.name}.npz"
        chosen = write_submission(folder, self.board, path, **self.settings)
        report = check(path, Expectations(self.board, atoms=chosen["atoms"]))
        settings = ", ".join(f"{name}={value}" for name, value in chosen.items())
        print(f"wrote {path} ({settings})\n{report}", flush=True)
        print(f"next: escaip submission check {path} --dataset DATA", flush=True)
        if report.problems:
            raise UserError(f"{path} has {len(report.problems)} problems, printed above")

    def save_state(self, _location: str, _is_preemption: bool = False) -> bool:
        """Nothing to do: the file is written at once."""
        return True

    def load_state(self, _location: str | None) -> None:
        """Nothing to do: the file is written at once."""
