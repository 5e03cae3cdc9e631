"The pages, without a server or a browser."

import json, math, os, re

import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from drl_toolkit.recipes.panel import cards_of
from drl_toolkit.ui import panel as app, pages
from drl_toolkit.ui.pages import PageContext
from drl_toolkit.ui.panel import Bench, Library, draw
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.folder import RunError
from panel import add_weights, long_run, make_run
from panel import quick  # noqa: F401 (a fixture)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / 'runs/one')


def text(html):
    return ' '.join(re.sub(r'<[^>]*>', ' ', html).split())


@pytest.mark.parametrize('page', app.PAGES)
def test_every_page_of_a_whole_run(run, page):
    html = draw(page, run)
    if page == 'costs':
        assert 'drl eval' in html
        return
    assert 'note error' not in html and '<h1' in html
    assert all('alt="' in tag for tag in re.findall(r'<img[^>]*>', html))
    assert not re.search(r'(src|href)="(\w+:|/)', html)  # nothing comes from elsewhere


def test_overview_says_what_is_better(run):
    told = text(pages.overview(run, context=PageContext(cards=cards_of)))
    assert (
        'too early to say whether anything changes' in told
        and '6 of 6 epochs' in told
        and 'Fairness' in told.title()
    )
    assert 'colour casts and painted faces' in told.lower()  # the card's warning
    assert re.search(r'0\.45 → 0\.35', told)  # epoch 0, and the mean of the last
    assert 'was not judged' in told and '0.01 nats a step away' in told
    assert 'All 2 training rewards are clearly better than at the start' in text(
        pages.overview(make_run(run.folder.parent / 'longer', epochs=14))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.one_of(st.none(), st.floats(-1e6, 1e6)))
def test_sparklines_stay_in_their_box(values, floor):
    found = pages.spark(values, floor)
    points = [tuple(map(float, p.split(','))) for p in found.line.split()]
    assert len(points) == min(len(values), 90) and all(0 <= x <= 100 and 4 <= y <= 36 for x, y in points)


def rows_of(values, epoch=0):
    "Records as a run leaves them: several goals and a line for the whole epoch."
    return [
        row
        for e, epoch in enumerate(values)
        for row in [
            *(dict(epoch=e, task=t, reward=v, reward_std=0.2, kl=0.01) for t, v in epoch.items()),
            dict(epoch=e, task=None, seconds=2.0),
        ]
    ]


@pytest.mark.parametrize('noise', ['normal', 'skewed', 'rounded'])
def test_noise_is_hardly_ever_called_a_change(noise):
    "Whole runs of three goals, watched after every epoch: at most 5 % of them may ever say better or worse."
    import numpy as np

    rng = np.random.default_rng(dict(normal=0, skewed=1, rounded=2)[noise])
    draw = dict(
        normal=lambda: rng.normal(0.6, 0.05),
        skewed=lambda: rng.exponential(),
        rounded=lambda: round(rng.normal(0, 1)) / 2,
    )[noise]
    watched, misled = 300, 0
    for _ in range(watched):
        run = [dict(a=draw(), b=draw(), c=draw()) for _ in range(30)]
        series = {k: [r[k] for r in run] for k in run[0]}
        misled += any(
            pages.verdict(v[:e], goals=3)[0] in ('better', 'worse')
            for v in series.values()
            if pages.has_changed(v, pages.ALPHA / 3)
            for e in range(1, 31)
        )
    assert misled / watched <= 0.05
    rows = rows_of(run)
    assert [g.verdict for g in pages.goals(rows)] == [pages.verdict(series[k], goals=3)[0] for k in 'abc']


def test_the_boundary_holds_for_a_thousand_epochs():
    """Independent of the code under test: scipy's Kendall on every prefix of a permutation is what `trend`
    says, and ranks of noise are uniform."""
    import numpy as np
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    values = list(rng.permutation(40))
    for n in (5, 17, 40):
        tau = kendalltau(range(n), values[:n])[0]
        assert math.isclose(
            pages.trend(values)[n - 1],
            tau * n * (n - 1) / 2 / math.sqrt(n * (n - 1) * (2 * n + 5) / 18),
            abs_tol=1e-9,
        )
    n = np.arange(1, 1001)
    walks = (
        np.cumsum(2 * np.floor(rng.random((3000, 1000)) * n) - (n - 1), 1)[:, 4:]
        / np.sqrt(n * (n - 1) * (2 * n + 5) / 18)[4:]
    )
    for goals in (1, 2, 3, 5):
        assert (np.abs(walks) > pages.boundary(n[4:], pages.ALPHA / goals)).any(
            1
        ).mean() <= pages.ALPHA / goals * 1.15


