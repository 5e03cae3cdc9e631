"Prompts, boxes and zero-shot detectors against hand-made cases and transformers' own post-processing."

import copy
import random

import pytest, tiny_models, torch
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

from drl_toolkit.emoji import world
from drl_toolkit.rewards.composition import Detections, Detector
from drl_toolkit.emoji.rewards import composition, strict_composition
from drl_toolkit.rewards.zero_shot import (
    Request,
    ZeroShotDetector,
    detection_reward,
    read_prompt,
    request_score,
)
from drl_toolkit.utils.words import plural, singular
from drl_toolkit.utils.images import to_pil, to_tensor


@pytest.mark.parametrize(
    'prompt, names, counts, relation',
    [
        ('a cat', ('cat',), (1,), None),
        ('An apple next to a pear.', ('apple', 'pear'), (1, 1), 'beside'),
        ('3 red cars', ('red car',), (3,), None),
        ('a photo of a dog on the right of two wolves', ('dog', 'wolf'), (1, 2), 'right'),
        ('a chair under a television', ('chair', 'television'), (1, 1), 'below'),
        ('a watermelon on side of a person', ('watermelon', 'person'), (1, 1), 'beside'),
        ('two people, a bus and four boxes', ('person', 'bus', 'box'), (2, 1, 4), None),
        ('a fish on a blue background', ('fish',), (1,), None),
        ('the sun over the sea', ('sun', 'sea'), (1, 1), 'above'),
    ],
)
def test_prompts_by_hand(prompt, names, counts, relation):
    assert read_prompt(prompt) == Request(names, counts, relation)


def test_every_emoji_prompt_is_read_as_the_world_reads_it():
    rng = random.Random(0)
    for _ in range(300):
        w = world.random_wanted(rng)
        assert read_prompt(world.prompt_of(w)) == Request(
            (world.PERSON,) if w.kind == 'portrait' else w.names,
            (w.count,) * len(w.names),
            {'next to': 'beside', None: None}.get(w.relation, w.relation),
        )
    assert all(singular(plural(o)) == o for o in world.OBJECTS)


@pytest.mark.parametrize(
    'prompt',
    [
        '',
        'happiness',
        'a',
        'zero cats',
        'a dog that rides a bicycle',
        'a cat above a dog above a fish',
        'cats',
    ],
)
def test_a_prompt_without_things_is_one_line(prompt):
    with pytest.raises(ValueError) as e:
        read_prompt(prompt)
    assert '\n' not in str(e.value) and repr(prompt) in str(e.value)


def found(*objects):
    objects = sorted(objects, key=lambda o: -o[1])
    names = tuple(dict.fromkeys(o[0] for o in objects)) + ('nothing',)
    boxes = torch.tensor([[(x - 0.1, y - 0.1, x + 0.1, y + 0.1) for _, _, x, y in objects]])
    return Detections(
        torch.tensor([[o[1] for o in objects]]),
        torch.tensor([[names.index(o[0]) for o in objects]]),
        boxes,
        names,
    )


@pytest.mark.parametrize(
    'relation, right', [('left', 1), ('right', 0), ('above', 0), ('below', 0), ('beside', 1), (None, 1)]
)
def test_relations(relation, right):
    boxes = found(('cat', 0.9, 0.2, 0.55), ('dog', 0.7, 0.8, 0.5))
    assert request_score(boxes, 0, Request(('cat', 'dog'), (1, 1), relation), strict=True) == pytest.approx(
        0.8 if right else 0.4
    )


def test_numbers_have_partial_credit():
    boxes = found(('star', 0.9, 0.2, 0.2), ('star', 0.9, 0.8, 0.2), ('dog', 0.9, 0.5, 0.8))
    score = lambda prompt: request_score(boxes, 0, read_prompt(prompt), strict=True).item()
    assert (
        score('two stars') == pytest.approx(0.9)
        and score('three stars') == pytest.approx(0.9 * 2 / 3)
        and score('four stars') == pytest.approx(0.45)
    )
    assert score('two stars and two dogs') == pytest.approx(0.9 * (1 + 0.5) / 2)
    assert request_score(boxes, 0, read_prompt('two stars and two dogs')) == pytest.approx(0.9)


def test_the_shipped_detector_goes_the_same_way():
    rng, asked = (
        random.Random(1),
        [
            'an apple next to an avocado',
            'a cat above a dog',
            'three stars',
            'a portrait of a doctor',
            'two keys',
        ]
        * 2,
    )
    images = to_tensor([world.draw(world.compose(world.parse(p), rng)) for p in asked])
    assert torch.allclose(detection_reward()(images, asked), composition(images, asked))
    assert torch.allclose(
        detection_reward(strict=True, threshold=0.5)(images, asked), strict_composition(images, asked)
    )
    assert (
        detection_reward()(images, asked) > detection_reward()(images, ['a bus next to a banana'] * 10)
    ).all()
    with pytest.raises(ValueError, match="does not know 'unicorn'"):
        detection_reward()(images[:1], ['a unicorn'])
    with pytest.raises(ValueError, match='threshold must be 0 to 1; got 2'):
        detection_reward(threshold=2)


