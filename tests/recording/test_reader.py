"""The capture file: the original program's dictionary, read back tensor by tensor."""

import json
from dataclasses import replace

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import MemorySink, Recorder, StepContext
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sites import Site, block_outputs
from tests.recording.cases import METADATA, tensors_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"weights_only": True}, {"mmap": True}, {"weights_only": True, "mmap": True}])
def test_torch_load_gives_the_original_programs_dictionary(tmp_path, plan, run, dtype, how):
    path = tmp_path / "capture_20250101_000000_tiny.pt"
    heard = run(path, plan(dtype=dtype))
    file = torch.load(path, **how)

    assert list(file) == ["double_blocks", "single_blocks", "denoising_context", "metadata"]
    assert list(file["double_blocks"]) == ["block_0", "block_1"]
    assert list(file["single_blocks"]) == ["block_0", "block_1", "block_2"]
    for step in range(4):
        for i in range(2):
            img, txt = file["double_blocks"][f"block_{i}"][step]
            assert torch.equal(img, heard.values[step, Site("double", i, "img")])
            assert torch.equal(txt, heard.values[step, Site("double", i, "txt")])
        for i in range(3):
            assert torch.equal(file["single_blocks"][f"block_{i}"][step], heard.values[step, Site("single", i)])
    context = file["denoising_context"]
    assert list(context) == ["y", "txt_seq_len", "img_state", "timestep_pairs", "guidance"]
    assert context["txt_seq_len"] == [7] * 4
    assert context["timestep_pairs"] == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert context["guidance"] == 2.5
    for step in range(4):
        assert torch.equal(context["y"][step], heard.contexts[step].y)
        assert torch.equal(context["img_state"][step], heard.contexts[step].img)
    names = [str(site) for site in block_outputs(2, 3)]
    assert file["metadata"] == {**METADATA, "captured_steps": [0, 1, 2, 3], "sites": names}

    tensors = tensors_in(file)
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    if not how.get("mmap"):  # else every storage is part of the one map
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_every_site_and_only_kept_steps_come_back(tmp_path, plan, run):
    asked = plan(["double.0.img", "double.1.*", "single.0", "single.0.img", "single.1.txt", "*.update", "single.2.*"])
    asked = replace(asked, steps=[3, 1, 3])
    heard = run(tmp_path / "c.pt", asked)
    file = torch.load(tmp_path / "c.pt", weights_only=True)
    assert list(file["double_blocks"]) == ["block_1"]  # of block 0 only one stream was asked for
    assert torch.equal(file["sites"]["double.0.img"][1], heard.values[3, Site("double", 0, "img")])
    assert file["metadata"]["captured_steps"] == [1, 3]
    assert file["denoising_context"]["timestep_pairs"] == [(0.75, 0.5), (0.25, 0.0)]

    capture = load_capture(tmp_path / "c.pt")
    assert capture.steps == [1, 3]
    assert capture.sites == list(asked.sites) == sorted({site for _, site in heard.values})
    for (step, site), value in heard.values.items():
        assert torch.equal(capture.read(site, step), value), f"{site} {step}"
        assert capture.shape(site) == asked.shape(site) == tuple(value.shape)


@pytest.mark.parametrize("batch", [1, 3])
def test_halves_of_a_stored_single_block_are_views(tmp_path, plan, run, batch):
    heard = run(tmp_path / "c.pt", plan(["single.1", "single.1.out"], batch=batch))
    capture = load_capture(tmp_path / "c.pt")
    for part in (None, "out"):
        whole = heard.values[2, Site("single", 1, None, part)]
        txt, img = (capture.read(Site("single", 1, stream, part), 2) for stream in ("txt", "img"))
        assert torch.equal(txt, whole[:, :7])
        assert torch.equal(img, whole[:, 7:])
        assert img._is_view()
        assert capture.shape(Site("single", 1, "img", part)) == (batch, 12, 64)
    assert not any(site.stream for site in capture.sites)


def test_halves_of_a_batch_are_written_in_their_own_order(tmp_path, plan, run):
    """A half of a batch does not lie in one piece in memory."""
    heard = run(tmp_path / "c.pt", plan(["single.*.img"], batch=3))
    capture = load_capture(tmp_path / "c.pt")
    assert all(torch.equal(capture.read(site, step), value) for (step, site), value in heard.values.items())


