"A reward over HTTP: exact where it says so, and one clear line whatever comes back."

import base64, io, json, re, socket, socketserver, subprocess, sys, threading, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from drl_toolkit.rewards import remote
from drl_toolkit.cli.main import main
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.rewards.remote import (
    Pending,
    decode_images,
    encode_images,
    load_reward,
    read_reply,
    read_request,
    remote_reward,
    scored_rollout,
    part_size,
)
from drl_toolkit.rewards.serving import make_server
from drl_toolkit.rewards.reward import Reward, reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.algorithms.async_rewards import AsyncRewardSampler
from drl_toolkit.prompts.task import Task
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.training.trainer import Trainer

IMAGES, PROMPTS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ['a cat', 'a dog'] * 3
mean = reward(lambda x, p: x.mean((1, 2, 3)), name='mean')


@contextmanager
def running(server):
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_address[1]}'
        finally:
            server.shutdown()


def answering(*replies):
    """A server that gives these (status, body) one after the other, and then the last one for ever; `asked`
    counts the requests."""

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            status, body = replies[min(Handler.asked, len(replies) - 1)]
            Handler.asked += 1
            if status is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.rfile.read(int(self.headers.get('Content-Length') or 0))
            self.send_response(status)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    return HTTPServer(('127.0.0.1', 0), Handler), Handler


ABOUT = (
    200,
    json.dumps(
        dict(protocol=1, name='far', level='sample', card=dict(what='far away'), limit=2**28)
    ).encode(),
)
told = lambda values, **more: (200, json.dumps(dict(protocol=1, values=values) | more).encode())

# images


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_npz_is_exact_and_png_is_8_bit(count, height, width, seed):
    x = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decode_images(json.loads(json.dumps(encode_images(x))), 'npz', count), x)
    back = decode_images(encode_images(x, 'png'), 'png', count)
    assert (back - x).abs().max() <= 0.5 / 255 + 1e-6 and torch.equal(
        decode_images(encode_images(back, 'png'), 'png', count), back
    )


def packed(write):
    buffer = io.BytesIO()
    write(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    'data, format, words',
    [
        (
            packed(lambda b: np.savez(b, images=np.array([{'a': 1}], dtype=object))),
            'npz',
            'allow_pickle=False',
        ),  # a pickle inside
        (packed(lambda b: np.savez(b, images=np.zeros((1, 3, 2, 2)))), 'npz', 'float64'),
        (packed(lambda b: np.savez(b, other=np.zeros(1))), 'npz', 'KeyError'),
        (packed(lambda b: np.save(b, np.zeros(1))), 'npz', 'no npz'),
        (
            packed(lambda b: np.savez_compressed(b, images=np.zeros((1, 3, 1500, 1500), np.float32))),
            'npz',
            'unpacked',
        ),
        (packed(lambda b: np.savez(b, images=np.full((1, 3, 2, 2), np.nan, np.float32))), 'npz', 'outside'),
        (packed(lambda b: np.savez(b, images=np.zeros((2, 3, 2, 2), np.float32))), 'npz', '(2, 3, 2, 2)'),
        ('not base64!', 'npz', 'base64'),
        ([], 'npz', 'list where base64'),
        (None, 'npz', 'NoneType'),
        ('x', 'png', 'a list with a PNG'),
        ([7], 'png', 'int where base64'),
        ([packed(lambda b: Image.new('RGB', (3000, 3000)).save(b, 'PNG'))], 'png', 'unpacked'),
        ([packed(lambda b: Image.new('RGB', (4, 4)).save(b, 'JPEG'))], 'png', 'no png'),
        ([packed(lambda b: Image.new('I;16', (4, 4)).save(b, 'PNG'))], 'png', '8-bit RGB'),
        ([packed(lambda b: Image.new('RGB', (4, n)).save(b, 'PNG')) for n in (4, 5)], 'png', 'one size'),
    ],
)
def test_bad_pictures_are_refused(data, format, words):
    with pytest.raises(ValueError) as caught:
        decode_images(data, format, 1, limit=2**20)
    assert words in str(caught.value)


# messages

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
replies = st.binary(max_size=60) | st.fixed_dictionaries(
    dict(protocol=st.just(1) | anything),
    optional=dict(values=anything | st.lists(st.floats(), max_size=3), metrics=anything, error=anything),
).map(lambda d: json.dumps(d).encode())


