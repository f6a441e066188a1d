"""A skip, in one line, of the test files of this folder for which `make test-real` could not download something."""

import pytest

from tests.real.install import FOLDER, PACKAGES


@pytest.fixture(autouse=True)
def downloads(request, monkeypatch):
    """Skip a test without the folders that its file names in NEEDS, and make the downloaded packages importable."""
    missing = [folder.name for folder in request.module.NEEDS if not folder.exists()]
    if missing:
        pytest.skip(f"{FOLDER} lacks {', '.join(missing)}; make test-real downloads them")
    monkeypatch.syspath_prepend(PACKAGES)
