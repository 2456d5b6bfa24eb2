"""Fewer bits and fewer tokens: what is kept, how exactly, and that the file says so."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.lens.readout import readable_sites
from flux_ir.recording.plan import CapturePlan, capture_bytes
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.recording.stored_dtype import dequantised, rounded, scaled
from flux_ir.recording.writer import CaptureWriter, file_bytes
from flux_ir.sites import Site, all_sites, block_outputs

TXT, IMG = 7, 12
PLACES = (0, 3, 4, 11)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def plan(tiny_flux_params):
    """Makes a plan that fits `tiny_inputs` and rounds."""

    def make(names=("double.1.img", "double.1.txt", "single.0", "single.1.img", "single.2.txt.neurons"), **changes):
        known = {"txt_tokens": TXT, "img_tokens": IMG, "timesteps": (1.0, 0.5, 0.0), "guidance": 1.0, "metadata": {}}
        sites = [Site.parse(name) for name in names]
        return CapturePlan(tiny_flux_params, sites, **{**known, "rounds": True, **changes})

    return make


@pytest.fixture
def run(tiny_flux, tiny_inputs):
    """Runs both steps of the plan into the file; what memory heard."""

    def capture(path, plan, dtype=torch.float32):
        model, memory = tiny_flux(dtype=dtype), MemorySink()
        with (
            CaptureWriter(path, plan) as writer,
            Recorder(model, plan.sites, writer, steps=plan.kept_steps),
            Recorder(model, plan.sites, memory, steps=plan.kept_steps),
        ):
            for step in range(2):
                model(*tiny_inputs(batch=plan.batch, dtype=dtype, seed=step))
        return memory

    return capture


def kept_by_hand(value, site, places):
    """The tokens of a whole value that a plan with these places keeps."""
    txt = {"img": 0, "txt": value.shape[1], None: TXT}[site.stream]
    return torch.cat([value[:, :txt], value[:, txt:][:, list(places)]], 1) if site.stream != "txt" else value


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


# ---- The numbers


def test_a_float8_token_uses_the_whole_range():
    value = torch.randn(2, 5, 64) * torch.logspace(-3, 4, 5)[None, :, None]
    values, scale = scaled(value)
    assert values.dtype == FLOAT8
    assert scale.dtype == torch.float32
    assert torch.equal(scale, value.abs().amax(-1) / 448)
    assert (values.float().abs().amax(-1) == 448).all()
    assert torch.equal(values.view(torch.uint8), (value / scale[..., None]).to(FLOAT8).view(torch.uint8))


def test_what_float8_loses_is_bounded():
    """Half a step of 3 bits, relative to the value; or half of the smallest step, relative to the token's largest."""
    value = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).double()
    value[:, 0] = 50  # an outlier dimension
    values, scale = scaled(value.float())
    error = (values.double() * scale.double()[:, None] - value).abs()
    bound = torch.maximum(value.abs() * 2**-4, value.abs().amax(-1, keepdim=True) / 448 * 2**-10)
    assert (error <= bound * 1.0001).all()


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-36])
def test_tokens_too_small_for_a_scale_are_zeros(largest):
    values, scale = scaled(torch.full((1, 3, 8), largest))
    assert scale.unique().tolist() == [1.0]
    assert values.float().unique().tolist() == [0.0]


def test_one_large_token_costs_the_others_nothing():
    value = torch.randn(1, 4, 32)
    alone = scaled(value[:, :3])
    value[:, 3] *= 1e6
    values, scale = scaled(value)
    assert torch.equal(scale[:, :3], alone.scale)
    assert torch.equal(values[:, :3].view(torch.uint8), alone.values.view(torch.uint8))


def test_dequantising_is_the_exact_product_rounded_once():
    values, scale = scaled(torch.randn(50, 16))
    read = dequantised(values, scale)
    assert read.dtype == torch.bfloat16
    exact = [Fraction(q) * Fraction(s) for q, s in zip(values[:, 0].double().tolist(), scale.tolist(), strict=True)]
    for got, product in zip(read[:, 0].double().tolist(), exact, strict=True):
        assert abs(Fraction(got) - product) <= abs(product) * Fraction(1, 2**8)  # half of bfloat16's step, and a bit


def test_float16_ends_where_it_ends():
    value = torch.tensor([1.0, 70_000.0, -1e9, 65_504.0])
    assert rounded(value, torch.float16).tolist() == [1.0, 65_504.0, -65_504.0, 65_504.0]
    assert rounded(value.bfloat16(), torch.float16).isfinite().all()


# ---- In the file


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_to_the_plans_dtype(tmp_path, plan, run, dtype, made, batch):
    asked = plan(dtype=dtype, batch=batch, context_dtype=torch.float32)
    heard = run(tmp_path / "c.pt", asked, made)
    capture = load_capture(tmp_path / "c.pt")
    assert capture.dtype == capture.stored_dtype == dtype
    assert capture.img_positions is None
    for (step, site), value in heard.values.items():
        assert torch.equal(capture.read(site, step), value.to(dtype))
        assert capture.read_stored(site, step)[1] is None
    assert torch.equal(capture.context(1).img, heard.contexts[1].img.float())
    assert (tmp_path / "c.pt").stat().st_size == file_bytes(asked)


