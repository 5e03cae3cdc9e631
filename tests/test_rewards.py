"The contract that every reward keeps, and the shipped ones against independent computations."
import io, warnings

import open_clip, pytest, torch
from PIL import Image

from drl_toolkit import world
from drl_toolkit.rewards import (Reward, check_reward, clip_pixels, clip_reward, clip_score, image_features, jpeg_compressibility,
                                 jpeg_incompressibility, load_clip, reward)

IMAGES, PROMPTS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ['a cat', 'a dog'] * 3
mean = lambda x: x.mean((1, 2, 3))

@pytest.mark.parametrize('score, error, words', [
    (lambda x, p: torch.arange(len(x)), TypeError, 'int64'),
    (lambda x, p: mean(x) > .5, TypeError, 'bool'),
    (lambda x, p: [1, 2, 3, 4, 5, 6], TypeError, 'int64'),
    (lambda x, p: mean(x).masked_fill(torch.arange(len(x)) == 1, float('nan')), ValueError, "NaN for 1 of 6 images (the first shows 'a dog')"),
    (lambda x, p: mean(x) / 0, ValueError, 'infinite'),
    (lambda x, p: mean(x)[:, None], ValueError, '(6, 1)'),
    (lambda x, p: mean(x)[:4], ValueError, '(6,) is right for 6 images'),
    (lambda x, p: mean(x).mean(), ValueError, 'shape ()'),
    (lambda x, p: mean(x).to('meta'), ValueError, 'meta'),
    (lambda x, p: None, TypeError, 'NoneType')])
def test_broken_contract_is_one_line_with_the_name(score, error, words):
    with pytest.raises(error) as caught: reward(score, name='broken')(IMAGES, PROMPTS)
    assert "'broken'" in str(caught.value) and words in str(caught.value) and '\n' not in str(caught.value)

@pytest.mark.parametrize('images, prompts', [(IMAGES * 255, PROMPTS), (IMAGES * 2 - 1, PROMPTS), (IMAGES[0], PROMPTS), ((IMAGES * 255).byte(), PROMPTS),
                                             (IMAGES, PROMPTS[:3]), (IMAGES, 'a cat'), ([1], PROMPTS)])
def test_wrong_input_is_refused(images, prompts):
    with pytest.raises((TypeError, ValueError), match="'mean'"): reward(lambda x, p: mean(x), name='mean')(images, prompts)

def test_values_become_float32_without_a_graph_and_keep_their_order():
    for score in (lambda x, p: mean(x).double(), lambda x, p: mean(x).tolist(), lambda x, p: mean(x).numpy()):
        values = reward(score, name='r')(IMAGES.clone().requires_grad_(), PROMPTS) if 'double' in score.__code__.co_names else reward(score, name='r')(IMAGES, PROMPTS)
        assert values.dtype == torch.float32 and not values.requires_grad and torch.allclose(values, mean(IMAGES))

def test_decorator_with_and_without_arguments():
    @reward
    def plain(images, prompts): "What it does."; return mean(images)
    @reward(level='group', name='other')
    def grouped(images, prompts): return mean(images).std()
    assert (plain.name, plain.level, plain.card.what) == ('plain', 'sample', 'What it does.') and (grouped.name, grouped.level) == ('other', 'group')
    with pytest.raises(ValueError, match="'sample' or 'group'"): Reward(mean, level='batch')

def test_constant_warns_once():
    flat = reward(lambda x, p: x.new_full((len(x),), .25), name='flat')
    with pytest.warns(UserWarning, match="'flat' gave 0.25 to all 6"): flat(IMAGES, PROMPTS)
    with warnings.catch_warnings(): warnings.simplefilter('error'); flat(IMAGES, PROMPTS)

def test_a_group_level_reward_sees_one_prompt_at_a_time():
    seen = []
    @reward(level='group')
    def mine(images, prompts): seen.append((len(images), set(prompts))); return mean(images).mean() if prompts[0] == 'a cat' else mean(images)
    values = mine(IMAGES, PROMPTS)
    assert seen == [(3, {'a cat'}), (3, {'a dog'})]
    assert torch.allclose(values[::2], mean(IMAGES[::2]).mean()) and torch.allclose(values[1::2], mean(IMAGES[1::2]))
    mine(IMAGES, ['a cat'] * 6, groups=torch.tensor([5, 5, 0, 0, 0, 5])); assert [n for n, _ in seen[2:]] == [3, 3]
    with pytest.raises(ValueError, match='mixes the prompts'): mine(IMAGES, PROMPTS, groups=torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match='2 group ids for 6 images'): mine(IMAGES, PROMPTS, groups=torch.zeros(2, dtype=torch.long))

def test_figures_are_means_over_groups():
    r = reward(lambda x, p: (mean(x), dict(count=len(x))), level='group', name='r')
    assert r.report(IMAGES, ['a'] * 4 + ['b'] * 2)[1] == {'count': 3}

def test_check_reward_finds_what_hurts():
    verdict = lambda f, **kw: ' '.join(check_reward(Reward(f, 'r', **kw), IMAGES, PROMPTS).problems)
    assert verdict(lambda x, p: mean(x)) == '' and verdict(lambda x, p: mean(x).std(), level='group') == ''
    assert 'deterministic' in verdict(lambda x, p: mean(x) + torch.rand(len(x)))
    assert 'neighbours' in verdict(lambda x, p: mean(x) - mean(x).mean())
    assert 'order' in verdict(lambda x, p: mean(x) + torch.arange(len(x)))
    with pytest.warns(UserWarning): assert 'constant' in verdict(lambda x, p: x.new_ones(len(x)))
    report = check_reward(lambda x, p: mean(x).double(), IMAGES, PROMPTS)
    assert report.dtype == 'float64' and 'ms per image' in repr(report) and 'data:image/png' in report._repr_html_()

def test_jpeg_size_is_the_size_of_the_file(tmp_path):
    values = jpeg_incompressibility(IMAGES, PROMPTS)
    array = (IMAGES[2].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(tmp_path / 'x.jpg', quality=95)
    assert values[2].item() == pytest.approx((tmp_path / 'x.jpg').stat().st_size / 1000)
    assert torch.equal(jpeg_compressibility(IMAGES, PROMPTS), -values)

def test_clip_score_agrees_with_open_clips_own_way_through_pil():
    folder = world.assets_dir() / 'clip'
    model, preprocess = open_clip.create_model_from_pretrained(f'local-dir:{folder}')
    tokenizer, prompts = open_clip.get_tokenizer(f'local-dir:{folder}'), ['an apple', 'three stars']
    pil = [Image.new('RGB', (64, 64), c) for c in ('red', 'gold')]
    with torch.no_grad():
        expected = (model.eval().encode_image(torch.stack([preprocess(im) for im in pil]), normalize=True) * model.encode_text(tokenizer(prompts), normalize=True)).sum(1)
    assert torch.allclose(clip_score(world.to_tensor(pil), prompts), expected, atol=1e-4)
    assert torch.allclose(image_features(world.to_tensor(pil)).norm(dim=1), torch.ones(2), atol=1e-5)

def test_clip_pixels_resize_like_open_clip():
    model, _ = load_clip(str(world.assets_dir() / 'clip'))
    wide = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(1)), (128, 192), mode='bicubic').clamp(0, 1)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{world.assets_dir() / 'clip'}")
    assert (clip_pixels(model, wide)[0] - preprocess(world.to_pil(wide)[0])).abs().mean() < .02

def test_a_missing_clip_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match='no open_clip_config.json'): clip_reward(tmp_path)(IMAGES, PROMPTS)
