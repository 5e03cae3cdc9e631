"""A vote counts once, stays blind, survives torn lines and several servers, and the page refuses what is no
vote."""

import http.client, json, multiprocessing, threading
from contextlib import contextmanager

import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom

from drl_toolkit.evaluation import votes as V
from drl_toolkit.ui.voting import vote_server
from drl_toolkit.cli.main import main
from drl_toolkit.runs.folder import RunError

PROMPTS = [f'image {i}' for i in range(12)]
BLACK, WHITE = torch.zeros(12, 3, 8, 8), torch.ones(12, 3, 8, 8)


@pytest.fixture
def ballot(tmp_path):
    return V.Ballot(V.make_ballot(tmp_path / 'b', PROMPTS, BLACK, WHITE, ('black', 'white')))


def likes_white(pair):
    return 'left' if pair.left.getpixel((0, 0))[0] > 100 else 'right'


def test_whoever_likes_the_tuned_picture_votes_for_it_wherever_it_stands(ballot):
    sides = set()
    while pair := ballot.draw('ann'):
        sides.add(likes_white(pair))
        ballot.vote(pair.id, likes_white(pair), 'ann')
    count = ballot.result()
    assert (count.votes, count.voters, count.pairs, count.win_rate) == (
        12,
        1,
        12,
        1.0,
    ) and count.low < 1 == count.high
    assert sides == {'left', 'right'}  # sides are mixed
    assert {p['tuned'] for p in ballot.pairs.values()} == {'a', 'b'}  # and so are the files


def test_a_reload_shows_the_same_and_voters_see_other_orders(ballot):
    assert (
        ballot.draw('ann').id == ballot.draw('ann').id
        and len({ballot.draw(f'voter {i}').id for i in range(20)}) > 3
    )
    assert len({ballot.mirrored('0000', f'voter {i}') for i in range(20)}) == 2


def test_pairs_with_fewest_votes_come_first(ballot):
    for id in list(ballot.pairs)[:-1]:
        ballot.vote(id, 'tie', 'ann')
    assert all(ballot.draw(f'voter {i}').id == '0011' for i in range(5))


def test_a_changed_mind_counts_once_and_ties_are_halves(ballot):
    for choice in ('left', 'right', 'tie'):
        ballot.vote('0003', choice, 'ann')
    assert ballot.result().votes == 1 and ballot.result().win_rate == 0.5


@pytest.mark.parametrize(
    'id, choice, voter, words',
    [
        ('0099', 'left', 'ann', 'not on this ballot'),
        ('../x', 'left', 'ann', 'not on this ballot'),
        ('0001', 'best', 'ann', "vote is 'best'"),
        ('0001', 'left', ' ', 'name of 1 to 80'),
        ('0001', 'left', 'x' * 81, 'name of 1 to 80'),
    ],
)
def test_what_is_no_vote_is_refused_and_leaves_nothing(ballot, id, choice, voter, words):
    with pytest.raises(ValueError, match=words):
        ballot.vote(id, choice, voter)
    assert not ballot.votes() and not (ballot.folder / 'votes.jsonl').exists()


def test_a_torn_line_is_left_out_and_then_replaced(ballot):
    ballot.vote('0001', 'tie', 'ann')
    with open(ballot.folder / 'votes.jsonl', 'ab') as f:
        f.write(b'{"voter": "bob", "pa')
    assert ballot.result().votes == 1
    ballot.vote('0002', 'tie', 'bob')
    assert ballot.result().votes == 2 and all(
        json.loads(l) for l in (ballot.folder / 'votes.jsonl').read_text().splitlines()
    )


def vote_all(folder, voter):
    ballot = V.Ballot(folder)
    while pair := ballot.draw(voter):
        ballot.vote(pair.id, likes_white(pair), voter)


def test_many_servers_write_one_file(ballot):
    processes = [
        multiprocessing.get_context('fork').Process(target=vote_all, args=(ballot.folder, f'voter {i}'))
        for i in range(2)
    ]
    for p in processes:
        p.start()
    vote_all(ballot.folder, 'mother')
    for p in processes:
        p.join(60)
    assert ballot.result().votes == 36 and ballot.result().voters == 3


