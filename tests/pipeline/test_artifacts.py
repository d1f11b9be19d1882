"""Publishing: whole or not at all, whoever is killed or comes at the same time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline.artifacts import publish_once, publishing, remembered, replace_directory

AT_ONCE = 8


def make_directory(text: str, path: Path) -> None:
    path.mkdir()
    (path / "file").write_text(text)


def publish_number(target: Path, number: int) -> str:
    return publish_once(target, partial(make_directory, str(number))).joinpath("file").read_text()


def replace_with_number(target: Path, number: int) -> None:
    with publishing(target) as path:
        path.write_text(str(number) * 100_000)


def test_it_is_made_once_with_the_folders_above(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    assert publish_number(target, 1) == publish_number(target, 2) == "1"
    assert list(target.parent.iterdir()) == [target], "scratch is left"


def test_of_several_processes_the_first_makes_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(AT_ONCE) as pool:
        for attempt in range(20):
            publish = partial(publish_number, tmp_path / str(attempt))
            assert len(set(pool.map(publish, range(AT_ONCE), chunksize=1))) == 1
    assert len(list(tmp_path.iterdir())) == 20, "scratch is left"


def test_of_several_processes_the_last_replaces_a_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with multiprocessing.get_context("fork").Pool(AT_ONCE) as pool:
        pool.map(partial(replace_with_number, target), list(range(AT_ONCE)) * 20, chunksize=1)
    text = target.read_text()
    assert len(text) == 100_000 and len(set(text)) == 1
    assert list(tmp_path.iterdir()) == [target], "scratch is left"


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        make_directory("half", path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_once(tmp_path / "directory", fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match="full"), publishing(tmp_path / "file") as path:
        path.write_text("half")
        raise OSError("full")
    assert (tmp_path / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


KILLED = """
import sys, time
from pathlib import Path
from pipeline.artifacts import publishing
with publishing(Path(sys.argv[1])) as path:
    path.write_text("half")
    (path.parent / "more").mkdir()
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    target, half = tmp_path / "file", tmp_path / ".file.new" / "file"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)])
    while not (half.parent / "more").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert half.exists() and not target.exists()
    with publishing(target) as path:
        assert not path.exists()
        path.write_text("whole")
    assert target.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target], "scratch is left"


def test_what_is_not_as_wanted_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("short")
    is_long = lambda path: path.exists() and path.stat().st_size > 5  # noqa: E731
    for text in ("longer", "not needed"):
        publish_once(tmp_path / "file", lambda p, text=text: p.write_text(text), is_done=is_long)
    assert (tmp_path / "file").read_text() == "longer"


def test_others_may_read_what_a_library_wrote_for_its_owner(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        make_directory("secret", path)
        (path / "file").chmod(0o600)

    umask = os.umask(0o027)
    try:
        publish_once(tmp_path / "directory", write)
    finally:
        os.umask(umask)
    assert (tmp_path / "directory" / "file").stat().st_mode & 0o777 == 0o640


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    for text in ("first", "second"):
        make_directory(text, tmp_path / "finished")
        replace_directory(tmp_path / "finished", tmp_path / "target")
        assert (tmp_path / "target" / "file").read_text() == text
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_what_follows_from_files_is_computed_again_only_if_one_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.artifacts.SETTLED_S", 0)
    files = [tmp_path / "a", tmp_path / "b"]
    calls = []

    def read() -> str:
        calls.append(1)
        return "".join(file.read_text() for file in files)

    def ask(what: str = "content", settings: object = None) -> str:
        time.sleep(0.02)  # two ticks of a file's time
        found: str = remembered(what, files, read, folder=tmp_path / "cache", settings=settings)
        return found

    for file in files:
        file.write_text("1")
    assert ask() == ask() == "11" and len(calls) == 1
    files[1].write_text("2")
    assert ask() == "12", "as large as before, and later"
    (tmp_path / "c").write_text("3")
    os.utime(tmp_path / "c", ns=(0, files[1].stat().st_mtime_ns))
    (tmp_path / "c").replace(files[1])
    assert ask() == "13", "as large and as old as before"
    count = len(calls)
    assert ask("another") == ask(settings={"a": 1}) == "13" and len(calls) == count + 2


def test_what_was_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in ("1", "2", "3"):
        file.write_text(text)  # within one tick of its time, perhaps
        assert remembered("content", [file], file.read_text, folder=tmp_path / "cache") == text


def test_where_nothing_can_be_written_nothing_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "cache").write_text("a file, no folder")
    read = (tmp_path / "file").read_text
    assert remembered("content", [tmp_path / "file"], read, folder=tmp_path / "cache") == "1"
