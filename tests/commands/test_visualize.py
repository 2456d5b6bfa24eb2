"""`create_visualization.py` and `flux-ir visualize`, as a user calls them, on run folders of coloured squares."""

import json
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image

from flux_ir.api.visualize import VisualizationSettings, create_visualization, file_name
from flux_ir.commands.main import main as flux_ir
from flux_ir.commands.visualize import VisualizeOptions, main
from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder

ROOT = Path(__file__).parents[2]
ID, OTHER = "0123abcd", "89abcdef"
CELLS = [(step, kind, block) for step in range(3) for kind, n in (("double", 2), ("single", 11)) for block in range(n)]


def colour_of(cell):
    step, kind, block = cell
    return (60 + 90 * step, 20 * block + 5, 220 if kind == "double" else 60)


def make_run(output_dir, generation_id=ID, *, lenses=("euler",), side=48, cells=CELLS, **facts):
    folder = RunFolder(output_dir, generation_id)
    for lens in lenses:
        for cell in cells:
            path = folder.decoded_image(lens, *cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side), colour_of(cell)).save(path, quality=95)
    metadata = {"generation_id": generation_id, "model": "flux-tiny", "seed": 1, "prompt": "a red circle"} | facts
    folder.metadata_file("20250102_030405", "flux-tiny").write_text(json.dumps(metadata), encoding="utf-8")
    return folder


@pytest.fixture
def output(tmp_path):
    make_run(tmp_path / "output")
    return tmp_path / "output"


def call(output, *words, generation_id=ID):
    return main(["--generation_id", generation_id, "--output_dir", str(output), *words])


def frames_of(path):
    """The colour in the lower right corner of every frame, and the size of the first."""
    if path.suffix == ".mp4":
        reader = imageio_ffmpeg.read_frames(str(path))
        size = next(reader)["size"]
        frames = [Image.frombytes("RGB", size, frame) for frame in reader]
    else:
        with Image.open(path) as film:
            frames = []
            for index in range(film.n_frames):
                film.seek(index)
                frames.append(film.convert("RGB"))
    return [frame.getpixel((frame.width - 9, frame.height - 5)) for frame in frames], frames[0].size


def cell_shown(colour):
    """The cell whose colour is nearest."""
    return min(CELLS, key=lambda cell: sum((a - b) ** 2 for a, b in zip(colour, colour_of(cell), strict=True)))


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_film_shows_every_block_of_every_step_in_order(suffix, output):
    assert call(output, "--output_format", suffix) == 0
    colours, size = frames_of(output / ID / f"visualization_{ID}.{suffix}")
    assert [cell_shown(colour) for colour in colours] == CELLS
    assert size[0] % 48 == 0, "it is not enlarged by a whole factor"


def test_a_gif_of_two_pictures_per_second_is_the_default(output):
    assert call(output) == 0
    with Image.open(output / ID / f"visualization_{ID}.gif") as film:
        assert film.info["duration"] == 500


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--block_type", "single"], "_single", [cell for cell in CELLS if cell[1] == "single"]),
        (["--block_type", "None"], "", CELLS),
        (["--max_blocks", "3"], "", [cell for cell in CELLS if cell[1] == "double" or cell[2] == 0]),
        (["--steps", "1-2"], "_steps_1-2", [cell for cell in CELLS if cell[0] > 0]),
        (
            ["--order", "steps", "--steps", "2,0", "--max_blocks=1"],
            "_by_block_steps_0,2",
            [(0, "double", 0), (2, "double", 0)],
        ),
    ],
)
def test_what_is_shown_can_be_chosen_and_is_told_by_the_name(words, name, expected, output):
    assert call(output, *words) == 0
    colours, _ = frames_of(output / ID / f"visualization_{ID}{name}.gif")
    assert [cell_shown(colour) for colour in colours] == expected


def test_the_other_lens_has_a_film_of_its_own(output):
    assert call(output) == 0
    before = (output / ID / f"visualization_{ID}.gif").read_bytes()
    make_run(output, lenses=("x0",), cells=CELLS[:5])
    assert call(output, "--lens", "x0") == 0
    assert len(frames_of(output / ID / f"visualization_{ID}_x0.gif")[0]) == 5
    assert (output / ID / f"visualization_{ID}.gif").read_bytes() == before


def test_a_film_that_is_replaced_is_announced(output, capsys):
    assert call(output) == 0
    assert "is replaced" not in capsys.readouterr().err
    assert call(output, "--fps", "4") == 0
    assert "is replaced" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_two_generations_are_compared_side_by_side(suffix, output):
    make_run(output, OTHER, side=96, seed=2, cells=CELLS[:26])
    assert call(output, "--compare", OTHER, "--output_format", suffix) == 0
    colours, (width, height) = frames_of(output / ID / f"visualization_{ID}_vs_{OTHER}.{suffix}")
    assert [cell_shown(colour) for colour in colours] == CELLS[:26]
    assert width > 2 * height