@settings(max_examples=150, deadline=None)
@given(status=st.sampled_from((200, 400, 422, 500)), body=replies)
def test_any_reply_is_values_or_one_line(status, body):
    try:
        values, metrics = read_reply(status, body, 2)
    except ValueError as e:
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 700
    else:
        assert (
            status == 200
            and values.shape == (2,)
            and values.isfinite().all()
            and values.dtype == torch.float32
            and isinstance(metrics, dict)
        )


good = json.dumps(dict(protocol=1, format='npz', images=encode_images(IMAGES), prompts=PROMPTS)).encode()


@settings(max_examples=150, deadline=None)
@given(
    body=st.binary(max_size=60)
    | st.builds(
        lambda i, b: good[:i] + bytes([b]) + good[i + 1 :], st.integers(0, len(good) - 1), st.integers(0, 255)
    )
    | st.integers(0, len(good) - 1).map(lambda i: good[:i])
    | st.fixed_dictionaries(
        dict(
            protocol=st.just(1),
            format=st.sampled_from(('npz', 'png')) | anything,
            images=anything,
            prompts=anything | st.just(['a']),
        ),
        optional={},
    ).map(lambda d: json.dumps(d).encode())
)
def test_any_request_is_pictures_or_a_value_error(body):
    try:
        images, prompts = read_request(body)
    except ValueError:
        return
    assert images.shape == (len(prompts), 3, 16, 16) and images.isfinite().all()


# both ends


@pytest.mark.parametrize('format, close', [('npz', 0), ('png', 0.5 / 255)])
def test_a_remote_reward_is_the_reward(format, close):
    with running(make_server(mean, port=0)) as url:
        far = remote_reward(url, batch_size=4, format=format)
        assert (far.name, far.level, far.card) == ('mean', 'sample', mean.card)
        assert (far(IMAGES, PROMPTS) - mean(IMAGES, PROMPTS)).abs().max() <= close + 1e-7
        assert torch.equal((2 * far + 1)(IMAGES, PROMPTS), 2 * far(IMAGES, PROMPTS) + 1)


def test_a_group_travels_whole_and_figures_come_back():
    seen = []

    @reward(level='group')
    def grouped(images, prompts):
        seen.append(len(images))
        return images.std(0).mean(), dict(size=len(images))

    with running(make_server(grouped, port=0)) as url:
        values, metrics = remote_reward(url, batch_size=1).report(IMAGES, PROMPTS)
    assert seen == [3, 3] and metrics == {'size': 3} and torch.allclose(values, grouped(IMAGES, PROMPTS))


def test_figures_of_batches_are_weighted_with_their_pictures():
    figured = Reward(lambda x, p: (x.mean((1, 2, 3)), dict(m=x.mean().item())), 'figured')
    with running(make_server(figured, port=0)) as url:
        assert remote_reward(url, batch_size=4).report(IMAGES, PROMPTS)[1]['m'] == pytest.approx(
            IMAGES.mean().item(), abs=1e-6
        )


@pytest.mark.parametrize(
    'reply, words',
    [
        ((200, b'<html>'), 'no JSON'),
        (told([0.1] * 5), '5 values; 6 are right'),
        (told([0.1] * 5 + [float('nan')]), 'nan'),
        (told(['a'] * 6), 'the value a'),
        (told([True] * 6), 'True'),
        (told(None), 'no values'),
        ((200, b'{"protocol": 0, "values": []}'), 'protocol 0'),
        (told([0.1] * 6, metrics=dict(a='b')), 'metrics'),
        ((500, b'{"protocol": 1, "error": "Boom:\\n two lines"}'), 'Boom: two lines'),
        ((200, b'[1]'), 'list'),
    ],
)
def test_a_wrong_answer_is_told_at_once(reply, words):
    server, handler = answering(ABOUT, reply)
    with running(server) as url, pytest.raises(ValueError) as caught:
        remote_reward(url)(IMAGES, PROMPTS)
    assert (
        words in str(caught.value)
        and url in str(caught.value)
        and '\n' not in str(caught.value)
        and handler.asked == 2
    )


