"""What tests in a real browser share: Chromium, and a JupyterLab of our own. SLOW=10 waits ten times as long, for a machine with much
other work."""

import os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--no-first-run',
]


SLOW = float(os.environ.get('SLOW', 1))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(
    folder,  # that it serves
):
    "A JupyterLab with settings of its own: its address."
    pytest.importorskip('jupyterlab', reason='jupyterlab is not installed')
    port, home = free_port(), folder / '.home'
    places = (
        'JUPYTER_CONFIG',
        'JUPYTER_DATA',
        'JUPYTER_RUNTIME',
        'JUPYTERLAB_SETTINGS',
        'JUPYTERLAB_WORKSPACES',
    )
    own = {f'{name}_DIR': str(home / name.lower()) for name in places}
    quiet = home / 'jupyterlab_settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    whole = home / 'jupyterlab_settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings'
    whole.parent.mkdir(parents=True)
    whole.write_text('{"windowingMode": "none"}')  # cells out of sight are in the page, too
    options = (
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        f'--ServerApp.root_dir={folder}',
    )
    open_to_all = ('--ServerApp.disable_check_xsrf=True', '--IdentityProvider.token=')
    with open(folder / 'server.log', 'w') as log:
        server = subprocess.Popen(
            [sys.executable, '-m', 'jupyterlab', *options, *open_to_all],
            stdout=log,
            stderr=log,
            env=os.environ | own | dict(IPYTHONDIR=str(home / 'ipython')),
        )
    try:
        for _ in range(int(600 * SLOW)):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/api').read()
                break
            except OSError:
                time.sleep(0.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(30 * SLOW)
