"""flux-tiny, and a small collection that nothing happened to, made once; a copy of it to be broken."""

import pytest

from tests.collecting.small_jobs import collected, files_of, new_suite, settings_of


@pytest.fixture(scope="session")
def suite():
    return new_suite()


@pytest.fixture(scope="session")
def plain(suite, tmp_path_factory):
    """A collection of five generations that nothing happened to. Read it only."""
    folder = tmp_path_factory.mktemp("plain")
    collected(folder, settings_of(), suite)
    return folder


@pytest.fixture
def whole(plain, tmp_path):
    """A copy of it, to be broken."""
    for name, content in files_of(plain).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path
