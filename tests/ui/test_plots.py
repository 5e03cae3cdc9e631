"Figures: what they draw is what they were given, and nothing is too little, too odd or too much for them."

import math, random
from types import SimpleNamespace

import matplotlib, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from drl_toolkit.ui import plots as P
from drl_toolkit.runs.recordings import _STEPS
from drl_toolkit.rewards.fairness import TONES
from drl_toolkit.utils.images import sheet

ODD = 'a "quoted" $x_1$ prompt / with \\slashes & <b>tags</b> ' + 'that is long ' * 9


def seen(figure) -> str:
    "The words of a figure that was really drawn."
    data = P.png(figure, dpi=50)
    assert isinstance(figure, Figure) and data[:8] == b'\x89PNG\r\n\x1a\n' and len(data) > 500
    return ' '.join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def bars(ax) -> list:  # of (heights, colours); heights below 0 for bars that hang
    found = [c for c in ax.collections if isinstance(c, PolyCollection)]
    ends = [[(p.vertices[:, 1].min(), p.vertices[:, 1].max()) for p in c.get_paths()] for c in found]
    return [
        (
            [
                high if high > 0 and low >= 0 and low == 0 else low if high == 0 else high - low
                for low, high in e
            ],
            [tuple(f) for f in c.get_facecolor()],
        )
        for e, c in zip(ends, found)
    ]


def picture(seed=0, size=(16, 16)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )


def path(steps=4, **more):
    rng = np.random.default_rng(steps)
    columns = {
        k: np.zeros(steps, kind)
        if kind is bool
        else (np.arange(steps) if k == 'steps' else rng.random(steps)).astype(kind)
        for k, kind in _STEPS.items()
    }
    size = more.pop('size', (16, 16))
    return SimpleNamespace(
        **dict(
            sample=0,
            prompt=ODD,
            advantage=1.5,
            noisy=[picture(i, size) for i in range(steps + 1)],
            predicted=[picture(i, size) for i in range(steps)],
        )
        | columns
        | more
    )


