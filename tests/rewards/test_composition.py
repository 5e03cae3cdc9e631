"""Presence, relation and count on hand-made detections; the detector class on a tiny random model and on the
shipped one."""

import random

import pytest, torch

from drl_toolkit.emoji import world
from drl_toolkit.rewards.composition import Detections, Detector, sorted_boxes
from drl_toolkit.emoji.rewards import composition, composition_reward, presence, strictness, wanted_classes
from drl_toolkit.utils.images import to_pil, to_tensor


def found(*objects):
    "Detections of one image from (name, confidence, centre x, centre y)."
    objects = sorted(objects, key=lambda o: -o[1])
    boxes = torch.tensor([[(x - 0.15, y - 0.15, x + 0.15, y + 0.15) for _, _, x, y in objects]])
    return Detections(
        torch.tensor([[o[1] for o in objects]]),
        torch.tensor([[world.CLASSES.index(o[0]) for o in objects]]),
        boxes,
        world.CLASSES,
    )


CAT_ABOVE = found(('cat', 0.9, 0.5, 0.25), ('dog', 0.7, 0.5, 0.75), ('key', 0.2, 0.1, 0.1))


def test_presence_is_equation_13():
    assert (
        presence(CAT_ABOVE, 0, 'a cat above a dog')
        == pytest.approx(0.8)
        == presence(CAT_ABOVE, 0, 'a dog next to a cat')
    )
    assert presence(CAT_ABOVE, 0, 'a cat above a fish') == pytest.approx(0.45) and presence(
        CAT_ABOVE, 0, 'two keys'
    ) == pytest.approx(0.2)
    assert wanted_classes('a portrait of a doctor on a blue background') == [world.PERSON]


def test_the_second_best_class_of_a_box_counts_and_has_a_gradient():
    p = torch.full((1, 2, len(world.CLASSES)), 0.01)
    p[0, 0, [world.CLASSES.index(n) for n in ('cat', 'dog')]] = torch.tensor([0.60, 0.59])
    p.requires_grad_()
    d = Detections(*sorted_boxes(p, torch.full((1, 2, 4), 0.5)), world.CLASSES, p)
    assert presence(d, 0, 'a dog').item() == pytest.approx(0.59) and presence(
        d, 0, 'a cat next to a dog'
    ).item() == pytest.approx(0.595)
    presence(d, 0, 'a dog').backward()
    assert p.grad[0, 0, world.CLASSES.index('dog')] == 1 and p.grad.sum() == 1
    assert [name for name, _, _ in d.above(0)] == ['cat']  # as an object it is one of the two


def test_strict_asks_for_relation_and_count():
    assert strictness(CAT_ABOVE, 0, 'a cat above a dog') == pytest.approx(0.8)
    for wrong in ('a dog above a cat', 'a cat next to a dog'):
        assert strictness(CAT_ABOVE, 0, wrong) == pytest.approx(0.4)
    beside = found(('cat', 0.9, 0.8, 0.5), ('dog', 0.7, 0.2, 0.55))
    assert (
        strictness(beside, 0, 'a cat next to a dog')
        == strictness(beside, 0, 'a dog next to a cat')
        == pytest.approx(0.8)
    )
    stars = found(
        ('star', 0.9, 0.5, 0.2), ('star', 0.9, 0.2, 0.7), ('star', 0.8, 0.52, 0.22)
    )  # the third is the first again
    assert strictness(stars, 0, 'two stars') == pytest.approx(0.9) and strictness(
        stars, 0, 'three stars'
    ) == pytest.approx(0.9 * 2 / 3)


def test_strict_is_never_above_presence_and_alone_needs_a_missing_object():
    rng = random.Random(0)
    for _ in range(60):
        scene = found(
            *[(rng.choice(world.CLASSES[:4]), rng.random(), rng.random(), rng.random()) for _ in range(4)]
        )
        prompt = world.prompt_of(
            world.Wanted('pair', tuple(rng.sample(world.CLASSES[:4], 2)), rng.choice(world.RELATIONS))
        )
        assert 0 <= strictness(scene, 0, prompt) <= presence(scene, 0, prompt) + 1e-6


def test_prompt_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="'a unicorn' is outside the emoji world"):
        composition(torch.rand(1, 3, 64, 64), ['a unicorn'])


@pytest.fixture(scope='module')
def random_detector(tmp_path_factory):
    from drl_toolkit.emoji.pretrain.detector import image_processor, new_detector

    folder = tmp_path_factory.mktemp('detector')
    torch.manual_seed(0)
    new_detector().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return Detector(folder)


def test_detector_agrees_with_transformers_own_processing(random_detector):
    """Same pixels as the image processor, same scores, labels and boxes as its post-processing where a
    query's best class is meant."""
    d, images = random_detector, torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = d.processor(images=to_pil(images), return_tensors='pt')
    assert (own['pixel_values'] - d.pixels(images)['pixel_values']).abs().max() < 1 / 255
    result = d(images)
    with torch.no_grad():
        out = d.model(**d.pixels(images))
    theirs = d.processor.post_process_object_detection(out, threshold=0.0, target_sizes=[(1, 1)] * 3)
    for i in range(3):
        assert result.scores[i, 0].item() == pytest.approx(theirs[i]['scores'].max().item(), abs=1e-5)
        assert torch.allclose(
            result.boxes[i, 0], theirs[i]['boxes'][theirs[i]['scores'].argmax()].clamp(0, 1), atol=1e-5
        )
    values = composition_reward(d)(images, ['a cat', 'a cat above a dog', 'two keys'])
    assert values.shape == (3,) and ((values >= 0) & (values <= 1)).all()


def test_other_picture_sizes_are_resized(random_detector):
    assert random_detector(torch.rand(2, 3, 96, 96)).boxes.shape[0] == 2


def test_shipped_detector_tells_what_is_drawn():
    rng = random.Random(3)
    asked = [
        'an apple next to an avocado',
        'a cat above a dog',
        'a rocket',
        'a portrait of a doctor',
        'three stars',
        'a key next to a cake',
    ] * 2
    images = to_tensor([world.draw(world.compose(world.parse(p), rng)) for p in asked])
    right, wrong = composition(images, asked), composition(images, ['a banana next to a bus'] * 12)
    assert right.mean() > 0.8 and wrong.mean() < 0.2