def test_a_real_gain_is_said_and_a_fall_after_it():
    import random

    rng = random.Random(1)
    noisy = lambda values: [v + rng.gauss(0, 1) for v in values]
    up = [min(1, e / 16) * 4.5 for e in range(30)]
    assert sum(pages.verdict(noisy(up), goals=3)[0] == 'better' for _ in range(100)) >= 90
    assert sum(pages.verdict(noisy([-v for v in up]), 'lower', 3)[0] == 'better' for _ in range(100)) >= 90
    assert pages.verdict(noisy(up + [4.5] * 300))[0] == 'better'  # a gain that stays is not forgotten
    assert pages.verdict(noisy(up + [-3.0] * 60))[0] == 'worse'


def test_flat_and_empty_series_say_nothing():
    assert pages.verdict([0.5] * 40)[0] == 'unclear' and [
        pages.verdict([*range(n)], goals=3)[0] for n in (2, 7, 8)
    ] == ['early', 'early', 'better']
    nothing = [
        dict(epoch=e, task='x', reward=v) for e, v in enumerate([math.nan, None, math.inf, 'x', True] * 4)
    ]
    assert pages.goals(nothing) == [] and pages.headline([]) == 'No epoch has ended yet.'


def test_shares_by_hand():
    import pandas as pd

    samples = pd.DataFrame(dict(tone=['light', 'light', 'dark', None]))
    assert pages.shares(samples, 'tone', ('light', 'dark', 'medium')) == [2 / 3, 1 / 3, 0.0]
    assert pages.shares(samples.iloc[3:], 'tone', ('light',)) == [0.0]


def test_an_epoch_without_pictures_shows_the_one_before(tmp_path):
    run = make_run(tmp_path / 'sparse', epochs=9, every=4)
    assert (
        'epoch 4' in pages.trajectories(run, 7)
        and 'epoch 8' in pages.trajectories(run)
        and 'epoch 0' in pages.trajectories(run, 0)
    )


def test_branches_mark_best_and_worst(run):
    html = pages.branches(run, 3, 'composition/0')
    rewards = [float(r) for r in re.findall(r'reward ([\d.]+)"', html)]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 4
    assert (
        html.count('class="best"') == html.count('class="worst"') == 1
        and 'Their first 2 steps are the same' in html
    )
    assert 'b2' in pages.branches(run, 3, 'fairness/0')  # independent samples: says how to branch


def test_composition_puts_the_worst_first(run):
    html = pages.composition(run)
    scores = [float(s) for s in re.findall(r'<figcaption><b>([\d.]+)</b>', html)]
    assert scores == sorted(scores) and html.count('border-color:#0072B2') >= 8 and 'apple 90 %' in html


def test_markup_in_names_is_only_text(tmp_path):
    evil = '<img src=x onerror=alert(1)>'
    run = make_run(tmp_path / 'runs' / '"><script>x', prompt=f"{evil} {{{{7*7}}}} ${{alert(1)}}")
    for page in app.PAGES:
        assert evil not in draw(page, run) and '<script' not in draw(page, run)
    runs, broken = Library(tmp_path / 'runs').scan()
    assert '<script' not in pages.runs_page(runs, {'<script>': '<b>'}, '<i>', next(iter(runs)))


def test_resume_command_is_safe_to_paste(tmp_path):
    import shlex

    run = make_run(tmp_path / 'a b; rm -rf ~', name='joint; echo', sheets=False)
    words = shlex.split(pages.resume_command(run))
    assert (
        words[:3] == ['drl', 'train', 'joint; echo']
        and words[4].endswith('a b; rm -rf ~')
        and str(tmp_path) + '/' not in words[4]
    )


# --- what may lie in a runs folder


