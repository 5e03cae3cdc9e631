"""LoRA: what is saved reloads at its scale, here and in plain diffusers; adapters that a pipeline came with
are part of the reference and of what is saved."""

import inspect, json
from importlib.metadata import version

import pytest, torch
from diffusers.utils import convert_state_dict_to_kohya
from packaging.version import parse
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from drl_toolkit.cli import main as cli

from drl_toolkit.sampling import saving
from drl_toolkit.sampling.lora import lora_disabled, pad_to_rank, stacked_factors, tuner_layers
from drl_toolkit.sampling.pipelines import adapt
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.loading import base_of
from drl_toolkit.runs.models import open_policy
from drl_toolkit.emoji.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from drl_toolkit.utils.loading import no_progress_bars
from drl_toolkit.sampling.saving import LORA_FILE

BUILDERS = dict(sd=tiny_sd, sdxl=tiny_sdxl, sd3=tiny_sd3, flux=tiny_flux)
PROMPTS = ['a portrait of a doctor', 'an apple', 'a cat above a dog']
WIDE = 'to_q to_k to_v to_out.0 net.0.proj net.2'


def peft_of_transformers():
    "The version of peft that transformers wants before it loads a LoRA into a text encoder."
    from transformers.integrations import peft

    return parse(peft.MIN_PEFT_VERSION)


def diffusers_reads_words():
    "Whether plain diffusers can load a LoRA of a text encoder here."
    return parse(version('peft')) >= peft_of_transformers()


@torch.no_grad()
def answer(pipeline):
    """The network's output for some noise and prompts, text encoders included: whatever adapters the pipeline
    has, by plain diffusers and peft."""
    adapter = adapt(pipeline, 64)
    noise = torch.randn(len(PROMPTS), *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    return adapter.forward(noise, torch.full((len(PROMPTS),), 500.0), adapter.encode(PROMPTS), 2.0)


def move(policy, size=0.2, seed=5):
    "Give the trained weights other values, as training would."
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        p.data += size * torch.randn(p.shape, generator=generator)


def plain(base):
    "A pipeline of diffusers, of the class that the folder names."
    from diffusers import DiffusionPipeline

    options = (
        dict(safety_checker=None, requires_safety_checker=False)
        if 'StableDiffusionPipeline' in (base / 'model_index.json').read_text()
        else {}
    )
    with no_progress_bars():
        pipeline = DiffusionPipeline.from_pretrained(base, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_plain(pipeline, folder, **options):
    "As a user of diffusers does. Some versions guess the name of the file by asking the hub."
    pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, **options)


def same(a, b):
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    'name, words, alpha', [(n, w, 7.0) for n in BUILDERS for w in (False, True)] + [('sd', True, 0.0)]
)
def test_a_saved_lora_comes_back_at_its_scale(name, words, alpha, tmp_path):
    BUILDERS[name]().save_pretrained(tmp_path / 'base')
    policy = Policy.from_pretrained(
        tmp_path / 'base',
        num_steps=2,
        lora_rank=3,
        lora_alpha=alpha,
        lora_targets=WIDE,
        train_text_encoder=words,
    )
    base = answer(policy.pipeline)
    move(policy)
    moved, folder = answer(policy.pipeline), policy.save(tmp_path / 'tuned', base=str(tmp_path / 'base'))
    assert not same(moved, base)
    again = Policy.from_pretrained(folder)
    assert torch.equal(answer(again.pipeline), moved) and again.continues_lora
    for p, q in zip(policy.parameters(), again.parameters()):
        assert torch.equal(p, q)
    if words and not diffusers_reads_words():
        return
    other = plain(tmp_path / 'base')
    load_plain(other, folder)
    assert same(answer(other), moved)


