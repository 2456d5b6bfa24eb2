"""Short runs of flux-tiny and short trainings on a small array, each into a fresh folder."""

import pytest

from flux_ir.commands.capture import main
from flux_ir.commands.train_sae import main as train_sae
from tests.commands.run_folder import SPEC
from tests.commands.small_training import QUICK


@pytest.fixture(autouse=True)
def no_named_weights(monkeypatch):
    """No variable of this machine leads to other weights."""
    for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def run(output, capsys):
    """Runs the command with these words, which must succeed. Returns the run's folder."""

    def capture(*words):
        known = set(output.iterdir()) if output.exists() else set()
        assert main([*words, "--output_dir", str(output)]) == 0, capsys.readouterr().err
        (made,) = set(output.iterdir()) - known
        return made

    return capture


@pytest.fixture
def train(tmp_path, capsys, array):
    """Trains with these words into a fresh folder, in this process; gives the code, stdout, stderr, and the folder."""

    def run(*words, captures=array):
        data = () if captures is None else ("--captures", str(captures))
        code = train_sae([*data, *QUICK, *words, "--output_dir", str(tmp_path / "saes")])
        told = capsys.readouterr()
        return code, told.out, told.err, tmp_path / "saes"

    return run
