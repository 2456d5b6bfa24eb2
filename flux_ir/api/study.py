"""A whole study by one small file: prompts, captures, autoencoders, their numbers, their features, known answers.

Every result lies in a folder whose name has a digest of all it depends on, so that a setting that was changed leads to
new folders from there on, and what was made before stays. A stage whose result is there is not run again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.api.progress import Note, Progress, Watch, unwatched
from flux_ir.api.study_file import PICK, REPORT, STAGES, StudyFile, read_study
from flux_ir.errors import FluxIRError, nearest
from flux_ir.files import complete_file, read_json, write_json


class StageResult(NamedTuple):
    """What became of one stage."""

    stage: str
    folders: tuple[Path, ...]
    """Where its results are."""
    seconds: float | None
    """That it took; None: its result was there."""


@dataclass(frozen=True)
class Studied:
    """A study that was run."""

    folder: Path
    stages: tuple[StageResult, ...]


def run_study(
    study: str | Path,
    *,
    from_: str | None = None,
    only: str | Sequence[str] | None = None,
    output_dir: str | Path = "studies",
    progress: Watch = unwatched,
) -> Studied:
    """Run a study's file, a TOML file as those in recipes/runs: from prompts to what the features mean.

    Its results are below `output_dir`/NAME, and study.toml there says every setting it used. A stage is skipped where
    its result for these settings is there; one that was stopped goes on. Of the stages the file has, `from_` is the
    first to be looked at, or `only` says which: those they build on must have been run.

    Raises FluxIRError for what a user can mend: what can be wrong with the file, before anything runs.
    """
    file = read_study(study)
    chosen = _chosen(file, from_, [only] if isinstance(only, str) else only)
    folder = Path(output_dir) / file.name
    with complete_file(folder / "study.toml") as beside:
        beside.write_text(file.to_toml(), encoding="utf-8")
    run = _Run(file, folder, progress)
    absent = [stage for stage in file.stages if not run.look_up(stage)]
    to_run = chosen & set(absent)
    if missing := [stage for stage in absent if stage not in chosen and to_run & _behind(file, stage)]:
        raise _not_run(file, folder, chosen, missing)
    return Studied(folder, tuple(run.stage(stage) for stage in file.stages if stage in chosen))


def _not_run(file: StudyFile, folder: Path, chosen: set[str], missing: Sequence[str]) -> FluxIRError:
    """Says what the chosen stages build on that is not there, and the command that makes it."""
    builds = next(stage for stage in file.stages if stage in chosen & _behind(file, missing[0]))
    others = any((folder / "stages").glob(f"{missing[0]}-*.json"))
    together = ",".join(stage for stage in file.stages if stage in chosen or stage in missing)
    return FluxIRError(
        f"{builds} builds on {missing[0]}, which is not finished with these settings"
        f"{', only with others' if others else ''}",
        hint=f"run flux-ir study {file.path} --only {together}: what is there already is skipped",
    )


def _chosen(file: StudyFile, from_: str | None, only: Sequence[str] | None) -> set[str]:
    """The stages to look at."""
    if from_ is not None and only is not None:
        raise FluxIRError("--from and --only both choose stages: got both", hint="leave one of them out")
    for name in [*(only or ()), *([from_] if from_ else ())]:
        if name not in file.stages:
            near = nearest(name, file.stages)
            raise FluxIRError(
                f"{file.path} has no stage {name!r}{f'; did you mean {near}?' if near else ''}",
                hint=f"it has {', '.join(file.stages)}",
            )
    names = list(file.stages)
    if from_ is not None:
        return set(names[names.index(from_) :])
    return set(names if only is None else only)


def _behind(file: StudyFile, stage: str) -> set[str]:
    """The stages that build on this one."""
    needs: dict[str, set[str]] = {"collect": set(), "train": {"collect"}}
    return {name for name in file.stages if stage in needs.get(name, {"collect", "train"})}


class _Run:
    """One run of a study: what each stage depends on, and where the results of those before it are."""

    def __init__(self, file: StudyFile, folder: Path, progress: Watch) -> None:
        self.file, self.folder, self.progress = file, folder, progress
        self.keys: dict[str, str] = {}
        self.found: dict[str, tuple[Path, ...]] = {}
        """The folders of the stages so far; "pick" and "report" are the captures for known answers."""

    def stage(self, stage: str) -> StageResult:
        """Run a stage, or find that its result is there."""
        record = self._record(stage)
        if (there := _read_record(record)) is not None:
            self.found |= there
            self.progress(Note(f"{stage}: there already, in {there[stage][0]}"))
            return StageResult(stage, there[stage], None)
        self.progress(Note(f"{stage}: {self.keys[stage]}"))
        begun = time.perf_counter()
        made = _WORK[stage](self, self.file.stages[stage])
        seconds = time.perf_counter() - begun
        self.found |= made
        write_json(
            record, {name: [path.relative_to(self.folder).as_posix() for path in paths] for name, paths in made.items()}
        )
        return StageResult(stage, made[stage], seconds)

    def look_up(self, stage: str) -> bool:
        """Whether the result of a stage is there."""
        there = _read_record(self._record(stage))
        self.found |= there or {}
        return there is not None

    def _record(self, stage: str) -> Path:
        """The file that says a stage is done; also settles its key."""
        content = {
            "settings": self.file.stages[stage],
            "prompts": self.file.prompts if stage in ("collect", "concepts") else None,
            "before": {name: key for name, key in self.keys.items() if stage in _behind(self.file, name)},
        }
        self.keys[stage] = _digest(content)
        return self.folder / "stages" / f"{stage}-{self.keys[stage]}.json"

    def place(self, what: str, stage: str) -> Path:
        """Where a stage keeps something."""
        return self.folder / f"{what}-{self.keys[stage]}"


def _digest(content: Any) -> str:
    """8 hex digits that stand for settings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _read_record(record: Path) -> dict[str, tuple[Path, ...]] | None:
    """What a finished stage has made; None if it is not finished, or if something of it is gone."""
    if not record.is_file():
        return None
    named = read_json(record)
    folder = record.parents[1]
    found = {name: tuple(folder / path for path in paths) for name, paths in named.items()}
    return found if all(path.exists() for paths in found.values() for path in paths) else None


