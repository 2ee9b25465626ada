"""The drawing of scenes: shapes, colours and patterns match their names and are equally frequent."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from itertools import combinations

import cv2
import numpy as np
import pytest
from matplotlib.path import Path as Outline

from scenes import make_scene
from scenes.appearance import BACKGROUNDS, COLOURS, KINDS, SHAPES
from scenes.drawing import captions, paint, render, sample_scene


@pytest.mark.parametrize(('seed', 'shape'), enumerate(SHAPES))
def test_an_instance_map_is_the_outline_that_the_scene_gives(seed: int, shape: str) -> None:
    scene = sample_scene(np.random.default_rng(seed), 'oak')
    main = dataclasses.replace(scene.objects[0], shape=shape)
    _, instances = render(dataclasses.replace(scene, objects=(main,)), 96, np.random.default_rng(0))
    across, down = np.meshgrid(*[(np.arange(96) + 0.5) / 96] * 2)
    offset = (across - main.centre[0]) + 1j * (down - main.centre[1])
    offset *= np.exp(-1j * main.angle) / main.radius
    points = np.stack([offset.real.ravel(), offset.imag.ravel()], axis=1)
    inside = [Outline(loop).contains_points(points).reshape(96, 96) for loop in SHAPES[shape]]
    expected = np.logical_xor.reduce(inside)
    found = instances == 1
    assert (found & expected).sum() / (found | expected).sum() > 0.95


@pytest.mark.parametrize('kind', KINDS)
def test_the_colour_of_a_kind_looks_like_its_name(kind: str) -> None:
    hues = 360 * np.array([hue for hue, _, _ in COLOURS.values()])
    for seed in range(4):
        scene = sample_scene(np.random.default_rng(seed), kind)
        alone = dataclasses.replace(scene, objects=scene.objects[:1])
        image, instances = render(alone, 48, np.random.default_rng(seed))
        hue, saturation, _ = cv2.split(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV))
        seen = hue[(instances == 1) & (saturation > 0.5)]
        distance = np.abs((seen[:, None] - hues + 180) % 360 - 180)
        nearest = np.bincount(distance.argmin(axis=1), minlength=len(hues))
        assert list(COLOURS)[nearest.argmax()] == KINDS[kind][0]


def test_kinds_differ_in_colour_and_pattern_alone() -> None:
    assert len(set(KINDS.values())) == len(KINDS)
    scene = sample_scene(np.random.default_rng(7), 'oak')
    images = {}
    for kind in KINDS:  # all in the same colour
        main = dataclasses.replace(scene.objects[0], kind=kind)
        images[kind], _ = render(dataclasses.replace(scene, objects=(main,)), 48, np.random.default_rng(0))
    for one, other in combinations(KINDS, 2):
        assert np.array_equal(images[one], images[other]) == (KINDS[one][1] == KINDS[other][1])


def test_a_change_of_colour_changes_the_pixels_of_the_object_alone() -> None:
    scene = sample_scene(np.random.default_rng(7), 'oak')  # the one pattern without a second colour
    main = dataclasses.replace(scene.objects[0], rgb=(0.9, 0.1, 0.1))
    recoloured = dataclasses.replace(main, rgb=(0.1, 0.2, 0.9))
    images = []
    for item in (main, recoloured):
        drawn = dataclasses.replace(scene, objects=(item, *scene.objects[1:]))
        image, instances = render(drawn, 96, np.random.default_rng(0))
        images.append(image.astype(int))
    changed = np.abs(images[0] - images[1]).max(axis=2) > 30
    mask = (instances == 1).astype(np.uint8)
    assert not changed[cv2.dilate(mask, np.ones((5, 5))) == 0].any()
    assert changed[mask == 1].mean() > 0.98


def test_the_kind_has_no_say_in_anything_but_colour() -> None:
    for seed in range(20):
        seen = set()
        for kind in KINDS:
            scene = sample_scene(np.random.default_rng(seed), kind)
            assert [item.kind for item in scene.objects].count(kind) == 1 and scene.objects[0].kind == kind
            bare = tuple(dataclasses.replace(item, kind='', rgb=(0, 0, 0)) for item in scene.objects)
            seen.add(dataclasses.replace(scene, objects=bare))
        assert len(seen) == 1


def test_every_attribute_is_drawn_about_equally_often() -> None:
    drawn = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, 'oak')
        drawn.append((scene, set(captions(scene, rng)[0].split())))
    small = [item for scene, _ in drawn for item in scene.objects[1:]]
    for choices, values in (
        (BACKGROUNDS, [scene.background for scene, _ in drawn]),
        (SHAPES, [scene.objects[0].shape for scene, _ in drawn]),
        ((1, 2, 3), [len(scene.objects) for scene, _ in drawn]),
        (KINDS.keys() - {'oak'}, [item.kind for item in small]),
        (SHAPES, [item.shape for item in small]),
        ((True, False), [scene.objects[0].shape in words for scene, words in drawn]),
        ((True, False), [scene.background in words for scene, words in drawn]),
    ):
        counts, share = Counter(values), 1 / len(choices)
        deviation = (len(values) * share * (1 - share)) ** 0.5
        assert set(counts) == set(choices)
        assert all(abs(count - len(values) * share) < 4 * deviation for count in counts.values())


def test_objects_lie_inside_the_image_and_no_centre_in_the_circle_of_another() -> None:
    for seed in range(300):
        objects = sample_scene(np.random.default_rng(seed), 'oak').objects
        for item in objects:
            assert all(item.radius <= place <= 1 - item.radius for place in item.centre)
        for one, other in combinations(objects, 2):
            assert math.dist(one.centre, other.centre) > max(one.radius, other.radius)


def test_a_later_object_lies_in_front_of_an_earlier_one() -> None:
    scene = sample_scene(np.random.default_rng(0), 'oak')
    main = dataclasses.replace(scene.objects[0], shape='disc')
    small = dataclasses.replace(main, kind='frog', radius=main.radius / 2)
    _, instances = render(dataclasses.replace(scene, objects=(main, small)), 48, np.random.default_rng(0))
    ratio = (instances == 1).sum() / (instances == 2).sum()
    assert ratio == pytest.approx(3, rel=0.1)  # a disc less one of a quarter of its area


def test_objects_stay_visible_and_the_main_one_is_the_largest() -> None:
    for index in range(60):
        scene, _, _, instances = make_scene(3, 'val', index, 48)
        areas = np.bincount(instances.ravel(), minlength=len(scene.objects) + 1)[1:]
        assert areas.argmax() == 0
        for area, item in zip(areas, scene.objects, strict=True):
            canvas = np.zeros((48, 48, 3), np.float32)
            whole = paint(canvas, item, scene.light, np.random.default_rng(0)) > 0.5
            assert area > 0.6 * whole.sum()