def test_the_context_of_a_step_is_found_by_the_samplers_number(tmp_path, plan, run):
    heard = run(tmp_path / "c.pt", plan(["single.0"], steps=[2]))
    context = load_capture(tmp_path / "c.pt").context(2)
    assert torch.equal(context.img, heard.contexts[2].img)
    assert torch.equal(context.y, heard.contexts[2].y)
    assert context[2:] == (0.5, 0.25, 2.5, 7)


def test_state_and_text_may_have_another_dtype(tmp_path, plan, run, tiny_flux, tiny_inputs):
    asked = plan(["single.0"], context_dtype=torch.float32, dtype=torch.bfloat16, timesteps=(1.0, 0.0))
    model = tiny_flux(dtype=torch.bfloat16)
    inputs = tiny_inputs(dtype=torch.bfloat16)
    with CaptureWriter(tmp_path / "c.pt", asked) as writer:
        writer.begin_step(0, StepContext(inputs.img.float(), inputs.y.float(), 7))
        with Recorder(model, asked.sites, sink := MemorySink()):
            model(*inputs)
        writer.write(0, Site("single", 0), sink.values[0, Site("single", 0)])
    capture = load_capture(tmp_path / "c.pt")
    assert capture.dtype == capture.read(Site("single", 0), 0).dtype == torch.bfloat16
    assert capture.context(0).img.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float64])
def test_other_dtypes_come_back_bit_for_bit(tmp_path, plan, dtype):
    asked = plan(["single.0.txt"], dtype=dtype, context_dtype=torch.float32, timesteps=(1.0, 0.0))
    value = torch.randn(asked.shape(Site("single", 0, "txt"))).to(dtype)
    with CaptureWriter(tmp_path / "c.pt", asked) as writer:
        writer.begin_step(0, StepContext(torch.zeros(asked.img_shape), torch.zeros(asked.y_shape), 7))
        writer.write(0, Site("single", 0, "txt"), value)
    for read in (
        load_capture(tmp_path / "c.pt").read(Site("single", 0, "txt"), 0),
        torch.load(tmp_path / "c.pt", weights_only=True)["sites"]["single.0.txt"][0],
    ):
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), value.view(torch.uint8))


def test_capturing_changes_no_bit_of_the_output(tmp_path, plan, tiny_flux, tiny_inputs):
    model, asked = tiny_flux(), plan(["*"])
    plain = [model(*tiny_inputs(seed=step)) for step in range(4)]
    with CaptureWriter(tmp_path / "c.pt", asked) as writer, Recorder(model, asked.sites, writer):
        captured = [model(*tiny_inputs(seed=step)) for step in range(4)]
    assert all(torch.equal(one, other) for one, other in zip(plain, captured, strict=True))


def test_capturing_works_in_inference_mode(tmp_path, plan, run):
    with torch.inference_mode():
        heard = run(tmp_path / "c.pt", plan(["single.2"]))
    value = load_capture(tmp_path / "c.pt").read(Site("single", 2), 3)
    assert torch.equal(value, heard.values[3, Site("single", 2)])


def test_a_run_folder_gives_its_newest_capture(tmp_path, plan, run):
    for name in ("capture_20250101_000000_b.pt", "capture_20250101_000001_a.pt"):
        run(tmp_path / "any name" / "intermediates" / name, plan(["single.2"], metadata={"name": name}))
    assert load_capture(tmp_path / "any name").metadata["name"] == "capture_20250101_000001_a.pt"
    with pytest.raises(FluxIRError, match=r"capture_\*\.pt"):
        load_capture(tmp_path)