def task(
    samples=8,
    group=4,
    split=2,
    shown=None,
    paths=None,
    rewards=('r',),
    values=None,
    prompts=('a cat', 'a dog'),
):
    shown = list(range(samples)) if shown is None else shown
    table = pd.DataFrame(
        dict(
            prompt=[prompts[i // group % len(prompts)] for i in range(samples)],
            seed=range(samples),
            group=[i // group for i in range(samples)],
            advantage=0.0,
            r=np.linspace(0, 1, samples) if values is None else values,
        )
    )
    return SimpleNamespace(
        name='t',
        samples=table,
        rewards=rewards,
        split=split,
        shown=shown,
        pictures={i: picture(i) for i in shown},
        boxes={
            i: [('cat', 0.9, (0.1, 0.1, 0.5, 0.5)), ('dog', 0.4, (-0.2, 0.5, 1.4, 0.2))] for i in shown[:2]
        },
        paths=[path()] if paths is None else paths,
        categories={},
    )


def metrics(epochs=12, tasks=('fair', ODD), **more):
    rng = random.Random(0)
    rows = [
        dict(epoch=e, task=t, reward=rng.random(), reward_std=0.1, advantage_share=1 / len(tasks))
        | more
        | {f'cosine/{o}': rng.random() - 0.5 for o in tasks if o != t}
        | (dict(parity=rng.random(), parity_floor=0.2, readable=0.9) if t == 'fair' else {})
        for e in range(epochs)
        for t in tasks
    ]
    return rows + [dict(epoch=e, task=None, seconds=1.0, data_loss=0.3) for e in range(epochs)]


def people(counts, prompt='a judge'):
    return pd.DataFrame(dict(prompt=prompt, tone=[c for name, n in counts.items() for c in [name] * n]))


FIGURES = {
    'curves': lambda: P.reward_curves(metrics()),
    'film': lambda: P.film_strip(path()),
    'tree': lambda: P.branch_tree(task()),
    'parity': lambda: P.parity_over_time(metrics()),
    'people': lambda: P.demographics(people(dict(light=3, dark=1)), 'tone'),
    'composition': lambda: P.composition_sheet(task()),
    'shares': lambda: P.objective_shares(metrics()),
    'cosines': lambda: P.gradient_cosines(metrics()),
    'tax': lambda: P.tax_matrix(pd.DataFrame([[1.0, math.nan]], ['m'], ['a', 'b'])),
    'evolution': lambda: P.evolution(
        {0: sheet([picture(i) for i in range(16)]), 5: sheet([picture(i) for i in range(16)])}
    ),
}


@pytest.mark.parametrize('name', FIGURES)
def test_every_figure_has_a_title_and_leaves_no_trace(name):
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(
        {'figure.facecolor': 'red', 'text.color': 'white', 'font.size': 30}
    ):  # somebody else's taste
        before = dict(matplotlib.rcParams)
        figure = FIGURES[name]()
        assert dict(matplotlib.rcParams) == before and not plt.get_fignums()
    assert figure.get_facecolor() == (1, 1, 1, 1) and len(seen(figure)) > 20
    sizes = {t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip()}
    assert 6 < min(sizes) and max(sizes) < 12 and figure.get_figwidth() <= 9.3
    extents = [
        (t.get_window_extent(), t.get_text())
        for t in figure.findobj(matplotlib.text.Text)
        if t.get_text().strip() and t.get_visible()
    ]
    top = max(
        ((box.y1, words) for box, words in extents if box.y1 <= figure.bbox.y1 + 1),
        key=lambda x: (x[0], len(x[1])),
    )
    assert len(top[1]) > 10  # the highest words are a title


def test_curves_show_the_rows_and_the_base():
    rows = metrics()
    fair, other, data = P.reward_curves(rows).axes
    (raw, _), base = fair.lines[:2], fair.lines[2]
    assert np.allclose(
        raw.get_ydata(), [r['parity'] for r in rows if r['task'] == 'fair']
    ) and raw.get_xdata().tolist() == list(range(1, 13))
    assert set(base.get_ydata()) == {rows[0]['parity']} and set(fair.lines[3].get_ydata()) == {0.2}
    assert (
        other.collections and not fair.collections
    )  # a band of single images around a reward, none around a parity


def test_a_film_strip_marks_what_was_clipped_and_what_was_learnt():
    p = path(
        6,
        trained=np.array([0, 1, 1, 0, 1, 0], bool),
        clipped=np.array([0, 1, 0, 0, 1, 0], bool),
        kl=np.full(6, np.nan),
    )
    figure = P.film_strip(p)
    crosses = [l for ax in figure.axes for l in ax.lines if l.get_marker() == 'x']
    assert [l.get_xdata()[0] for l in crosses] == [1, 4] and [
        l.get_ydata()[0] for l in crosses
    ] == pytest.approx(100 * (p.ratio[[1, 4]] - 1))
    ((heights, colours),) = bars(figure.axes[3])
    assert (
        heights == pytest.approx(p.log_prob.tolist())
        and len({colours[i] for i in (1, 2, 4)}) == 1
        and colours[0] != colours[1]
    )
    words = seen(figure)
    assert (
        'the run knows no base' in words
        and '3 of 6 steps' in words
        and '2 clipped' in words
        and 'praised' in words
        and ODD in words
    )


@pytest.mark.parametrize('steps, size', [(1, (16, 16)), (12, (16, 16)), (3, (32, 16)), (3, (16, 40))])
def test_film_strips_of_all_shapes(steps, size):
    figure = P.film_strip(path(steps, size=size, advantage=0.0, ratio=np.full(steps, np.nan)))
    assert 'neither praised nor blamed' in seen(figure)
    for ax in figure.axes[:2]:  # cells keep the images' shape
        box = ax.get_window_extent()
        across, up = (
            box.width / (ax.get_xlim()[1] - ax.get_xlim()[0]),
            box.height / (ax.get_ylim()[1] - ax.get_ylim()[0]),
        )
        assert across == pytest.approx(up, rel=0.02)


def test_a_tree_marks_the_best_and_the_worst():
    t = task(values=[0.3, 0.1, 0.9, 0.5, 0.0, 1.0, 0.2, 0.4])
    assert P.branch_tree(t, 0).axes and {'0.90\nbest', '0.10\nworst', '0.30', '0.50'} <= {
        x.get_text() for x in P.branch_tree(t).axes[0].texts
    }
    assert {'1.00\nbest', '0.00\nworst'} <= {x.get_text() for x in P.branch_tree(t, 'a dog').axes[0].texts}
    assert (
        'steps 1 to 2 are shared' in seen(P.branch_tree(t))
        and 'nothing is shared' in seen(P.branch_tree(task(split=None)))
        and 'the first noise' in seen(P.branch_tree(task(split=0)))
    )
    assert 'best' not in seen(P.branch_tree(task(values=[0.5] * 8))) and 'no path of this group' in seen(
        P.branch_tree(task(paths=[]))
    )
    with pytest.raises(ValueError, match="no image of prompt 'a cow' was kept.*'a cat', 'a dog'"):
        P.branch_tree(t, 'a cow')
    with pytest.raises(ValueError, match='no image of group 7 was kept'):
        P.branch_tree(t, 7)
    for odd in (
        task(1, 1),
        task(16, 16),
        task(shown=[], paths=[]),
        task(prompts=(ODD,)),
        task(values=[math.nan] * 8),
        task(8, 4, 9),
    ):
        seen(P.branch_tree(odd))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), min_size=1, max_size=4))
