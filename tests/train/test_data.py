"""Text: what is read, what is refused, what is held out, what is drawn."""

from __future__ import annotations

import pytest
import torch

from overdrive.models import ArgumentError
from overdrive.train import Text, standard_library


def written(folder, *contents: bytes):
    paths = [folder / f"{number}.txt" for number in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def test_files_are_joined_in_order_and_the_end_is_held_out(tmp_path):
    text = Text(written(tmp_path, b"a" * 500, bytes(range(1, 256)), b"z" * 500), length=10)
    whole = bytes(torch.cat((text.training, text.held_out)).tolist())
    assert whole == b"a" * 500 + b"\n" + bytes(range(1, 256)) + b"\n" + b"z" * 500
    assert len(text.held_out) == len(whole) // 20


def test_the_hash_is_of_what_the_text_says(tmp_path):
    one, other = written(tmp_path, b"to be or not to be " * 10, b"to be or not to be " * 10)
    assert Text([one], 4).sha256 == Text([other], 4).sha256 != Text([one, other], 4).sha256


def test_batches_are_windows_that_their_number_decides(tmp_path):
    text = Text(written(tmp_path, bytes(range(1, 256)) * 3), length=8)
    first = text.batch(seed=1, number=0, size=5)
    assert first.shape == (5, 9)
    assert first.dtype == torch.uint8
    assert all(bytes(row.tolist()) in bytes(text.training.tolist()) for row in first)
    assert torch.equal(first, text.batch(1, 0, 5))
    assert not torch.equal(first, text.batch(1, 1, 5))
    assert not torch.equal(first, text.batch(2, 0, 5))


def test_every_window_can_come(tmp_path):
    text = Text(written(tmp_path, bytes(range(1, 31))), length=8)
    starts = {int(text.batch(0, number, 1)[0, 0]) for number in range(400)}
    assert starts == {*range(1, len(text.training) - 8 + 1)}


def test_validation_spreads_over_what_is_held_out(tmp_path):
    text = Text(written(tmp_path, bytes(range(1, 256)) * 20), length=8)
    windows = torch.cat(text.validation(count=3, size=4))
    assert windows.shape == (12, 9)
    assert torch.equal(windows[0], text.held_out[:9])
    assert torch.equal(windows[-1], text.held_out[-9:])
    assert torch.equal(windows, torch.cat(text.validation(3, 4)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"abc\0def", "is binary: byte 3 is NUL"),
        ("plain words".encode("utf-16"), "is binary.*Convert UTF-16 or UTF-32 to UTF-8"),
    ],
    ids=["missing", "empty", "binary", "utf-16"],
)
def test_what_is_no_text_is_refused(tmp_path, content, words):
    path = tmp_path / "story.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=words) as caught:
        Text([path], 4)
    assert caught.value.argument == "texts"
    assert "story.txt" in str(caught.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"is a folder; name the files in it"):
        Text([tmp_path], 4)


def test_bytes_that_are_no_utf8_are_text(tmp_path):
    assert len(Text(written(tmp_path, "café".encode("latin-1") * 20), 4).training)


@pytest.mark.parametrize("length", [50, 1000])
def test_a_sequence_longer_than_the_text_is_refused(tmp_path, length):
    paths = written(tmp_path, b"x" * 101)
    with pytest.raises(ArgumentError, match=f"at least {2 * (length + 1)} .*this one has 101") as caught:
        Text(paths, length)
    assert caught.value.argument == "context"


def test_the_longest_sequence_that_a_text_allows(tmp_path):
    text = Text(written(tmp_path, b"x" * 102), 50)
    assert len(text.training) == len(text.held_out) == 51
    assert text.batch(0, 0, 1).shape == (1, 51)


def test_the_standard_library_is_text():
    paths = standard_library()
    assert len(paths) > 100
    assert not any("site-packages" in path.parts for path in paths)
    assert len(Text(paths, 128).training) > 1e6