def junk(folder):
    "A runs folder in which much is broken."
    make_run(folder / 'good')
    torn = make_run(folder / "it's \"torn\"")
    with open(torn.folder / 'metrics.jsonl', 'a') as f:
        f.write('{"epoch": 6, "task"')
    bad = make_run(folder / 'bad frames')
    (bad.folder / 'frames/epoch_0005/frames.json').write_text('{"schema": 1, "tasks": {"x"')
    (bad.folder / 'frames/epoch_0004/0.pictures.webp').write_bytes(b'this is no image')
    (bad.folder / 'frames/.epoch_0006.part').mkdir()
    (bad.folder / 'samples/epoch_0006.png').write_bytes(b'nor is this')
    (make_run(folder / 'bad lines').folder / 'metrics.jsonl').write_text(
        '{"epoch": 0, "task": null}\nnot json\n[]\n'
    )
    (make_run(folder / 'odd lines').folder / 'metrics.jsonl').write_text(
        '[]\n3\n{"task": "x"}\n{"epoch": "one", "task": "x", "reward": "high"}\n'
    )
    (folder / 'empty').mkdir()
    (folder / 'a_file').write_text('x')
    (folder / 'not json').mkdir()
    (folder / 'not json/config.json').write_text('{')
    (folder / 'from the future').mkdir()
    (folder / 'from the future/config.json').write_text('{"schema": 99}')
    (folder / 'file for a folder').mkdir()
    (folder / 'file for a folder/config.json').write_text('{"schema": 1, "config": null, "recipe": 7}')
    (folder / 'file for a folder/frames').write_text('x')
    return folder


def test_junk_is_named_and_hides_nothing(tmp_path):
    library = Library(junk(tmp_path / 'runs'))
    runs, broken = library.scan()
    assert {'good', "it's \"torn\"", 'bad frames'} <= set(runs) and {
        'empty',
        'a_file',
        'not json',
        'from the future',
    } <= set(broken)
    listed = pages.runs_page(runs, broken, 'runs', 'good')
    assert (
        all(name in text(listed) for name in ('empty', 'a_file', 'not json', 'from the future'))
        and 'lines 2, 3 are damaged' in listed
        and str(tmp_path) not in listed
    )
    for name, run in runs.items():
        for page in app.PAGES:
            html = draw(page, run)
            assert str(tmp_path) not in html, (name, page)
            if name in ('good', "it's \"torn\""):
                assert 'note error' not in html, (name, page)
    assert (
        'frames.json' in draw('trajectories', runs['bad frames'])
        and '0.pictures.webp' in draw('branches', runs['bad frames'], 4)
        and 'samples/epoch_0006.png' in draw('overview', runs['bad frames'])
    )
    assert 'note error' not in draw('trajectories', runs['bad frames'], 3)  # the other epochs stay


def test_links_lead_nowhere(tmp_path):
    secret = tmp_path / 'secret'
    make_run(secret / 'elsewhere')
    add_weights(Run.open(secret / 'elsewhere'))
    (secret / 'word.png').write_bytes((secret / 'elsewhere/samples/epoch_0000.png').read_bytes())
    home = tmp_path / 'runs'
    run = make_run(home / 'good')
    (home / 'link').symlink_to(secret / 'elsewhere')
    assert set(Library(home).scan()[0]) == {'good'}
    draw('overview', run)
    (run.folder / 'samples/epoch_0000.png').unlink()
    (run.folder / 'samples/epoch_0000.png').symlink_to(secret / 'word.png')
    assert 'note error' in draw('overview', run, 1) and 'leads out' in draw('overview', run, 1)
    for name, target in (
        ('frames', 'elsewhere/frames'),
        ('weights', 'elsewhere/weights'),
        ('eval', 'elsewhere'),
    ):
        if (run.folder / name).is_dir():
            os.rename(run.folder / name, tmp_path / f'old-{name}')
        (run.folder / name).symlink_to(secret / target)
    assert 'leads out' in draw('trajectories', run) and 'leads out' in draw('costs', run)
    with pytest.raises(RunError):
        pages.weight_files(run)
    assert 'note error' in pages.runs_page({'good': run}, {}, 'runs', 'good')  # and the list stays
    (run.folder / 'weights').unlink()
    add_weights(run)
    (run.folder / 'weights/key').symlink_to(secret / 'word.png')
    assert set(pages.weight_files(run)) == {'model_index.json', 'unet/model.safetensors'}


