"""Complete or absent: whatever is missing or not as planned is an error, and leaves no file."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import Recorder
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sites import Site
from tests.recording.cases import left_in


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