def test_variance_is_shared_out(groups):
    "Against the sums of squares of a one-way analysis of variance, written out."
    table = pd.DataFrame([dict(group=g, r=v) for g, values in enumerate(groups) for v in values])
    everything = np.concatenate([np.array(g) for g in groups])
    total = ((everything - everything.mean()) ** 2).sum()
    between, within = P.variance_shares(table, 'r')
    if total < 1e-9:
        return
    assert between == pytest.approx(
        sum(len(g) * (np.mean(g) - everything.mean()) ** 2 for g in groups) / total, abs=1e-6
    ) and between + within == pytest.approx(1)


def test_histograms_are_the_shares():
    now, base = people({'light': 6, 'dark': 2, None: 2}), people({'light': 9, 'medium': 1})
    figure = P.demographics(now, 'tone', base=base, names=TONES)
    band, then, today = (heights for heights, _ in bars(figure.axes[0]))
    assert (
        then == pytest.approx([0.9, 0, 0.1, 0, 0, 0])
        and today == pytest.approx([0.6, 0, 0, 0, 0.2, 0.2])
        and band == pytest.approx([2 * math.sqrt(0.2 * 0.8 / 10)] * 5 + [0])
    )
    far = math.sqrt((0.8 - 0.2) ** 2 + 3 * 0.2**2)  # the unreadable count with the commonest
    assert f'{far:.2f} from the target now' in seen(
        figure
    ) and f'{math.sqrt(0.7**2 + 0.1**2 + 3 * 0.2**2):.2f} at first' in seen(figure)
    (lines,) = (
        c
        for c in P.demographics(now, 'tone', target=dict(dark=3, light=1), names=('light', 'dark'))
        .axes[0]
        .collections
        if isinstance(c, LineCollection)
    )
    assert [s[0][1] for s in lines.get_segments()] == pytest.approx([0.25, 0.75, 0])
    with pytest.raises(ValueError, match='target names'):
        P.demographics(now, 'tone', target=dict(blue=1))


def test_histograms_of_little_and_much():
    for odd in (
        people({None: 3}),
        people({'light': 1}),
        people({f'class {i}': 1 for i in range(20)}),
        pd.concat([people({'light': 2}, f'{ODD} {i}') for i in range(30)]),
        people({'light': 1}).iloc[:0],
        pd.DataFrame(dict(prompt=['p'])),
    ):
        seen(P.demographics(odd, 'tone', base=people({'dark': 2})))
        seen(P.demographics(odd, 'tone', base=odd.iloc[:0]))
    for (n, prompt), panel in zip(
        [(2, 'b'), (1, 'a')],
        P.demographics(pd.concat([people({'light': 1}, 'a'), people({'dark': 2}, 'b')]), 'tone').axes[1:],
    ):
        assert panel.get_title(loc='left') == f'{prompt} ({n})'


def test_boxes_are_where_they_should_be():
    white = Image.new('RGB', (64, 64), 'white')
    drawn = np.asarray(P.boxed(white, [('cat', 0.9, (0.25, 0.5, 0.75, 1.0))]))
    assert drawn.shape == (192, 192, 3)
    ink = np.argwhere((drawn != 255).any(2))
    assert ink.min(0).tolist() == [96, 48] and ink.max(0).tolist()[0] == 191 and 143 <= ink.max(0)[1] <= 143
    assert (
        np.asarray(P.boxed(white, [('cat', 0.9, (0.8, 0.8, 0.2, 0.2)), ('cat', 0.9, (2.0, 2.0, 3.0, 3.0))]))
        == 255
    ).all() and np.asarray(white).min() == 255  # no box, and the image is untouched
    assert P.boxed(Image.new('RGB', (512, 256)), []).size == (512, 256)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(3, 30), st.integers(3, 30), st.integers(1, 9), st.integers(0, 4))