@pytest.mark.parametrize(
    'about, words',
    [
        ((200, b'{"protocol": 2, "name": "new"}'), 'protocol 2'),
        ((200, b'hello'), 'no JSON'),
        ((404, b'{"protocol": 1}'), 'status 404'),
        ((200, b'{"protocol": 1, "name": "x", "level": "batch"}'), "'batch'"),
    ],
)
def test_something_else_at_the_address_is_told_before_any_picture(about, words):
    with running(answering(about)[0]) as url, pytest.raises(ValueError, match=words):
        remote_reward(url)


@pytest.mark.filterwarnings('ignore:reward .far. gave')
def test_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr(remote.time, 'sleep', lambda seconds: None)
    server, handler = answering(ABOUT, (503, b''), (None, b''), told([0.5] * 6))
    with running(server) as url:
        assert remote_reward(url, retries=2)(IMAGES, PROMPTS).tolist() == [0.5] * 6
    assert handler.asked == 4
    with (
        running(answering(ABOUT, (503, b''))[0]) as url,
        pytest.raises(ConnectionError, match='status 503; tried 3 times'),
    ):
        remote_reward(url, retries=2)(IMAGES, PROMPTS)


def test_a_dead_and_a_slow_host():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match='refused; tried 1 time$'):
        remote_reward(f'http://127.0.0.1:{port}', retries=0)
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match='no answer within 0.2 s; tried 1 time$'):
            remote_reward(f'http://127.0.0.1:{silent.getsockname()[1]}', timeout=0.2, retries=0)
        assert time.monotonic() - began < 5


def test_a_dripping_host_does_not_hold_a_client_for_ever():
    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b' ')
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    with running(HTTPServer(('127.0.0.1', 0), Dripping)) as url, pytest.raises(TimeoutError):
        remote_reward(url, timeout=0.3, retries=0)


def forever(*parts, every=0.02):
    "The first parts at once, then the last one again and again."

    def talk(line):
        for part in parts[:-1]:
            line.sendall(part)
        while True:
            line.sendall(parts[-1])
            time.sleep(every)

    return talk


OK = b'HTTP/1.1 200 OK\r\n'


@pytest.mark.parametrize(
    'talk',
    [
        forever(b'HTTP/1.1 100 Continue\r\n\r\n'),
        forever(b'HTTP/1.1 100 Continue\r\n\r\n' * 1000, every=0),
        forever(OK + b'Transfer-Encoding: chunked\r\n\r\n0\r\n', b'a: b\r\n'),
        forever(b'HTTP/1.1 2', b'0'),
        forever(OK + b'X: ', b'y'),
        forever(OK + b'Transfer-Encoding: chunked\r\n\r\n1;', b'x'),
        forever(OK + b'Transfer-Encoding: chunked\r\n\r\n', b'1\r\n \r\n'),
        forever(OK + b'Content-Length: 99999\r\n\r\n', b' '),
        forever(OK + b'\r\n', b' '),
        forever(b''),
        lambda line: time.sleep(30),
    ],
    ids=[
        '100',
        '100 flood',
        'trailers',
        'status line',
        'headers',
        'chunk extension',
        'chunks',
        'body',
        'body without end',
        'silence',
        'silence too',
    ],
)
def test_the_time_limit_is_for_all_of_an_answer(talk):
    "Whatever a server does; and no thread is left behind."

    class Talking(socketserver.BaseRequestHandler):
        def handle(self):
            try:
                talk(self.request)
            except OSError:
                pass  # the client has gone

    server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), Talking)
    server.daemon_threads = True
    with running(server) as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match='no answer within 0.3 s; tried 1 time$'):
            remote_reward(url, timeout=0.3, retries=0)
        assert time.monotonic() - began < 2
    assert not [
        t for t in threading.enumerate() if t.name == 'remote reward' and (t.join(5), t.is_alive())[1]
    ]


