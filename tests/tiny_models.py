"""Tiny random models of the real classes, saved as the real ones are: a folder each, in which every line of
the rewards runs offline."""

import timm, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from drl_toolkit.emoji.pretrain.tokenizer import world_tokenizer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
WORDS = [
    '[PAD]',
    '[UNK]',
    '[CLS]',
    '[SEP]',
    '[MASK]',
    '.',
    'a',
    'an',
    'cat',
    'dog',
    'red',
    'car',
    'star',
    'strawberry',
    'apple',
    'above',
    'three',
    'stars',
    'picture',
    'of',
]
WIDTH, SIDE, PATCH = 128, 32, 8  # of ImageReward


def bert_tokenizer():
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)})


def text_config(tok, **more):
    return (
        SMALL
        | dict(
            vocab_size=len(tok),
            max_position_embeddings=16,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
        | more
    )


def save_clip(folder):
    torch.manual_seed(0)
    tok = world_tokenizer()
    CLIPModel(
        CLIPConfig(
            text_config=text_config(tok),
            vision_config=SMALL | dict(image_size=32, patch_size=8),
            projection_dim=16,
        )
    ).save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)), tok
    ).save_pretrained(folder)
    return folder


def save_siglip(folder):
    torch.manual_seed(0)
    tok = world_tokenizer()
    net = SiglipModel(
        SiglipConfig(
            text_config=SMALL | dict(vocab_size=len(tok), max_position_embeddings=16, projection_size=32),
            vision_config=SMALL | dict(image_size=32, patch_size=8),
        )
    )
    net.logit_scale.data, net.logit_bias.data = torch.tensor([2.0]), torch.tensor([-3.0])
    net.save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size=dict(height=32, width=32)), tok).save_pretrained(folder)
    return folder


def save_owl(folder):
    torch.manual_seed(0)
    tok = world_tokenizer()
    Owlv2ForObjectDetection(
        Owlv2Config(
            text_config=text_config(tok),
            vision_config=SMALL | dict(image_size=64, patch_size=16),
            projection_dim=32,
        )
    ).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size=dict(height=64, width=64)), tok).save_pretrained(folder)
    return folder


def save_dino(folder):
    torch.manual_seed(0)
    layers = dict(
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=32,
        num_queries=12,
        num_feature_levels=2,
        max_text_len=32,
    )
    swin = dict(
        model_type='swin',
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 1, 2],
        window_size=4,
        out_indices=[2, 3],
        out_features=['stage2', 'stage3'],
    )
    bert = SMALL | dict(model_type='bert', vocab_size=len(WORDS), max_position_embeddings=40)
    GroundingDinoForObjectDetection(
        GroundingDinoConfig(backbone_config=swin, text_config=bert, **layers)
    ).save_pretrained(folder)
    GroundingDinoProcessor(
        GroundingDinoImageProcessor(size=dict(shortest_edge=64, longest_edge=96)), bert_tokenizer()
    ).save_pretrained(folder)
    return folder


def save_image_reward(folder):
    """timm's ViT, transformers' BERT with cross-attention and an MLP under ImageReward's names.

    Returns the three."""
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        SIDE, PATCH, embed_dim=WIDTH, depth=2, num_heads=WIDTH // 64, num_classes=0, global_pool=''
    )
    bert = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=WIDTH // 64,
            intermediate_size=192,
            max_position_embeddings=40,
            is_decoder=True,
            add_cross_attention=True,
        ),
        add_pooling_layer=False,
    )
    mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    for m in (vit, bert, mlp):
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.15)
    bert.embeddings.token_type_embeddings.weight.data.zero_()  # BLIP's BERT has none
    tensors = {'blip.visual_encoder.' + k: v for k, v in vit.state_dict().items()} | {
        'blip.text_encoder.' + k: v for k, v in bert.state_dict().items()
    }
    torch.save(tensors | {'mlp.layers.' + k: v for k, v in mlp.state_dict().items()}, folder / 'reward.pt')
    bert_tokenizer().save_pretrained(folder)
    return vit.eval(), bert.eval(), mlp.eval()


def save_bert(folder):
    torch.manual_seed(0)
    BertModel(
        BertConfig(**SMALL | dict(num_hidden_layers=2), vocab_size=len(WORDS), max_position_embeddings=40)
    ).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


def save_blip(folder):
    "A captioner without a chat format."
    torch.manual_seed(0)
    text = SMALL | dict(
        vocab_size=len(WORDS),
        max_position_embeddings=40,
        encoder_hidden_size=32,
        bos_token_id=2,
        sep_token_id=3,
        eos_token_id=3,
        pad_token_id=0,
    )
    BlipForConditionalGeneration(
        BlipConfig(
            text_config=text, vision_config=SMALL | dict(image_size=32, patch_size=8), projection_dim=32
        )
    ).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=dict(height=32, width=32)), bert_tokenizer()).save_pretrained(
        folder
    )
    return folder


def save_llava(
    folder, words='yes no a cat an apple above dog three stars Does this picture show ? . Answer or'
):
    "A vision-language model with a chat format."
    torch.manual_seed(0)
    words = '<pad> <unk> <s> </s> <image> USER : ASSISTANT'.split() + words.split()
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, '<unk>'))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token='<pad>',
        unk_token='<unk>',
        bos_token='<s>',
        eos_token='</s>',
        additional_special_tokens=['<image>'],
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
        image_token_id=4,
        vision_feature_layer=-1,
        text_config=LlamaConfig(
            **SMALL,
            vocab_size=len(words),
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        ),
    )
    chat = (
        "{% for m in messages %}USER : {% for c in m.content %}{% if c.type == 'image' %}<image> {% else "
        "%}{{ "
        "c.text }} {% endif %}{% endfor %}{% endfor %}ASSISTANT :"
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)),
        tok,
        patch_size=8,
        vision_feature_select_strategy='default',
        chat_template=chat,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
