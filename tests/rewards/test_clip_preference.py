"The emoji world's tokenizer, CLIP and preference model, as their own libraries load them."

import random
from dataclasses import replace

import open_clip, pytest, torch
from transformers import AutoTokenizer

from drl_toolkit.emoji import world
from drl_toolkit.rewards.preference import preference
from drl_toolkit.emoji.pretrain import clip, preference as raters
from drl_toolkit.emoji.pretrain.tokenizer import CONTEXT, world_tokenizer, world_words
from drl_toolkit.utils.images import to_pil
from drl_toolkit.utils.loading import assets_dir
from drl_toolkit.rewards.fairness import TONES


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_word_is_one_token_and_other_words_survive():
    tok = world_tokenizer()
    assert all(len(tok(w).input_ids) == 3 for w in world_words())
    for text in ('a zebra on a blue background', 'an äpfel'):
        assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text


def test_shipped_tokenizers_are_the_same():
    texts = ['a portrait of an office worker on a gray background', 'three cacti', 'a zebra']
    want = world_tokenizer()(texts).input_ids
    for name in ('clip', 'preference'):
        assert AutoTokenizer.from_pretrained(assets_dir() / name)(texts).input_ids == want
        ids = open_clip.get_tokenizer(f'local-dir:{assets_dir() / name}')(texts)
        assert ids.shape == (3, CONTEXT) and [row[: len(w)].tolist() for row, w in zip(ids, want)] == want


def test_a_request_is_true_of_its_scene_and_no_near_miss_is():
    rng = random.Random(0)
    for _ in range(200):
        asked = clip.request(rng)
        shown = clip.shown(world.compose(asked, rng))
        assert clip.is_true(asked, shown)
        for miss in clip.near_misses(asked, rng):
            if miss.background == asked.background:
                assert not clip.is_true(miss, shown), (asked, miss)


def test_open_clip_reads_the_folder_and_its_transform_is_ours():
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{assets_dir() / 'clip'}")
    x = clip.clean([world.parse('a cat above a dog')], random.Random(0))
    assert torch.allclose(transform(to_pil(x)[0])[None], clip.normalize(x), atol=1e-5)
    with torch.no_grad():
        mine, theirs = (
            clip.load()[0].encode_image(clip.normalize(x)),
            model.eval().encode_image(clip.normalize(x)),
        )
    assert torch.equal(mine, theirs)


def test_clip_knows_the_world():
    metrics = clip.evaluate(n=48, seed=7)
    assert (
        metrics['clip_top1'] >= 0.97 and metrics['clip_pairs'] >= 0.9 and metrics['clip_backgrounds'] >= 0.9
    ), metrics


def test_utility_knows_neither_tone_nor_gender():
    rng = random.Random(1)
    for _ in range(50):
        asked = world.random_wanted(rng, 'portrait')
        picture = raters.random_picture(asked, rng, world.compose(asked, rng))
        person = picture.scene.placed[0]
        values = {
            raters.utility(
                replace(picture, scene=replace(picture.scene, placed=(replace(person, tone=t, gender=g),))),
                asked,
            )
            for t in TONES
            for g in world.GENDERS
        }
        assert len(values) == 1


def test_bradley_terry_is_the_cross_entropy_of_votes():
    r, u = torch.randn(5, 4), torch.randn(5, 4)
    want = []
    for a in range(4):
        for b in range(a + 1, 4):
            p, q = torch.sigmoid(u[:, a] - u[:, b]), torch.sigmoid(r[:, a] - r[:, b])
            want.append(-(p * q.log() + (1 - p) * (1 - q).log()))
    assert torch.allclose(raters.bradley_terry(r, u), torch.stack(want).mean(), atol=1e-6)


def test_preference_agrees_with_its_rules_and_is_blind_to_tone():
    metrics = raters.evaluate(n=150, seed=7)
    assert metrics['preference_accuracy'] >= 0.85 and metrics['preference_tone_gap'] < 0.3, metrics
    x = clip.clean([world.parse('a cat next to a dog')] * 2, random.Random(3))
    assert preference(x, ['a cat next to a dog', 'a bus']).diff() < -2
