"""Where a transfer keeps what it made: a folder per pair and noise, one table, the curve, and a sheet of pictures.

A picture's numbers are written after it, so a picture that has them is complete. Next: `flux_ir.api.transfer`.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from flux_ir.files import complete_file, read_json, versions, write_json
from flux_ir.plots.charts import TradeoffPoint, tradeoff
from flux_ir.steering.dose import Made
from flux_ir.steering.folder import claim
from flux_ir.steering.pairs import Case
from flux_ir.steering.table import Estimate
from flux_ir.steering.tradeoff import EDITED, ORIGINAL, Area, TransferRow, TransferRun, as_table
from flux_ir.steering.transfer import Chosen, Difference, Method
from flux_ir.tables import write_rows
from flux_ir.visualize.sheet import SheetColumn, SheetRow, draw_sheet

NAMES = {
    "features": "features",
    "activations": "whole activations",
    "neurons": "neurons",
    "mean": "mean difference",
    "random": "random features",
}
"""What the methods are called in figures."""
MOST_ON_SHEET = 12


class TransferFolder:
    """One transfer's folder. `identity` is what the pictures' bits depend on, but for seeds, k and strengths.

    Raises FluxIRError for a folder that holds a transfer with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self.numbers, self.table, self.curve = path / "transfer.json", path / "transfer.csv", path / "pareto.png"
        self.sheet = path / "pictures.png"
        claim(path, identity, "a transfer")

    def case(self, case: str) -> Path:
        """The folder of one pair and noise."""
        return self.path / "cases" / case

    def picture(self, case: str, name: str) -> Path:
        """One PNG; its numbers are beside it, under the same name."""
        return self.case(case) / f"{name}.png"

    def has(self, case: str, name: str) -> bool:
        """Whether a picture is there with its numbers."""
        return self.picture(case, name).with_suffix(".json").is_file()

    def keep(self, run: TransferRun, name: str, made: Made) -> None:
        """Write a picture, then its numbers."""
        encoded = BytesIO()
        Image.fromarray(made.picture.numpy()).save(encoded, format="PNG")
        path = self.picture(run.case, name)
        with complete_file(path) as beside:
            beside.write_bytes(encoded.getbuffer())
        write_json(path.with_suffix(".json"), run.to_json())

    def read(self, case: str, name: str) -> TransferRun:
        """The numbers of a picture that is there."""
        return TransferRun.from_json(read_json(self.picture(case, name).with_suffix(".json")))

    def write_numbers(
        self,
        settings: Mapping[str, Any],
        runs: Sequence[TransferRun],
        rows: Sequence[TransferRow],
        areas: Sequence[Area],
    ) -> None:
        """Everything in one file, and the table as CSV."""
        write_json(
            self.numbers,
            {
                "settings": self.identity | dict(settings),
                "table": [row_as_json(row) for row in rows],
                "areas": [{"method": area.method, **area.area._asdict()} for area in areas],
                "pictures": [run.to_json() for run in runs],
                "versions": versions("torch"),
            },
        )
        write_rows(self.table, as_table(rows))

    # ---- What a person looks at

    def draw_curve(self, title: str, subtitle: str, rows: Sequence[TransferRow]) -> None:
        """The fronts of all methods between the two prompts' own pictures."""
        anchors = {ORIGINAL: "original", EDITED: "edited prompt"}
        points = [
            TradeoffPoint(
                anchors.get(row.method) or NAMES[row.method],
                row.outside.mean,
                row.distance.mean,
                _half(row.outside),
                _half(row.distance),
                row.front,
            )
            for row in rows
            if row.outside is not None
        ]
        tradeoff(
            self.curve,
            [point for point in points if point.family not in anchors.values()],
            title,
            x="moved outside the region (latent, relative to the original's)",
            y="distance to the edited prompt's picture, in the region (1: the original's)",
            subtitle=subtitle,
            anchors=[point._replace(x_half=0, y_half=0) for point in points if point.family in anchors.values()],
        )

    def draw_pictures(self, title: str, cases: Mapping[str, str], rows: Sequence[TransferRow]) -> None:
        """A line per case (its folder's name, by label): both prompts' pictures and the best point of every method."""
        best = [row for row in rows if row.best]
        columns = [SheetColumn("original", "o"), SheetColumn("edited prompt", "e")]
        columns += [SheetColumn(NAMES[row.method], row.method[:1]) for row in best]
        names = [ORIGINAL, EDITED, *(picture_name(row.method, row.k, row.strength) for row in best)]
        lines = [
            SheetRow(label, [self.picture(case, name) for name in names])
            for label, case in list(cases.items())[:MOST_ON_SHEET]
        ]
        said = ", ".join(f"{NAMES[row.method]}: {setting(row)}" for row in best)
        draw_sheet(title, f"the best point of each method; {said}", columns, lines, self.sheet)


class Setting(NamedTuple):
    """One point of a method."""

    method: Method
    k: int | None
    strength: float
    draw: int = 0

    @property
    def name(self) -> str:
        """The name of its picture's files."""
        return picture_name(*self)


def picture_name(method: str, k: int | None, strength: float, draw: int = 0) -> str:
    """The name of a picture's files."""
    return "_".join(
        [
            method if method != "random" else f"random_{draw}",
            *([] if k is None else [f"k_{k}"]),
            f"strength_{strength:g}",
        ]
    )


def described_case(case: Case, inside: Tensor | None, where: str | None, difference: Difference) -> dict[str, Any]:
    """What was transferred in this case, as JSON can say it."""

    def units(chosen: Chosen) -> dict[str, Any]:
        return {
            name: [[str(unit.site), unit.number, unit.share] for unit in getattr(chosen, name)]
            for name in ("subtracted", "added")
        }

    return {
        "prompt": case.pair.prompt,
        "edited_prompt": case.pair.edited_prompt,
        "seed": case.seed,
        "region": None if inside is None else inside.nonzero().flatten().tolist(),
        "where": where,
        "units": {
            method if method != "random" else f"random_{draw}": units(chosen)
            for (method, draw), chosen in difference.chosen.items()
        },
    }


def row_as_json(row: TransferRow) -> dict[str, Any]:
    """A row as JSON can say it."""
    return {name: value._asdict() if isinstance(value, Estimate) else value for name, value in row._asdict().items()}


def setting(row: TransferRow) -> str:
    """The k and the strength of a row, in words."""
    return f"strength {row.strength:g}" if row.k is None else f"k {row.k}, strength {row.strength:g}"


def _half(estimate: Estimate) -> float:
    return 0.0 if estimate.high is None else estimate.high - estimate.mean
