"""Aesthetic, HPSv2 and ImageReward against timm, BERT and open_clip's own ways, on tiny checkpoints in the
published formats."""

import json, pickle

import open_clip, pytest, tiny_models, torch
from safetensors.torch import load_file, save_file

from drl_toolkit.rewards.reward_models import (
    MEAN,
    STD,
    ImageRewardModel,
    aesthetic_reward,
    fit_head,
    hps_reward,
    image_reward,
    linear_head,
)
from drl_toolkit.rewards.reward import image_features, load_clip, load_tensors, text_features, weights_file
from drl_toolkit.utils.images import to_pil
from drl_toolkit.utils.loading import assets_dir

IMAGES, PROMPTS = (
    torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    ['a cat', 'a dog above a cat', 'an apple'],
)
CLIP = str(assets_dir() / 'clip')


@pytest.fixture(scope='module')
def blip(tmp_path_factory):
    "timm's ViT, transformers' BERT with cross-attention and an MLP, saved under ImageReward's names."
    folder = tmp_path_factory.mktemp('blip')
    return folder, *tiny_models.save_image_reward(folder)


def test_image_reward_is_timms_vit_under_berts_cross_attention(blip):
    folder, vit, bert, mlp = blip
    net = ImageRewardModel(load_tensors(folder / 'reward.pt')).eval()
    ids, mask, pixels = (
        torch.tensor([[2, 5, 7, 3], [2, 6, 3, 0], [2, 5, 8, 3]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
        torch.randn(3, 3, tiny_models.SIDE, tiny_models.SIDE),
    )
    with torch.no_grad():
        seen = vit(pixels)
        both_ways = torch.zeros(3, 1, 4, 4).masked_fill(
            mask[:, None, None] == 0, torch.finfo().min
        )  # else a decoder would look back only
        read = bert(input_ids=ids, attention_mask=both_ways, encoder_hidden_states=seen).last_hidden_state[
            :, 0
        ]
        expected = (mlp(read)[:, 0] - MEAN) / STD
        assert torch.allclose(net.vision(pixels).last_hidden_state, seen, atol=1e-4)
        assert torch.allclose(net(pixels, ids, mask), expected, atol=1e-4)
    assert expected.std() > 0.01


def test_image_reward_from_file_and_its_gradient(blip):
    r = image_reward(blip[0] / 'reward.pt', blip[0])
    together, alone = (
        r(IMAGES, PROMPTS),
        torch.cat([r(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]),
    )
    assert torch.allclose(together, alone, atol=1e-4)  # padding does not matter
    leaf = (IMAGES * 1.2 - 0.1).requires_grad_()
    r.score(leaf, PROMPTS).sum().backward()
    assert (leaf.grad.abs().amax((1, 2, 3)) > 0).all() and leaf.grad[(leaf < 0) | (leaf > 1)].abs().mean() > 0


def test_an_incomplete_checkpoint_is_named(blip, tmp_path):
    tensors = load_tensors(blip[0] / 'reward.pt')
    with pytest.raises(
        ValueError,
        match="lacks 1 weights of its BlipVisionModel, such as 'encoder.layers.0.self_attn.projection.bias'",
    ):
        ImageRewardModel(
            {k: v for k, v in tensors.items() if k != 'blip.visual_encoder.blocks.0.attn.proj.bias'}
        )
    with pytest.raises(ValueError, match="'blip.visual_encoder.…' and so on are right"):
        ImageRewardModel({'x': torch.zeros(1)})
    with pytest.raises(ValueError, match="'mlp.layers.0.weight' and so on are right"):
        ImageRewardModel({k: v for k, v in tensors.items() if 'mlp' not in k or 'blip' in k})


def test_aesthetic_head_in_the_published_format(tmp_path):
    "The layout of sac+logos+ava1-l14-linearMSE: Sequential 'layers' with dropouts between, as a torch file."
    torch.manual_seed(0)
    d = image_features(IMAGES).shape[1]
    L, D = torch.nn.Linear, torch.nn.Dropout
    mlp = torch.nn.Sequential(L(d, 32), D(0.2), L(32, 12), D(0.2), L(12, 8), D(0.1), L(8, 4), L(4, 1)).eval()
    torch.save({'layers.' + k: v for k, v in mlp.state_dict().items()}, tmp_path / 'head.pth')
    r = aesthetic_reward(tmp_path / 'head.pth', CLIP, None)
    assert torch.allclose(r(IMAGES, PROMPTS), mlp(image_features(IMAGES))[:, 0].detach(), atol=1e-6)
    leaf = IMAGES.clone().requires_grad_()
    r.score(leaf, PROMPTS).sum().backward()
    assert leaf.grad.abs().sum() > 0
    save_file(
        {'layers.0.weight': torch.zeros(1, 7), 'layers.0.bias': torch.zeros(1)},
        tmp_path / 'seven.safetensors',
    )
    with pytest.raises(ValueError, match=f'takes 7 numbers and this CLIP gives {d}'):
        aesthetic_reward(tmp_path / 'seven.safetensors', CLIP, None)(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match="'layers.0.weight' and so on are right"):
        linear_head({'x': torch.zeros(1)})


def test_a_fitted_head_is_ridge_regression(tmp_path):
    x, w = (
        torch.randn(200, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, -2, 0, 3, 0, 0.5]),
    )
    tensors = load_file(fit_head(x, x @ w + 4, str(tmp_path / 'h.safetensors'), ridge=1e-7))
    assert torch.allclose(tensors['layers.0.weight'][0], w, atol=1e-3) and tensors[
        'layers.0.bias'
    ].item() == pytest.approx(4, abs=1e-3)


@pytest.fixture
def architecture(tmp_path):
    """The emoji CLIP as an architecture that open_clip knows by name, and a checkpoint of it as HPSv2's is
    stored."""
    config = json.loads((assets_dir() / 'clip/open_clip_config.json').read_text())['model_cfg']
    config['text_cfg'] |= {'hf_tokenizer_name': CLIP} if 'hf_tokenizer_name' in config['text_cfg'] else {}
    (tmp_path / 'tiny-emoji.json').write_text(json.dumps(config))
    before = set(open_clip.list_models())
    open_clip.add_model_config(tmp_path / 'tiny-emoji.json')
    torch.save({'epoch': 1, 'state_dict': load_clip(CLIP)[0].state_dict()}, tmp_path / 'weights.pt')
    yield 'tiny-emoji', tmp_path / 'weights.pt'
    for name in set(open_clip.list_models()) - before:
        open_clip.factory._MODEL_CONFIGS.pop(name)


def test_hps_is_the_cosine_of_an_architecture_with_a_file_of_weights(architecture):
    name, weights = architecture
    r = hps_reward(str(weights), name)
    model, _, preprocess = open_clip.create_model_and_transforms(name, str(weights))
    pixels = torch.stack([preprocess(im) for im in to_pil(IMAGES)])
    with torch.no_grad():
        seen, read = (
            model.eval().encode_image(pixels, normalize=True),
            model.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True),
        )
    assert torch.allclose(r(IMAGES, PROMPTS), (seen * read).sum(1), atol=1e-2) and torch.allclose(
        read, text_features(PROMPTS, CLIP), atol=1e-5
    )
    leaf = IMAGES.clone().requires_grad_()
    r.score(leaf, PROMPTS).sum().backward()
    assert leaf.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'tiny-emoji' is an architecture; it needs weights"):
        load_clip(name)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ('unpickled',))

    torch.save({'layers.0.weight': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(tmp_path / 'evil.pth')


@pytest.mark.parametrize('source', ['nowhere.pth', '/no/such/file.pth', './a/b/c.pth', 'owner/name'])
def test_a_missing_file_is_one_line(source):
    with pytest.raises(FileNotFoundError, match="'owner/name/file' on the hub is right"):
        weights_file(source)


def test_hps_shows_all_of_an_image_that_is_not_square(architecture):
    "Its release resizes the longer side and fills up with black; CLIP crops."
    name, weights = architecture
    wide = 0.3 + 0.4 * torch.rand(2, 3, 40, 80, generator=torch.Generator().manual_seed(2))
    model, _, _ = open_clip.create_model_and_transforms(name, str(weights))
    side = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    small = torch.nn.functional.interpolate(wide, (side // 2, side), mode='bicubic', antialias=True)
    square = torch.zeros(2, 3, side, side)
    square[:, :, side // 4 : side // 4 + side // 2] = small
    r, asked = hps_reward(str(weights), name), PROMPTS[:2]
    assert torch.allclose(r(wide, asked), r(square, asked), atol=1e-5)
    cropped = hps_reward(str(weights), name, resize_mode='shortest')
    assert not torch.allclose(r(wide, asked), cropped(wide, asked), atol=1e-4)
