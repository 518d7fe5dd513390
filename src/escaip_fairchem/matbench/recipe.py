"""What `configs/mptrj/matbench_discovery.yml` runs: relaxations, then the benchmark's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils
from fairchem.core.components.reducer import Reducer

from escaip_fairchem.matbench.files import (
    ENTRIES,
    REFERENCES,
    find_file,
    read_entries,
    read_references,
    require_pymatgen,
)
from escaip_fairchem.predict.relax import RelaxRunner

if TYPE_CHECKING:
    from fairchem.core.components.runner import Runner


class DiscoveryRunner(RelaxRunner):
    """Relaxes materials; what the last step needs is asked for before the first.

    Args:
        *args: As of `RelaxRunner`.
        entries: As of `DiscoveryReducer`, like the other one.
        references: Elemental reference entries.
        **options: As of `RelaxRunner`.
    """

    def __init__(self, *args: Any, entries: str, references: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.published = ((entries, ENTRIES), (references, REFERENCES))

    def run(self) -> None:
        """As of `RelaxRunner`.

        Raises:
            UserError: As there, or a file of the benchmark or pymatgen is missing.
        """
        require_pymatgen()
        for path, name in self.published:
            find_file(path, name)
        super().run()


class DiscoveryReducer(Reducer):
    """Writes the files of the benchmark into ``job.run_dir/job.timestamp_id``.

    Args:
        entries: WBM's computed structure entries, as published.
        references: Elemental reference entries, as published.
    """

    def __init__(self, entries: str, references: str) -> None:
        self.entries, self.references = entries, references

    @property
    def runner_type(self) -> type[Runner]:
        """The runner whose relaxations it takes."""
        return DiscoveryRunner

    def reduce(self) -> None:
        """Write the files, and check them.

        Raises:
            UserError: Relaxations are missing, or of another data set than the entries.
        """
        if distutils.is_master():
            self.reduce_folder(Path(self.job_config.metadata.results_dir))

    def reduce_folder(self, folder: Path) -> None:
        """Write the files beside a folder of relaxations, on whatever rank; as `reduce`."""
        from escaip_fairchem.matbench.energies import FormationEnergies
        from escaip_fairchem.matbench.write import write_files

        formation = FormationEnergies(
            read_entries(find_file(self.entries, ENTRIES)),
            read_references(find_file(self.references, REFERENCES)),
        )
        written = write_files(folder, folder.parent, formation)
        print(
            f"wrote {written.discovery} and {written.geo_opt}: {written.materials} materials, "
            f"{written.converged} converged, {len(written.failed)} without a prediction "
            f"{written.failed[:3] or ''}",
            flush=True,
        )
        print(f"next: escaip matbench check {folder.parent} --summary SUMMARY", flush=True)

    def save_state(self, _location: str, _is_preemption: bool = False) -> bool:
        """Nothing to do: the files are written at once."""
        return True

    def load_state(self, _location: str | None) -> None:
        """Nothing to do: the files are written at once."""
