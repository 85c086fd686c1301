import errno
import os
import resource

import pytest

from newllm_lib.system.files import write_atomic, write_text_atomic


@pytest.fixture
def old(tmp_path):
    """A file with old content, alone in its folder."""
    path = tmp_path / "kept.txt"
    path.write_text("old")
    return path


def assert_untouched(old):
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_a_file_is_written_and_replaced_whole(tmp_path):
    path = tmp_path / "new.bin"
    write_atomic(path, lambda file: file.write(b"\x00one"))
    assert path.read_bytes() == b"\x00one"
    write_text_atomic(path, "né\n")
    assert path.read_bytes() == b"n\xc3\xa9\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_whole(old):
    def write(file):
        file.write(b"half of the new")
        file.flush()
        assert old.read_text() == "old"

    write_atomic(old, write)
    assert old.read_text() == "half of the new"


def test_a_full_disk_leaves_the_old_file_and_names_the_path(old):
    def write(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as failed:
        write_atomic(old, write)
    assert failed.value.errno == errno.ENOSPC
    assert failed.value.strerror == "No space left on device"
    assert str(failed.value) == (
        f"cannot write {old}: No space left on device (the disk is full: free some space, or choose another folder); "
        "what was there is unchanged"
    )
    assert_untouched(old)


def test_a_write_that_the_system_refuses_leaves_the_old_file(old):
    """A real failure of the operating system: files may not grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as failed:
            write_atomic(old, lambda file: file.write(b"x" * 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.value.errno == errno.EFBIG
    assert f"cannot write {old}: " in str(failed.value)
    assert_untouched(old)


def test_an_error_without_a_number_keeps_its_words(old):
    """NumPy says of a full disk only 'N requested and M written'."""

    def write(file):
        raise OSError("100 requested and 10 written")

    with pytest.raises(OSError, match="100 requested and 10 written") as failed:
        write_atomic(old, write)
    assert f"cannot write {old}: " in str(failed.value)
    assert_untouched(old)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("not a disk's fault")])
def test_an_interruption_passes_through_and_leaves_the_old_file(old, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised:
        write_atomic(old, write)
    assert raised.value is error
    assert_untouched(old)


def test_a_failed_rename_leaves_no_temporary_file(tmp_path):
    folder = tmp_path / "a-folder"
    folder.mkdir()
    with pytest.raises(OSError, match=r"cannot write .*a-folder: "):
        write_text_atomic(folder, "text")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*nowhere/file\.txt: No such file or directory"):
        write_text_atomic(tmp_path / "nowhere" / "file.txt", "text")
