"""Annotations of objects in Pascal VOC's XML."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.progress import track

from mmmilan.datasets.classes import Names, as_name
from mmmilan.datasets.object_formats import Images, Part, by_lists, files_in, in_coco_format, missing, roles_of
from mmmilan.errors import InputError
from mmmilan.files import first_line


def voc_files(root: Path) -> list[Path]:
    """XML files of Pascal VOC."""
    files = [root / file for file in files_in(root, '.xml')] if root.is_dir() else []
    return [file for file in files if re.search(rb'<annotation[\s>]', head_of(file))]


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open('rb') as file:
        return file.read(1000)


def voc_parts(files: list[Path], root: Path, given: Names | None) -> list[Part]:
    """The splits of Pascal VOC: by the lists in ``ImageSets/Main``, or else by folders."""
    images = Images(root)
    divided, notes = by_lists(root, 'Main', [str(file) for file in files])
    roles: dict[str, list[Path]] = defaultdict(list)
    roles.update({role: [files[i] for i in places] for role, places in divided.items() if places})
    for file in files if not divided else ():
        roles[next(iter(roles_of(os.path.relpath(file.parent, root))), '')].append(file)
    found = {as_name(each.findtext('name', '')) for file in files for each in voc_root(file).findall('object')}
    names = sorted(found - {''})
    return [
        Part(
            role,
            f'{role} of {root}' if role else str(root),
            lambda role=role, own=own: read_voc(own, names, role, images),
            notes,
        )
        for role, own in roles.items()
    ]


def voc_root(path: Path) -> ElementTree.Element:
    """What an XML file holds.

    Raises:
        InputError: it is no XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f'{path} cannot be read as XML ({first_line(error)}); write it again.') from error


def voc_text(element: ElementTree.Element, field: str) -> str:
    """What a field within an element of an XML file says."""
    if text := element.findtext(field):
        return text
    raise ValueError(f'Missing field {field!r}')


def voc_object(element: ElementTree.Element, names: list[str]) -> dict[str, Any]:
    """An object of an XML file, without the id of its image; a difficult one is ignored, as in Pascal VOC's scores."""
    name = voc_text(element, 'name')  # with the spaces of an editor around it
    if as_name(name) not in names:
        raise ValueError(f'Unknown category name {name!r}')
    left, top, right, bottom = (float(voc_text(element, f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
    box = [left, top, right - left, bottom - top]
    ignored = element.findtext('difficult', '').strip() == '1'
    return dict(category_id=names.index(as_name(name)), bbox=box, area=box[2] * box[3], ignore=ignored)


def read_voc(files: list[Path], names: list[str], role: str, images: Images) -> dict[str, Any]:
    """The objects of XML files."""
    entries, objects, sought = [], [], []
    for file in track(files, 'Reading labels', transient=True):
        root = voc_root(file)
        try:
            name = voc_text(root, 'filename')
            width, height = (int(voc_text(root, f'size/{side}')) for side in ('width', 'height'))
            own = [voc_object(each, names) for each in root.findall('object')]
        except ValueError as error:
            raise InputError(
                f'{file} is not as Pascal VOC has it ({first_line(error)}); correct or remove it.'
            ) from error
        sought.append(images.seek(name, file.parent, file.stem))
        size = dict(width=width, height=height) if width > 0 and height > 0 else {}  # some tools write 0
        objects += [each | dict(image_id=len(entries)) for each in own]
        entries.append(dict(file_name=missing(name, file)) | size)
    for entry, path in zip(entries, images.choose(sought, role), strict=True):
        entry['file_name'] = path or entry['file_name']
    return in_coco_format(entries, names, objects)
