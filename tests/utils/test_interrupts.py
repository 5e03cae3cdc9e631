"""What ends a run from outside: it leaves in good order, with one line and a sensible exit status, and
nothing is lost."""

import io, os, signal, subprocess, sys, time

import pytest

from drl_toolkit.cli import main as cli
from drl_toolkit.utils.interrupts import steady_output, stop_on_signals
from drl_toolkit.runs.run import Run
from drl_toolkit.emoji.tiny import tiny_sd
from tiers import long, some

ENV = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONUNBUFFERED='')
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiny') / 'sd'
    tiny_sd().save_pretrained(folder)
    return folder


def start(tiny, out, *more, launcher=(), epochs=500, **options):
    argv = [
        '-m',
        'drl_toolkit.cli.main',
        'train',
        'compressibility',
        '--model',
        str(tiny),
        '--out',
        str(out),
        '--epochs',
        str(epochs),
        '--frames',
        '0',
        '--num-steps',
        '2',
        '--train-steps',
        '1',
        '--num-minibatches',
        '1',
    ]
    return subprocess.Popen(
        [sys.executable, *launcher, *argv, *more],
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) | options,
    )


def wait_for(there, process, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def check_saved(out):
    "The state is that after the last whole epoch, and the weights are written."
    run = Run.open(out)
    done = max(r['epoch'] for r in run.metrics()) + 1
    assert run.checkpoints()[-1].name == f'epoch_{done:04d}' and (out / 'weights').is_dir() and not run.alive
    return done


# one process


def test_a_signal_asks_once_and_ends_the_second_time(monkeypatch):
    heard, before = [], signal.getsignal(signal.SIGHUP)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        with stop_on_signals(heard.append):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher's and the terminal's: the second is the same
            time.sleep(0.55)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
    assert heard == ['SIGHUP', 'SIGTERM', 'SIGINT'] and signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize('ignored', [signal.SIGHUP, signal.SIGINT])
def test_what_a_shell_ignores_stays_ignored_and_sigterm_asks(ignored):
    """nohup ignores SIGHUP, and `drl train … &` in a script SIGINT: neither ends the run, and SIGTERM still
    does so in good order."""
    heard, before = [], signal.signal(ignored, signal.SIG_IGN)
    try:
        with stop_on_signals(heard.append):
            os.kill(os.getpid(), ignored)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.55)
            os.kill(os.getpid(), ignored)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        assert heard == ['SIGTERM'] and signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


@long
def test_a_terminal_that_closes_saves_and_leaves(tiny, tmp_path):
    process = start(tiny, tmp_path / 'r')
    wait_for((tmp_path / 'r/metrics.jsonl').exists, process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 0
        and err.count('SIGHUP: stopping after this epoch') == 1
        and 'Traceback' not in err
    )
    assert check_saved(tmp_path / 'r') < 500


@long
def test_under_nohup_a_terminal_may_close(tiny, tmp_path):
    process = start(
        tiny, tmp_path / 'r', epochs=40, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for((tmp_path / 'r/metrics.jsonl').exists, process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'SIGHUP' not in err and check_saved(tmp_path / 'r') == 40


@long
def test_nobody_reads_the_output(tiny, tmp_path):
    process = start(tiny, tmp_path / 'r', epochs=2)
    assert process.stdout.readline().startswith('Each epoch samples')
    process.stdout.close()  # as `| head -1` does
    assert process.wait(120) == 141
    err = process.stderr.read()
    assert 'Traceback' not in err and 'BrokenPipe' not in err and check_saved(tmp_path / 'r') == 2


def test_a_full_disk_where_the_output_goes_leaves_nothing_half_written(tiny, tmp_path):
    with open('/dev/full', 'w') as full:
        process = start(tiny, tmp_path / 'r', epochs=2, stdout=full)
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and [l for l in err.splitlines() if l.startswith('drl train: ')][0].endswith(
            'No space left on device'
        )
        and 'Traceback' not in err
    )
    assert not (tmp_path / 'r').exists()


def test_a_second_interrupt_ends_it_though_a_reward_is_awaited(tmp_path):
    "As in an overlapped wait for a remote reward: the thread that waits is not waited for."
    script = (
        "import sys, time\\nfrom concurrent.futures import ThreadPoolExecutor\\nfrom drl_toolkit.cli import "
        "main as cli\\n"
        "def slow(args): print('waits', flush=True); ThreadPoolExecutor(1).submit(time.sleep, "
        "300).result()\\n"
        "cli.COMMANDS['vote'] = slow\\nsys.argv = ['drl', 'vote', 'x']\\nsys.exit(cli.main())\\n"
    ).replace('\\n', '\n')
    process = subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    assert process.stdout.readline() == 'waits\n'
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == 'drl: stopped; drl train … --resume goes on\n'


def test_what_the_terminal_cannot_write_is_escaped(monkeypatch):
    "`PYTHONIOENCODING=ascii drl eval` failed at its last print, after all the work."
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding='ascii'))
    with steady_output() as (out, _):
        print('half ± of it')
    assert raw.getvalue() == b'half \\xb1 of it\n' and out.broken is None and sys.stdout.errors == 'strict'


