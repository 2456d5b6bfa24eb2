"""The capture file as a file: its size and bytes are known, and it is written and read with little memory."""

import io
import os
import resource
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch

from flux_ir.recording.file_format import Archive, blank_tensors, lay_out
from flux_ir.recording.plan import CapturePlan, capture_bytes
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import Recorder
from flux_ir.recording.writer import CaptureWriter, RecordFiller, file_bytes
from flux_ir.sites import block_outputs
from tests.recording.cases import tensors_in


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
    from flux_ir.models.flux1.transformer import FluxParams

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
