"""What the tests of the command line share."""

import pytest

from ddengine.cli import main


@pytest.fixture
def call(capsys, monkeypatch, world):
    """Runs a command in the folder `world` of the test's module: (exit code, stdout, stderr)."""
    monkeypatch.chdir(world)
    monkeypatch.delenv("DDENGINE_DEBUG", raising=False)

    def run(*words):
        capsys.readouterr()
        code = main(list(map(str, words)))
        return code, *capsys.readouterr()

    return run
