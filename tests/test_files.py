"""Files are written whole or not at all, over plain files only, and nothing of a run that fails or is killed stays."""

import errno
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from normfuse.files import Output, OutputError, check_target, same_file


def write(path, text, **options):
    with Output(path, **options) as output:
        output.staged.write_text(text)
        output.publish()


def in_child(action):
    """Runs an action in a process that ends at once afterwards, as if it was killed."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def names(folder):
    return sorted(os.listdir(folder))


# What may be written


def folder(path):
    path.mkdir()


def device(path):
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no right to make a device")


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NOT_PLAIN = {"a folder": folder, "a device": device, "a pipe": os.mkfifo, "a socket": listening}


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_no_plain_file_is_refused_and_stays(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 bytes
    NOT_PLAIN[kind](Path("it"))
    target = Path("it")
    if linked:
        target = Path("link")
        target.symlink_to("it")
    before = os.lstat("it")
    with pytest.raises(OutputError, match=f"cannot write {target}: it is {kind}"):
        write(target, "new")
    after = os.lstat("it")
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert names(tmp_path) == (["it", "link"] if linked else ["it"])


@pytest.mark.parametrize(
    ("path", "because"),
    [
        ("/dev/full", "it is a device"),
        ("absent/m", "there is no folder absent"),
        ("file/m", "not a directory"),
        ("n" * 300, "file name too long"),
        ("zero\0byte", "embedded null byte"),
        ("loop", "too many levels of symbolic links"),
        ("dangling", "there is no folder .*nowhere"),
        ("", "it is a folder"),
    ],
)
def test_names_that_cannot_be_written(tmp_path, monkeypatch, path, because):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere/m")
    before = names(".")
    with pytest.raises(OutputError, match=because) as caught:
        write(path, "new")
    assert "\n" not in str(caught.value) and names(".") == before


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match="the working directory is gone"):
        check_target("model.onnx")


@pytest.mark.parametrize("target", ["/dev/stdout", "printed"])
def test_what_the_program_prints_to_is_not_replaced(tmp_path, target):
    code = f"from normfuse.files import check_target\ntry: check_target({target!r})\nexcept ValueError as e: print(e)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with (tmp_path / "printed").open("w") as printed:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=printed, check=True)
    assert "it is where this program prints to" in (tmp_path / "printed").read_text()


def test_an_open_file_without_a_name_is_refused(tmp_path):
    with (tmp_path / "gone").open("w") as file:
        (tmp_path / "gone").unlink()
        with pytest.raises(OutputError, match="without a name"):
            check_target(f"/dev/fd/{file.fileno()}")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everything")
def test_read_only_files_and_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(OutputError, match="it is read-only"):
        write(tmp_path / "file", "new")
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match=r"the folder .* is read-only"):
        write(tmp_path / "other", "new")
    tmp_path.chmod(0o755)


def test_what_is_read_is_not_written_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("model").write_text("weights")
    Path("linked").symlink_to("model")
    os.link("model", "hard")
    for other in ("model", "./model", "folder/../model", "linked", "hard", tmp_path / "model"):
        assert same_file("model", other)
        with pytest.raises(OutputError, match="this command reads it too"):
            write(other, "new", reads=["absent", "model"])
    with pytest.raises(OutputError, match="this command reads it too"):
        write("model", "new", reads=["linked"])
    assert not any(same_file("model", name) for name in ("absent", "a\0b", "long" * 2000))
    assert Path("model").read_text() == "weights"
    write("another", "new", reads=["absent", "model"])


def test_the_error_is_of_the_kind_that_is_asked_for(tmp_path):
    with pytest.raises(KeyError):
        check_target(tmp_path, error=KeyError)


# How it is written


def test_links_stay_and_what_they_point_to_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    for name in ("old", "dangling"):
        (tmp_path / f"to {name}").symlink_to(Path("real") / name)
        (tmp_path / f"to to {name}").symlink_to(f"to {name}")
        write(tmp_path / f"to to {name}", "new")
        assert (tmp_path / f"to {name}").is_symlink() and (tmp_path / f"to to {name}").is_symlink()
        assert not (tmp_path / "real" / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"
    assert names(tmp_path / "real") == ["dangling", "old"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_what_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "m", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_appears_if_it_fails_or_is_not_published(tmp_path, problem):
    (tmp_path / "m").write_text("old")
    with pytest.raises(problem), Output(tmp_path / "m") as output:
        output.staged.write_text("new")
        raise problem
    with Output(tmp_path / "m") as output:
        output.staged.write_text("new")
    assert names(tmp_path) == ["m"] and (tmp_path / "m").read_text() == "old"


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*m: no space left on device$"), Output(tmp_path / "m"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), Output(tmp_path / "m"):
        raise FileNotFoundError(errno.ENOENT, "an error of somebody else")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match="file too large"):
            write(tmp_path / "m", "n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_a_folder_that_came_in_between_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="it is a folder"), Output(tmp_path / "m") as output:
        output.staged.write_text("new")
        (tmp_path / "m").mkdir()
        output.publish()
    assert names(tmp_path) == ["m"]


# What killed runs leave


def killed_while_writing(path):
    def action():
        Output(path).__enter__().staged.write_text("half")

    in_child(action)


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path):
    killed_while_writing(tmp_path / "other")
    (left,) = names(tmp_path)
    assert left.startswith(".normfuse-")
    write(tmp_path / "m", "new")
    assert names(tmp_path) == ["m"]


def test_runs_that_are_alive_are_left_alone_and_so_is_what_is_not_ours(tmp_path):
    (tmp_path / ".normfuse-notes").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".normfuse-link").symlink_to("elsewhere")
    with Output(tmp_path / "m") as first:
        first.staged.write_text("first")
        write(tmp_path / "m", "second")
        in_child(lambda: write(tmp_path / "n", "another process"))
        first.publish()
    assert names(tmp_path) == [".normfuse-link", ".normfuse-notes", "elsewhere", "m", "n"]
    assert (tmp_path / "m").read_text() == "first"


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again"])
def test_a_folder_that_is_removed_meanwhile_is_named(tmp_path, again):
    place = tmp_path / "folder"
    place.mkdir()
    message = r"cannot write .*/folder/m: its folder was removed meanwhile"
    with pytest.raises(OutputError, match=message), Output(place / "m") as output:
        shutil.rmtree(place)
        if again:
            place.mkdir()
        output.staged.write_text("")
    assert list(tmp_path.rglob("*")) == [place] * again