def test_bad_ballots(tmp_path, capsys, ballot):
    with pytest.raises(RunError, match='holds no ballot'):
        V.Ballot(tmp_path)
    with pytest.raises(ValueError, match='as many of each'):
        V.make_ballot(tmp_path / 'c', PROMPTS[:2], BLACK, WHITE)
    ballot.vote('0001', 'tie', 'ann')
    with pytest.raises(RunError, match='votes already'):
        V.make_ballot(ballot.folder, PROMPTS, BLACK, WHITE)
    assert main(['vote', str(tmp_path)]) == 2 and 'holds no ballot' in capsys.readouterr().err


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 60), st.floats(0.05, 0.95))
def test_the_interval_covers(n, p):
    "Exactly, by summing over all outcomes: never far below its level, for any share."
    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if V.jeffreys(k, n)[0] <= p <= V.jeffreys(k, n)[1])
    assert covered > 0.87


@contextmanager
def serving(ballot, access=None, voters=None):
    server = vote_server(ballot, port=0, access=access, voters=voters)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection(*server.server_address, timeout=10)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader('Set-Cookie'), answer.read()

    try:
        yield ask
    finally:
        server.shutdown()
        server.server_close()


def test_the_page_is_blind_and_takes_votes(ballot):
    with serving(ballot) as ask:
        status, cookie, page = ask('GET', '/')
        mine, page = (
            dict(Cookie=cookie.split(';')[0]),
            page.partition(b'</head>')[2],
        )  # names of colours stand in the style sheet
        assert (
            status == 200
            and 'HttpOnly' in cookie
            and b'white' not in page
            and b'black' not in page
            and b'image' in page
        )
        id = page.decode().split('name="pair" value="')[1][:4]
        left, right = (ask('GET', f'/{id}/{side}.png', **mine)[2] for side in ('left', 'right'))
        assert left[:4] == b'\x89PNG' and left != right
        assert ask('POST', '/', f'pair={id}&choice=left', **mine)[0] == 303 and ballot.result().votes == 1
        assert ask('GET', '/', **mine)[2].decode().split('name="pair" value="')[1][:4] != id
        for path in (
            '/../pairs.json',
            '/pairs.json',
            '/votes.jsonl',
            '/0000/../../x.png',
            '/0000/a.png',
            '//etc/passwd',
        ):
            assert ask('GET', path)[0] == 404
        for body in ('', 'pair=0001', 'pair=0001&choice=all', 'pair=9&choice=left', '\xff' * 10):
            assert ask('POST', '/', body.encode('latin-1'), **mine)[0] == 400
        assert ask('POST', '/', b'x' * 2000, **mine)[0] == 413 and ballot.result().votes == 1
        for i in range(12):
            page = ask('GET', '/', **mine)[2].decode()
            if 'Thank you' in page:
                break
            ask('POST', '/', 'pair=' + page.split('name="pair" value="')[1][:4] + '&choice=tie', **mine)
        assert 'white was preferred to black' in ' '.join(ask('GET', '/', **mine)[2].decode().split())


def test_names_from_strangers_do_no_harm(tmp_path):
    ballot = V.Ballot(V.make_ballot(tmp_path / 'b', ['<script>alert(1)</script>'], BLACK[:1], WHITE[:1]))
    with serving(ballot) as ask:
        assert b'<script>alert' not in ask('GET', '/')[2]
        assert ask('POST', '/', 'pair=0000&choice=tie', Cookie='voter=<b>x</b>')[0] == 403
        assert '<b>' not in ask('GET', '/', Cookie='voter=<b>x</b>')[1]


# who may vote


def voter(ask):
    return dict(Cookie=ask('GET', '/')[1].split(';')[0])


