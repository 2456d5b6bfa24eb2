"""A whole study by one small file: prompts, captures, autoencoders, their numbers, their features, known answers.

Every result lies in a folder whose name has a digest of all it depends on: a changed setting leads to new folders from
there on, and older results stay. A stage whose result is there is not run again. Next: `study_file`, the settings.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.api.progress import Note, Progress, Watch, unwatched
from flux_ir.api.study_file import PICK, REPORT, STAGES, StudyFile, did_you_mean, read_study
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, read_json, write_json


class StageResult(NamedTuple):
    """The result of one stage, and whether it was made now."""

    stage: str
    folders: tuple[Path, ...]
    """Where its results are."""
    seconds: float | None
    """How long it ran; None if its result was there already."""


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
    run = _StudyRun(file, folder, progress)
    unfinished = [stage for stage in file.stages if not run.look_up(stage)]
    to_run = chosen & set(unfinished)
    if missing := [stage for stage in unfinished if stage not in chosen and to_run & _built_on(file, stage)]:
        raise _not_run(file, folder, chosen, missing)
    return Studied(folder, tuple(run.stage(stage) for stage in file.stages if stage in chosen))


def _not_run(file: StudyFile, folder: Path, chosen: set[str], missing: Sequence[str]) -> FluxIRError:
    """The error for a chosen stage that builds on a missing one, with the command that makes both."""
    builds = next(stage for stage in file.stages if stage in chosen & _built_on(file, missing[0]))
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
            raise FluxIRError(
                f"{file.path} has no stage {name!r}{did_you_mean(name, file.stages)}",
                hint=f"it has {', '.join(file.stages)}",
            )
    names = list(file.stages)
    if from_ is not None:
        return set(names[names.index(from_) :])
    return set(names if only is None else only)


def _built_on(file: StudyFile, stage: str) -> set[str]:
    """The stages that build on this one."""
    needs: dict[str, set[str]] = {"collect": set(), "train": {"collect"}}
    return {name for name in file.stages if stage in needs.get(name, {"collect", "train"})}


class _StudyRun:
    """One run of a study: the key of each stage, a digest of all it depends on, and the folders of earlier stages."""

    def __init__(self, file: StudyFile, folder: Path, progress: Watch) -> None:
        self.file, self.folder, self.progress = file, folder, progress
        self.keys: dict[str, str] = {}
        self.folders: dict[str, tuple[Path, ...]] = {}
        """Where the results of the stages so far are, by stage."""

    def stage(self, stage: str) -> StageResult:
        """Run a stage, or find that its result is there."""
        record = self._record(stage)
        if (finished := _read_record(record)) is not None:
            self.folders |= finished
            self.progress(Note(f"{stage}: there already, in {finished[stage][0]}"))
            return StageResult(stage, finished[stage], None)
        self.progress(Note(f"{stage}: {self.keys[stage]}"))
        begun = time.perf_counter()
        folders = _WORK[stage](self, self.file.stages[stage])
        seconds = time.perf_counter() - begun
        self.folders |= folders
        write_json(
            record,
            {name: [path.relative_to(self.folder).as_posix() for path in paths] for name, paths in folders.items()},
        )
        return StageResult(stage, folders[stage], seconds)

    def look_up(self, stage: str) -> bool:
        """Whether the result of a stage is there."""
        finished = _read_record(self._record(stage))
        self.folders |= finished or {}
        return finished is not None

    def _record(self, stage: str) -> Path:
        """The file that says a stage is done, named by the stage's key, which is set here.

        The key has those of the stages it builds on, so stages are asked for in their order.
        """
        content = {
            "settings": self.file.stages[stage],
            "prompts": self.file.prompts if stage in ("collect", "concepts") else None,
            "before": {name: key for name, key in self.keys.items() if stage in _built_on(self.file, name)},
        }
        self.keys[stage] = _digest(content)
        return self.folder / "stages" / f"{stage}-{self.keys[stage]}.json"

    def folder_of(self, stage: str, name: str) -> Path:
        """The folder of this name for the results of a stage, as its key has it."""
        return self.folder / f"{name}-{self.keys[stage]}"


def _digest(content: Any) -> str:
    """A digest of settings: 8 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _read_record(record: Path) -> dict[str, tuple[Path, ...]] | None:
    """The folders that a finished stage has made; None if it is not finished, or if one of them is gone."""
    if not record.is_file():
        return None
    named = read_json(record)
    folder = record.parents[1]
    folders = {name: tuple(folder / path for path in paths) for name, paths in named.items()}
    return folders if all(path.exists() for paths in folders.values() for path in paths) else None


Work = Callable[[_StudyRun, dict[str, Any]], dict[str, tuple[Path, ...]]]


def _collect(run: _StudyRun, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    folder = run.folder_of("collect", "captures")
    _collect_prompts(run, "train", folder, settings)
    return {"collect": (folder,)}


def _collect_prompts(run: _StudyRun, use: str, folder: Path, settings: dict[str, Any]) -> None:
    """Collect activations of the prompts for this use: "train", "pick" or "report"."""
    others = {name: value for name, value in settings.items() if name != "sites"}
    STAGES["collect"].load()(run.file.prompts[use], settings["sites"], folder, **others, progress=run.progress)


def _train(run: _StudyRun, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    folder = run.folder_of("train", "saes")
    trained: list[Path] = []
    total = 0
    for row in STAGES["train"].load()(
        run.folders["collect"][0], **settings, output_dir=folder.parent, name=folder.name, progress=run.progress
    ):
        if row.total_tokens != total:  # of another run: each kind of tokens has one
            total = row.total_tokens
            run.progress(Progress("tokens", 0, total))
        run.progress(Progress("tokens", row.tokens, total))
        trained += [one.folder for one in row.finished]
    return {"train": tuple(trained)}


def _evaluate(run: _StudyRun, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    STAGES["evaluate"].load()(run.folders["train"], run.folders["collect"][0], **settings, progress=run.progress)
    return {"evaluate": tuple(folder / "metrics.json" for folder in run.folders["train"])}


def _features(run: _StudyRun, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    folder, analyse = run.folder_of("features", "features"), STAGES["features"].load()
    results = [
        analyse(sae, run.folders["collect"][0], **settings, output_dir=folder, progress=run.progress)
        for sae in run.folders["train"]
    ]
    return {"features": tuple(one.path for one in results)}


def _concepts(run: _StudyRun, settings: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Known answers, on captures of their own: pictures are needed, and prompts that nothing was trained on."""
    collecting = run.file.stages["collect"] | {"repeats": settings["repeats"], "save_images": True}
    captures = {}
    for use in (PICK, REPORT):
        captures[use] = run.folder / f"captures-{use}-{_digest([collecting, run.file.prompts[use]])}"
        _collect_prompts(run, use, captures[use], collecting)
    asked = {name: value for name, value in settings.items() if name != "repeats"}
    score = STAGES["concepts"].load()
    results = [
        score(sae, captures[PICK], captures[REPORT], **asked, output_dir=run.folder_of("concepts", "concepts"),
              progress=run.progress)
        for sae in run.folders["train"]
    ]  # fmt: skip
    return {"concepts": tuple(one.folder for one in results)}


_WORK: dict[str, Work] = {
    "collect": _collect,
    "train": _train,
    "evaluate": _evaluate,
    "features": _features,
    "concepts": _concepts,
}
