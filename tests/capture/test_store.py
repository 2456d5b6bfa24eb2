"""The capture file: the original program's dictionary, complete or absent, and read back tensor by tensor."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_ir.capture.archive import Archive, blank_tensors, lay_out
from flux_ir.capture.filler import RecordFiller
from flux_ir.capture.recorder import MemorySink, Recorder, StepContext
from flux_ir.capture.store import CapturePlan, CaptureWriter, capture_bytes, file_bytes, load_capture
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site, all_sites, block_outputs, match_sites

TIMESTEPS = (1.0, 0.75, 0.5, 0.25, 0.0)
METADATA = {"generation_id": "0123abcd", "prompt": "ein größerer Kreis", "seed": 7, "num_steps": 4, "note": None}


@pytest.fixture
def plan(tiny_flux_params):
    """Makes a plan that fits `tiny_inputs`."""

    def make(sites=None, **changes):
        sites = block_outputs(2, 3) if sites is None else match_sites(sites, all_sites(2, 3))
        known = {"txt_tokens": 7, "img_tokens": 12, "timesteps": TIMESTEPS, "guidance": 2.5, "metadata": METADATA}
        return CapturePlan(tiny_flux_params, sites, **{**known, "dtype": torch.float32, **changes})

    return make


@pytest.fixture
def run(tiny_flux, tiny_inputs):
    """Runs the network for every step of the plan with the file and the memory listening: what memory heard."""

    def capture(path, plan, *, steps=None, queue_bytes=2**20):
        model, memory = tiny_flux(dtype=plan.dtype), MemorySink()
        with (
            CaptureWriter(path, plan, queue_bytes=queue_bytes) as writer,
            Recorder(model, plan.sites, writer, steps=plan.kept_steps),
            Recorder(model, plan.sites, memory, steps=plan.kept_steps),
        ):
            for step in range(len(plan.timesteps) - 1) if steps is None else steps:
                inputs = tiny_inputs(batch=plan.batch, dtype=plan.context_dtype or plan.dtype, seed=step)
                model(*inputs)
        return memory

    return capture


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


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
        assert torch.equal(capture.read(Site("double", 10, "txt"), step), txt)
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


# ---- The file as a file


def test_the_size_is_told_exactly(tmp_path, plan, run):
    for asked in (plan(), plan(["*"], steps=[1], dtype=torch.bfloat16, context_dtype=torch.float32)):
        dtype = asked.context_dtype or asked.dtype
        (tmp_path / "c.pt").unlink(missing_ok=True)
        if dtype == asked.dtype:
            run(tmp_path / "c.pt", asked)
            assert (tmp_path / "c.pt").stat().st_size == file_bytes(asked)
            tensors = tensors_in(torch.load(tmp_path / "c.pt", weights_only=True))
            assert capture_bytes(asked) == sum(tensor.nbytes for tensor in tensors)
        assert capture_bytes(asked) < file_bytes(asked)


def test_the_size_is_that_of_the_published_models():
    """57 blocks of flux-dev at 1024 px and 50 steps: the original program's 80.7 GB."""
    from flux_ir.models.transformer import FluxParams

    params = FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)
    sites, times = block_outputs(19, 38), [i / 50 for i in range(51)]
    plan = CapturePlan(params, sites, times, txt_tokens=512, img_tokens=4096, guidance=2.5, metadata={})
    assert capture_bytes(plan) / 1e9 == pytest.approx(80.7, abs=0.05)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0 < file_bytes(plan) - capture_bytes(plan) < 5e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_the_zip_passes_its_checksums(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan(["*"]))
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        assert archive.testzip() is None
        assert sum(info.CRC == 0 for info in archive.infolist()) == 0
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", tmp_path / "c.pt"], check=True, capture_output=True)


def test_the_same_capture_gives_the_same_bytes_under_any_name(tmp_path, plan, run):
    for name in ("a.pt", "größer.pt"):
        run(tmp_path / name, plan())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "größer.pt").read_bytes()


