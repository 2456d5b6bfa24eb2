"""From a capture to pictures and numbers, on random networks and a real file."""

import json
import threading
from itertools import islice

import pytest
import torch
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder
from flux_ir.lens.decode import OTHER_WEIGHTS_DRIFT, LensDecoder, batch_size, lens_report, read_picture
from flux_ir.lens.measures import cosine, psnr_db, relative_distance
from flux_ir.lens.readout import read_step
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import Recorder
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.schedule import get_schedule
from flux_ir.sites import Site, all_sites, block_outputs, match_sites

HEIGHT, WIDTH, TXT_TOKENS = 32, 48, 7
LAST = Site("single", 2)


@pytest.fixture
def flux(tiny_flux):
    return tiny_flux(dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, "0123abcd")


@pytest.fixture
def captured(flux, folder):
    """Samples three steps of a random network into a capture file of the folder."""

    def sample_and_capture(sites=None, kept=None):
        draw, params = torch.Generator().manual_seed(3), flux.params
        txt = torch.randn(1, TXT_TOKENS, params.context_in_dim, generator=draw).to(flux.dtype)
        y = torch.randn(1, params.vec_in_dim, generator=draw).to(flux.dtype)
        inputs = prepare(noise_for([0], HEIGHT, WIDTH, "cpu", flux.dtype), TextEmbedding(txt, y), HEIGHT, WIDTH)
        times = get_schedule(3, inputs.img.shape[1])
        chosen = block_outputs(2, 3) if sites is None else match_sites(sites, all_sites(2, 3))
        planned = CapturePlan(
            params,
            chosen,
            times,
            txt_tokens=TXT_TOKENS,
            img_tokens=inputs.img.shape[1],
            guidance=2.5,
            metadata={"height": HEIGHT, "width": WIDTH},
            steps=kept,
        )
        path = folder.capture_file("20250101_000000", "tiny")
        with CaptureWriter(path, planned) as sink, Recorder(flux, chosen, sink, steps=planned.kept_steps):
            for _ in sample(flux, inputs, times, 2.5):
                pass
        return load_capture(path)

    return sample_and_capture


@pytest.fixture
def decoder(flux, folder, tiny_autoencoder):
    """Makes a decoder of a capture; the autoencoder is random."""

    def make(capture, lenses=("euler",), **options):
        return LensDecoder(capture, flux, tiny_autoencoder(), folder, lenses, **options)

    return make


def test_every_block_and_step_becomes_the_jpeg_of_its_own_latent(captured, decoder, flux, folder):
    capture = captured()
    reader = decoder(capture, batch=1)
    written = list(reader.pictures())
    keys = [(decoded.key.step, str(decoded.key.site)) for decoded in written]
    sites = ["double.0.img", "double.1.img", "single.0", "single.1", "single.2"]
    assert keys == [(step, site) for step in range(3) for site in sites]
    assert len(written) == len(reader) == 15
    by_key = {(decoded.key.step, decoded.key.site): decoded for decoded in written}
    for step in range(3):
        for reading in read_step(flux, capture, step):
            decoded = by_key[step, reading.site]
            kind, block = reading.site.kind, reading.site.block
            assert decoded.path == folder.path / f"intermediates/decoded/step_{step}/{kind}_block_{block}.jpg"
            pixels = decode(reader.autoencoder, reading.euler, HEIGHT, WIDTH, flux.dtype)
            assert decoded.path.read_bytes() == jpeg_bytes(pixels)


@pytest.mark.parametrize("batch", [2, 7, 100])
def test_the_batch_does_not_mix_pictures_up(captured, decoder, batch):
    capture = captured()
    alone = {decoded.path: read_picture(decoded.path) for decoded in decoder(capture, batch=1).pictures()}
    together = {decoded.path: read_picture(decoded.path) for decoded in decoder(capture, batch=batch).pictures()}
    assert alone.keys() == together.keys()
    assert len({pixels.numpy().tobytes() for pixels in alone.values()}) == 15
    for path, pixels in together.items():
        assert (pixels.float() - alone[path].float()).abs().mean() < 1.0  # bf16 may round otherwise in a batch


