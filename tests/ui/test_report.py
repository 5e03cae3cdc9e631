"""The report page, its files, and the commands that make them; on the emoji model with few images, and on a
tiny random one."""

import io, json
from html.parser import HTMLParser

import pandas as pd, pytest, torch

from drl_toolkit.evaluation import evaluate as E

from drl_toolkit.ui import report as R
from drl_toolkit.cli.main import main
from drl_toolkit.evaluation.drift import drift
from drl_toolkit.evaluation.eval_rewards import EvalReward, evaluate_rewards
from drl_toolkit.emoji.evaluation import EMOJI_EVAL_REWARDS
from drl_toolkit.rewards.pixels import sharpness
from drl_toolkit.rewards.reward import jpeg_compressibility
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.evaluation.votes import Ballot

PROBES = [E.PromptSet('objects/train', ('a <b>cat</b>', 'a "dog" & more') * 4)]


@pytest.fixture(scope='module')
def found():
    x = {'objects/train': torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    y = {k: v.mean(1, keepdim=True).expand_as(v) for k, v in x.items()}
    rows = [
        E.Row('small', 'training', 1.0, 2.0, 1.0, 0.5, 1.5, pictures=8),
        E.Row('Fréchet distance', 'all', 1.0, 2.0, 1.0, better='lower'),
    ]
    prompts = list(PROBES[0].prompts)
    return R.Evaluation(
        E.Comparison(rows, dict(small=1)),
        evaluate_rewards(
            [EvalReward(jpeg_compressibility, ()), EvalReward(sharpness, ())],
            PROBES,
            x,
            y,
            trained=('sharpness',),
        ),
        drift(x['objects/train'], y['objects/train'], prompts),
        PROBES,
        x,
        y,
        ('demo', '<script>bad()</script>'),
        3,
    )


class Page(HTMLParser):
    "Open tags, sources and text; HTML that does not close what it opened fails."

    VOID = {'meta', 'img', 'br', 'input'}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.alts, self.words, self.scripts = [], [], [], [], 0
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == 'script'
        if tag == 'img':
            self.sources.append(dict(attrs)['src'])
            self.alts.append(dict(attrs).get('alt'))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone_and_shows_names_as_text(found):
    page = Page(R.page(found, 'drl eval <x>'))
    assert (
        page.sources
        and all(s.startswith('data:image/') for s in page.sources)
        and all(page.alts)
        and page.scripts == 0
    )
    text = ' '.join(page.words)
    assert (
        '<script>bad()</script>' in text
        and 'a <b>cat</b>' in text
        and 'drl eval <x>' in text
        and '+0.500 … +1.500' in text
    )


def test_sentences_part_paid_from_unpaid(found):
    said = R.sentences(found)
    rows = found.rewards.set_index('reward')
    assert (
        said[0].startswith('Trained: sharpness (training prompts)')
        and rows.loc['sharpness', 'trained']
        and any('jpeg_compressibility (training)' in s for s in said)
    )


def test_one_sentence_and_the_pairs_that_changed_most_come_first(found):
    said = R.verdict_sentence(found)
    rows = found.rewards
    better = int((rows[rows['trained']]['effect_low'] > 0).sum())
    assert said.startswith('Against base, tuned is') and 'held-out' in said
    assert f'better in {better or "none"}' in said or 'not clearly different' in said
    first = R.first_pairs(found)
    assert len(first) == 2 and {p.prompt for p in first} == set(PROBES[0].prompts)  # one of each prompt
    base, tuned = found.base['objects/train'], found.tuned['objects/train']
    moved = (tuned - base).abs().mean((1, 2, 3))
    assert first[0].prompt == PROBES[0].prompts[int(moved.argmax())]
    page = R.page(found)
    assert page.index('class="verdict"') < page.index('class="pairs first"') < page.index('<h2>In words')


def test_files(found, tmp_path):
    names = R.write_report(tmp_path, found, 'drl eval')
    assert set(names) >= {
        'summary.json',
        'table.md',
        'rewards.csv',
        'drift.csv',
        'rewards.png',
        'samples.png',
        'report.html',
        'ballot',
    } and all((tmp_path / n).exists() for n in names)
    assert (
        pd.read_csv(tmp_path / 'rewards.csv').reward.tolist() == ['jpeg_compressibility', 'sharpness']
        and len(Ballot(tmp_path / 'ballot').pairs) == 8
    )
    Ballot(tmp_path / 'ballot').vote('0000', 'tie', 'ann')
    assert (
        'ballot' not in R.write_report(tmp_path, found) and Ballot(tmp_path / 'ballot').result().votes == 1
    )  # votes are not lost to a second evaluation


def test_first_prompts_are_different_ones():
    prompt_set = E.PromptSet('objects/train', ('a', 'a', 'b', 'c', 'b'))
    assert R._first_prompts(prompt_set, 3) == [0, 2, 3] and R._first_prompts(prompt_set, 9) == [0, 2, 3, 1, 4]


def test_figures_can_be_drawn_of_little():
    one = pd.DataFrame([dict(epoch=2, trained=float('nan'), watched=0.1, clip_score=0.1)])
    for figure in (
        R.over_optimisation(one),
        R.forest(
            pd.DataFrame(
                [
                    dict(
                        reward='x',
                        trained=True,
                        prompts='training',
                        effect=0.0,
                        effect_low=0.0,
                        effect_high=0.0,
                        win_rate=0.5,
                    )
                ]
            )
        ),
    ):
        figure.savefig(io.BytesIO(), format='png')


def test_eval_of_a_run_that_watched(tmp_path, capsys, few_prompt_sets):
    assert (
        main(
            [
                'train',
                'crispness',
                '--out',
                str(tmp_path / 'run'),
                '--epochs',
                '2',
                '--watch',
                'clip_score',
                '--watch-every',
                '1',
                '--num-steps',
                '2',
                '--train-steps',
                '1',
                '--num-minibatches',
                '1',
            ]
        )
        == 0
    )
    assert (
        main(
            [
                'eval',
                str(tmp_path / 'run'),
                '--out',
                str(tmp_path / 'e'),
                '--size',
                '.05',
                '--rewards',
                'drl_toolkit.rewards.lab:crispness',
            ]
        )
        == 0
    )
    out, rewards = capsys.readouterr().out, pd.read_csv(tmp_path / 'e/rewards.csv')
    assert (
        'report.html' in out
        and 'drl vote' in out
        and rewards[rewards.trained].reward.unique().tolist() == ['crispness']
    )
    assert (
        set(rewards.reward) == {'crispness'} | {j.reward.name for j in EMOJI_EVAL_REWARDS}
        and (tmp_path / 'e/watched.png').exists()
    )
    nats = pd.read_csv(tmp_path / 'e/drift.csv').set_index('measure').loc['KL of the paths', 'change']
    assert nats > 0 and 'seconds' in json.loads((tmp_path / 'e/summary.json').read_text())


def test_eval_of_any_other_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        'drl_toolkit.emoji.evaluation.speaks_emoji', lambda policy: False
    )  # the tiny one has the emoji tokenizer
    tiny_sd().save_pretrained(tmp_path / 'm')
    assert (
        main(
            [
                'train',
                'compressibility',
                '--model',
                str(tmp_path / 'm'),
                '--out',
                str(tmp_path / 'run'),
                '--epochs',
                '1',
                '--num-steps',
                '2',
                '--train-steps',
                '1',
            ]
        )
        == 0
    )
    assert main(['eval', str(tmp_path / 'run'), '--out', str(tmp_path / 'e'), '--size', '.1']) == 0
    rewards = pd.read_csv(tmp_path / 'e/rewards.csv')
    assert (
        set(rewards.reward) == {'jpeg_compressibility', 'sharpness', 'colourfulness'}
        and (tmp_path / 'e/report.html').exists()
    )
    for argv, words in (
        (['eval', str(tmp_path / 'm'), '--out', str(tmp_path / 'x')], '--against'),
        (
            ['eval', str(tmp_path / 'run'), '--out', str(tmp_path / 'x'), '--rewards', 'beauty'],
            "reward 'beauty' does not exist",
        ),
        (['eval', str(tmp_path / 'run'), '--out', str(tmp_path / 'x'), '--size', '0'], 'size must be in (0, 100)'),
        (['tax', str(tmp_path / 'm'), '--out', str(tmp_path / 'x')], 'holds no run'),
        (['tax', str(tmp_path / 'run'), str(tmp_path / 'run'), '--out', str(tmp_path / 'x')], 'different names'),
        (['tax', str(tmp_path / 'run'), '--out', str(tmp_path / 'x')], 'emoji world'),
        (['train', 'crispness', '--watch', 'beauty', '--out', str(tmp_path / 'y')], "reward 'beauty'"),
        (['train', 'crispness', '--patience', '2'], 'watch is empty'),
    ):
        capsys.readouterr()
        assert main(argv) == 2 and words in capsys.readouterr().err and not (tmp_path / 'y').exists()