def test_the_queue_is_bounded_in_bytes(tmp_path):
    """A disk that stands still: tensors are taken until the queue is full, then the producer waits."""

    class Stopped(io.FileIO):
        go_on = threading.Event()

        def write(self, data):
            self.go_on.wait(60)
            return super().write(data)

    kilobyte = torch.zeros(256)
    with (tmp_path / "f").open("wb", buffering=0) as file:
        lay_out(file, {str(i): blank_tensors()((256,), torch.float32) for i in range(10)})
    with Stopped(tmp_path / "f", "r+") as file:
        places = [place for name, place in Archive(tmp_path / "f").records().items() if name.startswith("data/")]
        taken = []
        with RecordFiller(file, tmp_path / "f", queue_bytes=4 * 1024) as filler:

            def produce():
                for i, place in enumerate(places):
                    filler.put(place, kilobyte + i)
                    taken.append(filler.held_bytes)

            producer = threading.Thread(target=produce)
            producer.start()
            producer.join(1.0)
            assert producer.is_alive()
            assert taken == [1024, 2048, 3072, 4096]
            file.go_on.set()
            producer.join()
        assert max(taken) <= 4 * 1024
        assert filler.held_bytes == 0
    loaded = torch.load(tmp_path / "f", weights_only=True)
    assert [tensor.unique().tolist() for tensor in loaded.values()] == [[float(i)] for i in range(10)]


def test_a_tensor_larger_than_the_queue_passes_alone(tmp_path, plan, run):
    heard = run(tmp_path / "c.pt", plan(), queue_bytes=1)
    capture = load_capture(tmp_path / "c.pt")
    assert all(torch.equal(capture.read(site, step), value) for (step, site), value in heard.values.items())


def test_nothing_stays_in_memory_once_written(tmp_path, plan, tiny_flux, tiny_inputs):
    """At any moment no more bytes are held than the queue may hold."""
    asked, model = plan(), tiny_flux()
    largest = 19 * 64 * 4
    with (
        CaptureWriter(tmp_path / "c.pt", asked, queue_bytes=2 * largest) as writer,
        Recorder(model, asked.sites, writer),
    ):
        for step in range(4):
            model(*tiny_inputs(seed=step))
            assert writer._filler.held_bytes <= 2 * largest


@pytest.mark.skipif(sys.platform != "linux", reason="holes in files and maps as on Linux")
def test_a_file_larger_than_memory_is_read(tmp_path):
    gigabytes = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30 + 1
    make = blank_tensors()
    with (tmp_path / "f").open("wb", buffering=0) as file:
        lay_out(file, {str(i): make((2**28,), torch.float32) for i in range(gigabytes)})
    assert (tmp_path / "f").stat().st_blocks * 512 < 2**20
    archive = Archive(tmp_path / "f")
    last = archive.tensor(archive.contents[str(gigabytes - 1)])
    assert last.nbytes == 2**30
    assert last[-1000:].unique().tolist() == [0.0]


# ---- Complete or absent


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_leaves_no_file(tmp_path, plan, tiny_flux, tiny_inputs, error):
    model, asked = tiny_flux(), plan()
    threads = threading.active_count()

    def interrupted():
        with CaptureWriter(tmp_path / "c.pt", asked) as writer, Recorder(model, asked.sites, writer):
            model(*tiny_inputs())
            assert left_in(tmp_path) == ["c.pt.partial"]
            raise error

    with pytest.raises(error):
        interrupted()
    assert left_in(tmp_path) == []
    assert threading.active_count() == threads


def test_a_step_that_never_came_is_an_error_and_leaves_no_file(tmp_path, plan, run):
    with pytest.raises(FluxIRError, match="not complete: 9 tensors never came, first img_state at step 3"):
        run(tmp_path / "c.pt", plan(), steps=range(3))
    assert left_in(tmp_path) == []


