"""The conversation with another library's process, with scripts in the libraries' place."""

import textwrap

import pytest

from vit_jax.benchmarking import peer as peer_module
from vit_jax.benchmarking.peer import Peer
from vit_jax.errors import UserError

pytestmark = pytest.mark.core


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a peer whose `prepare` has this body."""
    started = []

    def make(body):
        folder = peer_module.Path(peer_module.__file__).parent / "peers"
        script = tmp_path / "peer.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(folder)!r})\nfrom serve import serve\n\n"
            f"def prepare(kind, task):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
            "serve(prepare)\n")
        monkeypatch.setitem(peer_module.PEERS, "other", (str(script), "a kind"))
        started.append(Peer("other", {"number": 3}))
        return started[-1]

    yield make
    for peer in started:
        peer.close()


def test_a_peer_is_told_its_task_and_measured(start):
    peer = start("""
        print("a banner of the library")
        return (lambda times: times * task["number"]), {"kind": kind}
    """)
    assert peer.about == {"kind": "a kind"}
    assert [peer.run(2), peer.run(5)] == [6, 15]


@pytest.mark.parametrize("body, message", [
    ("import no_such_library", "no_such_library is not installed .*--peer_python"),
    ("raise ValueError('it has no G/14.')", "--against=other: it has no G/14."),
    ("raise KeyError('boom')", "--against=other ended with exit code 1: KeyError: 'boom'"),
    ("sys.exit(3)", "exit code 3: it said nothing"),
])
def test_what_it_fails_of_is_said(start, body, message):
    with pytest.raises(UserError, match=message):
        start(body)


def test_a_peer_that_dies_is_noticed(start):
    peer = start("return (lambda times: sys.exit(4)), {}")
    with pytest.raises(UserError, match="exit code 4"):
        peer.run(1)
