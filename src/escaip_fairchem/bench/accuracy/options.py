"""What is compared, and on what; imports the standard library only, as the command does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    import argparse

RECIPE = Path("configs/oc20/escaip_few_frames.yml")


@dataclass(frozen=True)
class Domain:
    """What a kind of structures asks of every model.

    Attributes:
        periodic: Whether there are periodic images.
        max_atoms: Atoms of a batch.
    """

    periodic: bool
    max_atoms: int


DOMAINS = {
    "oc20": Domain(periodic=True, max_atoms=200),
    "mptrj": Domain(periodic=True, max_atoms=200),
    "spice": Domain(periodic=False, max_atoms=200),
    "rmd17": Domain(periodic=False, max_atoms=168),
}


@dataclass(frozen=True)
class Model:
    """A model that takes part.

    Attributes:
        title: For tables and figures.
        overrides: What makes it out of the recipe.
        pbc_key: Of its backbone, whether there are periodic images.
    """

    title: str
    overrides: tuple[str, ...]
    pbc_key: str = "use_pbc"


_PEER = ("~preset", "~backbone", "optimizer=adamw")
# The rate of AdamW is one at which eSEN is known to learn OC20 frames; no model was tuned here.
MODELS = {
    "escaip": Model("EScAIP, recipe as shipped", ()),
    "escaip_adamw": Model(
        "EScAIP, AdamW, published init", ("optimizer=adamw", "lr=2e-3", "backbone.init=published")
    ),
    "builtin": Model("EScAIP built into fairchem", (*_PEER, "+peer=builtin", "lr=2e-3")),
    "esen": Model("eSEN of fairchem", (*_PEER, "+peer=esen", "lr=2e-3"), "always_use_pbc"),
}


@dataclass(frozen=True)
class Options:
    """The command line, checked; see ``escaip bench accuracy --help``."""

    out: Path
    data: str = "sample"
    domain: str = "oc20"
    minutes: float | None = None
    samples: int | None = None
    clock: str = "cpu"
    seeds: int = 1
    models: tuple[str, ...] = tuple(MODELS)
    evaluations: int = 10
    jobs: int = 1
    threads: int = 1
    recipe: Path = RECIPE
    settings: tuple[str, ...] = ()

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """From the command line.

        Raises:
            UserError: A number is not positive, a model is not known, or a setting is no setting.
        """
        names = cls.__dataclass_fields__
        given = {k: v for k, v in vars(args).items() if k in names and v is not None}
        given["models"] = tuple(name for name in args.models.split(",") if name)
        given["settings"] = tuple(args.set)
        options = cls(**given)
        for name in ("minutes", "samples", "seeds", "evaluations", "jobs", "threads"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value}; give a positive number")
        for name in options.models:
            if name not in MODELS:
                raise UserError(f"--models: {name!r} is not one of {', '.join(MODELS)}")
        if not options.models or len(set(options.models)) < len(options.models):
            raise UserError(f"--models: name some of {', '.join(MODELS)}, each once")
        for setting in options.settings:
            if "=" not in setting:
                raise UserError(f"--set {setting}: give KEY=VALUE or MODEL:KEY=VALUE")
        return options

    def overrides(self, model: str, seed: int) -> list[str]:
        """Of the recipe, for a training; those of the data are not among them."""
        budget = {"seconds": 60 * self.minutes if self.minutes else None, "samples": self.samples}
        domain = DOMAINS[self.domain]
        entry = MODELS[model]
        return [
            f"max_atoms={domain.max_atoms}",
            *entry.overrides,
            f"backbone.{entry.pbc_key}={str(domain.periodic).lower()}",
            "+budget=one",
            *(f"budget.{key}={value}" for key, value in budget.items() if value is not None),
            f"budget.clock={self.clock}",
            f"budget.evaluations={self.evaluations}",
            f"seed={seed}",
            "job.scheduler.ranks_per_node=1",
            *self._settings_of(model),
        ]

    def _settings_of(self, model: str) -> list[str]:
        found = []
        for setting in self.settings:
            name, colon, rest = setting.partition(":")
            if not colon or name not in MODELS:
                found.append(setting)
            elif name == model:
                found.append(rest)
        return found
