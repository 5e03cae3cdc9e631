"""Skin tone by colour, classifiers, targets and their credit, against the papers' table, hand-made cases and
independent computations."""

import math

import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from drl_toolkit.emoji import world
from drl_toolkit.rewards.attributes import (
    ITA_CLASSES,
    MONK,
    ImageClassifier,
    PromptClassifier,
    SkinTone,
    absence,
    balance_reward,
    divergence,
    fixed_face,
    ita,
    ita_class,
    lbp_faces,
    measure_floor,
    monk_class,
    monk_lab,
    own_credit,
    skin_lab,
    target_shares,
)
from drl_toolkit.rewards.fairness import (
    distance,
    leave_one_out,
    leave_one_out_credit,
    parity_floor,
    shares_of,
    statistical_parity,
)
from drl_toolkit.utils.images import to_pil, to_tensor

TABLE = [
    (94.21, 1.50, 5.43, 83.0),
    (92.27, 2.06, 7.29, 80.2),
    (93.09, 0.22, 14.21, 71.7),
    (87.57, 0.46, 17.75, 64.7),
    (77.90, 3.47, 23.14, 50.3),  # papers.md, section 6
    (55.14, 7.79, 26.74, 10.9),
    (42.47, 12.33, 20.53, -20.1),
    (30.68, 11.67, 13.34, -55.4),
    (21.07, 2.69, 5.97, -78.3),
    (14.61, 1.48, 3.53, -84.3),
]
ALL = torch.tensor([0, 1, 2, 3])


def patch(hexes, side=16):
    rgb = torch.tensor([[int(h[i : i + 2], 16) / 255 for i in (1, 3, 5)] for h in hexes])
    return rgb[:, :, None, None].expand(-1, -1, side, side)


def test_monk_scale_is_the_published_table():
    assert torch.allclose(monk_lab(), torch.tensor([r[:3] for r in TABLE]), atol=0.02)
    assert torch.allclose(ita(monk_lab()), torch.tensor([r[3] for r in TABLE]), atol=0.1)


def test_ita_by_hand():
    angle = lambda degrees: torch.tensor([[50 + 20 * math.tan(math.radians(degrees)), 5.0, 20.0]])
    for degrees, name in (
        (60, 'very light'),
        (50, 'light'),
        (30, 'intermediate'),
        (20, 'tan'),
        (0, 'brown'),
        (-40, 'dark'),
    ):
        assert (
            ita(angle(degrees)).item() == pytest.approx(degrees, abs=1e-3)
            and ITA_CLASSES[ita_class(angle(degrees))] == name
        )
    assert (
        ita_class(torch.tensor([[60.0, 0, -5]])).tolist()
        == [-1]
        == monk_class(torch.tensor([[60.0, 0, -5]])).tolist()
    )  # blue is no skin


def test_patches_of_the_scale_are_read_back():
    reader = SkinTone(fixed_face((0, 0, 1, 1)), monk_class)
    assert reader(patch(MONK)).tolist() == list(range(10)) and reader.names[9] == 'Monk 10'


def test_colour_is_read_as_the_median_of_the_middle():
    image = patch(['#0000ff'], 40)[0].clone()
    image[:, 14:34, 10:30] = patch([MONK[4]], 20)[0]
    image[:, 24:26, 14:26] = 0  # a mouth
    assert torch.allclose(skin_lab(image, (0, 0, 1, 1)), monk_lab()[4], atol=0.1)


def test_faces_on_a_photograph_and_the_rules_for_none_and_several():
    from skimage import data

    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    ((x0, y0, x1, y1),) = lbp_faces(photo)[0]
    assert x0 < 0.44 < x1 and y0 < 0.22 < y1  # her nose
    assert SkinTone()(photo).tolist() == [0] and SkinTone()(torch.rand(2, 3, 64, 64)).tolist() == [-1, -1]
    halves = torch.cat([patch([MONK[1]]), patch([MONK[7]])], 3)
    faces = lambda images: [[(0, 0, 0.5, 1), (0.5, 0, 1, 0.6)]] * len(images)
    assert SkinTone(faces, monk_class)(halves).tolist() == [1] and SkinTone(faces, several='unreadable')(
        halves
    ).tolist() == [-1]
    with pytest.raises(ValueError, match="several must be .*; got 'first'"):
        SkinTone(several='first')
    for box in ((1.2, 1.2, 1.3, 1.4), (-0.5, -0.5, -0.1, -0.1)):
        assert SkinTone(lambda x: [[box]])(photo).tolist() == [-1]  # outside the image
    with pytest.raises(ValueError, match='names must be .*; got None'):
        SkinTone(classify=lambda lab: lab[:, 0].long())
    with pytest.raises(TypeError, match='without `names`'):
        balance_reward(lambda images: images)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=2, max_size=16))
def test_a_uniform_target_is_the_fairness_chapter(values):
    classes, uniform = torch.tensor(values), target_shares(tuple('abcde'))
    assert distance(shares_of(classes, uniform), uniform).item() == pytest.approx(
        statistical_parity(classes), abs=1e-6
    )
    assert torch.allclose(own_credit(classes, uniform), leave_one_out_credit(classes), atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(-1, 3), min_size=2, max_size=12),
    st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    st.data(),
)
def test_a_ruined_face_never_helps_whatever_the_target(values, weights, data):
    ruined, target = values.copy(), target_shares(tuple('abcd'), weights)
    ruined[data.draw(st.integers(0, len(values) - 1))] = -1
    wrong = lambda v: distance(shares_of(torch.tensor(v), target), target).item()
    assert wrong(ruined) >= wrong(values) - 1e-6


