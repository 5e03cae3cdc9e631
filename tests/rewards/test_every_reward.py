"""One contract for every reward that ships: its card, its values, its independence of the batch, its
gradient. Emoji models where there are some, tiny random models of the real classes elsewhere."""

import random
from dataclasses import replace

import pytest, tiny_models, torch
from safetensors.torch import save_file

from drl_toolkit.emoji import world
from drl_toolkit.rewards.alignment import (
    answers_reward,
    caption_reward,
    nearest_caption,
    question_reward,
    siglip_reward,
)
from drl_toolkit.rewards.attributes import (
    ImageClassifier,
    PromptClassifier,
    SkinTone,
    balance_reward,
    divergence,
    fixed_face,
    monk_class,
)
from drl_toolkit.emoji.rewards import composition, strict_composition
from drl_toolkit.rewards.diversity import diversity, diversity_reward, mode_coverage, vendi
from drl_toolkit.emoji.rewards import fairness, rare_fairness, shared_fairness
from drl_toolkit.rewards.pixels import colourfulness, sharpness, text_reward
from drl_toolkit.rewards.preference import pick_score, preference, preference_reward
from drl_toolkit.rewards.reward_models import aesthetic_reward, hps_reward, image_reward
from drl_toolkit.rewards.lab import check_reward
from drl_toolkit.rewards.reward import (
    CLIP_H,
    clip_reward,
    clip_score,
    jpeg_compressibility,
    jpeg_incompressibility,
)
from drl_toolkit.rewards.zero_shot import ZeroShotDetector, detection_reward
from drl_toolkit.utils.images import to_tensor
from drl_toolkit.utils.loading import assets_dir
from drl_toolkit.rewards.fairness import TONES

A = assets_dir()
ASKED = ['a portrait of a doctor', 'a cat above a dog', 'three stars', 'an apple'] * 2
NO_GRADIENT = {
    'jpeg_compressibility',
    'jpeg_incompressibility',
    'text',
    'caption',
    'caption by blip',
    'answers',
    'fairness',
    'rare_fairness',
    'shared_fairness',
    'balance by ITA',
    'balance by Monk',
}

PARTIAL = {
    'composition',
    'strict_composition',
    'detection',
    'detection by owl',
    'detection by dino',  # these detectors detach the points that they look at
    'balance by prompts',
}  # a softmax so steep that a finite difference jumps over it


def pictures():
    rng = random.Random(0)
    return to_tensor([world.draw(world.compose(world.parse(p), rng)) for p in ASKED])


def head(folder, width):
    save_file(
        {
            'layers.0.weight': torch.randn(1, width, generator=torch.Generator().manual_seed(0)),
            'layers.0.bias': torch.zeros(1),
        },
        folder / 'head.safetensors',
    )
    return folder / 'head.safetensors'


def classifier():
    return ImageClassifier(A / 'tones', TONES)


def things():
    return PromptClassifier({p: p for p in sorted(set(ASKED))})


# Makers, so that each model is saved only when its own test runs; each takes a function that gives an empty
# folder.
GROUPS = {
    'balance by classifier': lambda new: balance_reward(classifier(), credit='soft'),
    'balance by prompts': lambda new: balance_reward(things(), measure=divergence, credit='soft'),
    'balance by ITA': lambda new: balance_reward(SkinTone(fixed_face())),
    'balance by Monk': lambda new: balance_reward(SkinTone(fixed_face(), monk_class), [1] * 9 + [2]),
    'fairness': lambda new: fairness,
    'rare_fairness': lambda new: rare_fairness,
    'shared_fairness': lambda new: shared_fairness,
    'diversity': lambda new: diversity,
    'vendi': lambda new: vendi,
}

SAMPLES = {
    'jpeg_compressibility': lambda new: jpeg_compressibility,
    'jpeg_incompressibility': lambda new: jpeg_incompressibility,
    'sharpness': lambda new: sharpness,
    'colourfulness': lambda new: colourfulness,
    'text': lambda new: text_reward(lambda images: [f'a{int(1000 * x)}' for x in images.mean((1, 2, 3))]),
    'clip_score': lambda new: clip_score,
    'clip of a folder': lambda new: clip_reward(str(A / 'clip')),
    'siglip': lambda new: siglip_reward(tiny_models.save_siglip(new())),
    'caption': lambda new: caption_reward(
        nearest_caption(['a cat', 'two stars', 'a portrait of a pilot']),
        A / 'emoji-sd/text_encoder',
        A / 'emoji-sd/tokenizer',
        -1,
        '{prompt}',
    ),
    'caption by blip': lambda new: caption_reward(
        tiny_models.save_blip(new()), tiny_models.save_bert(new()), layer=-1
    ),
    'question': lambda new: question_reward(tiny_models.save_llava(new())),
    'answers': lambda new: answers_reward(
        lambda p: [('What?', p.split()[-1]), ('More?', 'a')],
        lambda images, qs: [f'{x:.4f} a' for x in images.mean((1, 2, 3))],
    ),
    'composition': lambda new: composition,
    'strict_composition': lambda new: strict_composition,
    'detection': lambda new: detection_reward(strict=True),
    'detection by owl': lambda new: detection_reward(ZeroShotDetector(tiny_models.save_owl(new()))),
    'detection by dino': lambda new: detection_reward(ZeroShotDetector(tiny_models.save_dino(new()))),
    'preference': lambda new: preference,
    'pick_score': lambda new: pick_score(*[tiny_models.save_clip(new())] * 2),
    'aesthetic': lambda new: aesthetic_reward(head(new(), 128), str(A / 'preference'), None),
    'hps': lambda new: hps_reward(None, str(A / 'preference')),
    'image_reward': lambda new: _image_reward(new()),
}