def test_both_lenses_go_to_their_own_folders(captured, decoder, folder):
    capture = captured(["single.2", "double.0.img"])
    written = list(decoder(capture, ["euler", "x0"]).pictures())
    assert len(written) == len({decoded.path for decoded in written}) == 12
    for decoded in written:
        inside = folder.decoded(decoded.key.lens)
        assert inside in decoded.path.parents
    for block in ("double_block_0", "single_block_2"):
        first, last = (
            [(folder.decoded(lens) / f"step_{step}" / f"{block}.jpg").read_bytes() for lens in ("euler", "x0")]
            for step in (0, 2)
        )
        assert first[0] != first[1]
        assert last[0] == last[1]  # at the last step the two lenses coincide


def test_pictures_are_named_by_the_samplers_steps(captured, decoder, folder):
    written = list(decoder(captured(["single.1"], kept=[2])).pictures())
    assert [decoded.path for decoded in written] == [folder.decoded("euler") / "step_2" / "single_block_1.jpg"]


def test_numbers_are_distances_to_the_last_block_of_the_same_step(captured, decoder, flux):
    capture = captured()
    reader = decoder(capture)
    list(reader.pictures())
    assert len(reader.numbers) == 15
    for number in reader.numbers:
        velocities = {reading.site: reading.velocity for reading in read_step(flux, capture, number.step)}
        assert number.cosine == cosine(velocities[number.site], velocities[LAST])
        assert number.relative_distance == relative_distance(velocities[number.site], velocities[LAST])
        assert (number.relative_distance == 0.0) is (number.site == LAST)


@pytest.mark.parametrize(
    ("sites", "known"), [(["single.1", "double.0.img"], False), (["double.0.img", "single.2.img"], True)]
)
def test_numbers_need_the_last_block_or_its_image_half(captured, decoder, sites, known):
    reader = decoder(captured(sites))
    list(reader.pictures())
    assert all((number.cosine is not None) is known for number in reader.numbers)
    assert all((number.relative_distance is not None) is known for number in reader.numbers)


def test_likeness_to_the_final_picture_is_that_of_the_saved_files(captured, decoder, folder):
    capture = captured()
    last = list(decoder(capture).pictures())[-1]
    final = read_picture(last.path)
    for decoded in decoder(capture, final_picture=final).pictures():
        assert decoded.psnr_db == psnr_db(read_picture(decoded.path), final)
        assert (decoded.psnr_db is None) is (decoded.path == last.path)
    assert all(decoded.psnr_db is None for decoded in decoder(capture).pictures())


def test_the_report_has_a_row_per_site_and_step(captured, decoder):
    capture = captured()
    final = torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    reader = decoder(capture, final_picture=final)
    report = lens_report(reader, list(reader.pictures()))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["generation_id"] == "0123abcd"
    assert report["reference"] == {"velocity": "single.2 of the same step", "picture": "img_0.jpg"}
    assert list(report["sites"]) == ["double.0.img", "double.1.img", "single.0", "single.1", "single.2"]
    for rows in report["sites"].values():
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert list(row) == ["step", "cosine", "relative_distance", "psnr_euler_db"]
            assert all(isinstance(value, int | float) for value in row.values())


def test_a_second_reading_adds_to_the_report_and_loses_nothing(captured, decoder):
    capture = captured()
    final = torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    first = decoder(capture, final_picture=final)
    earlier = lens_report(first, list(first.pictures()))
    earlier["sites"]["single.9"] = [{"step": 5, "cosine": 0.5}]
    second = decoder(capture, ["x0"], final_picture=final)
    both = lens_report(second, list(second.pictures()), json.loads(json.dumps(earlier)))
    assert both["sites"]["single.9"] == [{"step": 5, "cosine": 0.5}]
    for site, rows in earlier["sites"].items():
        for row, merged in zip(rows, both["sites"][site], strict=True):
            assert row.items() <= merged.items()
            assert ("psnr_x0_db" in merged) is (site != "single.9")
    again = decoder(capture, final_picture=final)
    assert lens_report(again, list(again.pictures()), both) == both