def test_a_comparison_says_what_it_leaves_out(output, capsys):
    make_run(output, OTHER, cells=CELLS[:26])
    assert call(output, "--compare", OTHER) == 0
    assert f"{len(CELLS) - 26} pictures" in capsys.readouterr().err


def test_generations_with_nothing_in_common_cannot_be_compared(output, capsys):
    make_run(output, OTHER, cells=[(7, "double", 0)])
    assert call(output, "--compare", OTHER) == 2
    assert "in common" in capsys.readouterr().err


def test_a_generation_is_not_compared_with_itself(output, capsys):
    assert call(output, "--compare", "latest") == 2
    assert f"both are {ID}" in capsys.readouterr().err


@pytest.mark.parametrize("compare", [[], ["--compare", OTHER]])
def test_a_contact_sheet_shows_every_picture(compare, output):
    make_run(output, OTHER, seed=2)
    assert call(output, "--output_format", "png", *compare) == 0
    name = f"visualization_{ID}_vs_{OTHER}.png" if compare else f"visualization_{ID}.png"
    with Image.open(output / ID / name) as sheet:
        shown = {colour for count, colour in sheet.convert("RGB").getcolors(2**24) if count > 500}
    assert {cell_shown(colour) for colour in shown if colour[0] < 250} >= set(CELLS)


@pytest.mark.skipif(find_spec("flux_ir.explorer") is None, reason="the explorer is not there")
def test_html_is_the_explorers_page_of_this_generation(output):
    assert call(output, "--output_format", "html") == 0
    assert ID in (output / ID / f"visualization_{ID}.html").read_text(encoding="utf-8")


def test_latest_is_the_newest_run(output, capsys):
    newer = make_run(output, OTHER)
    metadata = newer.find_metadata()
    metadata.rename(newer.metadata_file("20260102_030405", "flux-tiny"))
    assert call(output, generation_id="latest") == 0
    assert (output / OTHER / f"visualization_{OTHER}.gif").exists()
    assert f"generation {OTHER}" in capsys.readouterr().out