def test_a_site_that_never_came_is_an_error_and_leaves_no_file(tmp_path, plan, tiny_flux, tiny_inputs):
    model, asked = tiny_flux(), plan(["single.0", "single.1"], steps=[0])
    with (
        pytest.raises(FluxIRError, match=r"first single\.1 at step 0"),
        CaptureWriter(tmp_path / "c.pt", asked) as writer,
        Recorder(model, [Site("single", 0)], writer),
    ):
        model(*tiny_inputs())
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"img_tokens": 13},
            r"img_state at step 0 must be torch.float32 \[1, 13, 64\].*got torch.float32 \[1, 12, 64\]",
        ),
        ({"dtype": torch.bfloat16, "context_dtype": torch.float32}, "double.0.img at step 0 must be torch.bfloat16"),
        ({"context_dtype": torch.bfloat16}, "img_state at step 0 must be torch.bfloat16"),
        ({"txt_tokens": 8}, "step 0 must have 8 text tokens, as planned: got 7"),
        ({"batch": 2}, r"\[2, 12, 64\], as planned: got torch.float32 \[1, 12, 64\]"),
        ({"steps": [1]}, "img_state at step 0 is not in the plan"),
    ],
)
def test_what_is_not_as_planned_is_refused(tmp_path, plan, tiny_flux, tiny_inputs, changes, says):
    model, asked = tiny_flux(), plan(**changes)
    with (
        pytest.raises(FluxIRError, match=says),
        CaptureWriter(tmp_path / "c.pt", asked) as writer,
        Recorder(model, asked.sites, writer),
    ):
        model(*tiny_inputs())
    assert left_in(tmp_path) == []


def test_a_second_value_for_the_same_place_is_refused(tmp_path, plan, tiny_flux, tiny_inputs):
    asked, site = plan(["single.0"]), Site("single", 0)
    with CaptureWriter(tmp_path / "c.pt", asked) as writer, Recorder(model := tiny_flux(), asked.sites, writer):
        for step in range(4):
            model(*tiny_inputs(seed=step))
        with pytest.raises(FluxIRError, match="at step 0 is not in the plan of this capture, or came twice"):
            writer.write(0, site, torch.zeros(asked.shape(site)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": [0, 4]}, r"among the schedule's 4, counted from 0: got \[4\]"),
        ({"steps": [-1]}, r"got \[-1\]"),
        ({"steps": []}, "got none"),
        ({"timesteps": [1.0]}, "schedule's 0"),
        ({"sites": []}, "at least one site"),
        ({"sites": [Site("single", 3)]}, "no site single.3"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan, changes, says):
    with pytest.raises(FluxIRError, match=says):
        replace(plan(), **changes)


def test_metadata_that_json_cannot_say_is_refused_before_anything_is_written(plan):
    with pytest.raises(TypeError):
        plan(metadata={"path": Path("x")})


def test_a_capture_larger_than_the_disk_is_refused_at_once(tmp_path, plan):
    asked = plan(img_tokens=10**9, timesteps=[i / 20 for i in range(21)])  # 30 TB
    with pytest.raises(FluxIRError) as caught, CaptureWriter(tmp_path / "c.pt", asked):
        pytest.fail("the body must not run")
    assert "c.pt" in caught.value.message
    assert "are free" in caught.value.message
    assert "--steps" in (caught.value.hint or "")
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, plan):
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxIRError, match="cannot write"), CaptureWriter(tmp_path / "file" / "c.pt", plan()):
        pytest.fail("the body must not run")


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from flux_ir.capture.store import CaptureWriter, file_bytes
from flux_ir.errors import FluxIRError
{setup}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes(plan) - 1000, resource.RLIM_INFINITY))
try:
    with CaptureWriter(Path(sys.argv[1]), plan):
        print("entered")
except FluxIRError as error:
    print(error.message)
"""

SETUP = """
from flux_ir.capture.recorder import Recorder, StepContext
from flux_ir.capture.store import CapturePlan
from flux_ir.models.transformer import Flux, FluxParams
from flux_ir.sites import block_outputs
params = FluxParams(64, 64, 24, 40, 64, 4.0, 4, 2, 3, (4, 6, 6), 10_000, True, False)
plan = CapturePlan(params, block_outputs(2, 3), [1.0, 0.5, 0.0], txt_tokens=7, img_tokens=12, guidance=1.0, metadata={},
                   dtype=torch.float32)
