"""LPIPS against the package called directly, with a random backbone; and what is said where it cannot be had."""

import lpips as package
import pytest
import torch

from flux_ir.steering import perceptual
from flux_ir.steering.dose import Price
from flux_ir.steering.perceptual import Lpips, find_lpips
from flux_ir.steering.regions import Grid
from flux_ir.steering.table import EDIT, Run, row_json, tabulate

GRID = Grid(width=48, height=64)
PRICE = Price(False, None, None, 0.5, None)


@pytest.fixture(scope="module")
def network():
    """The package's network with a random backbone, and our own use of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perceptual._network(random_backbone=True)


def pictures():
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, GRID.height, GRID.width, 3), dtype=torch.uint8, generator=draw)


def test_lpips_is_what_the_package_says_of_the_two_pictures(network):
    one, other = pictures()
    said = float(network(package.im2tensor(one.numpy()), package.im2tensor(other.numpy())))
    price = Lpips(network).added_to(PRICE, one, other, None, GRID)
    assert price.lpips == pytest.approx(said, rel=1e-5)
    assert price.lpips > 0
    assert price.lpips_outside is None
    assert Lpips(network).distance(one, one) == 0


def test_outside_the_region_its_pixels_are_made_equal(network):
    one, other = pictures()
    inside = torch.zeros(GRID.tokens, dtype=torch.bool)
    inside[0], inside[-1] = True, True
    restored = one.clone()
    restored[:16, :16], restored[-16:, -16:] = other[:16, :16], other[-16:, -16:]
    price = Lpips(network).added_to(PRICE, one, other, inside, GRID)
    said = float(network(package.im2tensor(restored.numpy()), package.im2tensor(other.numpy())))
    assert price.lpips_outside == pytest.approx(said, rel=1e-5)
    assert price.lpips_outside != price.lpips
    everywhere = torch.ones_like(inside)
    assert Lpips(network).added_to(PRICE, one, other, everywhere, GRID).lpips_outside is None


def test_without_the_package_nothing_is_said_and_without_its_weights_why(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_lpips("cpu", GRID) == (
        f"note: LPIPS is left out: there is no {tmp_path}/checkpoints/alexnet-owt-7be5be79.pth; "
        "this fetches it once: python -c \"import lpips; lpips.LPIPS(net='alex')\""
    )
    assert "needs 32 px, the picture has 16 x 64" in find_lpips("cpu", Grid(16, 64))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"damaged")
    assert find_lpips("cpu", GRID).startswith("note: LPIPS is left out: ")
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    assert find_lpips("cpu", GRID) is None


def test_numbers_without_lpips_say_nothing_of_it_and_are_read():
    run = Run(EDIT, 1.0, 0, None, None, None, PRICE)
    stored = run.to_json()
    assert sorted(stored["price"]) == sorted(name for name in Price._fields if not name.startswith("lpips"))
    assert Run.from_json(stored) == run
    (row,) = tabulate([run, run])
    assert "lpips" not in row_json(row)
    (row,) = tabulate([run, run._replace(price=PRICE._replace(lpips=0.1))])
    assert row.lpips is None  # of some of the pictures alone: no mean of the row
    (row,) = tabulate([run._replace(price=PRICE._replace(lpips=share)) for share in (0.1, 0.3)])
    assert row.lpips.mean == pytest.approx(0.2)
    assert row_json(row)["lpips"]["mean"] == row.lpips.mean
