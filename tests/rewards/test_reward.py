from drl_toolkit.utils.loading import assets_dir
from drl_toolkit.utils.images import to_pil, to_tensor

"The contract that every reward keeps, and the shipped ones against independent computations."
import warnings

import numpy as np, open_clip, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from drl_toolkit.rewards.reward import (
    Card,
    Reward,
    clip_pixels,
    clip_reward,
    clip_score,
    image_features,
    jpeg_compressibility,
    jpeg_incompressibility,
    load_clip,
    reward,
)

IMAGES, PROMPTS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ['a cat', 'a dog'] * 3
mean = lambda x: x.mean((1, 2, 3))


@pytest.mark.parametrize(
    'score, error, words',
    [
        (lambda x, p: torch.arange(len(x)), TypeError, 'int64'),
        (lambda x, p: mean(x) > 0.5, TypeError, 'bool'),
        (lambda x, p: ['1'] * 6, TypeError, 'list'),
        (
            lambda x, p: mean(x).masked_fill(torch.arange(len(x)) == 1, float('nan')),
            ValueError,
            "NaN for 1 of 6 images (the first shows 'a dog')",
        ),
        (lambda x, p: mean(x) / 0, ValueError, 'infinite'),
        (lambda x, p: mean(x)[:, None], ValueError, '(6, 1)'),
        (lambda x, p: mean(x)[:4], ValueError, '(6,) is right for 6 images'),
        (lambda x, p: mean(x).mean(), ValueError, 'shape ()'),
        (lambda x, p: mean(x).to('meta'), ValueError, 'meta'),
        (lambda x, p: None, TypeError, 'NoneType'),
    ],
)
def test_broken_contract_is_one_line_with_the_name(score, error, words):
    with pytest.raises(error) as caught:
        reward(score, name='broken')(IMAGES, PROMPTS)
    assert "'broken'" in str(caught.value) and words in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'images, prompts',
    [
        (IMAGES * 255, PROMPTS),
        (IMAGES * 2 - 1, PROMPTS),
        (IMAGES[0], PROMPTS),
        ((IMAGES * 255).byte(), PROMPTS),
        (IMAGES, PROMPTS[:3]),
        (IMAGES, 'a cat'),
        ([1], PROMPTS),
    ],
)
def test_wrong_input_is_refused(images, prompts):
    with pytest.raises((TypeError, ValueError), match="'mean'"):
        reward(lambda x, p: mean(x), name='mean')(images, prompts)


def test_values_become_float32_without_a_graph_and_keep_their_order():
    for score in (lambda x, p: mean(x).double(), lambda x, p: mean(x).tolist(), lambda x, p: mean(x).numpy()):
        values = (
            reward(score, name='r')(IMAGES.clone().requires_grad_(), PROMPTS)
            if 'double' in score.__code__.co_names
            else reward(score, name='r')(IMAGES, PROMPTS)
        )
        assert (
            values.dtype == torch.float32
            and not values.requires_grad
            and torch.allclose(values, mean(IMAGES))
        )


def test_decorator_with_and_without_arguments():
    @reward
    def plain(images, prompts):
        "What it does."
        return mean(images)

    @reward(level='group', name='other')
    def grouped(images, prompts):
        return mean(images).std()

    assert (plain.name, plain.level, plain.card.what) == ('plain', 'sample', 'What it does.') and (
        grouped.name,
        grouped.level,
    ) == ('other', 'group')
    with pytest.raises(ValueError, match="'sample' or 'group'"):
        Reward(mean, level='batch')


