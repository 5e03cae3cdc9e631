"The page that draws: prompts, seeds, epochs and guidance along two axes."

import numpy as np, pytest, torch

from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.runs.folder import RunError
from drl_toolkit.runs.run import Run
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.ui import compare
from drl_toolkit.utils.images import to_pil
from browsing import violations, wait_for_address
from panel import add_weights, make_run, picture, serving
from panel import quick  # noqa: F401 (a fixture)


@pytest.fixture
def tiny():
    return Policy(tiny_sd(), num_steps=2)


def far(one, other):
    "Largest difference of two images, in levels."
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def test_a_seed_is_the_noise_of_every_prompt(tiny):
    "Each image is the first one of a rollout of its own; more than a batch of them."
    wanted = [(p, s) for p in ('a cat', 'a dog', 'a car') for s in range(3)]
    found = compare.draw_images(tiny, wanted, batch=4)
    for (prompt, seed), image in zip(wanted, found, strict=True):
        assert far(image, to_pil(rollout(tiny, [prompt], seed=seed).images)[0]) <= 1
    assert far(found[0], found[1]) > 1  # other noise


@pytest.fixture
def trained(tmp_path):
    "A run whose LoRA was 1, 2 and 3 after as many epochs, with a checkpoint of epoch 2; and what each of them draws."
    pipeline = tiny_sd()
    pipeline.save_pretrained(tmp_path / 'model')
    tiny = Policy(pipeline, num_steps=2)
    drawn = {0: compare.draw_images(tiny, [('a cat', 0)])[0]}
    with Run.create(tmp_path / 'runs/r', dict(num_steps=2, seed=0), model=str(tmp_path / 'model')) as run:
        for epoch in (1, 2, 3):
            torch.manual_seed(epoch)
            for p in tiny.parameters():
                p.data = 0.3 * torch.randn_like(p)
            drawn[epoch] = compare.draw_images(tiny, [('a cat', 0)])[0]
            run.log(dict(epoch=epoch - 1, tasks=dict(t=dict(reward=float(epoch))), seconds=1.0))
            if epoch == 2:
                run.checkpoint(2, tiny.named_parameters(), None, dict(epoch=2))
        run.save_weights(tiny)
    return Run.open(run.folder), drawn


def test_every_model_of_a_run_draws(trained):
    "Base, a checkpoint between, and the tuned model, each by its own weights; and no other epoch."
    run, drawn = trained
    assert compare.epochs_there(run) == [0, 2, 3]
    grid = compare.grid_of(run, [], 'a cat', '0', 'base, 2, tuned', '', 'epoch', 'seed')
    found = compare.draw_grid(run, grid)
    for image, epoch in zip(found, (0, 2, 3), strict=True):
        assert far(image, drawn[epoch]) <= 1
    assert far(drawn[0], drawn[2]) > 3 and far(drawn[2], drawn[3]) > 3
    with pytest.raises(compare.NotKept, match='base, 2, tuned; got .1.*nearest are base, 2') as pruned:
        compare.grid_of(run, [], 'a cat', '0', '1, 2')  # as near to the base as to 2: the earlier one
    assert pruned.value.instead == 'base, 2'
    with pytest.raises(ValueError, match='base, 2, tuned; got .4') as never:
        compare.grid_of(run, [], 'a cat', '0', '1, 4')
    assert not isinstance(never.value, compare.NotKept)  # never trained
    swapped = compare.draw_grid(run, grid._replace(down='seed', across='epoch'))
    assert all(a is b for a, b in zip(swapped, found))  # nothing was drawn again
    strong = compare.draw_grid(
        run, compare.grid_of(run, [], 'a cat', '0', 'tuned', '1, 6', 'guidance', 'seed')
    )
    assert far(strong[0], drawn[3]) <= 1 < far(strong[1], drawn[3])
    with pytest.raises(ValueError, match='no such prompt'):
        compare.draw_grid(run, grid, refuse)


def refuse(policy, prompt):
    raise ValueError('no such prompt')


@pytest.mark.parametrize(
    'asked, words',
    [
        (('', '99999999999'), 'seeds must be'),
        (('', '3-1'), 'seeds must be'),
        (('', '-1'), 'seeds must be'),
        (('', '0-2147483648'), 'seeds must be'),
        (('', '0', '7'), 'epochs must be among'),
        (('', '0', '', 'strong'), 'guidance must be'),
        (('', '0', '', '1, 2'), 'guidance must have one value'),
        (('', '0', '', '', 'seed', 'seed'), 'two different axes'),
        (('', '0', '', '', 'colour', 'seed'), 'rows must be one of'),
        (('', '0-30'), 'at most 36'),
        (('a\nb', '0-3'), 'prompt must have one value'),
    ],
)
def test_what_is_refused_says_what_is_right(tmp_path, asked, words):
    run = make_run(tmp_path / 'r', epochs=2)
    with pytest.raises(ValueError, match=words):
        compare.grid_of(run, ['a cat'], *asked)
    with pytest.raises(ValueError, match='the prompt is empty'):
        compare.grid_of(run, [])
    with pytest.raises(RunError, match='no weights yet'):
        compare.draw_grid(run, compare.grid_of(run, ['a cat']))


