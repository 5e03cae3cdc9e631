"Sharpness, colourfulness and text against skimage, NumPy and hand-made cases."

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import laplace

from drl_toolkit.rewards.pixels import colourfulness, edits, quoted, rapid_reader, sharpness, text_reward

IMAGES = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def test_sharpness_is_the_variance_of_the_laplacian():
    for image, ours in zip(IMAGES, sharpness(IMAGES, [''] * 3)):
        gray = 255 * np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), 1)
        assert ours.item() == pytest.approx(laplace(gray)[1:-1, 1:-1].var(ddof=1), rel=1e-4)


def test_colourfulness_by_numpy():
    r, g, b = 255 * IMAGES[1].double().numpy()
    rg, yb = r - g, (r + g) / 2 - b
    assert colourfulness(IMAGES, [''] * 3)[1].item() == pytest.approx(
        np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()), rel=1e-4
    )


def test_a_plain_gray_picture_has_finite_gradients():
    for r in (sharpness, colourfulness):
        gray = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
        r.score(gray, ['']).sum().backward()
        assert gray.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.text('abc', max_size=6), st.text('abc', max_size=6), st.text('abc', max_size=6))
def test_edits_are_a_distance(a, b, c):
    assert (
        edits(a, b) == edits(b, a)
        and (edits(a, b) == 0) == (a == b)
        and edits(a, c) <= edits(a, b) + edits(b, c)
    )
    assert abs(len(a) - len(b)) <= edits(a, b) <= max(len(a), len(b)) and edits('kitten', 'sitting') == 3


@pytest.mark.parametrize(
    'said, value',
    [
        ('Open', 1),
        ('We are OPEN!', 1),
        ('O p e n', 1),
        ('apen', 0.75),
        ('op', 0.5),
        ('', 0),
        ('quite other words', 0),
    ],
)
def test_text_by_hand(said, value):
    assert (
        text_reward(lambda images: [said] * len(images))(IMAGES[:1], ['a sign that says "open"']).item()
        == value
    )


@pytest.mark.parametrize(
    'prompt', ['a sign', 'a sign that says ""', "a sign that says 'open'", 'a sign that says "!"']
)
def test_a_prompt_without_words_is_one_line(prompt):
    with pytest.raises(ValueError, match='has no word in double quotation marks'):
        quoted(prompt)


def test_without_rapidocr_the_extra_is_named(monkeypatch):
    from drl_toolkit.rewards import pixels

    pixels._ocr.cache_clear()
    monkeypatch.setitem(__import__('sys').modules, 'rapidocr', None)
    with pytest.raises(ImportError, match=r"pip install 'drl_toolkit\[ocr\]'"):
        rapid_reader(IMAGES)


def test_rapidocr_reads_drawn_words():
    pytest.importorskip('rapidocr')
    from PIL import Image, ImageDraw, ImageFont
    from drl_toolkit.utils.images import to_tensor

    def sign(text):
        image = Image.new('RGB', (160, 64), '#fff3c4')
        ImageDraw.Draw(image).text((12, 14), text, fill='#303030', font=ImageFont.load_default(32))
        return image

    values = text_reward()(to_tensor([sign('open'), sign('apen')]), ['a "open"'] * 2)
    assert values[0] == 1 and values[1] < 1
