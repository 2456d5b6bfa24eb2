"""Words that nobody reads: from Python they are refused as on the command line, before anything else is done."""

import subprocess
import sys

import pytest

import flux_ir
from flux_ir.api.arguments import LEAST, check_least
from flux_ir.commands.cli.option import flags
from flux_ir.commands.train_sae import TrainSAEOptions
from flux_ir.errors import FluxIRError

# In a process of its own: here, under pytest, the annotations are checked at every call, and for users they are not.
CALLS = {
    "load_model('flux-tiny', dtype='float16')": "--dtype must be one of auto, bfloat16, float32: got 'float16'",
    "load_model('flux-tiny', parts=['vae'])": "--parts must be one of text, transformer, autoencoder: got 'vae'",
    "capture('x', model='flux-tiny', lens='eular')": "--lens must be one of euler, x0, both, tuned, jac",
    "capture('x', model='flux-tiny', width=0)": "width and height must be positive multiples of 16 px: got 0 x 128",
    "read_lens('01234567', lens='x1')": "--lens must be one of euler, x0, both, tuned, jac",
    "collect(['a'], 'single.6', 'c', model='flux-tiny', verify='no')": "--verify must be one of checksums, sizes",
    "collect(['a'], 'single.6', 'c', model='flux-tiny', store_dtype='int8')": "--store_dtype must be one of bfloat16",
    "collect(['a'], 'single.6', 'c', model='flux-tiny', dtype='float16')": "--dtype must be one of auto",
    "collect(['a'], 'single.6', 'c', model='flux-tiny', num_steps=0)": "num_steps must be at least 1: got 0",
    "collect(['a'], 'single.6', 'c', model='flux-tiny', seed=-1)": "--seed must be at least 0: got -1",
    "collect(['a'], 'single.6', 'c', model='flux-tiny', repeats=0)": "--repeats must be at least 1: got 0",
    "capture('x', model='flux-tiny', seed=-1)": "--seed must be at least 0: got -1",
    "collect_clip('nowhere', 'c', tokens='class')": "--tokens must be one of cls, patches, all: got 'class'",
    "train_sae('nowhere', arch='tpk')": "--arch must be one of topk, batch_topk",
    "train_sae('nowhere', stream='image')": "--stream must be one of img, txt: got 'image'",
    "train_sae('nowhere', log='x')": "--log must be one of none, tensorboard, wandb: got 'x'",
    "evaluate_sae('nowhere', 'c', baselines='pcaa')": "one of pca, random, itda, neurons: got 'pcaa'",
    "export('nowhere', 'e', format='npz')": "--format must be one of safetensors, npy: got 'npz'",
    "export_sae('nowhere', output_dir='e', format='lens')": "--format must be one of sae_lens, sparsify",
    "create_visualization(output_format='giff')": "--output_format must be one of gif, mp4, png, html: got 'giff'",
    "create_visualization(order='step')": "--order must be one of depth, steps: got 'step'",
    "create_visualization(fps=0)": "--fps must be above 0: got 0",
    "explore('01234567')": "01234567",
    "train_sae('nowhere', k=0)": "--k must be at least 1: got 0",
    "train_sae('nowhere', k=[4, 0])": "--k must be at least 1: got 0",
    "train_sae('nowhere', max_tokens=0)": "--max_tokens must be at least 1: got 0",
    "train_sae('nowhere', batch_tokens=0)": "--batch_tokens must be at least 1: got 0",
    "train_sae('nowhere', resample=0)": "--resample must be at least 1: got 0",
    "train_sae('nowhere', seed=-1)": "--seed must be at least 0: got -1",
    "train_sae('nowhere', ema=2.0)": "--ema must be below 1: got 2.0",
    "evaluate_sae('nowhere', 'c', prompts=0)": "--prompts must be at least 1: got 0",
    "evaluate_sae('nowhere', 'c', splice_batch=0)": "--splice_batch must be at least 1: got 0",
    "evaluate_sae('nowhere', 'c', held_out=2.0)": "--held_out must be from 0 to below 1: got 2.0",
}


def test_words_that_are_not_known_are_refused_before_anything_is_done(tmp_path):
    script = "\n".join(f"try: print('done:', f.{call})\nexcept f.FluxIRError as error: print(error)" for call in CALLS)
    command = [sys.executable, "-c", f"import flux_ir as f\n{script}"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert len(told) == len(CALLS)
    for call, line in zip(CALLS, told, strict=True):
        assert CALLS[call] in line
        assert "hint: " in line
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_is_not_asked_for_what_it_has_settled(tmp_path):
    model = flux_ir.load_model("flux-tiny", parts=[], dtype="float32")
    with pytest.raises(FluxIRError, match="a loaded model is used as it is: got dtype, device as well"):
        flux_ir.collect(["a"], "single.6", tmp_path / "c", model=model, dtype="bfloat16", device="cpu")


def test_a_number_has_the_same_least_as_a_flag_and_from_python():
    told = {flag.name: flag.facts.minimum for flag in flags(TrainSAEOptions)}
    assert (told["k"], told["seed"], told["prompts"], told["lr"]) == (LEAST["k"], LEAST["seed"], None, None)
    check_least({"k": None, "prompts": ("a", "b"), "seed": [0, 1], "steps": iter([-1])})
    with pytest.raises(FluxIRError, match="--k must be at least 1: got 0"):
        check_least({"k": (4, 0)})
    with pytest.raises(FluxIRError, match="--permutations must be at least 1: got 0"):
        check_least({"permutations": 0}, permutations=1)