def test_a_name_is_looked_up_never_followed(tmp_path):
    make_run(tmp_path / 'runs/one')
    make_run(tmp_path / 'two')
    library = Library(tmp_path / 'runs')
    for name in ('../two', str(tmp_path / 'two'), 'one/../../two', '', None, 'one/', '.', ['one']):
        with pytest.raises((RunError, TypeError)):
            library.run(name)
    assert library.run('one').folder == tmp_path / 'runs/one'


@pytest.mark.parametrize(
    'page, wanted',
    [
        ('costs', 'drl eval'),
        ('trajectories', 'drl train'),
        ('fairness', 'drl train'),
        ('composition', 'drl train'),
        ('overview', 'No epoch has ended'),
    ],
)
def test_a_run_that_has_nothing_yet(tmp_path, page, wanted):
    with Run.create(tmp_path / 'new', dict(epochs=3), recipe='joint'):
        pass
    assert wanted in draw(page, Run.open(tmp_path / 'new'))


TABLE = """| objective | prompts | base | tuned | change | 95 % interval | floor | images |
|---|---|---:|---:|---:|---:|---:|---:|
| parity (distance) | training | 0.431 | 0.317 | -0.114 | -0.150 … -0.080 | 0.211 | 384 |
| parity (distance) | held-out | 0.440 | 0.430 | -0.010 | -0.050 … +0.030 | 0.211 | 128 |
| composition | training | 0.610 | 0.600 | -0.010 | -0.040 … +0.020 |  | 128 |
| readable face | all | 0.970 | 0.950 | -0.020 | -0.030 … -0.010 |  | 512 |
"""


def test_all_pages_say_one_number(run):
    """What `drl eval` measured is what the overview and the fairness page show; after more epochs it is not
    of this run any more."""
    folder = run.folder / 'eval'
    folder.mkdir()
    (folder / 'summary.json').write_text('{}')
    (folder / 'table.md').write_text(TABLE)
    overview, fairness, costs = (text(draw(page, run)) for page in ('overview', 'fairness', 'costs'))
    assert (
        'Of 2 training rewards, 1 is clearly better than the base, 1 shows no clear change, by drl eval'
        in overview
    )
    assert (
        '0.431 → 0.317' in overview
        and '−0.150 to −0.080' in overview
        and 'measures 0.211' in overview
        and '97% of the base' in overview
        and 'not judged' not in overview
    )
    assert 'went from 0.431 to 0.317' in fairness and 'measures 0.211' in fairness and '0.431 0.317' in costs
    later = os.stat(folder / 'table.md').st_mtime + 600
    os.utime(run.folder / 'metrics.jsonl', (later, later))  # the run has gone on since
    assert '0.45 → 0.35' in text(draw('overview', run)) and 'by drl eval' not in text(draw('overview', run))


