"""Lint what can only be seen where all scripts of a page are one: names declared nowhere, twice, or for nothing.

The scripts of a page are classic scripts that use each other's names, so Biome cannot ask this of one file at a time.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from flux_ir.explorer import atlas_page, feature_pages, map_page, page
from flux_ir.explorer.document import joined

BIOME = Path(__file__).with_name("biome")
PAGES = {"runs": page.SCRIPTS, "features": feature_pages.SCRIPTS, "maps": map_page.SCRIPTS, "atlas": atlas_page.SCRIPTS}
RULES = {
    "preset": "none",
    "correctness": {"noUndeclaredVariables": "error", "noUnusedVariables": "error"},
    "style": {"useConst": "error"},
    "suspicious": {"noRedeclare": "error"},  # of two functions of one name the later would replace the other, silently
}


def main() -> int:
    """Returns Biome's exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "biome.json").write_text(json.dumps({"root": True, "linter": {"rules": RULES}}))
        for script, parts in PAGES.items():
            (folder / f"{script}.js").write_text(joined(parts), encoding="utf-8")
        return subprocess.run([BIOME, "lint", "--config-path", folder, folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