def test_words_of_a_server_do_nothing_to_a_terminal():
    evil, seen = '\x1b]0;owned\x07\x1b[2J\x9b1A\u202e', '\\x1b]0;owned\\x07\\x1b[2J\\x9b1A\\u202e'
    dumped = lambda status, **more: (status, json.dumps(dict(protocol=1) | more).encode())
    about = dict(name=evil, level='sample', card=dict(what=evil), limit=2**28)
    with running(
        answering(dumped(200, **about), dumped(200, values=[0.5, 0.2], metrics={evil: 1.0}))[0]
    ) as url:
        far = remote_reward(url)
        values, metrics = far.report(IMAGES[:2], PROMPTS[:2])
        assert far.name == far.card.what == seen and list(metrics) == [seen] and '\x1b' not in repr(far)
    for reply in (
        dumped(422, error=evil),
        dumped(200, values=[evil] * 2),
        dumped(200, values=evil),
        (200, b'\x1b[2J'),
    ):
        with running(answering(dumped(200, **about), reply)[0]) as url, pytest.raises(ValueError) as caught:
            remote_reward(url)(IMAGES[:2], PROMPTS[:2])
        assert str(caught.value).isprintable()
    for reply in (dumped(200, name=evil, level=evil, limit=1), dumped(200, protocol=evil)):
        with running(answering(reply)[0]) as url, pytest.raises(ValueError) as caught:
            remote_reward(url)
        assert str(caught.value).isprintable()


def test_errors_of_the_command_line_do_nothing_to_a_terminal(capsys):
    assert main(['train', '\x1b]0;owned\x07']) == 2
    assert '\x1b' not in (told := capsys.readouterr().err) and 'x1b]0;owned' in told


@pytest.mark.parametrize(
    'more, words',
    [
        (dict(url='localhost:8100'), 'url'),
        (dict(url='file:///etc/passwd'), 'url'),
        (dict(url='http://localhost:port'), 'url'),
        (dict(url=None), 'url'),
        (dict(timeout=0), 'timeout'),
        (dict(timeout=float('nan')), 'timeout'),
        (dict(retries=-1), 'retries'),
        (dict(batch_size=1.5), 'batch_size'),
        (dict(format='jpeg'), 'format'),
    ],
)
def test_wrong_arguments(more, words):
    with pytest.raises(ValueError, match=words):
        remote_reward(**dict(url='http://127.0.0.1:9') | more)


# the server


def post(url, body, **headers):
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(url, body, {'Content-Type': 'application/json'} | headers), timeout=10
        )
    except urllib.error.HTTPError as e:
        answer = e
    return answer.status, json.loads(answer.read())


def test_the_server_survives_everything():
    def fails(images, prompts):
        if prompts[0] == 'boom':
            raise RuntimeError('out of memory')
        return images.mean((1, 2, 3)) / (prompts[0] != 'nan')

    with running(make_server(fails, port=0, limit=2**20)) as url:
        ask = lambda prompts, **more: json.dumps(
            dict(protocol=1, format='npz', images=encode_images(IMAGES), prompts=prompts) | more
        ).encode()
        assert (
            post(url, b'nonsense')[0] == 400
            and post(url, ask(PROMPTS[:2]))[0] == 400
            and 'protocol 0' in post(url, ask(PROMPTS, protocol=0))[1]['error']
        )
        assert (
            post(url + '/other', b'{}')[0] == 404
            and post(url, b'{}', **{'Content-Type': 'text/plain'})[0] == 415
        )
        for size in (21, 24, 26):
            assert post(url, b' ' * 2**size)[0] == 413  # more than any socket buffers: it can still read why
        with socket.create_connection(('127.0.0.1', int(url.rpartition(':')[2])), 5) as line:
            line.sendall(
                b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: '
                b'-1\r\n\r\n{}'
            )
            assert b' 400 ' in line.recv(1000)  # h11's own answer
            line.close()
        with socket.create_connection(('127.0.0.1', int(url.rpartition(':')[2])), 5) as line:
            line.sendall(
                b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
                b'application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'
            )
            assert b' 411 ' in line.recv(1000)
        status, told = post(url, ask(['boom'] * 6))
        assert status == 500 and told['error'] == 'RuntimeError: out of memory'
        status, told = post(url, ask(PROMPTS))
        assert status == 200 and torch.allclose(torch.tensor(told['values']), mean(IMAGES, PROMPTS))
        with pytest.raises(ValueError, match='smaller batch_size'):
            remote_reward(url)(torch.rand(6, 3, 200, 200), PROMPTS)
        assert remote_reward(url, batch_size=2)(torch.rand(6, 3, 200, 200), PROMPTS).shape == (6,)


def png_of(width, height):
    return packed(lambda b: Image.new('RGB', (width, height)).save(b, 'PNG'))


def asked(images):
    return json.dumps(dict(protocol=1, format='png', images=images, prompts=['a'] * len(images))).encode()