def test_a_vote_needs_a_voter_and_none_is_made_up(ballot):
    with serving(ballot) as ask:
        for cookie in ({}, dict(Cookie='voter=me'), dict(Cookie='voter=' + 'a' * 32 + '.' + 'b' * 32)):
            assert {ask('POST', '/', 'pair=0001&choice=tie', **cookie)[0] for _ in range(20)} == {403}
        assert not ballot.votes()
        mine = voter(ask)
        assert ask('POST', '/', 'pair=0001&choice=tie', **mine)[0] == 303
    value = mine['Cookie'].partition('=')[2].partition('.')[0]
    assert value not in (ballot.folder / 'votes.jsonl').read_text()  # what is on the ballot is no key to it
    with serving(ballot) as ask:  # another process knows who voted
        assert ask('POST', '/', 'pair=0002&choice=tie', **mine)[0] == 303 and ballot.result().voters == 1


def test_an_address_has_so_many_voters(ballot):
    with serving(ballot, voters=V.Voters(most=3)) as ask:
        assert [ask('POST', '/', 'pair=0001&choice=tie', **voter(ask))[0] for _ in range(5)] == [303] * 3 + [
            403
        ] * 2
    assert ballot.result().voters == 3


@pytest.mark.parametrize(
    'headers',
    [
        dict(Origin='http://evil.example'),
        dict(Origin='null'),
        dict(Host='evil.example'),
        dict(Host='evil.example', Origin='http://evil.example'),
        dict(Origin='http://127.0.0.1:1'),
    ],
)
def test_a_page_of_another_site_votes_for_nobody(ballot, headers):
    with serving(ballot) as ask:
        assert ask('POST', '/', 'pair=0001&choice=left', **voter(ask), **headers)[0] in (403, 421)
        assert ask('GET', '/', **headers)[0] in (403, 421) and not ballot.votes()


def test_beyond_this_machine_a_token_is_needed(ballot):
    from drl_toolkit.utils.web import access_to

    access = access_to('0.0.0.0')
    with serving(ballot, access) as ask:
        assert (
            ask('GET', '/')[0] == 401
            and ask('GET', '/?token=guess')[0] == 401
            and ask('POST', '/', 'pair=0001&choice=left')[0] == 401
        )
        status, cookie, _ = ask('GET', f'/?token={access.token}')
        assert status == 303 and 'HttpOnly' in cookie
        assert ask('GET', '/', Cookie=cookie.split(';')[0])[0] == 200


def test_who_has_seen_the_count_votes_no_more(ballot):
    while pair := ballot.draw('ann'):
        ballot.vote(pair.id, 'tie', 'ann')
    with pytest.raises(ValueError, match='all pairs'):
        ballot.vote('0001', 'left', 'ann')
    assert ballot.result().win_rate == 0.5


# undo, a personal result, agreement


def test_the_last_vote_can_be_taken_back_until_it_counts(ballot):
    with pytest.raises(ValueError, match='no vote to take back'):
        ballot.undo('ann')
    first = ballot.draw('ann').id
    ballot.vote(first, 'bad', 'ann')
    assert ballot.result().win_rate == 0.5 and ballot.rows()['ann', first]['choice'] == 'bad'
    assert ballot.undo('ann') == first and not ballot.votes() and ballot.draw('ann').id == first
    while pair := ballot.draw('ann'):
        ballot.vote(pair.id, 'tie', 'ann')
    assert not ballot.can_undo('ann')  # the count has been seen


def test_a_personal_result_stays_as_it_was(tmp_path):
    "After thirty votes a voter is told what they preferred; what they do then neither changes it nor tells a side."
    n, given = 40, []
    images = torch.zeros(n, 3, 8, 8), torch.ones(n, 3, 8, 8)
    ballot = V.Ballot(V.make_ballot(tmp_path / 'b', ['p'] * n, *images))
    while pair := ballot.draw('ann'):
        assert (ballot.personal('ann') is None) == (len(given) < V.PERSONAL)
        likes = likes_white(pair)
        ballot.vote(pair.id, likes if len(given) % 3 else {'left': 'right', 'right': 'left'}[likes], 'ann')
        given.append(pair.id)
        if len(given) == V.PERSONAL:
            told = ballot.personal('ann')
            assert told.win_rate == 20 / 30 and not ballot.can_undo('ann')
            with pytest.raises(ValueError, match='cannot be changed'):
                ballot.vote(given[3], 'left', 'ann')
        if len(given) > V.PERSONAL:
            assert ballot.personal('ann') == told
        if len(given) == 35:
            assert ballot.undo('ann') == given.pop() and ballot.personal('ann') == told
            ballot.vote(pair.id, 'tie', 'ann')
            given.append(pair.id)
    assert len(given) == n