def test_what_a_run_names_does_nothing_to_the_terminal(monkeypatch, capsys):
    """Of every command's stdout: a note, a model, a task's name.

    Colours stay, and the progress bars of stderr."""

    def command(args):
        print('model \x1b]0;title\x07 \x1b[2J \r\u202e', '\x1b[1mbold\x1b[0m')
        print('\r 50 %\x1b[A', file=sys.stderr)

    monkeypatch.setitem(cli.COMMANDS, 'vote', command)
    assert cli.main(['vote', 'x']) == 0
    out, err = capsys.readouterr()
    assert (
        out == 'model \\x1b]0;title\\x07 \\x1b[2J \\r\\u202e \x1b[1mbold\x1b[0m\n'
        and err == '\r 50 %\x1b[A\n'
    )


@pytest.mark.parametrize('fails', ['write', 'flush'])
@pytest.mark.parametrize(
    'error, status', [(BrokenPipeError(32, 'Broken pipe'), 141), (OSError(28, 'No space left on device'), 2)]
)
def test_the_exit_status_says_that_output_was_lost(fails, error, status, monkeypatch, capsys):
    class Broken(io.StringIO):
        pass

    def fail(self, *args):
        raise error

    setattr(Broken, fails, fail)
    done = []
    monkeypatch.setitem(
        cli.COMMANDS, 'vote', lambda args: (print('a'), print('b', flush=True), done.append(1)) and None
    )
    monkeypatch.setattr(sys, 'stdout', Broken())
    assert cli.main(['vote', 'x']) == status and done
    assert ('No space left' in capsys.readouterr().err) == (status == 2)


# several processes


@pytest.mark.parametrize('number', some((signal.SIGTERM, signal.SIGINT), [signal.SIGTERM]))
def test_a_signal_to_the_launcher_saves_and_leaves_everywhere(number, tiny, tmp_path):
    process = start(tiny, tmp_path / 'r', launcher=TORCHRUN)
    wait_for((tmp_path / 'r/metrics.jsonl').exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert (
        err.count(f'{number.name}: stopping after this epoch') == 2
        and 'as asked' in out
        and 'ProcessError' not in err
    )
    check_saved(tmp_path / 'r')


@long
def test_a_signal_to_one_of_the_others_ends_all(tiny, tmp_path):
    process = start(tiny, tmp_path / 'r', launcher=TORCHRUN)
    wait_for((tmp_path / 'r/metrics.jsonl').exists, process)
    other = [
        int(p)
        for p in children(process.pid)
        if b'RANK=1\0' in open(f'/proc/{p}/environ', 'rb').read()
        and b'LOCAL_RANK=1\0' in open(f'/proc/{p}/environ', 'rb').read()
    ]
    os.kill(other[0], signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0 and 'as asked' in out
    check_saved(tmp_path / 'r')


def children(pid):
    return open(f'/proc/{pid}/task/{pid}/children').read().split()


def gone(pids):
    return not any(
        os.path.exists(f'/proc/{p}') and open(f'/proc/{p}/stat').read().split()[2] != 'Z' for p in pids
    )


def test_orphans_of_a_launcher_save_and_leave(tiny, tmp_path):
    process = start(
        tiny, tmp_path / 'r', launcher=TORCHRUN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for((tmp_path / 'r/metrics.jsonl').exists, process)
    theirs = children(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while not gone(theirs) and time.monotonic() < end:
        time.sleep(0.2)
    assert len(theirs) >= 2 and gone(theirs)
    check_saved(tmp_path / 'r')


@long
def test_orphans_of_a_comparison_save_and_leave(tiny, tmp_path):
    argv = [
        'compare',
        'clip',
        '--methods',
        'ppo',
        '--seeds',
        '1',
        '--out',
        str(tmp_path),
        '--',
        '--model',
        str(tiny),
        '--epochs',
        '500',
        '--num-steps',
        '2',
        '--train-steps',
        '1',
        '--num-minibatches',
        '1',
    ]
    process = subprocess.Popen(
        [sys.executable, '-m', 'drl_toolkit.cli.main', *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENV,
    )
    wait_for((tmp_path / 'ppo-0/metrics.jsonl').exists, process)
    theirs = [
        p
        for t in os.listdir(f'/proc/{process.pid}/task')
        for p in open(f'/proc/{process.pid}/task/{t}/children').read().split()
    ]
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while not gone(theirs) and time.monotonic() < end:
        time.sleep(0.2)
    assert theirs and gone(theirs)
    check_saved(tmp_path / 'ppo-0')