@pytest.mark.parametrize("how", [{}, {"weights_only": True}, {"weights_only": True, "mmap": True}])
def test_float8_comes_with_a_scale_for_every_token(tmp_path, plan, run, how):
    asked = plan(dtype=FLOAT8)
    heard = run(tmp_path / "c.pt", asked)
    file, capture = torch.load(tmp_path / "c.pt", **how), load_capture(tmp_path / "c.pt")
    assert list(file["scales"]) == [str(site) for site in asked.sites]
    assert "token_positions" not in file
    assert file["double_blocks"]["block_1"][0][0].dtype == FLOAT8
    assert capture.stored_dtype == FLOAT8
    assert capture.dtype == torch.bfloat16
    assert capture.context(0).y.dtype == torch.bfloat16
    for (step, site), value in heard.values.items():
        values, scale = scaled(value)
        stored, stored_scale = capture.read_stored(site, step)
        assert torch.equal(stored.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(stored_scale, scale)
        assert torch.equal(file["scales"][str(site)][step], scale)
        read = capture.read(site, step)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, dequantised(values, scale))
    half = Site.parse("single.0.img")
    assert torch.equal(capture.read(half, 1), capture.read(half.whole, 1)[:, TXT:])
    assert capture.read_stored(half, 1)[1].shape == (1, IMG)
    assert capture.read_stored(Site.parse("single.0.txt"), 1)[1].shape == (1, TXT)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
def test_only_the_chosen_places_of_the_image_are_kept(tmp_path, plan, run, dtype, batch):
    asked = plan(dtype=dtype, img_positions=PLACES, batch=batch, context_dtype=torch.float32)
    heard = run(tmp_path / "c.pt", asked)
    file, capture = torch.load(tmp_path / "c.pt", weights_only=True), load_capture(tmp_path / "c.pt")
    for positions in (file["token_positions"], capture.img_positions):
        assert positions.dtype == torch.int32
        assert positions.tolist() == list(PLACES)
    for (step, site), value in heard.values.items():
        kept = kept_by_hand(value, site, PLACES)
        expected = dequantised(*scaled(kept)) if dtype == FLOAT8 else kept
        assert capture.shape(site) == asked.shape(site) == tuple(kept.shape)
        assert torch.equal(capture.read(site, step), expected), str(site)
    txt, img = (capture.read(Site.parse(f"single.0.{stream}"), 1) for stream in ("txt", "img"))
    assert torch.equal(torch.cat([txt, img], 1), capture.read(Site.parse("single.0"), 1))
    assert capture.shape(Site.parse("single.0.img")) == (batch, 4, 64)
    assert torch.equal(capture.context(0).img, heard.contexts[0].img[:, list(PLACES)])
    assert capture.context(0).txt_tokens == TXT


@pytest.mark.parametrize("positions", [None, PLACES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FLOAT8])
@pytest.mark.parametrize("whole_network", [False, True])
def test_the_size_is_told_exactly(tmp_path, plan, run, dtype, positions, whole_network):
    sites = all_sites(2, 3) if whole_network else [Site.parse("double.1.img")]
    asked = replace(plan(dtype=dtype, img_positions=positions, metadata={"prompt": "größer"}), sites=sites)
    run(tmp_path / "c.pt", asked)
    assert (tmp_path / "c.pt").stat().st_size == file_bytes(asked)
    tensors = tensors_in(torch.load(tmp_path / "c.pt", weights_only=True))
    assert capture_bytes(asked) == sum(tensor.nbytes for tensor in tensors)


def test_rounding_to_the_networks_own_dtype_changes_no_byte(tmp_path, plan, run):
    for name, rounds in (("a.pt", True), ("b.pt", False)):
        run(tmp_path / name, plan(dtype=torch.float32, rounds=rounds))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_full_float8_capture_can_still_be_read_by_a_lens(tmp_path, plan, run):
    run(tmp_path / "c.pt", replace(plan(dtype=FLOAT8), sites=block_outputs(2, 3)))
    assert len(readable_sites(load_capture(tmp_path / "c.pt"))) == 5


def test_a_lens_refuses_a_part_of_a_picture(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan(img_positions=PLACES))
    with pytest.raises(FluxIRError, match=r"a lens needs every image token, and .*c\.pt keeps 4 of them"):
        readable_sites(load_capture(tmp_path / "c.pt"))


# ---- Plans that cannot be


@pytest.mark.parametrize("places", [[], [3, 1], [1, 1], [-1, 2], [0, 12]])
def test_places_that_are_not_on_the_grid_are_refused(plan, places):
    with pytest.raises(FluxIRError, match="places among the 12 image tokens"):
        plan(img_positions=places)


def test_other_dtypes_are_not_rounded_to(plan):
    with pytest.raises(FluxIRError, match="to one of bfloat16, float16, float32, float8_e4m3fn: got torch"):
        plan(dtype=torch.int8)


def test_whole_numbers_are_refused(tmp_path, plan):
    asked = plan(["double.0.img"])
    with (
        pytest.raises(FluxIRError, match=r"must be floats \[1, 12, 64\], as planned: got torch.int64"),
        CaptureWriter(tmp_path / "c.pt", asked) as writer,
    ):
        writer.write(0, asked.sites[0], torch.zeros(1, IMG, 64, dtype=torch.long))