class Pencil:
    "In place of a policy: what it draws says what it was asked for."

    guidance_scale = 1.0


@pytest.fixture
def pencils(monkeypatch):
    "What the models were asked to draw, and did at once."
    asked = []

    def draw(policy, wanted, batch=16):
        asked.extend(wanted)
        return [picture(40 * seed + len(prompt), str(seed)) for prompt, seed in wanted]

    monkeypatch.setattr(compare, '_policies', lambda folder, stamp: [Pencil(), Pencil()])
    monkeypatch.setattr(compare, 'draw_images', draw)
    return asked


def test_a_first_grid_is_drawn_at_once(look, tmp_path, pencils):
    "Of the run's own prompt; then a click on another one, more seeds, rows and columns exchanged, and a wrong word."
    asked = pencils
    add_weights(make_run(tmp_path / 'runs/joint', epochs=3, sheets=False))
    from drl_toolkit.ui.panel import World

    with serving(tmp_path / 'runs', world=World()) as (address, _):
        page = look(f'{address}/?run=joint&view=compare', '.picture-grid img')
        heads = lambda: [h.strip() for h in page.locator('.picture-grid th').all_inner_texts()]
        assert heads() == ['seed 0', 'seed 1', 'seed 2', 'seed 3', 'base', 'tuned (3 epochs)']
        assert '“a portrait of a doctor”' in page.inner_text('#compare h2') and len(asked) == 8
        page.get_by_role('button', name='a dog above a car').click()
        page.wait_for_function(
            "document.querySelector('#compare h2').innerText.includes('a dog above a car')"
        )
        page.fill('#seeds input, #seeds textarea', '5')
        page.click('#swap')
        page.click('#draw')
        page.wait_for_function("document.querySelectorAll('.picture-grid img').length === 2")
        assert heads() == ['base', 'tuned (3 epochs)', 'seed 5'] and asked[-1] == ('a dog above a car', 5)
        assert violations(page, '#compare') == []
        assert page.evaluate('document.documentElement.scrollWidth') <= 1280
        page.fill('#seeds input, #seeds textarea', '99999999999')
        page.click('#draw')
        page.wait_for_selector('#compare .note.error')
        assert 'seeds must be whole numbers' in page.inner_text('#compare')
        page.fill('#seeds input, #seeds textarea', '5')
        page.fill('#epochs-drawn input, #epochs-drawn textarea', '1, tuned')
        page.click('#draw')
        page.get_by_role(
            'button', name='Draw base, tuned'
        ).click()  # epoch 1 left no weights; the base is nearest
        page.wait_for_function("document.querySelectorAll('.picture-grid img').length === 2")


def test_a_grid_has_an_address(look, tmp_path, pencils):
    "What is asked for is in it; back and forward and a copied address bring each grid again."
    add_weights(make_run(tmp_path / 'runs/joint', epochs=3, sheets=False))
    from drl_toolkit.ui.panel import World

    with serving(tmp_path / 'runs', world=World()) as (address, _):
        page = look(f'{address}/?run=joint&view=compare', '.picture-grid img')
        heads = lambda n: page.wait_for_function(
            f"document.querySelectorAll('.picture-grid th').length === {n}"
        )
        wait_for_address(page, lacks=['seeds'])
        page.fill('#prompt textarea', 'a red car\na blue car')
        page.fill('#seeds input, #seeds textarea', '7')
        page.click('#draw')  # two prompts, but rows are epochs and columns are seeds
        page.wait_for_selector('#compare .note.error')
        page.fill('#prompt textarea', 'a red car')
        page.click('#draw')
        heads(3)
        wait_for_address(page, 'prompts=a+red+car', 'seeds=7', lacks=['rows'])
        page.fill('#seeds input, #seeds textarea', '0-3')
        page.click('#draw')
        heads(6)
        page.go_back()
        heads(3)
        wait_for_address(page, 'seeds=7')
        assert page.input_value('#seeds :is(input, textarea)') == '7'
        page.get_by_role('tab', name='Runs', exact=True).click()
        page.wait_for_selector('#runs table.list')
        wait_for_address(page, lacks=['seeds'])
        page.go_back()
        page.wait_for_url('**seeds=7*')
        page.go_forward()
        page.wait_for_selector('#runs table.list')
        other = look(
            f'{address}/?run=joint&view=compare&prompts=a+red+car%0Aa+cat&seeds=7&epochs=tuned&rows=prompt&columns=colour',
            '.picture-grid img',
        )
        shown = [h.strip() for h in other.locator('.picture-grid th').all_inner_texts()]
        assert shown == ['seed 7', '“a red car”', '“a cat”']  # an axis that is none is left as it is