def test_krippendorff_by_the_published_example():
    "Three coders, 15 units: 0.691 for nominal values."
    a = '* * * * * 3 4 1 2 1 1 3 3 * 3'.split()
    b = '1 * 2 1 3 3 4 3 * * * * * * *'.split()
    c = '* * 2 1 3 4 4 * 2 1 1 3 3 * 4'.split()
    units = [[v for v in unit if v != '*'] for unit in zip(a, b, c)]
    assert V.krippendorff(units) == pytest.approx(0.691, abs=5e-4)
    assert V.krippendorff([['x', 'x'], ['y', 'y']]) == 1 and V.krippendorff([['x', 'x']]) is None
    assert V.krippendorff([]) is None


def test_the_table_of_voters(ballot):
    for id in ('0000', '0001', '0002'):
        for voter in ('ann', 'bob'):
            likes = likes_white(ballot.pair(id, voter))
            ballot.vote(id, 'tie' if (id, voter) == ('0002', 'bob') else likes, voter)
    found = ballot.agreement()
    assert [(v.name, v.votes, v.tuned, v.tie, v.agrees) for v in found.voters] == [
        ('voter 1', 3, 3, 0, 2 / 3),
        ('voter 2', 3, 2, 1, 2 / 3),
    ]
    assert found.pairs == 3 and 'ann' not in str(found)


def test_the_page_takes_back_and_counts_both_bad(ballot):
    undo = lambda page: page.split('id="vote-undo"')[1].split('>')[0]
    with serving(ballot) as ask:
        mine = voter(ask)
        page = ask('GET', '/', **mine)[2].decode()
        id = page.split('name="pair" value="')[1][:4]
        assert 'disabled' in undo(page)
        assert ask('POST', '/', f'pair={id}&choice=bad', **mine)[0] == 303
        assert 'disabled' not in undo(ask('GET', '/', **mine)[2].decode())
        assert ask('POST', '/', 'choice=undo')[0] == 403  # of a stranger
        assert ask('POST', '/', 'choice=undo', **mine)[0] == 303 and not ballot.votes()
        assert ask('POST', '/', 'choice=undo', **mine)[0] == 400


# what lies in a ballot


def test_links_in_a_ballot_are_not_followed(ballot, tmp_path):
    (tmp_path / 'theirs').write_bytes(b'keep me, I have no newline')
    (ballot.folder / 'votes.jsonl').symlink_to(tmp_path / 'theirs')
    for act in (ballot.votes, lambda: ballot.vote('0001', 'tie', 'ann')):
        with pytest.raises((RunError, OSError), match='link'):
            act()
    assert (tmp_path / 'theirs').read_bytes() == b'keep me, I have no newline'
    (ballot.folder / 'votes.jsonl').unlink()
    for side in 'ab':
        (ballot.folder / f'0001_{side}.png').unlink()
        (ballot.folder / f'0001_{side}.png').symlink_to('/etc/passwd')
    with serving(ballot) as ask:
        for side in ('left', 'right'):
            status, _, body = ask('GET', f'/0001/{side}.png')
            assert status == 500 and b'root:' not in body and str(tmp_path).encode() not in body


def test_a_damaged_ballot_is_answered_with_a_sentence(ballot):
    with serving(ballot) as ask:
        mine = voter(ask)
        for side in 'ab':
            (ballot.folder / f'0003_{side}.png').unlink()
        assert ask('GET', '/0003/left.png')[0] == 500 and ask('GET', '/0002/left.png')[0] == 200
        (ballot.folder / 'votes.jsonl').write_text('nonsense\n')
        for status, _, body in (ask('GET', '/', **mine), ask('POST', '/', 'pair=0001&choice=tie', **mine)):
            assert (
                status in (400, 500)
                and b'line 1 is damaged' in body
                and str(ballot.folder).encode() not in body
            )
