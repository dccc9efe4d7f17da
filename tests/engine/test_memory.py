"""The memory of this machine."""

from types import SimpleNamespace

from engine import memory


def test_what_is_installed_is_what_the_system_says(monkeypatch):
    assert 2**28 < memory.installed() < 2**50
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory, "os", SimpleNamespace(sysconf=pages.get))
    assert memory.installed() == 4_096_000
    monkeypatch.setattr(memory, "os", SimpleNamespace())
    assert memory.installed() == 8 * 2**30


def test_the_bandwidth_is_that_of_the_fastest_read(monkeypatch):
    shapes = [(64, 100), (100, 64), (300, 64)]
    assert 2**20 < memory.bandwidth(shapes, 2**20, 2) < 2**50
    clock = iter([0, 5.0, 10, 10.5, 20, 23])  # three reads, of 5, 0.5 and 3 seconds
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=clock.__next__))
    read = 4 * 64 * (100 + 100 + 300 + 100)  # with the first once more there are so many bytes as are asked for
    assert memory.bandwidth(shapes, 140_000, 3) == read / 0.5
