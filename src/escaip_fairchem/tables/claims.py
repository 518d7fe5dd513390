"""What was published, for a reader to compare with: text, source, and numbers where there are any.

The paper's own result tables are images; of them only what its text and captions say is here.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "Qu and Krishnapriyan, NeurIPS 2024, arXiv 2410.24169"


@dataclass(frozen=True)
class Claim:
    """Something published.

    Attributes:
        text: What is claimed.
        source: Where.
    """

    text: str
    source: str = PAPER

    def __str__(self) -> str:
        """One line."""
        return f"claim: {self.text} ({self.source})"


#: Force cosine that the paper's models reach between rotated prediction and prediction of rotated.
COSINE = 0.99

EQUIVARIANCE = Claim(
    f"after training on OC20 All+MD, MPtrj or SPICE, the cosine of forces is above {COSINE}; "
    "10 batches, 32 rotations",
    f"{PAPER}, table on rotational equivariance and the authors' check_model_equivariance.py",
)
SCALING = Claim(
    "force and energy errors fall with every larger model and with more data (500 k, 1 M, 2 M "
    "frames, All+MD); no exponents are given",
    f"{PAPER}, scaling figure",
)
ATTENTION = Claim(
    "at equal parameters (about 83 M), EquiformerV2 on OC20 2M gains most from parameters in the "
    "attention, and L = 0 with BOO is comparable to L = 6",
    f"{PAPER}, Figure 2; the same question is asked of EScAIP here",
)
TRADEOFF = Claim(
    "at least 10 times faster inference and 5 times less memory than other models, and state of "
    "the art on OC20, OC22, SPICE and MPtrj; the figures behind it could not be read",
    f"{PAPER}, abstract; Figure 1 draws it",
)

#: Force MAE in meV/A and EFwT in % on OC20 S2EF val-ID after training on 2M; speeds of the same
#: runs are not published there.
OC20_2M = {
    "SchNet": (73.7, 0.0),
    "DimeNet++": (59.5, 0.01),
    "SpinConv": (32.9, 0.18),
    "GemNet-dT": (25.7, 1.10),
    "GemNet-OC": (22.5, 2.12),
    "SCN": (21.6, 1.68),
    "eSCN L4": (19.1, 2.55),
    "eSCN L6": (18.6, 2.66),
    "EquiformerV2 83M": (16.7, 4.26),
}
OC20_2M_SOURCE = "OC20 2M, val-ID: fairchem 1, docs/core/model_checkpoints.md"
