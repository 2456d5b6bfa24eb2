"""The pages of features: a list of all of them and a page for each, in a folder that opens without a server."""

from dataclasses import asdict
from pathlib import Path

from flux_ir.api.progress import Note, Progress, Watch, unwatched
from flux_ir.explorer.feature_pages import PagesSettings, page_digest, write_pages
from flux_ir.explorer.feature_stages import stages_digest
from flux_ir.features.folder import FeatureFolder, open_features

AFTER = ("score", "examples")
"""The stages that there must be."""


def explore_features(
    features: str | Path | FeatureFolder,
    *,
    pictures: bool = True,
    patch_features: int = 8,
    thumbnail_px: int = 256,
    progress: Watch = unwatched,
) -> Path:
    """Write the pages of features; gives the page to open, `pages/index.html` in the folder of the features.

    `features` is the folder that `score_features` left and `find_examples` went on with; what later stages found is
    shown where it is there. `patch_features` are the strongest features kept of every patch of the pictures shown, 0
    for none; `thumbnail_px` is the longer side of the small pictures. Without `pictures` the maps and the prompts stand
    alone. What is there already is not written again.

    Raises FluxIRError for a folder without examples, and for captures without pictures unless `pictures` is False.
    """
    settings = PagesSettings(pictures=pictures, patch_features=patch_features, thumbnail_px=thumbnail_px)
    folder = open_features(features)
    for stage in AFTER:
        folder.check_done(stage)
    depends_on = {**asdict(settings), "page": page_digest(), "made_of": stages_digest(folder)}
    page = folder.path / "pages" / "index.html"
    if folder.is_done("pages", depends_on, after=AFTER):
        progress(Note(f"the pages in {page.parent} are complete"))
        return page
    for stage, done, total in write_pages(folder, settings):
        if done == 1:
            progress(Progress(stage, 0, total))
        progress(Progress(stage, done, total))
    folder.mark_done("pages", depends_on, after=AFTER)
    return page
