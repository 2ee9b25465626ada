"""Arguments of public functions: what fits is taken, the rest is refused by name before anything is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmmilan import arguments
from mmmilan.arguments import check, checked
from mmmilan.errors import InputError


@pytest.mark.parametrize(
    ('hint', 'value', 'taken'),
    [
        (arguments.Count, np.int64(3), 3),
        (arguments.Rate, 1, 1.0),
        (arguments.Path, Path('a/b'), Path('a/b')),
        (arguments.Paths, iter(['a', 'b']), ['a', 'b']),
        (arguments.Paths, ['a'], 'a'),
        (arguments.Paths, np.array(['a', 'b'], object), ['a', 'b']),
        (arguments.Texts, ('a dog', 'a cat'), ['a dog', 'a cat']),
        (arguments.Images, 'a.jpg', ['a.jpg']),
        (arguments.Images, np.array(['a.jpg', 'b.jpg']), ['a.jpg', 'b.jpg']),
        (arguments.Count | None, None, None),
        (arguments.Device, 'cpu', 'cpu'),
    ],
)
def test_what_is_taken(hint, value, taken):
    assert check(hint, 'it', value) == taken


def test_arrays_and_pil_images():
    batch, picture = np.zeros((2, 4, 4, 3), np.uint8), Image.new('RGB', (4, 4))
    assert [each.shape for each in check(arguments.Images, 'images', batch)] == [(4, 4, 3)] * 2
    assert len(check(arguments.Images, 'images', batch[0])) == 1
    assert check(arguments.Images, 'images', [picture]) == [picture]


@pytest.mark.parametrize(
    ('hint', 'value', 'message'),
    [
        (arguments.Count, 0, 'it=0 is out of range; give a whole number from 1 to 1000000.'),
        (arguments.Count, True, 'it=True is not a whole number; give a whole number from 1 to 1000000.'),
        (arguments.Rate, float('nan'), 'it=nan is not a number above 0; give one, such as 0.001.'),
        (arguments.Path, ' ', "it=' ' names no file; give a path."),
        (arguments.Path, 3, 'it=3 is not a path; give a str or a Path.'),
        (arguments.Paths, [], 'it is empty; give at least one.'),
        (arguments.Text, '', 'it has an empty text; say something in it.'),
        (arguments.Texts, 'a dog', "it='a dog' is one text and not a list; give a list of texts."),
        (arguments.Images, [3], 'it=3 is not an image; give a path, a PIL image, or a uint8 array [H, W, 3] in BGR'),
        (arguments.Device, 'gpu', "it='gpu' is not a device of this machine; choose one of cpu"),
        (arguments.Path | dict, '', "it='' names no file; give a path."),
        (arguments.Paths, np.array([1, 2]), 'it=<ndarray> is not a list of paths; give one.'),
        (tuple[arguments.Pixels, arguments.Pixels] | arguments.Pixels, (8,), 'it=(8,) is wrong; give 2 values.'),
        (arguments.Paths | bool, ['a', 3], 'it=3 is not a path'),
        (bool | arguments.Path, 3, 'it=3 is not a path; give a str or a Path.'),
    ],
)
def test_what_is_refused(hint, value, message):
    with pytest.raises(InputError) as error:
        check(hint, 'it', value)
    assert str(error.value).startswith(message)


@checked
def build(data: arguments.Path, **changes: object) -> None:
    pass


@checked
def save(data: arguments.Paths, out: arguments.Path, *, batch_size: arguments.Count = 64) -> tuple:
    return data, out, batch_size


def test_a_call_is_checked_where_it_enters():
    assert save(['a'], 'o') == ('a', 'o', 64)
    for call, message in [
        (lambda: save('a', 'o', batchsize=3), 'save takes no batchsize; the nearest name is batch_size.'),
        (lambda: save('a'), "save: missing a required argument: 'out'; it takes data, out, batch_size."),
        (lambda: build('a', 'o', **{'b.c': 1}), 'build: too many positional arguments; it takes data, changes.'),
        (lambda: save('a', 'o', batch_size=0), 'batch_size=0 is out of range; give a whole number from 1 to 1000000.'),
    ]:
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message
