"""`flux-ir compare-features`: which features of two folders are the same, and which have moved."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flux_ir.commands.cli.option import REQUIRED, Options, option
from flux_ir.commands.cli.parse import launch

if TYPE_CHECKING:
    from flux_ir.api.comparison_files import Comparison

WHAT, HOW = "what is compared", "how"
SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class CompareFeaturesOptions(Options):
    """Match the features of two sites, steps, autoencoders, models, or guidance strengths of one model.

    Features are matched one to one, by what they do on the same generations or by their directions, never by number,
    and a null says which of the matches mean something. Where the generations are the same, features that have become
    more or less frequent or strong are listed, and CKA says how alike the activations are.
    """

    features: Path = option(REQUIRED, help="a folder of features, as score-features leaves it", group=WHAT)
    other: Path = option(REQUIRED, help="the folder to compare it with", group=WHAT)
    by: Literal["auto", "activations", "decoder"] = option(
        "auto",
        help="correlation over the same generations, or cosine of directions; auto: the first, where it can be",
        group=HOW,
    )
    level: Literal["image", "token"] = option(
        "image", help="correlate the largest activation of each image, or that of every token", group=HOW
    )
    stream: Literal["img", "txt"] | None = option(
        None, help="image or text tokens", group=HOW, default_text="image tokens, where there are some"
    )
    candidates: int = option(
        16, help="partners of each feature that are tried, where there are more than 4,096", group=HOW
    )
    min_likeness: float = option(
        0.5, help="correlation or cosine of a pair that counts as the same", group=HOW, maximum=1.0
    )
    min_images: int = option(10, help="leave out features active on fewer images", group=HOW)
    max_images: int = option(20_000, help="most generations to compare", group=HOW)
    permutations: int = option(10_000, help="draws of the test for features that have moved", group=HOW, minimum=1)
    fdr: float = option(0.05, help="share of the lists that may be chance", group=HOW, maximum=1.0)
    cka_tokens: int = option(20_000, help="tokens that CKA is measured on; 0: leave it out", group=HOW)
    seed: int = option(0, help="seed of the null", group=HOW)
    name: str | None = option(
        None, help="name of the result's folder below FEATURES/compare", group=WHAT, default_text="that of the other"
    )


def run(options: CompareFeaturesOptions) -> None:
    """Compare as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.compare_features import compare_features
    from flux_ir.api.comparison_files import PICTURE
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        found = compare_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for line in summary(found):
        report.results.print(line, markup=False)
    written = {"numbers": found.path, "picture": found.path.with_name(PICTURE)}
    report.table("compared", written, peak_memory())


def summary(found: "Comparison") -> list[str]:
    """What was matched, the strongest matches, and what has moved most."""
    from flux_ir.commands.report import aligned
    from flux_ir.features.folder import open_features
    from flux_ir.features.labels import read_labels

    content, pairs = found.content, found.content["pairs"]
    null, count, least = content["null"], len(found.matched), content["settings"]["min_likeness"]
    lines = [
        f"{side}: {one['features']}, {one['site'] or 'an array'} ({one['stream']}), model {one['model'] or 'unknown'}, "
        f"steps {','.join(map(str, one['steps']))}: {one['compared']} of {one['d_sae']} features compared"
        for side, one in (("a", content["a"]), ("b", content["b"]))
    ]
    where = f" over {content['generations']} generations, each {content['level']}" if content["level"] else ""
    lines.append(f"{count} of {content['a']['compared']} matched by {content['by']}{where}, at {least:g} or more")
    lines.append(
        f"under the null ({null['kind']}) half of the pairs are above {null['quantile_0.5']:.2f} and 5% above "
        f"{null['quantile_0.95']:.2f}"
    )
    lines += [
        f"CKA of step {one['step_a']} and {one['step_b']}: {one['cka']:.3f} on {one['tokens']} tokens "
        f"(images permuted: {one['permuted']:.3f})"
        for one in content["cka"]
    ]
    matched = [place for place, is_one in enumerate(pairs["matched"]) if is_one]
    alone = [len(content[side]["unmatched"]) for side in ("a", "b")]
    lines.append(f"unmatched: {alone[0]} of a and {alone[1]} of b, which {found.path.name} lists")
    labels = read_labels(open_features(found.path.parents[2]), content["a"]["stream"]) or {}
    best = sorted(matched, key=lambda place: -pairs["likeness"][place])
    rows = [("most alike: a", "b", "likeness", "q", "label of a")]
    for place in best[:SHOWN]:
        a, b, q = (pairs[name][place] for name in ("a", "b", "q"))
        rows.append((str(a), str(b), f"{pairs['likeness'][place]:.3f}", f"{q:.2g}", labels.get(a, {}).get("text", "")))
    lines += ["", *aligned(rows)] if best else []
    for measure, change in content["changes"].items():
        lines += _moved(content, measure, change, matched)
    return lines


def _moved(content: Any, measure: str, change: Any, matched: Sequence[int]) -> list[str]:
    """The matched features whose number differs most surely, the most certain first."""
    from flux_ir.commands.report import aligned

    moved = [place for place in matched if change["q"][place] <= content["fdr"]]
    words = {"frequency": "share of images active on", "mean": "mean activation"}
    lines = ["", f"{len(moved)} of {len(matched)} matched features differ in their {words[measure]}"]
    moved.sort(key=lambda place: -abs(change["z"][place]))
    rows = [("most: a", "b", "in a", "in b", "z", "q")]
    for place in moved[:SHOWN]:
        (a, b), (in_a, in_b) = ([values[side][place] for side in ("a", "b")] for values in (content["pairs"], change))
        sure = f"{change['z'][place]:+.1f}", f"{change['q'][place]:.2g}"
        rows.append((str(a), str(b), f"{in_a:.4g}", f"{in_b:.4g}", *sure))
    return lines + (aligned(rows) if moved else [])


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CompareFeaturesOptions, run, argv, prog=prog)