# ---- adapters that a pipeline came with


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    "Files of two LoRAs that others made, one of them in kohya's format, and the base."
    folder = tmp_path_factory.mktemp('foreign')
    tiny_sd(seed=1).save_pretrained(folder / 'base')
    for i, alpha in enumerate((3.0, 6.0)):
        torch.manual_seed(i)
        pipeline = plain(folder / 'base')
        config = LoraConfig(
            r=3, lora_alpha=alpha, init_lora_weights=False, target_modules=['to_q', 'to_v', 'conv1']
        )
        pipeline.unet.add_adapter(config)
        Policy(pipeline, train='lora', lora_rank=2).save(folder / f'lora_{i}')
    torch.manual_seed(9)
    pipeline = plain(folder / 'base')
    pipeline.unet.add_adapter(
        LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=['to_q', 'to_v'])
    )
    from peft.utils import get_peft_model_state_dict

    state = {f'unet.{k}': v for k, v in get_peft_model_state_dict(pipeline.unet).items()}
    kohya = {
        k.replace('lora_unet_unet', 'lora_unet'): v for k, v in convert_state_dict_to_kohya(state).items()
    }
    save_file(
        {k: (torch.tensor(5.0) if k.endswith('alpha') else v.contiguous()) for k, v in kohya.items()},
        folder / 'kohya.safetensors',
    )
    return folder


def loaded(pipeline, at):
    load_plain(pipeline, at / 'lora_0')


def named(pipeline, at):
    load_plain(pipeline, at / 'lora_0', adapter_name='mine')


def scaled(pipeline, at):
    named(pipeline, at)
    pipeline.set_adapters('mine', 0.5)


def both(pipeline, at):
    named(pipeline, at)
    load_plain(pipeline, at / 'lora_1', adapter_name='other')
    pipeline.set_adapters(['mine', 'other'], [1.0, 0.25])


def one_of_two(pipeline, at):
    both(pipeline, at)
    pipeline.set_adapters('other')


def kohya(pipeline, at):
    pipeline.load_lora_weights(str(at), weight_name='kohya.safetensors')


def switched_off(pipeline, at):
    named(pipeline, at)
    pipeline.disable_lora()


def words_too(pipeline, at):
    torch.manual_seed(3)
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=['q_proj', 'v_proj']),
        pipeline.text_encoder,
    )


GIVEN = [loaded, named, scaled, both, one_of_two, kohya, switched_off, words_too]


@pytest.mark.parametrize('train', ['lora', 'full'])
@pytest.mark.parametrize('give', GIVEN)
def test_what_the_user_gave_is_the_reference_and_is_saved(give, train, foreign, tmp_path, capsys):
    pipeline = plain(foreign / 'base')
    base = answer(pipeline)
    give(pipeline, foreign)
    before = answer(pipeline)
    assert same(before, base) == (give is switched_off)
    policy = Policy(pipeline, num_steps=2, train=train, lora_rank=4, lora_alpha=6)
    told = [line for line in capsys.readouterr().err.splitlines() if 'is added to its weights' in line]
    assert same(answer(pipeline), before) and len(told) == (give is not switched_off)
    assert all('reference' in line and ('rank 4' in line) == (train == 'lora') for line in told)
    if train == 'full':
        policy.base_weights()
    else:
        assert {layer.r['default'] for layer in tuner_layers(policy.network).values()} == {4}
    move(policy, 0.05)
    moved = answer(pipeline)
    assert not same(moved, before)
    with policy.reference():
        assert same(answer(pipeline), before)
    folder = policy.save(tmp_path / 'tuned', base=str(foreign / 'base'))
    assert same(answer(Policy.from_pretrained(folder).pipeline), moved)
    if train == 'lora' and give is words_too and not diffusers_reads_words():
        return
    other = plain(folder if train == 'full' else foreign / 'base')
    if train == 'lora':
        load_plain(other, folder)
    assert same(answer(other), moved)


def test_what_cannot_be_saved_is_refused_before_anything_is_sampled(foreign):
    pipeline = plain(foreign / 'base')
    pipeline.unet.add_adapter(LoraConfig(use_dora=True, init_lora_weights=False, target_modules=['to_q']))
    before = answer(pipeline)
    with pytest.raises(ValueError, match="train is 'lora', but the pipeline's own adapters .*DoRA.*'full'"):
        Policy(pipeline)
    assert same(answer(pipeline), before)
    assert same(answer(Policy(pipeline, train='full').pipeline), before)
    for unload in (False, True):
        pipeline = plain(foreign / 'base')
        loaded(pipeline, foreign)
        pipeline.fuse_lora()
        if unload:
            pipeline.unload_lora_weights()
        before = answer(pipeline)
        with pytest.raises(ValueError, match='fused into the pipeline'):
            Policy(pipeline)
        assert same(answer(Policy(pipeline, train='full').pipeline), before) and not tuner_layers(
            pipeline.unet
        )
    pipeline = plain(foreign / 'base')
    pipeline.fuse_qkv_projections()
    for train in ('lora', 'full'):
        with pytest.raises(ValueError, match='projections .* are fused'):
            Policy(pipeline, train=train)