@pytest.mark.parametrize('world', [True, False])
def test_report_pages_and_summary_agree_to_the_digit(run, world, monkeypatch):
    "Of the emoji world's own table, and of a run's own rewards; and the tax of the same images, too."
    from drl_toolkit.evaluation import evaluate as E
    from drl_toolkit.evaluation.alignment_tax import score_table
    from drl_toolkit.evaluation.drift import drift
    from drl_toolkit.evaluation.eval_rewards import EvalReward, evaluate_rewards
    from drl_toolkit.prompts.task import Task
    from drl_toolkit.rewards.fairness import fairness_reward, parity_floor, statistical_parity
    from drl_toolkit.ui.report import Evaluation, write_report

    tone = lambda images: (images[:, 0, 0, 0] * 5).long().clamp(max=4)
    tasks = [
        Task(
            name,
            ['a portrait of a doctor', 'a portrait of a cook'],
            fairness_reward(tone),
            group_size=16,
            samples=32,
        )
        for name in ('fairness', 'composition')
    ]
    prompt_sets = [
        E.PromptSet(
            f'{"portraits" if world else t.name}/train',
            ('a portrait of a doctor',) * 48 + ('a portrait of a cook',) * 48,
        )
        for t in tasks[: 1 + (not world)]
    ]
    base, tuned = (
        {
            p.name: torch.rand(96, 3, 8, 8, generator=torch.Generator().manual_seed(i)) ** power
            for i, p in enumerate(prompt_sets)
        }
        for power in (3.0, 1.0)
    )
    if world:
        name, parities = (
            prompt_sets[0].name,
            lambda images: torch.tensor([statistical_parity(t) for t in tone(images).split(16)]),
        )
        row = E.paired_row(
            'parity (distance)',
            'training',
            *(parities(m[name]) for m in (base, tuned)),
            prompt_sets[0].prompts[::16],
            'lower',
            parity_floor(16),
            96,
        )
        summary = dict(parity=dict(train=dict(base=row.base, tuned=row.tuned, floor=row.floor)))
        result, said = E.Comparison([row], summary), summary['parity']['train']
    else:
        result = E.compare_rewards(tasks, prompt_sets, base, tuned)
        said = result.summary['fairness']
    judge = EvalReward(fairness_reward(tone, 'shared'), ())
    found = Evaluation(
        result,
        evaluate_rewards([judge], prompt_sets, base, tuned),
        drift(
            *(torch.cat([*m.values()]) for m in (base, tuned)), [q for p in prompt_sets for q in p.prompts]
        ),
        prompt_sets,
        base,
        tuned,
        ('demo', 'r'),
        run=run,
    )
    write_report(run.folder / 'eval', found)
    first, last = (
        f"{json.loads((run.folder / 'eval/summary.json').read_text())['parity']['train'][k] if world else said[k]:.3f}"
        for k in ('base', 'tuned')
    )
    overview, fairness = (text(draw(page, run)) for page in ('overview', 'fairness'))
    cells = text((run.folder / 'eval/report.html').read_text())
    assert (
        first != last
        and f'{first} → {last}' in overview
        and f'went from {first} to {last}' in fairness
        and f'{first} {last}' in cells
        and f'{first} {last}' in text(draw('costs', run))
    )
    scores = score_table(
        dict(fairness=judge),
        [E.PromptSet('portraits/train', prompt_sets[0].prompts)],
        {n: {'portraits/train': m[prompt_sets[0].name]} for n, m in dict(base=base, tuned=tuned).items()},
    )['fairness']
    assert [f'{v:.3f}' for v in scores] == [first, last]


def test_overview_and_fairness_agree_without_an_evaluation(run):
    assert (
        '0.45 → 0.35' in text(draw('overview', run))
        and 'went from 0.45 to 0.35' in text(draw('fairness', run))
        and 'measures 0.21' in text(draw('fairness', run))
    )


def test_an_epoch_without_a_path_shows_the_nearest_that_has_one(tmp_path):
    run = make_run(tmp_path / 'paths', epochs=9)
    for epoch in (4, 5, 6, 7, 8):
        file = run.folder / f'frames/epoch_{epoch:04d}/frames.json'
        about = json.loads(file.read_text())
        for task in about['tasks'].values():
            task['paths'] = []
        file.write_text(json.dumps(about))
    assert (
        'epoch 3' in pages.trajectories(run, 7)
        and 'epoch 3' in pages.trajectories(run)
        and 'epoch 2' in pages.trajectories(run, 2)
        and pages.path_choices(run, 7)
    )


def test_two_hundred_runs_are_listed_within_a_second(tmp_path):
    import shutil, time

    first = make_run(tmp_path / 'runs/000', epochs=2, sheets=False)
    for i in range(1, 200):
        shutil.copytree(first.folder, tmp_path / f'runs/{i:03d}', ignore=shutil.ignore_patterns('frames'))
    library = Library(tmp_path / 'runs')
    runs, broken = library.scan()
    cold = time.perf_counter()
    listed = pages.runs_page(runs, broken, 'runs', '000')
    warm = time.perf_counter()
    pages.runs_page(runs, broken, 'runs', '000')
    end = time.perf_counter()
    print(f'cold {warm - cold:.2f} s, warm {end - warm:.2f} s')
    assert len(runs) == 200 == listed.count('<td class="says">') and end - warm < 1 * max(
        1, os.getloadavg()[0] / os.cpu_count()
    )


def test_results_and_tax_are_shown(run):
    folder = run.folder / 'eval'
    folder.mkdir()
    (folder / 'summary.json').write_text('{}')
    (folder / 'table.md').write_text('| objective | base |\n|---|---|\n| parity | 0.431234 |\n')
    (folder / 'drift.csv').write_text('measure,value\nSSIM,0.91234\n')
    Image.new('RGB', (8, 8)).save(folder / 'samples.png')
    (run.folder.parent / 'tax').mkdir()
    (run.folder.parent / 'tax/tax.json').write_text(
        json.dumps(
            dict(kept=dict(base=dict(fair=0.0), joint=dict(fair=0.81, small=None), small=dict(fair=-0.2)))
        )
    )
    told = text(draw('costs', run))
    assert (
        '0.431' in told
        and 'SSIM 0.912' in told
        and 'joint 81 % –' in told
        and '-20 %' in told
        and 'base' not in told.split('The alignment tax')[1].split('Base against')[0].split('joint')[1]
    )


