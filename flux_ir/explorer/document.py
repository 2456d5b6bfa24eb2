"""How a page is put together: a template of `web/`, style sheets and scripts joined into one of each, and JSON.

Nothing is put together at view time and nothing comes from elsewhere: a page works from `file://`, and its content
security policy allows no script inside it but its own, whatever a prompt contains.
"""

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from flux_ir.files import complete_file

_SLOT = re.compile(r"\{\{(\w+)\}\}")
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def ascii_json(value: Any) -> str:
    """JSON in ASCII. It is also a JavaScript expression: the line separators that old engines refuse are escaped."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def safe_json(value: Any) -> str:
    """JSON in ASCII that can stand in any HTML element: no `</script>`, no `<!--`, no line separator survives in it."""
    return re.sub("[<>&]", lambda found: _UNSAFE[found[0]], ascii_json(value))


def write_script(path: Path, name: str, value: Any) -> None:
    """A classic script that gives a value to the page, as `received(name, value)`; complete or not at all."""
    with complete_file(path) as beside:
        beside.write_text(f"received({json.dumps(name)},{ascii_json(value)})\n", encoding="ascii", newline="\n")


def joined(names: Sequence[str]) -> str:
    """Files of `web/` one after the other, such as the scripts of a page: modules do not load from `file://`."""
    return "\n".join(files("flux_ir.explorer").joinpath("web", name).read_text(encoding="utf-8") for name in names)


def policy(style: str, script: str, *, scripts_beside: bool = False) -> str:
    """The content security policy of a page with this style sheet and this script.

    With `scripts_beside` it also loads scripts from files, which is how a page without a server reads data: text in a
    prompt still cannot become one, since every address that the page loads is made of numbers.
    """
    beside = " file:" if scripts_beside else ""
    return (
        f"default-src 'none'; script-src {_hash(script)}{beside}; style-src {_hash(style)}; "
        "img-src 'self' file: blob:; base-uri 'none'; form-action 'none'"
    )


def filled(template: str, slots: Mapping[str, Iterator[str]]) -> Iterator[str]:
    """The text of a page in order. Slots are found in the template alone, so no content is ever taken for one."""
    for index, part in enumerate(_SLOT.split(joined([template]))):
        if index % 2 == 0:
            yield part
        else:
            yield from slots[part]


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode('ascii')}'"