def test_a_run_without_metadata_can_be_shown(output):
    RunFolder(output, ID).find_metadata().unlink()
    make_run(output, OTHER)
    assert call(output, "--compare", OTHER) == 0
    assert call(output, "--output_format", "png") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--generation_id", "0123abce"], [f"no generation 0123abce in .*has 1 other.*hint: the nearest .*{ID}"]),
        (["--generation_id", "../x"], ["8 hex digits .* got '../x'"]),
        (["--generation_id", ID, "--compare", "../x"], ["8 hex digits .* got '../x'"]),
        ([], ["--generation_id is required"]),
        (
            ["--generation_id", ID, "--lens", "x0"],
            ["no pictures of the x0 lens", f"lens --generation_id {ID} --lens x0"],
        ),
        (["--generation_id", ID, "--fps", "0"], ["--fps must be at least 0.01: got 0"]),
        (["--generation_id", ID, "--fps", "-2"], ["--fps must be at least 0.01: got -2"]),
        (["--generation_id", ID, "--fps", "nan"], ["--fps must be a finite number"]),
        (["--generation_id", ID, "--fps", "inf"], ["--fps must be a finite number"]),
        (["--generation_id", ID, "--fps", "60"], ["a GIF shows at most 50 pictures per second"]),
        (["--generation_id", ID, "--max_blocks", "0"], ["--max_blocks must be at least 1"]),
        (["--generation_id", ID, "--font_size", "0"], ["--font_size must be at least 1"]),
        (["--generation_id", ID, "--steps", "1,7"], ["--steps must be steps that were decoded, 0-2: got 7"]),
        (["--generation_id", ID, "--output_format", "png", "--fps", "3"], ["--fps means nothing for .* png"]),
        (["--generation_id", ID, "--output_format", "html", "--lens", "x0"], ["--lens means nothing for .* html"]),
        (["--generation_id", ID, "--block_typ", "single"], ["did you mean --block_type"]),
    ],
)
def test_wrong_input_is_one_line_with_a_remedy(words, said, output, capsys):
    assert main([*words, "--output_dir", str(output)]) == 2
    error = capsys.readouterr().err
    for pattern in said:
        assert re.search(pattern, error, re.DOTALL), error
    assert "Traceback" not in error
    assert not list((output / ID).glob("visualization*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output_format", "avi"], "--output_format must be gif, mp4, png or html: got 'avi'"),
        (["--block_type", "triple"], "--block_type must be double or single: got 'triple'"),
    ],
)
def test_a_wrong_choice_is_told_without_the_type_checks_of_the_tests(words, said, output):
    script = [sys.executable, str(ROOT / "create_visualization.py"), "--generation_id", ID, "--output_dir", str(output)]
    done = subprocess.run([*script, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr


def test_nothing_outside_the_output_folder_is_read_or_written(tmp_path, capsys):
    make_run(tmp_path, "deadbeef")
    make_run(tmp_path / "output")
    before = sorted(tmp_path.rglob("*"))
    for name in ("../deadbeef", "..", f"{ID}/../../deadbeef", str(tmp_path / "deadbeef")):
        assert call(tmp_path / "output", generation_id=name) == 2
        assert call(tmp_path / "output", "--compare", name) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", ["gif", "mp4", "png"])
@pytest.mark.parametrize("spoilt", ["missing", "broken"])
def test_a_spoilt_picture_stops_the_work_or_is_skipped_by_name(suffix, spoilt, output, capsys):
    path = RunFolder(output, ID).decoded_image("euler", 1, "single", 10)
    if spoilt == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    assert call(output, "--output_format", suffix) == 2
    error = capsys.readouterr().err
    assert f"cannot show {path}" in error
    assert "--skip_broken" in error
    assert not list((output / ID).glob("visualization*"))

    assert call(output, "--output_format", suffix, "--skip_broken") == 0
    assert f"left out: {path}" in capsys.readouterr().err
    if suffix != "png":
        colours, _ = frames_of(output / ID / f"visualization_{ID}.{suffix}")
        assert [cell_shown(colour) for colour in colours] == [c for c in CELLS if c != (1, "single", 10)]


def test_many_spoilt_pictures_are_counted(output, capsys):
    folder = RunFolder(output, ID)
    shutil.rmtree(folder.decoded("euler") / "step_1")
    for cell in CELLS[:13]:
        folder.decoded_image("euler", *cell).write_bytes(b"")
    numbers = [{"step": step, "psnr_euler_db": 1.0} for step in range(3)]
    folder.lens_json.write_text(json.dumps({"sites": {"double.0": numbers}}))
    assert call(output, "--skip_broken") == 0
    error = capsys.readouterr().err
    assert error.count("left out: /") == 20
    assert "left out: 6 more" in error


def test_the_names_are_those_of_the_original_program():
    folders = [RunFolder(Path("output"), ID), RunFolder(Path("output"), OTHER)]

    def name(*, compare=False, **options):
        return file_name(VisualizationSettings(generation_id=ID, **options), folders if compare else folders[:1])

    assert name() == f"visualization_{ID}.gif"
    assert name(block_type="single", output_format="mp4") == f"visualization_{ID}_single.mp4"
    assert name(block_type="double", max_blocks=3, fps=7.5, font_size=9) == f"visualization_{ID}_double.gif"
    assert name(lens="x0", compare=True) == f"visualization_{ID}_x0_vs_{OTHER}.gif"
    assert name(steps=(5, 0, 1, 2)) == f"visualization_{ID}_steps_0-2,5.gif"
    assert name(steps=tuple(range(0, 900, 2))) == f"visualization_{ID}_steps_450_of_0-898.gif"


def test_options_are_checked_from_python_too():
    with pytest.raises(FluxIRError, match="--fps"):
        VisualizeOptions(generation_id=ID, fps=0.0)
    assert VisualizeOptions(generation_id=ID, output_format="mp4", fps=60).fps == 60


def test_a_film_from_python_says_what_it_is_and_prints_nothing(output, capsys):
    drawn = create_visualization(ID, steps=[0, 2], block_type="double", fps=4, output_dir=output)
    assert capsys.readouterr() == ("", "")
    assert (drawn.frames, drawn.seconds, drawn.left_out) == (4, 1.0, {})
    assert drawn.files == {"film": output / ID / f"visualization_{ID}_double_steps_0,2.gif"}
    with pytest.raises(FluxIRError, match="at most 50 pictures per second"):
        create_visualization(ID, fps=51, output_dir=output)


def test_the_verb_does_the_same_as_the_script(output):
    assert flux_ir(["visualize", "--generation_id", ID, "--output_dir", str(output), "--max_blocks", "1"]) == 0
    assert len(frames_of(output / ID / f"visualization_{ID}.gif")[0]) == 3


def test_making_a_film_never_loads_torch(output):
    code = (
        "import sys; from flux_ir.commands.visualize import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    words = ["--generation_id", ID, "--output_dir", str(output)]
    for suffix in ("gif", "mp4", "png"):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--output_format", suffix], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip().splitlines()[-1] == "0 []", done.stderr


def test_help_loads_nothing_heavy_and_is_instant():
    script = [sys.executable, str(ROOT / "create_visualization.py"), "--help"]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        shown = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5
    assert "--generation_id" in shown
    assert "first N blocks of each step in depth order" in " ".join(shown.split())
    code = "import sys; from flux_ir.commands.visualize import main; main(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in loaded for name in ("torch", "numpy", "PIL", "fire", "rich", "imageio_ffmpeg"))