@pytest.mark.parametrize("sites", [None, ["single.2.img"]])
def test_the_weights_of_the_capture_leave_no_drift_and_others_do(captured, decoder, flux, tiny_flux, folder, sites):
    capture = captured(sites)
    own = decoder(capture)
    list(own.pictures())
    assert own.drift <= 1e-3
    if sites is None:
        assert own.drift == 0.0
    other = tiny_flux(dtype=torch.bfloat16, seed=1)
    stranger = LensDecoder(capture, other, own.autoencoder, folder, ["x0"], other_weights=True)
    list(stranger.pictures())
    assert stranger.drift > 0.05


def test_what_these_weights_cannot_have_made_is_refused_before_anything_is_written(
    captured, decoder, tiny_flux, folder, monkeypatch
):
    capture = captured()
    other = tiny_flux(dtype=torch.bfloat16, seed=1)
    stranger = LensDecoder(capture, other, decoder(capture).autoencoder, folder, ["euler"])
    stranger.drift = OTHER_WEIGHTS_DRIFT + 0.01
    with pytest.raises(FluxIRError, match=r"is damaged, or was made with other weights: .* 26\.0% off the sampler's"):
        list(stranger.pictures())
    assert not folder.decoded("euler").exists()


def test_a_capture_that_is_not_finite_is_refused_by_step_and_site(captured, decoder, folder):
    capture = captured()
    reads = decoder(capture)
    weight = reads.model.final_layer.linear.weight
    weight[0, 0] = float("inf")
    with pytest.raises(FluxIRError, match=r"single.2 at step 0 of .* cannot be read: what it stands for is not finite"):
        list(reads.pictures())
    assert not folder.decoded("euler").exists()


def test_drift_is_unknown_without_the_last_block_or_the_next_step(captured, decoder, tiny_flux, folder):
    for sites, kept in ((["single.1"], None), (["single.2"], [0, 2])):
        capture = captured(sites, kept)
        stranger = LensDecoder(
            capture, tiny_flux(dtype=torch.bfloat16, seed=1), decoder(capture).autoencoder, folder, []
        )
        list(stranger.pictures())
        assert stranger.drift == 0.0


def test_a_place_that_cannot_be_written_ends_the_reading_and_leaves_no_half_file(captured, decoder, folder):
    capture = captured()
    (folder.decoded("euler")).mkdir()
    (folder.decoded("euler") / "step_1").write_text("in the way")
    with pytest.raises(FluxIRError, match=r"cannot write .*step_1"):
        list(decoder(capture, batch=2).pictures())
    files = sorted(path for path in folder.decoded("euler").rglob("*") if path.is_file())
    assert {path.parent.name for path in files if path.suffix == ".jpg"} <= {"step_0", "step_2"}
    assert not [path for path in files if path.suffix == ".partial"]
    for path in files:
        if path.suffix == ".jpg":
            Image.open(path).load()


def test_a_reading_that_is_left_early_leaves_whole_files_and_no_thread(captured, decoder, folder):
    capture, threads = captured(), threading.active_count()
    pictures = decoder(capture, batch=1).pictures()
    done = list(islice(pictures, 4))
    pictures.close()
    assert threading.active_count() == threads
    files = [path for path in folder.decoded("euler").rglob("*") if path.is_file()]
    assert {decoded.path for decoded in done} <= set(files)
    assert len(files) < 15
    for path in files:
        assert path.suffix == ".jpg"
        Image.open(path).load()


def test_batches_hold_a_fixed_number_of_pixels():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    threads = torch.get_num_threads()
    sides = (128, 256, 4096)
    assert [batch_size(side, side, cpu) for side in sides] == [8 * threads, 2 * threads, 1]
    assert [batch_size(1024, 1024, gpu), batch_size(512, 1024, gpu)] == [8, 16]


def test_a_saved_picture_is_read_as_it_was_written(tmp_path):
    picture = Image.new("RGB", (4, 2), (10, 20, 30))
    picture.putpixel((3, 1), (255, 0, 7))
    picture.save(tmp_path / "p.png")
    pixels = read_picture(tmp_path / "p.png")
    assert pixels.shape == (1, 2, 4, 3)
    assert pixels.dtype == torch.uint8
    assert pixels[0, 0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 1, 3].tolist() == [255, 0, 7]