def test_small_files_of_large_pictures_are_unpacked_one_request_at_a_time():
    """Eight at once that unpack to the limit each: 64 MB of floats, from 60 KB.

    One after the other they took 121 to 151 MB, all together 814 to 953."""
    if not Path('/proc/self/clear_refs').exists():
        pytest.skip('Linux only')
    peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    body = asked([png_of(2300, 2300)])
    with (
        running(make_server(Reward(lambda x, p: x[:, 0, 0, 0] + 1, 'corner'), port=0, limit=2**26)) as url,
        ThreadPoolExecutor(8) as pool,
    ):
        assert len(body) < 100_000 and post(url, asked([png_of(2400, 2400)]))[0] == 400
        assert post(url, body)[0] == 200  # what the first one loads is no part of it
        Path('/proc/self/clear_refs').write_text('5')
        before = peak()
        assert [status for status, _ in pool.map(lambda i: post(url, body), range(8))] == [200] * 8
        assert peak() - before < 400


def test_a_crowd_is_served_in_line():
    "300 connections at once: none is reset."

    def ask(i):
        return post(url, good)[0]

    with running(make_server(mean, port=0)) as url, ThreadPoolExecutor(300) as pool:
        assert list(pool.map(ask, range(300))) == [200] * 300


@pytest.mark.parametrize(
    'sent',
    [
        b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: '
        b'1000\r\n\r\n{',
        b'GET / HT',
        b'GET / HTTP/1.1\r\nHost: loc',
    ],
)
def test_half_a_request_is_not_held(sent):
    server = make_server(mean, port=0, seconds=0.3)
    with running(server), socket.create_connection(server.server_address, 5) as line:
        began = time.monotonic()
        line.sendall(sent)
        answer = b''.join(iter(lambda: line.recv(1000), b''))
        assert (not answer or b' 408 ' in answer) and time.monotonic() - began < 3


def test_only_who_may_ask_is_answered():
    from drl_toolkit.utils.web import access_to

    with running(make_server(mean, port=0)) as url:
        for headers in (dict(Host='evil.example'), dict(Origin='http://evil.example'), dict(Origin='null')):
            assert post(url, good, **headers)[0] in (403, 421)
    access = access_to('0.0.0.0')
    with running(make_server(mean, port=0, access=access)) as url:
        assert post(url, good)[0] == 401 and post(url, good, Authorization='Bearer guess')[0] == 401
        with pytest.raises(ValueError, match='status 401') as caught:
            remote_reward(f'{url}/?token=guess')
        assert 'guess' not in str(caught.value)
        assert torch.allclose(
            remote_reward(f'{url}/?token={access.token}')(IMAGES, PROMPTS), mean(IMAGES, PROMPTS)
        )


def test_it_listens_on_this_machine_only_by_default():
    with make_server(mean, port=0) as server:
        assert server.server_address[0] == '127.0.0.1'
        with pytest.raises(OSError, match='cannot listen on'):
            make_server(mean, port=server.server_address[1])
    with pytest.raises(ValueError, match='port is 70000'):
        make_server(mean, port=70000)


def test_drl_serve(tmp_path, capsys):
    (tmp_path / 'mine.py').write_text('def bright(images, prompts): return images.mean((1, 2, 3))\n')
    server = subprocess.Popen(
        [sys.executable, '-m', 'drl_toolkit.cli.main', 'serve', f'{tmp_path}/mine.py:bright', '--port', '0'],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        first, second = server.stdout.readline(), server.stdout.readline()
        assert 'bright' in first
        assert torch.allclose(remote_reward(second.split()[1])(IMAGES, PROMPTS), mean(IMAGES, PROMPTS))
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
    for spec, words in (
        ('mean', "'mean' does not exist"),
        ('nowhere.py:f', 'no file'),
        ('no_such_module:f', 'no_such_module'),
        ('drl_toolkit.rewards.reward:beauty', 'beauty'),
        ('json:__name__', 'no function'),
    ):
        assert main(['serve', spec]) == 2 and words in capsys.readouterr().err
    assert load_reward(f'{tmp_path}/mine.py:bright').name == 'bright'


# at once


def test_pending_gives_what_report_gives():
    figured = Reward(lambda x, p: (x.mean((1, 2, 3)), dict(m=x.mean().item())), 'figured')
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1)).tolist()
    with Pending(figured, PROMPTS) as pending:
        for rows in (order[:1], order[1:5], order[5:]):
            pending.add(rows, IMAGES[rows])
        values, metrics = pending.result()
    whole, expected = figured.report(IMAGES, PROMPTS)
    assert torch.allclose(values, whole) and metrics['m'] == pytest.approx(expected['m'], abs=1e-6)