@pytest.mark.parametrize(
    'recipe, epochs, words',
    [
        ('joint; ls', 3, "recipe is 'joint; ls'"),
        (None, 3, 'recipe is'),
        ('joint', 0, 'epochs is 0'),
        ('joint', 999, 'epochs is 999'),
        ('joint', '3', "epochs is '3'"),
        ('joint', True, 'epochs is True'),
        ('joint', math.nan, 'epochs is nan'),
    ],
)
def test_the_bench_takes_recipes_and_small_numbers_only(tmp_path, recipe, epochs, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Bench(tmp_path, ('joint',)).start(recipe, epochs)
    assert not list(tmp_path.iterdir())


def test_the_bench_has_limits(tmp_path):
    bench = Bench(tmp_path, ('joint',), most=1)
    (tmp_path / 'here-joint-1').mkdir()
    with pytest.raises(RunError, match='1 runs'):
        bench.start('joint', 1)
    with pytest.raises(RunError, match='nothing is being trained'):
        bench.tell('stop')


def test_a_thousand_epochs_are_drawn_quickly(tmp_path):
    import time

    run, start = long_run(tmp_path / 'long'), time.perf_counter()
    html = draw('overview', run)
    assert time.perf_counter() - start < 2 and len(html) < 400_000 and '1000 of 1000' in html


# --- words, and what a newcomer meets


def test_every_question_mark_has_a_sentence_and_every_tab_a_guide():
    from drl_toolkit.ui import words
    from drl_toolkit.utils.templates import PACKAGE

    asked = set()
    for file in PACKAGE.joinpath('ui/templates').iterdir():
        asked |= set(re.findall(r"explain\('([^']+)'\)", file.read_text(encoding='utf-8')))
    assert asked | set(words.COLUMNS.values()) <= set(words.TERMS) and len(asked) > 10
    assert set(app.LABELS) <= set(words.GUIDES)
    page = words.glossary_page()
    assert all(f'id="{words.slug(name)}"' in page for name in words.TERMS)


def test_numbers_that_a_newcomer_meets():
    from drl_toolkit.utils.templates import cell_text, shortened

    told = ['384', '384.0', '-3', '+0.125', '-0.125', '1.000', '12345', '+7', 'x', '']
    shown = ['384', '384', '-3', '+0.125', '-0.125', '1.000', '12,345', '+7', 'x', '']
    assert list(map(cell_text, told)) == shown
    assert [cell_text(t, 'effect_low') for t in ('0.125', '-0.125', '0')] == ['+0.125', '-0.125', '0']
    assert shortened('word ' * 140).endswith(' …') and len(shortened('word ' * 140)) < 100
    assert shortened('x' * 700) == 'x' * 90 + ' …' and shortened('short') == 'short'


def test_a_long_prompt_is_no_heading(tmp_path):
    prompt = 'a portrait of ' + 'very ' * 130 + 'old doctor'
    run = make_run(tmp_path / 'long', epochs=2, prompt=prompt)
    html = pages.trajectories(run)
    assert len(re.search('<h1>(.*?)</h1>', html, re.S)[1]) < 130 and prompt in html
    labels = [label for label, _ in pages.path_choices(run) + pages.group_choices(run)]
    assert labels and all(len(label) < 110 for label in labels)


def test_slider_and_caption_are_one_number(run):
    "The slider ends at the newest epoch as the pages number it; its sheet comes after the epoch."
    assert app.last_epoch(run) == 5 and 'epoch 5' in pages.trajectories(run, 5)
    assert 'after 6 epochs' in pages.overview(run, 5) and 'after 6 epochs' in pages.overview(run)
    assert 'nearest' not in pages.trajectories(run, 5)


def test_a_bar_says_its_own_share(run):
    "Of each class the share at the start and now, below its two bars, and both bars as high as they say."
    html = pages.fairness(run, 5)
    mix = pages.mixes(pages.read_frames(run, 5), pages.read_frames(run, 0))[0]
    large = html[html.index('mix large') : html.index('For each prompt')]
    heights = [float(h) for h in re.findall(r'class="(?:was|is)" style="height:([\d.]+)%', large)]
    labels = re.findall(r'<b>(\d+) % → (\d+) %</b>', large)
    assert labels == [(f'{100 * a:.0f}', f'{100 * b:.0f}') for a, b in zip(mix.all.base, mix.all.now)]
    truth = [v for pair in zip(mix.all.base, mix.all.now) for v in pair]
    assert heights == [round(100 * v / mix.top_of_all, 1) for v in truth] and max(heights) < 100


@pytest.mark.parametrize('count', [1, 3])
def test_early_says_how_long_that_takes(count):
    rising = lambda epochs: rows_of([{f'task {i}': 0.1 * e for i in range(count)} for e in range(epochs)])
    fewest = int(re.search(r'takes (\d+) epochs', pages.headline(pages.goals(rising(3))))[1])
    assert 'too early' in pages.headline(pages.goals(rising(fewest - 1)))
    assert 'better' in pages.headline(pages.goals(rising(fewest)))


def test_a_resume_is_offered_only_where_it_can_be(tmp_path):
    from drl_toolkit.utils.loading import assets_dir

    shipped = pages.next_step(Run.open(assets_dir() / 'runs/joint'))
    assert '--resume' not in shipped.command and 'drl train joint' in shipped.command
    assert (
        pages.eval_command(Run.open(assets_dir() / 'runs/joint'))
        == 'drl eval recorded/joint --out runs/joint-eval'
    )
    whole, part = make_run(tmp_path / 'whole', epochs=3), make_run(tmp_path / 'part', epochs=3, planned=9)
    assert '--resume' not in pages.next_step(whole).command  # no checkpoint
    for run in (whole, part):
        (run.folder / 'checkpoints/epoch_0003').mkdir(parents=True)
    assert pages.next_step(part).command.endswith('--resume')
    assert pages.next_step(whole).command.endswith('--resume --epochs 6')


def test_pages_show_the_nearest_epoch_that_has_what_they_are_about(tmp_path):
    run = make_run(tmp_path / 'some', epochs=6)
    for epoch in (3, 4, 5):
        file = run.folder / f'frames/epoch_{epoch:04d}/frames.json'
        told = json.loads(file.read_text())
        for task in told['tasks'].values():
            task |= dict(categories={}, boxes={})
        file.write_text(json.dumps(told))
    for page in (pages.fairness, pages.composition):
        assert 'epoch 2 · the nearest to epoch 5' in page(run, 5), page


def test_figures_for_a_dark_page_can_be_read(run):
    "Grays turn, so that what was black on white is ink on the card; contrast by W3C's definition."
    figure = pages.curve(pages.plots.reward_curves, run)

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    night, card = figure.night.data.decode(), luminance('#1b2027')
    assert '#ffffff' not in night and '#1b2027' in night and '#ffffff' in figure.day.data.decode()
    ink = re.search('<svg fill="(#......)"', night)[1]
    lines = set(re.findall('stroke: (#[0-9a-f]{6})', night)) - {'#1b2027'}
    contrast = {c: (luminance(c) + 0.05) / (card + 0.05) for c in (ink, *lines)}
    assert contrast[ink] > 4.5 and len(lines) > 1 and min(contrast.values()) > 2.9, contrast


def test_the_panel_of_an_empty_place(tmp_path, monkeypatch):
    "Without a runs folder: the recorded runs, the command that adds one, and the own run as soon as it is there."
    from drl_toolkit.utils.loading import assets_dir

    monkeypatch.chdir(tmp_path)
    library = Library(app._runs_folder(None, False), None, assets_dir() / 'runs')
    panel = app.Panel(library)
    assert list(library.scan().runs) == ['recorded/joint', 'recorded/branches']
    shown = panel.look('overview', None, None, '')[panel.html['overview']]
    assert 'drl train joint --out runs/joint' in shown and 'note error' not in shown
    make_run(tmp_path / 'runs/mine', epochs=2)
    library._at = -9
    assert list(library.scan().runs) == ['mine', 'recorded/joint', 'recorded/branches']
    assert 'came with the package' not in panel.look('overview', 'mine', None, '')[panel.html['overview']]
