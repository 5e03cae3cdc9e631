"""Pipelines with random weights in the shapes of Stable Diffusion 1.5, 2 and XL: as large and as slow as the published
ones, with nothing to download.

Denoiser and VAE have the published sizes; a prompt has 77 tokens of the published width. The text encoders
themselves have one layer, since an epoch reads each prompt once."""

from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from drl_toolkit.emoji.pretrain.tokenizer import world_tokenizer
from drl_toolkit.emoji.tiny import ready, tiny_ddim, tiny_text_encoder

UNETS = dict(  # what differs from UNet2DConditionModel's defaults, as published
    sd15=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    sd2=dict(
        sample_size=64,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    sdxl=dict(
        sample_size=128,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
        addition_embed_type='text_time',
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
)


def published_vae(pixels):
    "Stable Diffusion's VAE."
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=pixels,
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
    )


def tokenizer():
    "The emoji world's words, padded to CLIP's length."
    found = world_tokenizer()
    found.model_max_length = 77
    return found


def random_pipeline(name):
    "A pipeline of the shape 'sd15', 'sd2' or 'sdxl'."
    unet = UNet2DConditionModel(**UNETS[name])
    parts = dict(
        unet=unet,
        vae=published_vae(8 * unet.config.sample_size),
        scheduler=tiny_ddim('epsilon'),
        tokenizer=tokenizer(),
    )
    if name != 'sdxl':
        encoder = tiny_text_encoder(parts['tokenizer'], unet.config.cross_attention_dim)
        return ready(
            StableDiffusionPipeline(
                **parts,
                text_encoder=encoder,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )
    pair = dict(
        text_encoder=tiny_text_encoder(parts['tokenizer'], 768),
        text_encoder_2=tiny_text_encoder(parts['tokenizer'], 1280, projection=True),
    )
    return ready(StableDiffusionXLPipeline(**parts, **pair, tokenizer_2=tokenizer(), add_watermarker=False))