"""


def program(text, *arguments):
    return [sys.executable, "-c", text, *map(str, arguments)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
def test_space_that_cannot_be_taken_is_said_before_anything_is_computed(tmp_path):
    done = subprocess.run(
        program(LIMITED.format(setup=SETUP), tmp_path / "c.pt"), capture_output=True, text=True, check=True
    )
    assert "c.pt: File too large (it needs " in done.stdout
    assert "entered" not in done.stdout
    assert left_in(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("swallowed", [True, False])
def test_a_disk_that_runs_full_while_writing_stops_the_producer_and_leaves_no_file(tmp_path, plan, swallowed):
    asked = plan(img_tokens=5000)  # the thread does not wake for less than a megabyte
    writer, site = CaptureWriter(tmp_path / "c.pt", asked), Site("single", 0)
    seen = []

    def capture():
        with writer, Path("/dev/full").open("wb") as full:
            os.dup2(full.fileno(), writer._filler.file.fileno())  # from here on the thread meets a full disk
            writer.write(0, site, torch.zeros(asked.shape(site)))
            writer._filler._thread.join(60)
            try:
                writer.write(1, site, torch.zeros(asked.shape(site)))
            except FluxIRError as error:
                seen.append(error)
                if not swallowed:
                    raise
            writer._missing.clear()  # a caller that goes on must not end up with a file

    with pytest.raises(FluxIRError) as caught:
        capture()
    assert seen == [caught.value]
    assert "c.pt: No space left on device" in caught.value.message
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert left_in(tmp_path) == []


# Forks one process per moment; each kills itself, without any chance to clean up, at that call of the sink.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from flux_ir.capture.store import CaptureWriter
{setup}
torch.set_num_threads(1)
folder = Path(sys.argv[1])
values = {{site: torch.randn(plan.shape(site)) for site in plan.sites}}

class Dying(CaptureWriter):
    calls = 0
    def _put(self, *arguments):
        if self.calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        super()._put(*arguments)

def capture():
    with Dying(folder / f"capture_{{moment}}.pt", plan) as writer:
        for step in range(2):
            writer.begin_step(step, StepContext(torch.zeros(plan.img_shape), torch.zeros(plan.y_shape), 7))
            for site in plan.sites:
                writer.write(step, site, values[site])

for moment in [0, 1, 2, 7, 11, 17, 18]:
    if (child := os.fork()) == 0:
        capture()
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_killed_process_leaves_nothing_under_a_final_name(tmp_path):
    done = subprocess.run(program(KILLED.format(setup=SETUP), tmp_path), capture_output=True, text=True, check=True)
    exits = dict(map(int, line.split()) for line in done.stdout.splitlines())
    assert exits == {**dict.fromkeys([0, 1, 2, 7, 11, 17], -signal.SIGKILL), 18: 0}
    assert left_in(tmp_path) == sorted([*(f"capture_{i}.pt.partial" for i in (0, 1, 2, 7, 11, 17)), "capture_18.pt"])
    assert load_capture(tmp_path / "capture_18.pt").steps == [0, 1]


def test_what_a_killed_process_left_is_written_over(tmp_path, plan, run):
    (tmp_path / "c.pt.partial").write_bytes(b"x" * 10**6)
    run(tmp_path / "c.pt", plan())
    assert left_in(tmp_path) == ["c.pt"]
    assert (tmp_path / "c.pt").stat().st_size == file_bytes(plan())
    assert torch.load(tmp_path / "c.pt", weights_only=True)["metadata"]["seed"] == 7


# ---- Files that are no captures


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(tmp_path, plan, run, keep):
    run(tmp_path / "c.pt", plan())
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(FluxIRError, match=r"c\.pt is not a complete capture file"):
        load_capture(tmp_path / "c.pt")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FluxIRError, match=r"nowhere\.pt: No such file"):
        load_capture(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("value", [{"weight": torch.zeros(3)}, [1, 2], {"double_blocks": {}, "metadata": {}}, 5])
def test_other_files_of_torch_save_are_refused_by_name(tmp_path, value):
    torch.save(value, tmp_path / "c.pt")
    with pytest.raises(FluxIRError, match=r"c\.pt is a file of PyTorch, but no capture"):
        load_capture(tmp_path / "c.pt")


def test_a_zip_of_something_else_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FluxIRError, match="not one of torch"):
        load_capture(tmp_path / "c.pt")


def test_lists_of_unequal_length_are_refused(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan())
    file = torch.load(tmp_path / "c.pt", weights_only=True)
    file["single_blocks"]["block_1"].pop()
    torch.save(file, tmp_path / "c.pt")
    with pytest.raises(FluxIRError, match=r"'single_blocks\.block_1': 3"):
        load_capture(tmp_path / "c.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by a pickle"),)

    torch.save({"metadata": Malicious()}, tmp_path / "c.pt", pickle_module=pickle)
    with pytest.raises(FluxIRError, match="mkdir"):
        load_capture(tmp_path / "c.pt")
    assert left_in(tmp_path) == ["c.pt"]


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