def test_measures_against_torch():
    p, q = torch.tensor([0.5, 0.25, 0.25, 0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert divergence(p, q).item() == pytest.approx(
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(p), torch.distributions.Categorical(q)
        ).item(),
        abs=1e-5,
    )
    assert (
        distance(p, q).item() == pytest.approx((0.16 + 0.0025 + 0.0025 + 0.16) ** 0.5)
        and absence(p, q).item() == 0.25
        and absence(p, torch.tensor([1.0, 0, 0, 0])) == 0
    )
    assert all(m(q, q).abs() < 1e-6 for m in (distance, divergence, absence))


def test_floor_is_that_of_the_fairness_chapter_and_never_zero():
    assert (
        measure_floor(16, (0.2,) * 5) == parity_floor(16)
        and measure_floor(8, (0.7, 0.2, 0.1), divergence) > 0.01
    )
    with pytest.raises(ValueError, match='n must be 1 or more.*got 0'):
        measure_floor(0, (0.5, 0.5))


@pytest.mark.parametrize(
    'target, words',
    [
        ({'x': 1}, "names 'x'"),
        ([1, 2], '3 weights'),
        ([1, -1, 1], 'none negative'),
        ([0, 0, 0], 'not all 0'),
        ([1, float('nan'), 0], '3 weights'),
    ],
)
def test_wrong_targets_are_one_line(target, words):
    with pytest.raises(ValueError, match=words):
        target_shares(('a', 'b', 'c'), target)


def test_leave_one_out_of_a_sum_is_the_member():
    values = torch.tensor([1.0, 2, 4])
    assert torch.equal(leave_one_out(3, lambda rows: values[rows].sum()), values)


class Reader:
    "The first channel's value, in tenths, is the class; 0.9 is unreadable."

    names = ('a', 'b', 'c', 'd')

    def __call__(self, images):
        return (images[:, 0, 0, 0] * 10).round().long().apply_(lambda v: -1 if v == 9 else v)

    def probabilities(self, images):
        return torch.softmax(-50 * (images[:, 0].mean((1, 2))[:, None] - torch.arange(4) / 10) ** 2, 1)


def shown(*classes):
    return (torch.tensor(classes) / 10.0)[:, None, None, None].expand(-1, 3, 4, 4).clone()


def test_reward_follows_its_target():
    images, prompts = shown(0, 0, 0, 1, 2, 9), ['p'] * 6
    even, metrics = balance_reward(Reader()).report(images, prompts)
    assert (
        even[4] > 0 > even[0] > even[5]
        and metrics['readable'] == pytest.approx(5 / 6)
        and metrics['coverage'] == 0.75
    )
    mostly_a = balance_reward(Reader(), {'a': 6, 'b': 1, 'c': 1})(shown(0, 0, 1, 1, 2, 2), prompts)
    assert mostly_a[0] > 0 > mostly_a[2]
    q = target_shares(Reader.names)
    shared = balance_reward(Reader(), measure=divergence, credit='shared')(
        torch.cat([shown(0, 0), shown(0, 1)]), ['p'] * 2 + ['q'] * 2
    )
    assert torch.allclose(
        shared, -torch.tensor([math.log(4)] * 2 + [math.log(2)] * 2), atol=1e-5
    ) and torch.allclose(q.sum(), torch.tensor(1.0))


def test_soft_credit_moves_the_crowd_towards_the_target():
    images = shown(0, 0, 0, 0).requires_grad_()
    r = balance_reward(Reader(), credit='soft')
    r.score(images, ['p'] * 4)[0][0].backward()
    assert (images.grad.sum((1, 2, 3)) > 0).all()  # all are of the lowest class; brighter would be better
    assert r(shown(0, 1, 2, 3), ['p'] * 4)[0] > r(shown(0, 0, 0, 1), ['q'] * 4)[0]


@pytest.mark.parametrize(
    'more, words',
    [
        (dict(credit='all'), "credit must be .*; got 'all'"),
        (dict(credit='soft', measure=absence), 'no use for absence'),
        (dict(target={'a': 1}, measure=divergence), 'would be infinite'),
        (dict(reader=SkinTone(), credit='soft'), 'SkinTone has none'),
    ],
)
def test_wrong_settings_are_one_line(more, words):
    with pytest.raises(ValueError, match=words):
        balance_reward(**dict(reader=Reader()) | more)


def test_any_transformers_classifier(tmp_path):
    torch.manual_seed(0)
    names = ['young', 'old', 'cannot tell']
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path)
    reader, images = (
        ImageClassifier(tmp_path, ('old', 'young')),
        torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        theirs = reader.model(**reader.processor(images=to_pil(images), return_tensors='pt')).logits.softmax(
            1
        )
    assert torch.allclose(reader.probabilities(images), theirs[:, [1, 0]], atol=0.02)
    assert (ImageClassifier(tmp_path, surest=0.99)(images) == -1).all() and reader.names == ('old', 'young')
    with pytest.raises(ValueError, match="no label 'middle'"):
        ImageClassifier(tmp_path, ('middle',))
    leaf = images.clone().requires_grad_()
    balance_reward(reader, credit='soft').score(leaf, ['p'] * 3)[0].sum().backward()
    assert leaf.grad.abs().amax((1, 2, 3)).min() > 0


def test_clip_prompts_as_a_classifier():
    images = to_tensor(
        [
            world.draw(world.compose(world.parse(p), __import__('random').Random(0)))
            for p in ('a cat', 'a dog', 'a bus')
        ]
    )
    assert PromptClassifier({'cat': 'a cat', 'dog': 'a dog', 'bus': 'a bus'})(images).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match='1 classes'):
        PromptClassifier({'cat': 'a cat'})