def test_a_sheet_is_taken_apart(count, width, height, columns, pad):
    pictures = [picture(i, (width, height)) for i in range(count)]
    found = P.cells_of_sheet(sheet(pictures, columns, pad=pad), columns, pad)
    if found[0].size == (width, height):  # other heights may fit the same sheet; images are about square
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, pictures))
    else:
        assert abs(width - height) >= abs(width - found[0].height)


def test_sheets_through_training():
    sheets = {e: sheet([picture(i) for i in range(16)]) for e in range(0, 50, 5)}
    words = seen(P.evolution(sheets))
    assert 'base' in words and 'epoch 45' in words and words.count('epoch') == 5
    for odd in ({}, {3: sheet([picture()], 8)}, {0: sheet([picture()], 1)}):
        seen(P.evolution(odd))


def test_taxes():
    words = seen(P.tax_matrix(pd.DataFrame([[1.0, -0.25], [7.0, math.nan]], ['a', 'b'], ['x', 'y'])))
    assert all(w in words for w in ('100%', '-25%', '700%', 'not measured'))
    seen(P.tax_matrix(pd.DataFrame()))


@pytest.mark.parametrize(
    'rows',
    [
        [],
        metrics(1),
        metrics(2),
        metrics(1, ('one',)),
        metrics(3, ('one', 'two'), reward=None),
        metrics(3, ('one', 'two'), reward=math.nan),
        [dict(epoch=0, task=None)],
        [dict(epoch=0, task='t')],
        [dict(epoch=4, task='t', parity=0.5, parity_floor=0.2)],
        metrics(1000),
        metrics(4, tuple(map(str, range(11)))),
        metrics(3)[4:],
        [
            dict(epoch=e, task='t', reward=1.0, **{'balance': 0.1, 'balance_floor': 0.05} if e else {})
            for e in range(3)
        ],
    ],
    ids=[
        'none',
        'one epoch',
        'two',
        'one task',
        'null',
        'nan',
        'no task',
        'no figures',
        'parity alone',
        'thousand',
        'eleven tasks',
        'a part',
        'late',
    ],
)
def test_metrics_of_all_kinds(rows):
    for draw in (P.reward_curves, P.parity_over_time, P.objective_shares, P.gradient_cosines):
        seen(draw(rows))


def test_compositions():
    for odd in (task(), task(1, 1), task(shown=[]), task(prompts=(ODD,)), task(3, 3)):
        seen(P.composition_sheet(odd))
    assert (
        '0.43' in seen(P.composition_sheet(task()))
        and len(P.composition_sheet(task(40, 4)).axes[0].images) == 4
    )


def test_threads_may_draw_at_once():
    from concurrent.futures import ThreadPoolExecutor

    before = dict(matplotlib.rcParams)
    with ThreadPoolExecutor(4) as pool:
        same = list(pool.map(lambda _: P.png(P.gradient_cosines(metrics()), 50), range(8)))
    assert len(set(same)) == 1 and dict(matplotlib.rcParams) == before


# Names beside points


@pytest.mark.parametrize('legend', [False, True])
def test_names_of_a_crowd_lie_on_nothing(legend):
    draws = random.Random(3)
    points = {f'method_{i}': (draws.gauss(0, 0.1), draws.gauss(0, 0.1)) for i in range(16)}
    fig = Figure(figsize=(7.5, 4.2), layout='constrained')
    ax = fig.subplots()
    ax.scatter(*zip(*points.values()), s=20, label='methods')
    ax.scatter([-1, 1], [-1, 1])  # the crowd is in the middle
    if legend:
        ax.legend()
    notes = P.label_points(ax, points)
    fig.draw_without_rendering()
    assert [note.get_text() for note in notes] == list(points)
    boxes = [matplotlib.text.Text.get_window_extent(note) for note in notes]  # without the lines
    at = ax.transData.transform(list(points.values()))
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :]), notes[i].get_text()
        assert not any(box.contains(*xy) for xy in at), notes[i].get_text()
        assert ax.bbox.containsx(box.x0) and ax.bbox.containsx(box.x1)
        assert not legend or not box.overlaps(ax.get_legend().get_window_extent())


def test_a_lone_point_has_its_name_beside_it():
    ax = Figure().subplots()
    ax.plot([0, 1], [0, 1], 'o')
    (note,) = P.label_points(ax, {'here': (0.5, 0.5)})
    assert note.xy == (0.5, 0.5) and note.xyann == (5, 0) and note.arrow_patch is None
