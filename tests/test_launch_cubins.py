"""Compiled kernels on disk: found by what they were made from, never used if damaged, never in the way."""

import json
import stat

import pytest

from isokern.backends.launch import cubins
from isokern.backends.launch.image import Image

IMAGE = Image(b"\x7fELF machine code", "kernel", threads=96, shared=10, cluster=2, cooperative=True, scratch=5)


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "directory", lambda: tmp_path / "kernels")
    return cubins.file_of("compiler", ("source", "sm_90", "1.0"))


def compiler():
    def make():
        make.calls += 1
        return IMAGE

    make.calls = 0
    return make


def test_a_kernel_is_compiled_once_for_all_processes(path):
    make = compiler()
    assert cubins.cached(path, make) == cubins.cached(path, make) == IMAGE
    assert make.calls == 1


def test_anything_that_could_change_a_kernel_changes_its_file(path):
    names = [
        ("source", "sm_90", "1.0"),
        ("source", "sm_100", "1.0"),
        ("source", "sm_90", "1.1"),
        ("other", "sm_90", "1.0"),
    ]
    files = {cubins.file_of("compiler", name) for name in names} | {cubins.file_of("another", names[0])}
    assert len(files) == 5
    assert path in files


def flipped(text):
    head = json.loads(text)
    return json.dumps(head | {"code": "AAAA" + head["code"][4:]})


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "another code": flipped,
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "an unknown field": lambda text: text.replace('"threads"', '"unknown"'),
    "no JSON object": lambda text: "[1]",
    "no base64": lambda text: text.replace('"code": "', '"code": "?'),
    "no text": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kernel_is_compiled_again(path, damage, caplog):
    make = compiler()
    cubins.cached(path, make)
    path.write_bytes(DAMAGE[damage](path.read_text()).encode(errors="surrogateescape"))
    assert cubins.cached(path, make) == IMAGE
    assert make.calls == 2
    assert "made anew" in caplog.text
    cubins.cached(path, make)
    assert make.calls == 2, "and written again"


def test_a_folder_that_cannot_be_written_costs_the_saving_alone(path, tmp_path, caplog):
    (tmp_path / "kernels").write_text("a file where the folder should be")
    assert cubins.cached(path, compiler()) == IMAGE
    assert "cannot write" in caplog.text


def test_a_discarded_kernel_is_compiled_again(path):
    make = compiler()
    cubins.discard(path)
    cubins.cached(path, make)
    cubins.discard(path)
    cubins.cached(path, make)
    assert make.calls == 2


def test_a_compilers_error_is_passed_on_and_leaves_no_file(path):
    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cubins.cached(path, fails)
    assert not path.exists()


def test_others_may_read_what_the_umask_lets_them(path):
    cubins.cached(path, compiler())
    assert path.stat().st_mode & stat.S_IRUSR
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing half written stays"


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    cubins.directory.cache_clear()
    monkeypatch.setenv("ISOKERN_CACHE", str(tmp_path))
    assert cubins.directory() == tmp_path / "kernels"
    cubins.directory.cache_clear()