Work = Callable[[_Run, dict[str, Any]], dict[str, tuple[Path, ...]]]


def _collect(run: _Run, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    folder = run.place("captures", "collect")
    _capture(run, "train", folder, settings)
    return {"collect": (folder,)}


def _capture(run: _Run, use: str, folder: Path, settings: dict[str, Any]) -> None:
    """A collection of the prompts for this use."""
    others = {name: value for name, value in settings.items() if name != "sites"}
    STAGES["collect"].load()(run.file.prompts[use], settings["sites"], folder, **others, progress=run.progress)


def _train(run: _Run, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    folder = run.place("saes", "train")
    trained: list[Path] = []
    total = 0
    for row in STAGES["train"].load()(
        run.found["collect"][0], **settings, output_dir=folder.parent, name=folder.name, progress=run.progress
    ):
        if row.total_tokens != total:  # of another run: each kind of tokens has one
            total = row.total_tokens
            run.progress(Progress("tokens", 0, total))
        run.progress(Progress("tokens", row.tokens, total))
        trained += [one.folder for one in row.finished]
    return {"train": tuple(trained)}


def _evaluate(run: _Run, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    STAGES["evaluate"].load()(run.found["train"], run.found["collect"][0], **settings, progress=run.progress)
    return {"evaluate": tuple(folder / "metrics.json" for folder in run.found["train"])}


def _features(run: _Run, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    folder, analyse = run.place("features", "features"), STAGES["features"].load()
    found = [
        analyse(sae, run.found["collect"][0], **settings, output_dir=folder, progress=run.progress)
        for sae in run.found["train"]
    ]
    return {"features": tuple(one.path for one in found)}


def _concepts(run: _Run, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Known answers, on captures of their own: pictures are needed, and prompts that nothing was trained on."""
    collecting = run.file.stages["collect"] | {"repeats": settings["repeats"], "save_images": True}
    captures = {}
    for use in (PICK, REPORT):
        captures[use] = run.folder / f"captures-{use}-{_digest([collecting, run.file.prompts[use]])}"
        _capture(run, use, captures[use], collecting)
    asked = {name: value for name, value in settings.items() if name != "repeats"}
    score = STAGES["concepts"].load()
    found = [
        score(sae, captures[PICK], captures[REPORT], **asked, output_dir=run.place("concepts", "concepts"),
              progress=run.progress)
        for sae in run.found["train"]
    ]  # fmt: skip
    return {"concepts": tuple(one.folder for one in found)}


_WORK: dict[str, Work] = {
    "collect": _collect,
    "train": _train,
    "evaluate": _evaluate,
    "features": _features,
    "concepts": _concepts,
}
