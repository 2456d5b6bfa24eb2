"""flux-tiny, and a small collection that nothing happened to, made once; a copy of it to be broken."""

import shutil

import pytest

from flux_ir.activations import shards
from tests.collecting.small_jobs import collected, new_suite, settings_of


@pytest.fixture(scope="session")
def suite():
    return new_suite()


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two generations: a small collection has several."""
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)


@pytest.fixture(scope="session")
def plain(suite, tmp_path_factory):
    """A collection of five generations that nothing happened to. Read it only."""
    folder = tmp_path_factory.mktemp("plain")
    collected(folder, settings_of(), suite)
    return folder


@pytest.fixture
def whole(plain, tmp_path):
    """A copy of it, to be broken."""
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def whole_pairs(plain_pairs, tmp_path):
    """A copy of the one in pairs, to be broken."""
    shutil.copytree(plain_pairs, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def plain_pairs(suite, tmp_path_factory):
    """Those five generations in shards of two. Read it only."""
    folder = tmp_path_factory.mktemp("plain_pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_IMAGES", 2)
        collected(folder, settings_of(batch_size=1), suite)
    return folder