def test_files_of_the_original_program_are_read(tmp_path):
    """It saved with one torch.save, and told neither sites nor steps in the metadata."""
    draw = torch.Generator().manual_seed(0)

    def tensor(tokens, width):
        return torch.randn(1, tokens, width, generator=draw).bfloat16()

    file = {
        "double_blocks": {f"block_{i}": [(tensor(6, 8), tensor(5, 8)) for _ in range(3)] for i in range(11)},
        "single_blocks": {f"block_{i}": [tensor(11, 8) for _ in range(3)] for i in range(2)},
        "denoising_context": {
            "y": [torch.randn(1, 4, generator=draw).bfloat16()] * 3,  # one tensor, three times
            "txt_seq_len": [5, 5, 5],
            "img_state": [tensor(6, 64) for _ in range(3)],
            "timestep_pairs": [(1.0, 0.6), (0.6, 0.3), (0.3, 0.0)],
            "guidance": 3,
        },
        "metadata": {"generation_id": "0123abcd", "width": 48, "height": 32, "seed": None},
    }
    file["single_blocks"]["block_1"][2] = tensor(22, 8)[:, ::2]  # not the whole of its storage
    torch.save(file, tmp_path / "capture_x.pt")
    capture = load_capture(str(tmp_path / "capture_x.pt"))
    assert capture.steps == [0, 1, 2]
    assert capture.sites == block_outputs(11, 2)
    assert capture.metadata["width"] == 48
    for step in range(3):
        img, txt = file["double_blocks"]["block_10"][step]
        assert torch.equal(capture.read(Site("double", 10, "img"), step), img)
        assert torch.equal(capture.read("double.10.txt", step), txt)
        assert torch.equal(capture.read(Site("single", 1), step), file["single_blocks"]["block_1"][step])
        assert torch.equal(capture.read(Site("single", 1, "img"), step), file["single_blocks"]["block_1"][step][:, 5:])
        assert torch.equal(capture.context(step).y, file["denoising_context"]["y"][step])
    assert capture.context(1).guidance == 3.0


def test_writing_to_a_tensor_read_never_changes_the_file(tmp_path, plan, run):
    heard = run(tmp_path / "c.pt", plan(["single.2"]))
    before = (tmp_path / "c.pt").read_bytes()
    load_capture(tmp_path / "c.pt").read(Site("single", 2), 0).zero_()
    assert (tmp_path / "c.pt").read_bytes() == before
    again = load_capture(tmp_path / "c.pt").read(Site("single", 2), 0)
    assert torch.equal(again, heard.values[0, Site("single", 2)])


def test_a_tensor_read_outlives_its_capture(tmp_path, plan, run):
    heard = run(tmp_path / "c.pt", plan(["single.2"]))
    value = load_capture(tmp_path / "c.pt").read(Site("single", 2), 3)
    assert torch.equal(value, heard.values[3, Site("single", 2)])


@pytest.mark.parametrize(
    ("site", "step", "says", "hint"),
    [("single.2.update", 0, "single.2.update was not captured", "single.2"), ("single.2", 1, "step 1", "steps 0, 3")],
)
def test_what_was_not_captured_is_named(tmp_path, plan, run, site, step, says, hint):
    run(tmp_path / "c.pt", plan(["single.2"], steps=[0, 3]))
    with pytest.raises(FluxIRError) as caught:
        load_capture(tmp_path / "c.pt").read(Site.parse(site), step)
    assert says in caught.value.message
    assert "c.pt" in caught.value.message
    assert hint in (caught.value.hint or "")


def test_metadata_is_the_same_in_json(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan())
    metadata = load_capture(tmp_path / "c.pt").metadata
    assert json.loads(json.dumps(metadata)) == metadata


@pytest.mark.gpu
def test_a_gpus_tensors_are_captured_without_a_change(tmp_path, plan, tiny_flux, tiny_inputs):
    asked = plan(["*"], dtype=torch.bfloat16)
    model, memory = tiny_flux(dtype=torch.bfloat16).cuda(), MemorySink()
    with (
        CaptureWriter(tmp_path / "c.pt", asked, queue_bytes=20_000) as writer,
        Recorder(model, asked.sites, writer),
        Recorder(model, asked.sites, memory),
    ):
        for step in range(4):
            model(*(None if value is None else value.cuda() for value in tiny_inputs(dtype=torch.bfloat16, seed=step)))
    capture = load_capture(tmp_path / "c.pt")
    assert all(torch.equal(capture.read(site, step), value.cpu()) for (step, site), value in memory.values.items())
