"""Folders, files and names that hold no whole pipeline: one line, at once; what can be loaded is loaded and
said."""

import json, shutil, socket, time

import pytest, torch
from diffusers import AutoencoderTiny

from drl_toolkit.sampling import loading
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.algorithms.objectives import data_loss
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.loading import find_model, open_pipeline, unreachable
from drl_toolkit.emoji.tiny import tiny_flux, tiny_sd, tiny_sdxl


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models') / 'sd'
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'sd')
    return tmp_path / 'sd'


def weights(folder):
    return [f for f in folder.rglob('*.safetensors')]


def test_weights_of_a_variant_alone_are_loaded_and_said(folder, saved, capsys, monkeypatch):
    monkeypatch.setattr('drl_toolkit.utils.messages._SAID', set())
    for file in weights(folder):
        file.rename(file.with_name(file.name.replace('.safetensors', '.fp16.safetensors')))
    pipeline, plain = open_pipeline(folder), open_pipeline(saved)
    assert capsys.readouterr().err.count('its fp16 weights are the only ones') == 1
    for name in ('unet', 'vae', 'text_encoder'):
        for a, b in zip(getattr(pipeline, name).parameters(), getattr(plain, name).parameters()):
            assert torch.equal(a, b)


def test_one_variant_of_one_part_is_enough_to_take_it_there(folder):
    file = folder / 'unet/diffusion_pytorch_model.safetensors'
    file.rename(file.with_name('diffusion_pytorch_model.fp16.safetensors'))
    assert open_pipeline(folder).unet is not None


def pickle_unet(folder):
    (folder / 'unet/diffusion_pytorch_model.safetensors').rename(folder / 'unet/diffusion_pytorch_model.bin')


def null(name):
    def change(folder):
        index = json.loads((folder / 'model_index.json').read_text())
        (folder / 'model_index.json').write_text(json.dumps(index | {name: [None, None]}))

    return change


@pytest.mark.parametrize(
    'change, words',
    [
        (
            pickle_unet,
            r'unet/ of model .* has pickled weights alone \(diffusion_pytorch_model.bin\), and nothing is '
            r'unpickled here',
        ),
        (lambda f: shutil.rmtree(f / 'tokenizer'), 'has no tokenizer/, which its model_index.json names'),
        (
            lambda f: [p.unlink() for p in (f / 'tokenizer').iterdir() if p.name != 'tokenizer_config.json'],
            'tokenizer/ of model .* has no vocabulary; one of tokenizer.json',
        ),
        (
            lambda f: (f / 'vae/diffusion_pytorch_model.safetensors').unlink(),
            'vae/ of model .* has no weights',
        ),
        (lambda f: shutil.rmtree(f / 'scheduler'), 'has no scheduler/'),
        (
            null('vae'),
            'has no vae, as its model_index.json says; a StableDiffusionPipeline needs vae, unet, '
            'text_encoder, tokenizer, scheduler',
        ),
        (null('tokenizer'), 'has no tokenizer, as'),
        (null('scheduler'), 'has no scheduler, as'),
    ],
)
def test_a_folder_that_lacks_something_is_one_line(change, words, folder):
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        Policy.from_pretrained(folder, num_steps=2)
    assert str(error.value).count('\\n') == 0


def test_parts_and_networks_of_other_pipelines_are_refused():
    xl, wide, distilled = tiny_sdxl(), tiny_sd(), tiny_sd()
    xl.text_encoder_2 = None
    with pytest.raises(
        ValueError, match='pipeline has no text_encoder_2; a StableDiffusionXLPipeline needs vae, unet'
    ):
        Policy(xl, num_steps=2)
    wide.unet = type(wide.unet).from_config(wide.unet.config, in_channels=9)
    with pytest.raises(
        ValueError,
        match='unet takes 9 channels, but the latents of the VAE have 4: .* a text-to-image model is right',
    ):
        Policy(wide, num_steps=2)
    distilled.unet = type(wide.unet).from_config(distilled.unet.config, time_cond_proj_dim=16)
    with pytest.raises(ValueError, match='takes the guidance scale as an embedding'):
        Policy(distilled, num_steps=2)
    assert Policy(tiny_flux(), num_steps=2).latent_shape[0] == 16


def test_single_files_say_how_they_become_a_folder(tmp_path):
    (tmp_path / 'folder').mkdir()
    for place in ('model.safetensors', 'model.ckpt', 'folder/v1-5.safetensors'):
        (tmp_path / place).write_bytes(b'')
    for place, words in (
        (
            'model.safetensors',
            'is a single file; convert it once by StableDiffusionPipeline.from_single_file',
        ),
        ('model.ckpt', 'is a single file'),
        ('folder', 'holds v1-5.safetensors and no model_index.json; convert it once'),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            find_model(tmp_path / place)


def test_a_hub_name_without_network_is_one_line_at_once(monkeypatch, tmp_path):
    "Offline by wish, by a refused connection, and by one that never answers; what the cache holds is taken."
    from huggingface_hub import constants

    with pytest.raises(
        OSError,
        match="model 'owner/name' is a hub id that is not in this machine's cache, .*HF_HUB_OFFLINE is set",
    ):
        Policy.from_pretrained('owner/name')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(loading, 'getproxies', dict)
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{port}')
    began = time.monotonic()
    with pytest.raises(OSError, match='out of reach .*[Rr]efused'):
        Policy.from_pretrained('owner/name')
    monkeypatch.setattr(loading.socket, 'create_connection', lambda *a: time.sleep(3))
    assert 'no answer in' in unreachable('http://127.0.0.1', 0.2) and time.monotonic() - began < 3
    monkeypatch.setattr(loading, 'unreachable', lambda address: 'no network')
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda name, file: str(tmp_path / file))
    assert find_model('owner/name') == str(tmp_path)


def test_a_tiny_autoencoder_has_latents_for_the_data_loss():
    pipeline = tiny_sd()
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    policy, images = Policy(pipeline, num_steps=2), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(
            policy.adapter.to_latents(images), pipeline.vae.encode(images * 2 - 1).latents, atol=1e-6
        )
    assert (
        data_loss(policy, images, ['a cat'] * 2, torch.Generator().manual_seed(0)).isfinite()
        and rollout(policy, ['a cat'], seed=1).images.isfinite().all()
    )