def test_constant_warns_once():
    flat = reward(lambda x, p: x.new_full((len(x),), 0.25), name='flat')
    with pytest.warns(UserWarning, match="'flat' gave 0.25 to all 6"):
        flat(IMAGES, PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        flat(IMAGES, PROMPTS)


def test_a_group_level_reward_sees_one_prompt_at_a_time():
    seen = []

    @reward(level='group')
    def mine(images, prompts):
        seen.append((len(images), set(prompts)))
        return mean(images).mean() if prompts[0] == 'a cat' else mean(images)

    values = mine(IMAGES, PROMPTS)
    assert seen == [(3, {'a cat'}), (3, {'a dog'})]
    assert torch.allclose(values[::2], mean(IMAGES[::2]).mean()) and torch.allclose(
        values[1::2], mean(IMAGES[1::2])
    )
    mine(IMAGES, ['a cat'] * 6, groups=torch.tensor([5, 5, 0, 0, 0, 5]))
    assert [n for n, _ in seen[2:]] == [3, 3]
    with pytest.raises(ValueError, match='mixes the prompts'):
        mine(IMAGES, PROMPTS, groups=torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match='2 group ids for 6 images'):
        mine(IMAGES, PROMPTS, groups=torch.zeros(2, dtype=torch.long))


def test_figures_are_means_over_groups():
    r = reward(lambda x, p: (mean(x), dict(count=len(x))), level='group', name='r')
    assert r.report(IMAGES, ['a'] * 4 + ['b'] * 2)[1] == {'count': 3}


bright, red = (
    reward(lambda x, p: mean(x), name='bright'),
    reward(lambda x, p: x[:, 0].mean((1, 2)), name='red', card=Card('red', unit='share', hacks='paint')),
)
spread = reward(lambda x, p: (x.std(0).mean(), dict(size=len(x))), level='group', name='spread')

numbers = st.floats(-4, 4).map(lambda v: round(v, 2)).filter(lambda v: v != 0)
steps = st.lists(
    st.tuples(
        st.sampled_from(('+', '-', '*', '/', 'clip', 'neg', '+r', '-r', 'r-')),
        numbers,
        st.sampled_from((0, 1)),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_arithmetic_is_arithmetic_and_the_name_says_it(steps):
    both, values = (bright, red), (mean(IMAGES), IMAGES[:, 0].mean((1, 2)))
    r, expected = bright, values[0]
    for op, number, other in steps:
        if op == '+':
            r, expected = r + number, expected + number
        if op == '-':
            r, expected = number - r, number - expected
        if op == '*':
            r, expected = number * r, number * expected
        if op == '/':
            r, expected = r / number, expected / number
        if op == 'neg':
            r, expected = -r, -expected
        if op == 'clip':
            r, expected = r.clip(min=number), expected.clamp(min=number)
        if op == '+r':
            r, expected = r + both[other], expected + values[other]
        if op == '-r':
            r, expected = r - both[other], expected - values[other]
        if op == 'r-':
            r, expected = both[other] - r, values[other] - expected
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found, metrics = r.report(IMAGES, PROMPTS)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    read = eval(
        r.name, dict(bright=bright, red=red)
    )  # a name is the expression, and reads as what it computes
    assert torch.allclose(
        r.score(IMAGES, PROMPTS), read.score(IMAGES, PROMPTS), rtol=1e-3, atol=1e-3
    ) and set(metrics) <= {'bright', 'red'}


def test_names_levels_and_cards():
    r = 0.7 * (bright - red) + bright.clip(max=0.9) / 2
    assert (
        r.name == '0.7*(bright - red) + bright.clip(max=0.9)/2'
        and r.level == 'sample'
        and r.card.hacks == 'red: paint'
        and r.card.unit == ''
        and 'red: red' in r.card.what
    )
    assert (
        (bright + spread).level == 'group'
        and sum([bright, red]).name == 'bright + red'
        and (np.float64(0.5) * red).name == '0.5*red'
        and (red - (bright - 1)).name == 'red - (bright - 1)'
    )
    assert (
        bright.standardised(0.5, 0.1).name == '(bright - 0.5)/0.1'
        and r.named('mix').name == 'mix'
        and (2 * r.named('mix')).name == '2*mix'
        and r.name != 'mix'
    )


def test_each_part_is_asked_once_and_recorded():
    asked = []
    counted = reward(lambda x, p: (asked.append(1), mean(x))[1], name='counted')
    values, metrics = (counted + 2 * counted.clip(max=0.5) - red).report(IMAGES, PROMPTS)
    assert len(asked) == 1 and metrics == {
        'counted': pytest.approx(mean(IMAGES).mean().item()),
        'red': pytest.approx(IMAGES[:, 0].mean().item()),
    }


def test_groups_and_samples_mixed():
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    values, metrics = (bright + 3 * spread).report(IMAGES, PROMPTS, groups)
    expected = mean(IMAGES).clone()
    for g in range(2):
        expected[groups == g] += 3 * IMAGES[groups == g].std(0).mean()
    assert (
        torch.allclose(values, expected)
        and metrics['size'] == 3
        and set(metrics) == {'bright', 'spread', 'size'}
    )
    one = (bright + 3 * spread).score(IMAGES[::2], PROMPTS[::2])
    assert torch.allclose(one, expected[::2])
    two = (spread + spread.named('other')).report(IMAGES, PROMPTS, groups)[1]
    assert set(two) == {'spread', 'other', 'spread/size', 'other/size'}  # metrics of one name keep apart


def test_a_sum_of_differentiable_rewards_is_differentiable():
    x = IMAGES.clone().requires_grad_()
    (grad,) = torch.autograd.grad((2 * bright - red.clip(max=0.4) + spread).score(x, PROMPTS).sum(), x)
    y = IMAGES.clone().requires_grad_()
    (by_hand,) = torch.autograd.grad(
        (2 * mean(y) - y[:, 0].mean((1, 2)).clamp(max=0.4) + y.std(0).mean()).sum(), y
    )
    assert torch.allclose(grad, by_hand, atol=1e-7)


@pytest.mark.parametrize(
    'make, error, words',
    [
        (lambda: bright * red, TypeError, 'only a number'),
        (lambda: bright / red, TypeError, 'only a number'),
        (lambda: bright * True, TypeError, 'True'),
        (lambda: bright + 'x', TypeError, "'x'"),
        (lambda: bright + torch.ones(3), TypeError, 'only a number'),
        (lambda: bright + float('nan'), ValueError, 'nan'),
        (lambda: bright / 0, ValueError, '/ 0'),
        (lambda: bright.clip(), ValueError, 'clip'),
        (lambda: bright.clip(min=1, max=0), ValueError, 'min 1 and max 0'),
        (lambda: bright.standardised(0, 0), ValueError, 'std must be a number above 0; got 0'),
        (lambda: bright.standardised('0', 1), TypeError, "'0'"),
        (
            lambda: bright + reward(lambda x, p: mean(x), name='bright'),
            ValueError,
            "two parts called 'bright'",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_combination_that_overflows_is_told_by_its_name():
    with pytest.raises(ValueError, match='1e.38.bright. returned an infinite'):
        (1e38 * bright.named('bright') * 1e38)(IMAGES, PROMPTS)


def test_jpeg_size_is_the_size_of_the_file(tmp_path):
    values = jpeg_incompressibility(IMAGES, PROMPTS)
    array = (IMAGES[2].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(tmp_path / 'x.jpg', quality=95)
    assert values[2].item() == pytest.approx((tmp_path / 'x.jpg').stat().st_size / 1000)
    assert torch.equal(jpeg_compressibility(IMAGES, PROMPTS), -values)


def test_clip_score_agrees_with_open_clips_own_way_through_pil():
    folder = assets_dir() / 'clip'
    model, preprocess = open_clip.create_model_from_pretrained(f'local-dir:{folder}')
    tokenizer, prompts = open_clip.get_tokenizer(f'local-dir:{folder}'), ['an apple', 'three stars']
    pil = [Image.new('RGB', (64, 64), c) for c in ('red', 'gold')]
    with torch.no_grad():
        expected = (
            model.eval().encode_image(torch.stack([preprocess(im) for im in pil]), normalize=True)
            * model.encode_text(tokenizer(prompts), normalize=True)
        ).sum(1)
    assert torch.allclose(clip_score(to_tensor(pil), prompts), expected, atol=1e-4)
    assert torch.allclose(image_features(to_tensor(pil)).norm(dim=1), torch.ones(2), atol=1e-5)


def test_clip_pixels_resize_like_open_clip():
    model, _ = load_clip(str(assets_dir() / 'clip'))
    wide = torch.nn.functional.interpolate(
        torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(1)), (128, 192), mode='bicubic'
    ).clamp(0, 1)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{assets_dir() / 'clip'}")
    assert (clip_pixels(model, wide)[0] - preprocess(to_pil(wide)[0])).abs().mean() < 0.02


def test_a_missing_clip_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match='no open_clip_config.json'):
        clip_reward(tmp_path)(IMAGES, PROMPTS)


@pytest.mark.parametrize('size', [(40, 64), (100, 30)])
@pytest.mark.parametrize('mode', ['shortest', 'longest', 'squash'])
def test_other_shapes_go_through_open_clips_own_transform(mode, size):
    "Cropped, with black bars, or squashed: its transform of PIL images, within their rounding."
    model, _ = load_clip(str(assets_dir() / 'clip'))
    cfg, side = model.visual.preprocess_cfg, model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    noise = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    images = to_tensor(to_pil(torch.nn.functional.interpolate(noise, size, mode='bilinear')))
    transform = open_clip.image_transform(side, False, cfg['mean'], cfg['std'], resize_mode=mode)
    theirs = torch.stack([transform(image) for image in to_pil(images)])
    std = torch.tensor(cfg['std'])[:, None, None]
    ours = clip_pixels(model, images, mode)
    assert ours.shape == theirs.shape and ((ours - theirs) * std).abs().max() < 1.6 / 255
    if mode == 'longest':
        black = (0 - torch.tensor(cfg['mean'])) / torch.tensor(cfg['std'])
        assert torch.allclose(ours[0, :, 0, 0], black, atol=1e-6)
    with pytest.raises(ValueError, match="resize_mode must be one of shortest, longest, squash; got 'pad'"):
        clip_pixels(model, images, 'pad')


def test_eight_bits_are_those_of_a_file_and_let_gradients_pass():
    rounded, file = clip_score.eight_bit(), to_tensor(to_pil(IMAGES))
    first = reward(lambda images, prompts: images[:, 0, 0, 0], name='first')
    assert torch.equal(first.eight_bit()(IMAGES, PROMPTS), file[:, 0, 0, 0])
    assert not torch.equal(first(IMAGES, PROMPTS), file[:, 0, 0, 0])
    assert torch.allclose(rounded(IMAGES, PROMPTS), clip_score(file, PROMPTS), atol=1e-6)
    images = IMAGES * 1.2 - 0.1  # some too dark, some too bright
    leaf, plain = images.clone().requires_grad_(), to_tensor(to_pil(images)).requires_grad_()
    rounded.raw(leaf, PROMPTS).sum().backward()
    clip_score.raw(plain, PROMPTS).sum().backward()
    assert torch.allclose(leaf.grad, plain.grad, atol=1e-6) and leaf.grad.abs().sum() > 0
    assert rounded.name == clip_score.name
    with pytest.raises(ValueError, match='is a combination; make its parts eight_bit'):
        (clip_score + jpeg_compressibility).eight_bit()
