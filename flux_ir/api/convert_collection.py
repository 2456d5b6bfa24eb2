"""An old collection, which had a capture file for every generation, becomes one of shards."""

from pathlib import Path
from typing import NamedTuple

from flux_ir.api.progress import Progress, Watch, unwatched
from flux_ir.collecting.convert import Conversion
from flux_ir.collecting.storage import open_storage


class Converted(NamedTuple):
    """A collection of shards that came of an old one."""

    where: str
    generations: int


def convert_collection(captures: str | Path, output_dir: str | Path, *, progress: Watch = unwatched) -> Converted:
    """Makes a collection of shards of an old one, which had a capture file for every generation and stays as it is.

    The new folder has the bytes that collecting anew gives; the same call goes on where it was stopped. Raises
    FluxIRError for a folder that holds no complete old collection, and for files of it that are broken.
    """
    conversion = Conversion(open_storage(str(captures)), open_storage(str(output_dir)))
    generations = len(conversion.collection.work)
    progress(Progress("convert", 0, generations))
    for done in conversion.run():
        progress(Progress("convert", done, generations))
    return Converted(conversion.new.where, generations)