def test_pending_waits_for_whole_groups():
    seen, groups = [], torch.tensor([0, 1, 0, 1, 0, 1])
    grouped = Reward(lambda x, p: (seen.append(p), x.std(0).mean())[1], 'grouped', 'group')
    with Pending(grouped, PROMPTS, groups) as pending:
        pending.add([0, 1, 2, 3], IMAGES[:4])
        pending.add([4], IMAGES[4:5])
        pending.add([5], IMAGES[5:])
        values, _ = pending.result()
    assert seen == [['a cat'] * 3, ['a dog'] * 3] and torch.allclose(values, grouped(IMAGES, PROMPTS, groups))


def test_pending_tells_errors_early_and_what_is_missing():
    def fails(images, prompts):
        raise ValueError('no judge today')

    with pytest.raises(ValueError, match='no judge today'), Pending(Reward(fails), PROMPTS) as pending:
        for i in range(6):
            pending.add([i], IMAGES[i : i + 1])
            time.sleep(0.05)
    with Pending(mean, PROMPTS) as pending:
        pending.add([0], IMAGES[:1])
        with pytest.raises(ValueError, match='5 of 6'):
            pending.result()
        with pytest.raises(ValueError, match='2 rows for 1 images'):
            pending.add([1, 2], IMAGES[:1])


def test_the_judge_of_pending_gets_one_thread_and_takes_none():
    "Of PyTorch's threads; those who sample, and later ones, keep theirs."
    before, count = torch.get_num_threads(), lambda *_: torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Pending(Reward(lambda x, p: x.mean((1, 2, 3)) * 0 + count(), 'threads'), PROMPTS) as pending:
            pending.add(list(range(6)), IMAGES)
            assert pending.result()[0].tolist() == [1] * 6
        with ThreadPoolExecutor(1) as later:
            assert count() == later.submit(count).result() == 2
    finally:
        torch.set_num_threads(before)


def test_a_scored_rollout_is_a_rollout_and_its_scores():
    policy, prompts = Policy(tiny_sd(), num_steps=2), ['a cat'] * 3 + ['a dog'] * 2
    traj, values, _ = scored_rollout(policy, prompts, mean, seed=3, epoch=1, batch_size=2)
    whole = rollout(policy, prompts, seed=3, epoch=1)
    assert (
        torch.equal(traj.latents, whole.latents)
        and torch.equal(traj.log_probs, whole.log_probs)
        and (traj.seeds, traj.prompts) == (whole.seeds, whole.prompts)
    )
    assert torch.allclose(traj.images, whole.images, atol=1e-5) and torch.allclose(
        values, mean(whole.images, prompts), atol=1e-5
    )
    for wrong in (dict(prompts='a cat'), dict(prompts=[]), dict(batch_size=-1)):
        with pytest.raises(ValueError):
            scored_rollout(**dict(policy=policy, prompts=prompts, reward=mean) | wrong)


def test_parts_are_as_large_as_the_device_wants(monkeypatch):
    "A small network on a GPU needs many rows at once; a large one, and a CPU, few."
    of = lambda device, large: part_size(SimpleNamespace(device=torch.device(device), large=large))
    assert of('cpu', False) == of('cpu', True) == of('cuda', True) < of('cuda', False)
    monkeypatch.setattr('drl_toolkit.algorithms.async_rewards.part_size', lambda policy: 3)
    seen, policy = [], Policy(tiny_sd(), num_steps=2)
    counted = Reward(lambda x, p: (seen.append(len(x)), x.mean((1, 2, 3)))[1], 'counted')
    task, config = Task('counted', ['a cat'], counted, samples=8), TrainConfig(train_steps=1)
    for sampler, parts in ((AsyncRewardSampler(), [3, 3, 2]), (AsyncRewardSampler(5), [5, 3])):
        seen.clear()
        Trainer(policy, [task], config, callbacks=[], sampler=sampler).collect(task)
        assert seen == parts
