"""A server for each test, and no waiting between attempts."""

from collections.abc import Iterator

import pytest
from server import Server, serving

from dmd2.downloads.fetch import Fetch


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Fetch.__init__, "__kwdefaults__", {**Fetch.__init__.__kwdefaults__, "backoff_s": 0.0})
    with serving() as running:
        yield running