@pytest.fixture(scope='module')
def owl(tmp_path_factory):
    return ZeroShotDetector(tiny_models.save_owl(tmp_path_factory.mktemp('owl')))


def unsaturated(detector):
    """A copy with logits of order 1: a random OWL's best confidence rounds to 1, where a sigmoid has no
    gradient."""
    detector = copy.deepcopy(detector)
    detector.confidence = getattr(detector, detector.confidence.__name__)  # the copy's own method
    head = getattr(detector.model, 'class_head', None)
    for p in (*head.logit_scale.parameters(), *head.logit_shift.parameters()) if head else ():
        p.mul_(0.01)
    return detector


@pytest.fixture(scope='module')
def dino(tmp_path_factory):
    return ZeroShotDetector(tiny_models.save_dino(tmp_path_factory.mktemp('dino')))


@pytest.mark.parametrize('size', [(64, 64), (48, 96)])
def test_owl_agrees_with_its_own_post_processing(owl, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = owl.find(images, ['cat', 'dog'])
    inputs = owl.processor(
        images=to_pil(images), text=[['a photo of a cat', 'a photo of a dog']] * 2, return_tensors='pt'
    )
    with torch.no_grad():
        out = owl.model(**inputs)
    theirs = owl.processor.post_process_grounded_object_detection(out, threshold=0.0, target_sizes=[size] * 2)
    for i in range(2):
        best = theirs[i]['scores'].argmax()
        box = theirs[i]['boxes'][best] / torch.tensor([size[1], size[0]] * 2)
        assert ours.scores[i, 0].item() == pytest.approx(
            theirs[i]['scores'][best].item(), abs=0.02
        ) and torch.allclose(ours.boxes[i, 0], box.clamp(0, 1), atol=0.02)


def test_grounding_dino_scores_a_name_by_its_own_tokens(dino):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    confidence, boxes = dino._by_token(images, ['red car', 'dog'])
    inputs = dino.processor(images=to_pil(images), text=['red car. dog.'] * 2, return_tensors='pt')
    with torch.no_grad():
        p = dino.model(**inputs).logits.sigmoid()  # tokens: [CLS] red car . dog . [SEP]
    assert inputs['input_ids'][0].tolist() == [2, 10, 11, 5, 9, 5, 3]
    assert (
        torch.allclose(confidence, torch.stack([p[..., 1:3].mean(-1), p[..., 4]], -1), atol=0.02)
        and (confidence > 0).any()
    )


@pytest.mark.parametrize('which', ['owl', 'dino'])
def test_zero_shot_keeps_the_contract(which, request):
    r = detection_reward(request.getfixturevalue(which), threshold=0.0, strict=True)
    images, asked = (
        torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        ['a cat', 'a red car above a dog', 'two strawberries', 'a cat'],
    )
    together, alone = r(images, asked), torch.cat([r(images[i : i + 1], asked[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5) and ((together >= 0) & (together <= 1)).all()
    leaf = (images * 1.2 - 0.1).requires_grad_()
    detection_reward(unsaturated(request.getfixturevalue(which))).score(leaf, asked).sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


def test_a_detector_of_another_kind_is_named(monkeypatch):
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, OmDetTurboConfig

    class Other(torch.nn.Module):
        config = OmDetTurboConfig()

    monkeypatch.setattr(AutoModelForZeroShotObjectDetection, 'from_pretrained', lambda *a, **k: Other())
    monkeypatch.setattr(AutoProcessor, 'from_pretrained', lambda *a, **k: None)
    with pytest.raises(ValueError, match="of type 'omdet-turbo'; owlvit, owlv2"):
        ZeroShotDetector('x')


def test_detr_has_a_class_of_nothing(tmp_path):
    torch.manual_seed(0)
    config = DetrConfig(
        backbone_config=dict(
            model_type='resnet',
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type='basic',
            out_features=['stage2'],
        ),
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=10,
        id2label={0: 'cat', 1: 'dog', 2: 'car'},
        label2id={'cat': 0, 'dog': 1, 'car': 2},
    )
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    DetrImageProcessor(size=dict(shortest_edge=64, longest_edge=96)).save_pretrained(tmp_path)
    d, images = Detector(tmp_path), torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = d.model(**d.processor(images=to_pil(images), return_tensors='pt'))
    theirs = d.processor.post_process_object_detection(out, threshold=0.0)
    ours = d(images)
    for i in range(2):
        best = theirs[i]['scores'].argmax()
        assert ours.scores[i, 0].item() == pytest.approx(
            theirs[i]['scores'][best].item(), abs=0.01
        ) and torch.allclose(ours.boxes[i, 0], theirs[i]['boxes'][best].clamp(0, 1), atol=0.01)
    assert detection_reward(d)(images, ['a cat above a dog', 'a car']).shape == (2,)