def test_an_unfused_pipeline_is_as_if_it_had_never_been_fused(foreign):
    pipeline = plain(foreign / 'base')
    loaded(pipeline, foreign)
    before = answer(pipeline)
    pipeline.fuse_lora()
    pipeline.unfuse_lora()
    assert same(answer(Policy(pipeline).pipeline), before)


# ---- weights of our own


def test_a_second_policy_on_a_pipeline(capsys):
    "Other options make a new LoRA; the same ones go on with it."
    pipeline = tiny_sd()
    first = Policy(pipeline, num_steps=2, lora_rank=2)
    move(first)
    moved = answer(pipeline)
    again = Policy(pipeline, num_steps=3, lora_rank=2)
    assert (
        all(p is q for p, q in zip(first.parameters(), again.parameters()))
        and again.continues_lora
        and not capsys.readouterr().err
    )
    with again.reference():
        assert torch.equal(answer(pipeline), moved)
    second = Policy(pipeline, num_steps=2, lora_rank=4)
    assert "'default', rank 2" in capsys.readouterr().err
    assert {len(p) for n, p in second.named_parameters().items() if 'lora_A' in n} == {4} and same(
        answer(pipeline), moved
    )


def test_an_untrained_lora_is_made_anew_by_another_seed(capsys):
    pipeline = tiny_sd()
    Policy(pipeline, num_steps=2, lora_seed=0)
    mine = {n: p.clone() for n, p in Policy(pipeline, num_steps=2, lora_seed=1).named_parameters().items()}
    fresh = Policy(tiny_sd(), num_steps=2, lora_seed=1).named_parameters()
    assert all(torch.equal(mine[n], fresh[n]) for n in fresh) and not capsys.readouterr().err


def test_a_lora_of_one_s_own_is_trained_on_or_is_the_base_of_another(tmp_path, capsys):
    tiny_sd(seed=1).save_pretrained(tmp_path / 'base')
    first = Policy.from_pretrained(tmp_path / 'base', num_steps=2, lora_rank=2, lora_alpha=3)
    move(first)
    start, one = answer(first.pipeline), first.save(tmp_path / 'one', base=str(tmp_path / 'base'))
    for options, rank in ((dict(lora_rank=2, lora_alpha=3), 2), (dict(lora_rank=4), 6)):
        policy = Policy.from_pretrained(one, num_steps=2, **options)
        assert same(answer(policy.pipeline), start) and ('is added' in capsys.readouterr().err) == (rank == 6)
        move(policy, seed=6)
        moved = answer(policy.pipeline)
        with policy.reference():
            assert same(answer(policy.pipeline), start) and not same(start, moved)
        folder = policy.save(tmp_path / f'two_{rank}', base=str(one))
        saved = json.loads((folder / 'policy.json').read_text())
        assert saved['lora_rank'] == rank and base_of(folder) == str(tmp_path / 'base')
        other = plain(tmp_path / 'base')
        load_plain(other, folder)
        assert same(answer(other), moved) and same(
            answer(Policy.from_pretrained(folder, base=str(one)).pipeline), moved
        )
        again = Policy.from_pretrained(folder, num_steps=2)
        assert again.continues_lora and same(
            answer(Policy.from_pretrained(again.save(tmp_path / 'three'), num_steps=2).pipeline), moved
        )