def _image_reward(folder):
    tiny_models.save_image_reward(folder)
    return image_reward(folder / 'reward.pt', folder)


@pytest.fixture
def new(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp('model')


def complete(card):
    assert all(getattr(card, f) for f in ('what', 'unit', 'range', 'model', 'hacks', 'licence')), card


@pytest.mark.filterwarnings('ignore:reward .* gave')
@pytest.mark.parametrize('name', [*SAMPLES, *GROUPS])
def test_contract(name, new):
    r, images = (SAMPLES | GROUPS)[name](new), pictures()
    complete(r.card)
    asked = [f'a sign that says "{p}"' for p in ASKED] if name == 'text' else ASKED
    assert r.level == ('group' if name in GROUPS else 'sample')
    values = r(images, asked)
    assert (
        values.shape == (8,)
        and values.dtype == torch.float32
        and values.isfinite().all()
        and not values.requires_grad
    )
    problems = [
        p for p in check_reward(r, images, asked, others=[]).problems if 'constant' not in p
    ]  # deterministic, and independent of order and neighbours
    assert not [p for p in problems if not (name in PARTIAL and p.startswith('its gradient'))]
    outside = (images * 1.2 - 0.1).requires_grad_()  # as back-propagation gives them
    rows = slice(None) if r.level == 'sample' else slice(0, None, 4)
    raw = r.score(outside[rows], asked[rows])
    raw = raw[0] if isinstance(raw, tuple) else raw
    assert raw.requires_grad == (name not in NO_GRADIENT)
    if raw.requires_grad:
        raw.sum().backward()
        assert outside.grad.isfinite().all() and outside.grad[rows].abs().sum() > 0
        assert outside.grad[(outside < 0) | (outside > 1)].abs().sum() > 0  # nothing was clamped on the way


@pytest.mark.parametrize(
    'make',
    [
        lambda: clip_reward(*CLIP_H),
        siglip_reward,
        caption_reward,
        question_reward,
        lambda: answers_reward(lambda p: []),
        pick_score,
        aesthetic_reward,
        hps_reward,
        image_reward,
        text_reward,
        lambda: preference_reward('folder'),
        lambda: diversity_reward(lambda f: mode_coverage(f, torch.rand(8, 128))),
    ],
)
def test_the_real_ones_are_made_without_loading_anything(make, monkeypatch):
    def refuse(*a, **k):
        raise AssertionError('a model was loaded')

    import huggingface_hub, open_clip

    for owner, name in ((torch, 'load'), (open_clip, 'create_model'), (huggingface_hub, 'hf_hub_download')):
        monkeypatch.setattr(owner, name, refuse)
    complete(make().card)


def test_emoji_rewards_tell_right_from_wrong():
    """Blur, another prompt, a missing object and a changed tone, each seen by the rewards whose business it
    is."""
    rng = random.Random(1)
    asked = [
        world.prompt_of(world.random_wanted(rng, k))
        for k in ('object', 'pair', 'count', 'portrait')
        for _ in range(4)
    ]
    scenes = [world.compose(world.parse(p), rng) for p in asked]
    draw = lambda **fault: to_tensor([world.draw(replace(s, **fault)) for s in scenes])
    whole = draw()
    for r in (sharpness, preference):
        assert r(whole, asked).mean() > r(draw(blur=0.8), asked).mean() > r(draw(blur=2.0), asked).mean(), r
    other = asked[5:] + asked[:5]
    for r in (
        clip_score,
        preference,
        composition,
        strict_composition,
        detection_reward(),
        hps_reward(None, str(A / 'preference')),
    ):
        assert r(whole, asked).mean() > r(whole, other).mean() + 0.1, r
    without = to_tensor([world.draw(replace(s, placed=s.placed[:1])) for s in scenes[4:12]])
    for r in (composition, strict_composition, detection_reward(strict=True)):
        assert (r(whole[4:12], asked[4:12]) >= r(without, asked[4:12]) - 0.05).all() and r(
            whole[4:12], asked[4:12]
        ).mean() > r(without, asked[4:12]).mean() + 0.2, r
    one, tones = world.parse('a portrait of a judge'), ['light'] * 10
    pair = [
        to_tensor([world.draw(world.compose(one, rng, t)) for t in ts])
        for ts in (tones, tones[:5] + ['dark'] * 2 + ['medium'] * 3)
    ]
    for r in (
        shared_fairness,
        balance_reward(SkinTone(fixed_face()), credit='shared'),
        diversity_reward(credit='shared'),
    ):
        same, mixed = r(
            torch.cat([pair[0][:1].expand(10, -1, -1, -1), pair[1]]),
            ['a portrait of a judge'] * 20,
            torch.tensor([0] * 10 + [1] * 10),
        )[[0, 10]]
        assert mixed > same, r