@pytest.mark.parametrize('rank', [16, 4])
def test_a_run_on_the_weights_of_a_run(rank, tmp_path, capsys):
    "As typed: `drl train … --model RUN/weights`; `drl eval` compares it with what it began from."
    tiny_sd().save_pretrained(tmp_path / 'base')
    short = [
        '--train',
        'lora',
        '--epochs',
        '1',
        '--num-steps',
        '2',
        '--train-steps',
        '1',
        '--frames',
        '0',
        '--lr',
        '.01',
        '--warmup',
        '0',
    ]
    for name, model, options in (
        ('one', tmp_path / 'base', []),
        ('two', tmp_path / 'one/weights', ['--lora-rank', str(rank)]),
    ):
        assert (
            cli.main(
                [
                    'train',
                    'compressibility',
                    '--model',
                    str(model),
                    '--out',
                    str(tmp_path / name),
                    *short,
                    *options,
                ]
            )
            == 0
        ), capsys.readouterr().err
    assert ('is added to its weights' in capsys.readouterr().err) == (rank == 4)
    one, two = (answer(open_policy(tmp_path / name).pipeline) for name in ('one', 'two'))
    other = plain(tmp_path / 'base')
    assert not same(answer(other), one) and not same(one, two)
    load_plain(other, tmp_path / 'two/weights')
    assert same(answer(other), two) and same(
        answer(Policy.from_pretrained(tmp_path / 'one/weights').pipeline), one
    )


def test_damaged_weights_are_one_line(tmp_path):
    tiny_sd().save_pretrained(tmp_path / 'base')
    folder = Policy.from_pretrained(tmp_path / 'base', num_steps=2, lora_rank=2).save(
        tmp_path / 'one', base=str(tmp_path / 'base')
    )
    file = folder / LORA_FILE
    state = load_file(file)
    key = min(k for k in state if 'down' in k)
    for harm, words in (
        (lambda s: s.pop(key), 'one matrix'),
        (lambda s: s.update(x=s[key].clone()), 'no matrix of a LoRA|no part'),
        (lambda s: s.update({key: s[key][:1]}), 'another rank'),
        (lambda s: s.update({key: s[key][:, :1].contiguous()}), 'shape'),
        (lambda s: s.update({k.replace('unet.', 'prior.'): s.pop(k) for k in list(s)}), 'no part'),
        (lambda s: s.update({k.replace('blocks', 'knots'): s.pop(k) for k in list(s)}), 'no layer'),
    ):
        bad = dict(state)
        harm(bad)
        save_file(bad, file)
        with pytest.raises(ValueError, match=words) as caught:
            Policy.from_pretrained(folder)
        assert '\n' not in str(caught.value) and 'cannot be read' in str(caught.value)
    save_file(state, file)
    note = json.loads((folder / 'policy.json').read_text())
    (folder / 'policy.json').write_text(json.dumps(note | dict(base=str(folder))))
    with pytest.raises(ValueError, match='names itself'):
        Policy.from_pretrained(folder)


# ---- the pieces


def test_two_loras_side_by_side_are_their_sum():
    torch.manual_seed(0)
    draw = lambda rank: (torch.randn(rank, 5), torch.randn(4, rank))
    first, second = dict(a=draw(2), b=draw(2)), dict(b=draw(3), c=draw(3))
    weight = lambda pair: pair[1] @ pair[0]
    for stack in (stacked_factors(first, second), pad_to_rank(stacked_factors(first, second), 7)):
        for name, want in dict(
            a=weight(first['a']), b=weight(first['b']) + weight(second['b']), c=weight(second['c'])
        ).items():
            torch.testing.assert_close(weight(stack[name]), want)
    assert {len(down) for down, _ in pad_to_rank(stacked_factors(first, second), 7).values()} == {7}
    conv = pad_to_rank(dict(a=(torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1))), 5)['a']
    assert conv[0].shape == (5, 3, 3, 3) and conv[1].shape == (4, 5, 1, 1) and conv[0].sum() == 54


def test_no_method_of_transformers_or_diffusers_that_wants_its_own_peft():
    for function in (
        Policy,
        Policy.save,
        Policy.from_pretrained,
        Policy.reference,
        saving.save_lora,
        saving.add_saved_lora,
    ):
        assert not {
            'add_adapter',
            'disable_adapters()',
            'enable_adapters()',
            'load_lora_weights(',
            'load_adapter',
        } & set(inspect.getsource(function).split('.'))


def test_off_and_on():
    pipeline = tiny_sd()
    policy = Policy(pipeline, num_steps=2)
    base = answer(pipeline)
    move(policy)
    moved = answer(pipeline)
    with lora_disabled([policy.network]):
        assert torch.equal(answer(pipeline), base)
    assert torch.equal(answer(pipeline), moved) and all(p.requires_grad for p in policy.parameters())
